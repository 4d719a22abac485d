"""manifests/ is what kustomize makes of kustomize/: an edit of either is found, with a renderer and without one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from hafnium_contract.errors import InputError
from hafnium_local import rendered_manifests as rendered

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what matters."""
    for folder in (rendered.SOURCE, rendered.FOLDER):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    return tmp_path


def test_the_record_fits_what_is_committed() -> None:
    assert rendered.problems(ROOT) == []


def test_an_edited_source_is_found_without_a_renderer(tree: Path) -> None:
    path = tree / "kustomize/base/rollouts/deployment.yaml"
    path.write_text(path.read_text().replace("replicas: 2", "replicas: 3"))
    assert rendered.check(tree, None) == ["kustomize/ was changed since manifests/ was rendered from it"]
    with pytest.raises(InputError, match="out of date and nothing here renders it"):
        rendered.write(tree, None)


def test_an_edited_missing_or_foreign_manifest_is_found_without_a_renderer(tree: Path) -> None:
    path = tree / "manifests/install.yaml"
    path.write_text(path.read_text().replace("replicas: 2", "replicas: 3"))
    (tree / "manifests/prod.yaml").unlink()
    (tree / "manifests/extra.yaml").write_text("a: 1\n")
    assert rendered.check(tree, None) == [
        "manifests/install.yaml: not the text that was rendered", "manifests/prod.yaml: not the text that was rendered",
        "manifests/extra.yaml: nothing renders it"]


def test_without_a_record_nothing_is_taken_for_good(tree: Path) -> None:
    (tree / "manifests" / rendered.RECORD).write_text("{}")
    assert "can't be read" in rendered.check(tree, None)[0]


def test_samples_are_no_sources(tree: Path) -> None:
    (tree / "kustomize/samples/more.yaml").write_text("a: 1\n")
    assert rendered.check(tree, None) == []


def test_the_samples_render_into_a_namespace_of_their_own() -> None:
    renderer = rendered.find_renderer()
    if renderer is None:
        pytest.skip("no kustomize, kubectl or go that renders")
    objects = [o for o in yaml.safe_load_all(renderer(ROOT / "kustomize/samples")) if o]
    assert {"Namespace", "ModelRollout", "RoleBinding"} == {o["kind"] for o in objects}
    namespaces = {o["metadata"].get("namespace", o["metadata"]["name"]) for o in objects}
    assert namespaces == {"risk-samples"}, "the overlays' ModelRollout has the same name"


def test_an_overlay_of_ones_own_changes_bucket_images_model_and_settings_everywhere() -> None:
    renderer = rendered.find_renderer()
    if renderer is None:
        pytest.skip("no kustomize, kubectl or go that renders")
    text = renderer(ROOT / "examples/cluster")
    assert "s3://hafnium-risk/inference-log" not in text
    assert "image: ghcr.io/hafnium/" not in text
    objects = [o for o in yaml.safe_load_all(text) if o]
    buckets = {o["metadata"]["namespace"]: o["data"]["inference-log"] for o in objects if o["metadata"]["name"] == "hafnium-buckets"}
    assert buckets == dict.fromkeys(("hafnium-system", "risk"), "s3://risk-of-yours/inference-log?region=eu-central-1")
    (rollout,) = [o for o in objects if o["kind"] == "ModelRollout"]
    assert rollout["spec"]["model"]["storageUri"] == "s3://risk-of-yours/bundles/unified-risk/v1"
    asked = [e for c in (rollout["spec"]["service"]["transformer"]["containers"][0],
                         *(c for o in objects if o["kind"] == "CronJob"
                           for c in o["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]),
                         *(c for o in objects if o["metadata"]["name"] == "hafnium-rollout-operator" and o["kind"] == "Deployment"
                           for c in o["spec"]["template"]["spec"]["containers"]))
             for e in c.get("env", []) if e["name"].endswith("INFERENCE_LOG")]
    assert [e["valueFrom"]["configMapKeyRef"] for e in asked] == [{"name": "hafnium-buckets", "key": "inference-log"}] * 4


def test_the_next_training_has_another_name_and_the_same_volume(tmp_path: Path) -> None:
    renderer = rendered.find_renderer()
    if renderer is None:
        pytest.skip("no kustomize, kubectl or go that renders")
    shutil.copytree(ROOT / "kustomize", tmp_path / "kustomize")
    (tmp_path / "next").mkdir()
    (tmp_path / "next/kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources: [../kustomize/overlays/training]\n" + next_training())
    objects = {o["kind"]: o for o in yaml.safe_load_all(renderer(tmp_path / "next")) if o}
    assert objects["RayJob"]["metadata"]["name"] == "hafnium-training-2"
    claim = objects["PersistentVolumeClaim"]["metadata"]["name"]
    assert f"claimName: {claim}" in yaml.safe_dump(objects["RayJob"])
    assert claim == "training"


def next_training() -> str:
    """What docs/kubernetes.md has users write for it."""
    text = (ROOT / "docs/kubernetes.md").read_text(encoding="utf-8").partition("**The next training**")[2]
    return text.partition("```yaml\n")[2].partition("```")[0]


def test_what_could_not_be_done_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert rendered.find_renderer() is None
    assert rendered.run(ROOT, only_check=True) == 0
    assert "was NOT rendered anew" in capsys.readouterr().err


def test_with_a_renderer_every_byte_counts(tree: Path) -> None:
    renderer = rendered.find_renderer()
    if renderer is None:
        pytest.skip("no kustomize, kubectl or go that renders")
    assert rendered.check(tree, renderer) == []
    path = tree / "kustomize/components/images/kustomization.yaml"
    path.write_text(path.read_text().replace("newTag: 0.1.0", "newTag: 0.1.1"))
    found = rendered.check(tree, renderer)
    assert any("+        image: ghcr.io/hafnium/hafnium-rollout:0.1.1" in text for text in found)
    assert any(text.startswith("--- kustomize/components/retraining/rayjob.yaml") for text in found), "what is rendered first, too"
    assert rendered.write(tree, renderer) > 0
    assert rendered.check(tree, renderer) == []


def test_a_kustomization_that_is_broken_says_what_kustomize_says(tree: Path) -> None:
    renderer = rendered.find_renderer()
    if renderer is None:
        pytest.skip("no kustomize, kubectl or go that renders")
    (tree / "kustomize/install/kustomization.yaml").write_text("resources: [../nowhere]\n")
    with pytest.raises(InputError, match="nowhere"):
        rendered.render(tree, renderer)
