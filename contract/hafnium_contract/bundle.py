"""A bundle: one model with all that is known about it, in a directory that never changes.

Written beside its place and renamed into it, so that a reader sees a whole bundle or none. Opened only when every hash
fits. Nothing is ever unpickled: the files are ONNX, YAML, JSON, Markdown and Parquet.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from hafnium_contract.contract_file import load_contract
from hafnium_contract.errors import BundleError, ContractError, InputError
from hafnium_contract.model_contract import MODEL_NAME_PATTERN, ModelContract, Strict
from hafnium_contract.whole_files import sync_folder

MANIFEST = "manifest.json"
MODEL = "model.onnx"
CONTRACT = "contract.yaml"
REQUIRED = (MODEL, CONTRACT, "evaluation.json", "model_card.json", "model_card.md", "reference.parquet", "environment.json")
REFERENCE_ROWS_MIN = 1_000
"""In reference.parquet, where windows of as many rows are judged against it: with fewer rows no movement is ever significant. Who trains is
told, who looks for drift refuses (or asks windows for fewer rows, too)."""
INPUT_NAME = "features"
SCORE_OUTPUT = "score"
INTERVAL_OUTPUT = "interval"
BYTES_MAX = 2 * 1024**3
_DIGEST = r"^sha256:[0-9a-f]{64}$"
VERSION_PATTERN = r"^[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"


class Manifest(Strict):
    """manifest.json. `digest` covers every other field, so neither a file nor a fact about it can change unseen."""

    schema_version: Literal[1]
    model_name: Annotated[str, Field(pattern=MODEL_NAME_PATTERN)]
    model_version: Annotated[str, Field(pattern=VERSION_PATTERN)]
    """Also a Kubernetes label value."""
    contract_digest: Annotated[str, Field(pattern=_DIGEST)]
    data_digest: str
    git_commit: str
    seed: int
    opset: int
    files: dict[str, Annotated[str, Field(pattern=_DIGEST)]]
    """File name → sha256 of its bytes."""
    digest: Annotated[str, Field(pattern=_DIGEST)]


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: every hash was checked when this object was made."""

    path: Path
    manifest: Manifest
    contract: ModelContract

    @property
    def model_path(self) -> Path:
        return self.path / MODEL

    @property
    def digest8(self) -> str:
        """First 8 hex digits of the digest: part of the names of its services."""
        return self.manifest.digest.removeprefix("sha256:")[:8]


def file_digest(path: Path) -> str:
    """`sha256:…` of a file's bytes, read in blocks."""
    with path.open("rb") as f:
        return "sha256:" + hashlib.file_digest(f, "sha256").hexdigest()


def bytes_digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """sha256 over the canonical JSON of the manifest without its `digest`."""
    rest = {k: v for k, v in manifest.items() if k != "digest"}
    return bytes_digest(json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def check_destination(out: Path, model_version: str | None = None) -> None:
    """Raises InputError when no bundle could be written at `out`, or none with this version: an hour before it would be."""
    if model_version is not None and re.fullmatch(VERSION_PATTERN, model_version) is None:
        raise InputError(
            f"--model-version {model_version!r}: expected at most 63 letters, digits, `-`, `_` and `.`, a letter or digit first and last"
        )
    folder = out.absolute().parent
    try:
        while not folder.exists():
            folder = folder.parent
    except OSError as e:
        raise InputError(f"--out {out}: can't be written: {folder}: {e.strerror}") from e
    if not folder.is_dir():
        raise InputError(f"--out {out}: can't be written: {folder} is a file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"--out {out}: can't be written: no permission to write in {folder}")


def write_bundle(
    out: Path, files: Mapping[str, bytes], *, contract: ModelContract, model_version: str, data_digest: str,
    git_commit: str, seed: int, opset: int,
) -> Bundle:
    """Writes a bundle at `out` atomically. `files` maps each of REQUIRED (and any more) to its bytes.

    Writing the same bundle again is fine; writing another one over it is a BundleError, since a bundle never changes. It is opened, and
    so checked, before it gets its name: what could not be opened is not left behind.
    """
    missing = [name for name in REQUIRED if name not in files]
    if missing:
        raise BundleError(f"bundle {out}: files not given: {', '.join(missing)}")
    facts: dict[str, Any] = {
        "schemaVersion": 1, "modelName": contract.name, "modelVersion": model_version, "contractDigest": contract.digest,
        "dataDigest": data_digest, "gitCommit": git_commit, "seed": seed, "opset": opset,
        "files": {name: bytes_digest(data) for name, data in sorted(files.items())},
    }
    facts["digest"] = manifest_digest(facts)
    try:
        Manifest.model_validate(facts)
    except ValidationError as e:
        raise BundleError(f"bundle {out}: manifest is not valid: {_first(e)}") from e
    if out.exists():
        existing = open_bundle(out)
        if existing.manifest.digest != facts["digest"]:
            raise BundleError(
                f"{out}: holds another bundle ({existing.manifest.digest}); a bundle never changes: choose another --out"
            )
        return existing
    staging: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        for name, data in files.items():
            _write_synced(staging / name, data)
        _write_synced(staging / MANIFEST, (json.dumps(facts, indent=2, sort_keys=True) + "\n").encode())
        found = _checked(staging, out)
        staging.chmod(0o755)
        staging.rename(out)
        sync_folder(out.parent)
    except OSError as e:
        raise BundleError(f"bundle {out}: can't be written: {e.strerror}; nothing was left behind") from e
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    return replace(found, path=out)


def _checked(staging: Path, out: Path) -> Bundle:
    try:
        return open_bundle(staging)
    except BundleError as e:
        raise BundleError(f"bundle {out}: {str(e).replace(f'{staging}/', '')}; nothing was left behind") from e


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _first(e: ValidationError) -> str:
    x = e.errors()[0]
    return f"{'.'.join(str(s) for s in x['loc'])}: {x['msg']}"


def open_bundle(path: Path, *, expect_contract: str | None = None, expect_digest: str | None = None) -> Bundle:
    """Opens a bundle and checks every byte of it.

    Raises InputError when there is no such directory, BundleError (naming the file) when a file is missing, changed or
    not listed, when the schemaVersion is unknown, or when the contract or the digest is not the expected one.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no such bundle (a bundle is a directory with {MANIFEST})")
    manifest = _read_manifest(path)
    for name in REQUIRED:
        if name not in manifest.files:
            raise BundleError(f"{path}/{MANIFEST}: does not list {name}")
    for name, digest in manifest.files.items():
        if "/" in name or name in (".", "..", MANIFEST):
            raise BundleError(f"{path}/{MANIFEST}: {name!r} is not a plain file name")
        file = path / name
        if not file.is_file():
            raise BundleError(f"{path}/{name}: missing; the manifest lists it")
        if file.stat().st_size > BYTES_MAX:
            raise BundleError(f"{path}/{name}: larger than {BYTES_MAX} bytes")
        found = file_digest(file)
        if found != digest:
            raise BundleError(f"{path}/{name}: changed: the manifest says {digest}, the file has {found}")
    extra = sorted(p.name for p in path.iterdir() if p.name != MANIFEST and p.name not in manifest.files)
    if extra:
        raise BundleError(f"{path}: files that the manifest does not list: {', '.join(extra)}")
    try:
        contract = load_contract(path / CONTRACT)
    except ContractError as e:
        raise BundleError(f"{path}/{CONTRACT}: not a valid contract: {e}") from e
    if contract.digest != manifest.contract_digest:
        raise BundleError(
            f"{path}/{CONTRACT}: has digest {contract.digest}, the model was made for {manifest.contract_digest}"
        )
    if contract.name != manifest.model_name:
        raise BundleError(f"{path}/{MANIFEST}: model {manifest.model_name!r}, but the contract is {contract.name!r}'s")
    if expect_contract is not None and contract.digest != expect_contract:
        raise BundleError(f"{path}: made for contract {contract.digest}, expected {expect_contract}")
    if expect_digest is not None and manifest.digest != expect_digest:
        raise BundleError(f"{path}: digest {manifest.digest}, expected {expect_digest}")
    return Bundle(path, manifest, contract)


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise BundleError(f"{file}: missing; is {path} a bundle?") from e
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise BundleError(f"{file}: can't be read: {e}") from e
    if not isinstance(data, dict) or data.get("schemaVersion") != 1:
        version = data.get("schemaVersion") if isinstance(data, dict) else None
        raise BundleError(f"{file}: schemaVersion {version!r}; this Hafnium knows 1")
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as e:
        raise BundleError(f"{file}: {_first(e)}") from e
    found = manifest_digest(data)
    if found != manifest.digest:
        raise BundleError(f"{file}: changed: it says digest {manifest.digest}, its contents have {found}")
    return manifest
