"""The tree is the architecture: what must be so for every part, and what each extra must bring by itself."""

from __future__ import annotations

import importlib.util
import json
import pkgutil
import re
import subprocess
import sys
import textwrap
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PARTS = {
    "contract": "hafnium_contract", "predictors": "hafnium_predictor", "transformers": "hafnium_transformer",
    "training": "hafnium_training", "monitoring": "hafnium_monitoring", "rollouts": "hafnium_rollout", "local": "hafnium_local",
}
EXTRA_OF = {
    "hafnium_contract": None, "hafnium_predictor": "predictor", "hafnium_transformer": "transformer",
    "hafnium_training": "training", "hafnium_monitoring": "monitoring", "hafnium_rollout": "rollout",
}


def test_no_top_folder_is_a_package() -> None:
    """`transformers/__init__.py` would make this folder win over Hugging Face's package wherever the root is on sys.path."""
    assert not [f for f in PARTS if (ROOT / f / "__init__.py").exists()]
    found = importlib.util.find_spec("transformers")
    assert found is None or (found.origin is not None and not found.origin.startswith(str(ROOT)))


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(extra: str | None) -> set[str]:
    """Distributions that `hafnium-serving[extra]` brings, by their metadata, on this platform."""
    todo: list[tuple[str, frozenset[str]]] = [("hafnium-serving", frozenset({extra} if extra else set()))]
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        name, extras = item = todo.pop()
        if item in seen:
            continue
        seen.add(item)
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # a requirement of another platform
        for text in requires:
            r = Requirement(text)
            if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in (extras or {""})):
                todo.append((_normal(r.name), frozenset(r.extras)))
    return {name for name, _ in seen}


def test_the_predictors_extra_brings_no_training_library() -> None:
    brought = closure("predictor")
    assert {"kserve", "onnxruntime"} <= brought
    assert not brought & {"torch", "mlflow", "mlflow-skinny", "ray", "feast", "evidently", "pandas-stubs"}
    assert not closure(None) & {"kserve", "torch", "onnxruntime", "pandas"}, "the kernel stays small"


IMPORT_ALL = textwrap.dedent("""
    import importlib, importlib.abc, json, sys
    allowed, modules = json.load(sys.stdin)
    allowed = set(allowed)
    class OnlyTheExtra(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top in allowed or top.startswith("_"):
                return None
            raise ModuleNotFoundError(f"{name} is not in this extra", name=name)
    sys.meta_path.insert(0, OnlyTheExtra())
    for module in modules:
        importlib.import_module(module)
    print(json.dumps(sorted(m for m in sys.modules if m in ("torch", "mlflow", "ray"))))
""")


@pytest.mark.parametrize("package", list(EXTRA_OF))
def test_a_part_imports_with_its_own_extra_alone(package: str) -> None:
    """A clean environment without installing 5 GB: modules of every distribution that the extra doesn't bring can't be imported."""
    brought = closure(EXTRA_OF[package])
    allowed = {top for top, names in metadata.packages_distributions().items() if any(_normal(n) in brought for n in names)}
    allowed |= set(PARTS.values()) - {p for p in EXTRA_OF if p not in (package, "hafnium_contract")} - {"hafnium_local"}
    folder = next(f for f, p in PARTS.items() if p == package)
    modules = [package] + [
        m.name for m in pkgutil.walk_packages([str(ROOT / folder / package)], prefix=f"{package}.")
        if not m.name.endswith("__main__") and not m.name.startswith(("hafnium_contract.serving", "hafnium_contract.telemetry"))
    ]
    if package in ("hafnium_predictor", "hafnium_transformer"):  # what the two servers share stands on their extras
        shared = ROOT / "contract" / "hafnium_contract" / "serving"
        modules += [m.name for m in pkgutil.walk_packages([str(shared)], prefix="hafnium_contract.serving.")]
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], input=json.dumps([sorted(allowed), modules]), text=True,
                          capture_output=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    if package in ("hafnium_contract", "hafnium_predictor", "hafnium_transformer", "hafnium_rollout", "hafnium_monitoring"):
        assert json.loads(done.stdout.splitlines()[-1]) == []


@pytest.mark.parametrize("part", ["predictor", "transformer"])
def test_tracing_imports_with_its_own_extra_beside_the_part_s(part: str) -> None:
    brought = closure(part) | closure("telemetry")
    assert not closure("predictor") & {"opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http"}, "who does not trace has none of it"
    allowed = {top for top, names in metadata.packages_distributions().items() if any(_normal(n) in brought for n in names)}
    folder = ROOT / "contract" / "hafnium_contract" / "telemetry"
    modules = [m.name for m in pkgutil.walk_packages([str(folder)], prefix="hafnium_contract.telemetry.")]
    assert len(modules) >= 3
    asked = json.dumps([sorted(allowed | {"hafnium_contract"}), modules])
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], input=asked, text=True, capture_output=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_the_wheel_installs_and_imports_in_a_clean_environment(tmp_path: Path) -> None:
    """The wheel with nothing but the kernel's dependencies: `contract check` works, and a heavy command says what to install."""
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
                   check=True, capture_output=True, timeout=240)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for package in PARTS.values():
        assert f"{package}/__init__.py" in names
        assert f"{package}/py.typed" in names
    assert not [n for n in names if n.startswith("tests/") or n.endswith((".onnx", ".csv", ".parquet"))]
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True, timeout=120)
    subprocess.run([str(venv / "bin/pip"), "install", "--quiet", "-c", str(constraints(tmp_path)), str(wheel)], check=True, timeout=240)
    command = str(venv / "bin/hafnium")
    contract = str(ROOT / "examples/unified-risk/contract.yaml")
    assert "valid" in subprocess.run([command, "contract", "check", contract], check=True, capture_output=True, text=True).stdout
    asked = subprocess.run([command, "simulate", "--out", str(tmp_path / "sim")], capture_output=True, text=True, check=False)
    assert asked.returncode == 2
    assert "pip install 'hafnium-serving[local]'" in asked.stderr


def constraints(folder: Path) -> Path:
    """The lock without its hashes: pip takes constraints with hashes only for files that it downloads by hash."""
    lines = [line.split(" \\")[0] for line in (ROOT / "requirements.lock").read_text().splitlines() if re.match(r"[a-z0-9]", line)]
    path = folder / "constraints.txt"
    path.write_text("\n".join(lines) + "\n")
    return path
