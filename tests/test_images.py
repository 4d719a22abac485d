"""Images: what the Dockerfiles share is the same in all of them, and each lock holds what its part imports, and not what it leaves out."""

from __future__ import annotations

import json
import pkgutil
import re
import subprocess
import sys
import textwrap
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = {
    "predictors": "hafnium_predictor", "transformers": "hafnium_transformer", "training": "hafnium_training",
    "monitoring": "hafnium_monitoring", "rollouts": "hafnium_rollout",
}
OWN = re.compile(r"^(# The .* image\. Context|#   docker build |EXPOSE |ENTRYPOINT |CMD |LABEL |\s+org\.opencontainers.*description=)")
SERVERS = ("predictors", "transformers")
ONLY_ON_A_CLUSTER = {
    "boto3", "botocore", "jmespath", "psycopg2-binary", "s3transfer",  # extra mlflow-server
    "aiohttp-cors", "colorful", "distlib", "google-api-core", "opencensus", "opencensus-context", "opentelemetry-exporter-prometheus",
    "platformdirs", "proto-plus", "py-spy", "python-discovery", "smart-open", "virtualenv", "wrapt",  # extra ray-cluster
}
"""Of extras that nothing on one machine needs, so they are not in requirements.lock."""


def dockerfile(folder: str) -> list[str]:
    return (ROOT / folder / "Dockerfile").read_text(encoding="utf-8").splitlines()


def lock(path: str) -> dict[str, set[str]]:
    """Distribution → its versions (one for each Python), by the lock."""
    out: dict[str, set[str]] = {}
    for line in (ROOT / path).read_text(encoding="utf-8").splitlines():
        if found := re.match(r"([a-z0-9][-a-z0-9._]*)==(\S+)", line):
            out.setdefault(found[1], set()).add(found[2])
    return out


def left_out(folder: str) -> list[str]:
    lines = (ROOT / folder / "not-needed.txt").read_text(encoding="utf-8").splitlines()
    return [line.partition("#")[0].strip() for line in lines if line.partition("#")[0].strip()]


def test_every_part_with_an_image_is_known_here() -> None:
    assert {p.parent.name for p in ROOT.glob("*/Dockerfile")} == set(PARTS)


@pytest.mark.parametrize("folder", list(PARTS))
def test_a_dockerfile_differs_from_the_others_in_its_own_lines_only(folder: str) -> None:
    def shared(lines: list[str], own: str) -> list[str]:
        return [line.replace(f"{own}/", "PART/") for line in lines if not OWN.match(line)]

    assert shared(dockerfile(folder), folder) == shared(dockerfile("predictors"), "predictors")


@pytest.mark.parametrize("folder", list(PARTS))
def test_an_image_runs_as_nobody_and_starts_its_part(folder: str) -> None:
    lines = dockerfile(folder)
    (user,) = [line for line in lines if line.startswith("USER ")]
    assert re.fullmatch(r"USER [1-9]\d{3,}:[1-9]\d{3,}", user)
    (entry,) = [json.loads(line.removeprefix("ENTRYPOINT ")) for line in lines if line.startswith("ENTRYPOINT ")]
    assert entry in (["/opt/hafnium/bin/python", "-m", PARTS[folder]], ["/opt/hafnium/app/bin/hafnium"])
    assert not [line for line in lines if line.startswith("FROM") and "latest" in line]
    last = lines[max(i for i, line in enumerate(lines) if line.startswith("FROM")):]
    assert [line for line in last if line.startswith("RUN rm") and "/usr/local/bin/pip*" in line and "site-packages/pip*" in line]


def test_images_carry_the_version_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for folder in PARTS:
        assert f"ARG VERSION={project['version']}" in dockerfile(folder)


@pytest.mark.parametrize("folder", list(PARTS))
def test_every_requirement_has_a_hash_and_no_address(folder: str) -> None:
    text = (ROOT / folder / "requirements.lock").read_text(encoding="utf-8")
    entries = re.split(r"\n(?=[a-z0-9])", text.strip())
    assert len(entries) > 20
    assert not [e.splitlines()[0] for e in entries if "--hash=sha256:" not in e]
    assert "://" not in text


@pytest.mark.parametrize("folder", list(PARTS))
def test_an_image_has_the_versions_that_the_tests_run_with(folder: str) -> None:
    tested, held = lock("requirements.lock"), lock(f"{folder}/requirements.lock")
    assert set(held) - set(tested) <= (ONLY_ON_A_CLUSTER if folder == "training" else set())
    assert not {n: (v, tested[n]) for n, v in held.items() if n in tested and not v <= tested[n]}


@pytest.mark.parametrize("folder", list(PARTS))
def test_what_is_left_out_is_not_there_and_has_a_reason(folder: str) -> None:
    names = left_out(folder)
    assert names == sorted(set(names), key=names.index)
    assert not set(names) & set(lock(f"{folder}/requirements.lock"))
    everything = lock("requirements.lock")
    assert set(names) <= set(everything), "nothing requires this any more"
    for line in (ROOT / folder / "not-needed.txt").read_text(encoding="utf-8").splitlines():
        named = line.partition("#")[0].strip()
        assert "#" in line or re.match(r"(cuda|nvidia|triton)", named), line


def test_small_images_hold_none_of_what_trains() -> None:
    for folder in ("predictors", "rollouts"):
        assert not set(lock(f"{folder}/requirements.lock")) & {"torch", "mlflow", "mlflow-skinny", "ray", "feast", "evidently", "pandas"}
    assert not set(lock("transformers/requirements.lock")) & {"torch", "mlflow", "mlflow-skinny", "ray", "evidently", "kubernetes"}


IMPORT_ALL = textwrap.dedent("""
    import importlib, importlib.abc, json, sys
    allowed, modules, lean = json.load(sys.stdin)
    allowed = set(allowed)
    class OnlyTheLock(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top in allowed or top.startswith("_"):
                return None
            raise ModuleNotFoundError(f"{name} is not in this image", name=name)
    sys.meta_path.insert(0, OnlyTheLock())
    if lean:
        from hafnium_contract.serving.lean_sdk import lean_sdk
        lean_sdk()
    for module in modules:
        importlib.import_module(module)
    print(json.dumps(sorted(sys.modules)))
""")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.slow
@pytest.mark.parametrize("folder", list(PARTS))
def test_a_part_imports_with_its_lock_alone(folder: str) -> None:
    held = {normal(n) for n in lock(f"{folder}/requirements.lock")}
    allowed = {top for top, names in metadata.packages_distributions().items() if any(normal(n) in held for n in names)}
    package = PARTS[folder]
    modules = [package] + [
        m.name for m in pkgutil.walk_packages([str(ROOT / folder / package)], prefix=f"{package}.") if not m.name.endswith("__main__")
    ]
    if folder in SERVERS:
        shared = ROOT / "contract/hafnium_contract"
        for name in ("serving", "telemetry"):
            modules += [m.name for m in pkgutil.walk_packages([str(shared / name)], prefix=f"hafnium_contract.{name}.")]
        modules += ["kserve.model_server", "kserve.protocol.grpc.server"]
    if folder == "training":
        allowed |= set(PARTS.values())  # the wheel has them all, and the `hafnium` command names all parts
        modules += ["hafnium_local.__main__", "mlflow.onnx", "ray.tune.search.optuna", "mlflow.server", "boto3", "psycopg2"]
        present = {d for names in metadata.packages_distributions().values() for d in names}
        modules = [m for m in modules if m not in {"boto3", "psycopg2"} - {normal(d) for d in present}]
    given = json.dumps([sorted(allowed | {"hafnium_contract", "hafnium_local", package}), modules, folder in SERVERS])
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], input=given, text=True, capture_output=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    if folder == "predictors":
        loaded = set(json.loads(done.stdout.splitlines()[-1]))
        assert not {"pandas.core", "kubernetes", "pyarrow"} & loaded


def test_a_placeholder_says_what_is_missing_and_leaves_the_real_thing_alone() -> None:
    code = textwrap.dedent("""
        import importlib.abc, sys
        class Nothing(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "kubernetes":
                    raise ModuleNotFoundError(name, name=name)
        sys.meta_path.insert(0, Nothing())
        from hafnium_contract.serving.lean_sdk import lean_sdk
        print(lean_sdk())
        from kserve import KServeClient
        import pandas
        print(pandas.DataFrame({"a": [1]}).shape)
        KServeClient()
    """)
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=120, check=False)
    assert done.stdout.splitlines() == ["('kubernetes',)", "(1, 1)"]
    assert "KServeClient needs kubernetes, which this image leaves out" in done.stderr
