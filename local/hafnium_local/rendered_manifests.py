"""manifests/: what kustomize makes of kustomize/, committed, so that `kubectl apply -f` needs nothing else and a review shows what changes.

Rendering needs kustomize (alone, inside kubectl, or built by Go), which Python can't bring along. Where there is none, edited sources and
edited manifests are still found: RECORD keeps the sha256 of the sources and of each text that was made of them. That less was done is said
aloud, since whoever changes the record as well would pass.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from hafnium_contract.errors import InputError

SOURCE = "kustomize"
FOLDER = "manifests"
PRODUCTS = {
    "crds.yaml": "crds", "install.yaml": "install", "dev.yaml": "overlays/dev", "staging.yaml": "overlays/staging",
    "prod.yaml": "overlays/prod", "knative.yaml": "overlays/knative",
    "training.yaml": "overlays/training",
}
"""File in FOLDER → kustomization in SOURCE."""
PARTS = {"components/retraining/rayjob.yaml": "components/retraining/template"}
"""File in SOURCE that others take as text → kustomization in SOURCE that it is made from; rendered first."""
RECORD = "rendered.json"
NOTE = "# Rendered by `make generate` from kustomize/{source}: don't edit.\n"
VERSION_MIN = (5, 5)
"""5.5.0 (in kubectl 1.32) and 5.7.1 (1.34) write the same bytes; older ones were not tried."""
GO_PROGRAM = "sigs.k8s.io/kustomize/kustomize/v5@v5.7.1"
SECONDS_MAX = 120
BUILD_SECONDS_MAX = 1_200
"""Go fetches and builds it the first time: a minute of CPU, many on a busy machine."""

Render = Callable[[Path], str]
"""Folder of a kustomization → YAML."""


@dataclass(frozen=True)
class Renderer:
    """A program that renders."""

    name: str
    command: tuple[str, ...]
    seconds_max: float = SECONDS_MAX

    def __call__(self, folder: Path) -> str:
        """Raises InputError with kustomize's own words."""
        done = subprocess.run([*self.command, str(folder)], capture_output=True, text=True, timeout=self.seconds_max, check=False)
        if done.returncode != 0:
            raise InputError(f"{folder}: {self.name} can't render it: {done.stderr.strip()[-1000:]}")
        return done.stdout


def find_renderer() -> Renderer | None:
    """kustomize or kubectl on the PATH, if new enough; else Go, which builds the released source. None: there is nothing."""
    for program, ask, command in (
        ("kustomize", ("version",), ("build",)), ("kubectl", ("version", "--client", "-o", "json"), ("kustomize",)),
    ):
        path = shutil.which(program)
        if path is not None and _version([path, *ask]) >= VERSION_MIN:
            return Renderer(program, (path, *command))
    go = shutil.which("go")
    if go is not None and _version([go, "run", GO_PROGRAM, "version"], BUILD_SECONDS_MAX):
        return Renderer("go", (go, "run", GO_PROGRAM, "build"), BUILD_SECONDS_MAX)
    return None


def _version(command: Sequence[str], seconds_max: float = SECONDS_MAX) -> tuple[int, ...]:
    """kustomize's version as the program says it; () when it says none."""
    try:
        done = subprocess.run(list(command), capture_output=True, text=True, timeout=seconds_max, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    said = re.search(r'kustomizeVersion": "v(\d+)\.(\d+)', done.stdout) or re.match(r"\s*v(\d+)\.(\d+)", done.stdout)
    return tuple(int(n) for n in said.groups()) if said and done.returncode == 0 else ()


def sources_digest(root: Path) -> str:
    """sha256 over names and bytes of everything that may be part of a rendering; samples aren't."""
    digest = hashlib.sha256()
    base = root / SOURCE
    for path in sorted(p for p in base.rglob("*") if p.is_file() and p.relative_to(base).parts[0] != "samples"):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(base).as_posix()}\0{len(data)}\0".encode() + data)
    return "sha256:" + digest.hexdigest()


def text_digest(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def render(root: Path, renderer: Render) -> dict[str, str]:
    """File name in FOLDER → text, RECORD last. From the tree as it is: PARTS have to be right."""
    texts = {name: _rendered(root, source, renderer) for name, source in PRODUCTS.items()}
    record = {"sources": sources_digest(root), "manifests": {name: text_digest(text) for name, text in texts.items()}}
    return {**texts, RECORD: json.dumps(record, indent=2) + "\n"}


def _rendered(root: Path, source: str, renderer: Render) -> str:
    return NOTE.format(source=source) + renderer(root / SOURCE / source)


def write(root: Path, renderer: Render | None) -> int:
    """Renders everything into FOLDER. Returns how many files changed. Raises InputError when that is needed and can't be done."""
    if renderer is None:
        if problems(root):
            raise InputError(f"{FOLDER}/ is out of date and nothing here renders it: expected kustomize or kubectl (kustomize "
                             f"{'.'.join(map(str, VERSION_MIN))} or newer) or go on the PATH")
        return 0
    (root / FOLDER).mkdir(exist_ok=True)
    changed = sum(_written(root / SOURCE / name, _rendered(root, source, renderer)) for name, source in PARTS.items())
    return changed + sum(_written(root / FOLDER / name, text) for name, text in render(root, renderer).items())


def _written(path: Path, text: str) -> bool:
    """Whether there was anything to write."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    path.write_text(text, encoding="utf-8")
    return True


def check(root: Path, renderer: Render | None) -> list[str]:
    """What is out of date, one line or difference for each. With a renderer byte by byte, else by the record alone."""
    if renderer is None:
        return problems(root)
    out: list[str] = []
    texts = {f"{SOURCE}/{name}": _rendered(root, source, renderer) for name, source in PARTS.items()}
    texts |= {f"{FOLDER}/{name}": text for name, text in render(root, renderer).items()}
    for name, text in texts.items():
        path = root / name
        found = path.read_text(encoding="utf-8") if path.is_file() else ""
        if found != text:
            names = f"{name} (committed)", f"{name} (rendered)"
            out.append("\n".join(list(difflib.unified_diff(found.splitlines(), text.splitlines(), *names, lineterm=""))[:40]))
    return out


def problems(root: Path) -> list[str]:
    """What the record alone can tell: sources or manifests that are not those of the last rendering."""
    path = root / FOLDER / RECORD
    try:
        record = cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
        manifests = cast("dict[str, str]", record["manifests"])
        sources = str(record["sources"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        return [f"{FOLDER}/{RECORD}: can't be read ({type(e).__name__}); expected what `make generate` writes"]
    out: list[str] = []
    if sources != sources_digest(root):
        out.append(f"{SOURCE}/ was changed since {FOLDER}/ was rendered from it")
    for name in sorted({*manifests, *PRODUCTS}):
        file = root / FOLDER / name
        if not file.is_file() or manifests.get(name) != text_digest(file.read_text(encoding="utf-8")):
            out.append(f"{FOLDER}/{name}: not the text that was rendered")
    extra = {p.name for p in (root / FOLDER).glob("*")} - {*PRODUCTS, RECORD}
    return [*out, *(f"{FOLDER}/{name}: nothing renders it" for name in sorted(extra))]


def run(root: Path, only_check: bool) -> int:
    """Writes or checks, and says on stderr what could not be done. Returns the number of files that differed."""
    renderer = find_renderer()
    if not only_check:
        return write(root, renderer)
    found = check(root, renderer)
    for text in found:
        sys.stderr.write(text + "\n")
    if renderer is None:
        sys.stderr.write(f"WARNING: {FOLDER}/ was NOT rendered anew, only compared with the checksums in {FOLDER}/{RECORD}: no program "
                         "that renders it is on the PATH (kustomize or kubectl, new enough, or go)\n")
    return len(found)
