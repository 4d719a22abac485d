"""The command line: what it prints, and the exit statuses that scripts rely on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from hafnium_contract.contract_file import load_contract
from hafnium_local.__main__ import app
from hafnium_local.generated import run as generate
from hafnium_testing import make_bundle

ROOT = Path(__file__).parents[2]
CONTRACT = ROOT / "examples" / "unified-risk" / "contract.yaml"


def hafnium(*args: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own."""
    return subprocess.run([sys.executable, "-m", "hafnium_local", *map(str, args)], capture_output=True, text=True, cwd=cwd,
                          env=os.environ | {"NO_COLOR": "1", "COLUMNS": "200"}, timeout=120, check=False)


def test_a_valid_contract_is_0_and_json_says_what_it_is() -> None:
    done = hafnium("contract", "check", CONTRACT, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["digest"] == load_contract(CONTRACT).digest


def test_a_wrong_contract_is_1_with_the_line_and_no_traceback(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(CONTRACT.read_text().replace("dtype: bool", "dtype: boolean"))
    done = hafnium("contract", "check", bad)
    assert done.returncode == 1
    line = next(i for i, text in enumerate(bad.read_text().splitlines(), 1) if "boolean" in text)
    assert f"line {line}: features[3].dtype" in done.stderr
    assert "Traceback" not in done.stderr
    asked = hafnium("contract", "check", bad, "--json")
    assert asked.returncode == 1
    assert json.loads(asked.stdout)["problems"][0]["line"] == line


WRONG: dict[tuple[str, ...], str] = {
    ("contract", "check", "absent.yaml"): "absent.yaml",
    ("contract", "check"): "Missing argument",
    ("bundle", "check", "absent"): "absent",
    ("bundle", "create", "--model", "absent.onnx", "--contract", "c.yaml", "--data", "a.csv", "--out", "b", "--trained-by", "us"):
        "absent.onnx",
    ("nonsense",): "No such command",
    ("train", "--contract", "absent.yaml", "--data", "absent.csv", "--out", "b"): "absent.yaml",
    ("train", "--contract", "c.yaml", "--data", "absent.csv", "--out", "b"): "absent.csv",
    ("train", "--contract", "c.yaml", "--data", "a.csv", "--out", "b", "--params", "absent.json"): "absent.json",
    ("demo", "--fault", "nonsense"): "units, stale, slow, crash",
    ("demo", "--contract", "c.yaml", "--data", "absent.csv"): "absent.csv: no such file",
    ("demo", "--data", "absent.csv"): "give --contract too",
    ("demo", "--contract", "absent.yaml"): "absent.yaml",
    ("demo", "--contract", "c.yaml", "--resume"): "no demo that was interrupted",
    ("demo", "--contract", "c.yaml", "--work", "full"): "something else than an earlier demo",
    ("demo", "--port", "70000"): "less than or equal to 65535",
    ("features", "materialise", "--contract", "c", "--repo", "r", "--until", "tomorrow"): "'tomorrow' is not a time",
    ("up", "--state", "absent-state-folder/that/has/nothing"): "nothing to run",
    ("up", "--port", "70000"): "less than or equal to 65535",
    ("rollout", "status", "absent", "--state", "nowhere"): "no ModelRollout 'absent'",
    ("rollout", "replay"): "give the rollout's NAME, or --record",
    ("rollout", "replay", "absent", "--state", "nowhere"): "no ModelRollout 'absent'",
    ("rollout", "replay", "--record", "nowhere"): "no record of a rollout",
    ("rollout", "replay", "--record", "rows.jsonl"): "not a line of a record",
    ("score", "--url", "http://127.0.0.1:1", "absent.csv"): "absent.csv",
    ("score", "--url", "ftp://127.0.0.1", "rows.jsonl"): "must begin with http",
    ("replay", "--url", "http://127.0.0.1:1", "rows.jsonl", "--since", "2026-01-01"): "need --contract",
    ("replay", "--url", "nonsense", "rows.jsonl"): "must begin with http",
    ("drift", "check", "--bundle", "b", "--log", "absent", "--evidence", "e"): "--log absent: no such folder",
}
"""Arguments → a part of the sentence that says what is wrong."""


@pytest.mark.parametrize("args", WRONG, ids=" ".join)
def test_wrong_usage_or_input_is_2_and_says_what_is_wrong(args: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(CONTRACT.read_text())
    (tmp_path / "rows.jsonl").write_text('{"features": {}}\n')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("the only copy")
    done = hafnium(*args, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert WRONG[args] in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert (tmp_path / "full" / "thesis.txt").is_file()


def test_every_command_teaches() -> None:
    def commands(group: Any, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], Any]]:
        out: list[tuple[tuple[str, ...], Any]] = []
        for name, command in group.commands.items():
            out += commands(command, (*path, name)) if hasattr(command, "commands") else [((*path, name), command)]
        return out

    found = commands(typer.main.get_command(app), ())
    assert len(found) > 20
    for path, command in found:
        assert "Example: hafnium " + " ".join(path) in (command.help or ""), path
        for parameter in command.params:
            assert getattr(parameter, "hidden", False) or getattr(parameter, "help", None), (path, parameter.name)


def test_bundle_check_is_0_for_a_good_one_and_1_with_the_files_name_for_a_changed_one(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", load_contract(CONTRACT))
    assert hafnium("bundle", "check", bundle.path).returncode == 0
    (bundle.path / "model_card.md").write_text("better than it is")
    done = hafnium("bundle", "check", bundle.path, "--json")
    assert done.returncode == 1
    assert "model_card.md" in json.loads(done.stdout)["problem"]


def test_the_manifest_of_a_bundle_is_what_up_and_rollout_take(tmp_path: Path) -> None:
    from hafnium_local.manifests import read_manifests
    from hafnium_rollout.objects import load_rollout

    bundle = make_bundle(tmp_path / "b", load_contract(CONTRACT))
    refused = hafnium("bundle", "manifest", bundle.path)
    assert refused.returncode == 2
    assert "give --features" in refused.stderr
    refused = hafnium("bundle", "manifest", bundle.path, "--features", tmp_path)
    assert refused.returncode == 2
    assert "no Feast repo" in refused.stderr
    (tmp_path / "feature_store.yaml").touch()
    service = tmp_path / "service.yaml"
    service.write_text(hafnium("bundle", "manifest", bundle.path, "--features", tmp_path).stdout)
    (found,) = read_manifests([service]).objects
    assert found.kind == "InferenceService"
    for pace in ((), ("--quick",)):
        rollout = tmp_path / "rollout.yaml"
        rollout.write_text(hafnium("bundle", "manifest", bundle.path, "--features", tmp_path, "--rollout", *pace).stdout)
        assert load_rollout(rollout).spec.model.digest == bundle.manifest.digest
        assert [s.live_weight for s in load_rollout(rollout).spec.strategy.steps] == [0, 5, 25, 100]


def test_schema_is_a_json_schema_that_takes_the_examples() -> None:
    schema: Any = json.loads(CliRunner().invoke(app, ["contract", "schema"]).stdout)
    for name in ("unified-risk", "creditcard"):
        Draft202012Validator(schema).validate(yaml.safe_load((ROOT / "examples" / name / "contract.yaml").read_text()))
    with pytest.raises(Exception, match="nonsense"):
        Draft202012Validator(schema).validate({"nonsense": 1})


def test_generated_files_are_up_to_date_and_a_change_is_seen(tmp_path: Path) -> None:
    assert generate(ROOT, check=True) == 0, "run: make generate"
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    wanted = generate(tmp_path, check=False)
    assert wanted > 0
    assert generate(tmp_path, check=True) == 0
    page = tmp_path / "docs" / "reference" / "metrics.md"
    page.write_text(page.read_text() + "by hand\n")
    assert generate(tmp_path, check=True) == 1


def test_a_state_folder_and_a_cluster_at_once_are_refused_and_no_credentials_are_told(tmp_path: Path) -> None:
    done = hafnium("rollout", "status", "--state", tmp_path, "-n", "default")
    assert done.returncode == 2
    assert "not both" in done.stderr
    done = hafnium("rollout", "status", "--kubeconfig", tmp_path / "absent")
    assert done.returncode == 2
    assert "no credentials for Kubernetes" in done.stderr
