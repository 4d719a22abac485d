"""A bundle's storageUri, as KServe takes it → a folder of this machine.

`pvc://CLAIM/PATH` is a folder of the volumes that the job mounts, one per claim (`--volumes`); `s3://` is fetched; `file://` is what it
says. What is fetched needs no trust: a bundle is opened by its digest, and every file's hash is checked.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from urllib.parse import unquote, urlsplit

import pyarrow as pa

from hafnium_contract.bundle import MANIFEST, REQUIRED
from hafnium_monitoring.errors import LogReadError, PlaceError
from hafnium_monitoring.log_places import open_bucket, without_query

_CLAIM = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
FILE_BYTES_MAX = 512 * 1024 * 1024
"""Of one file. Hafnium's own models are below 1 MB; this lets others' in and keeps a wrong address from filling the disk."""


@dataclass
class BundlePlaces:
    """Bundles as folders. Each is fetched once."""

    volumes: Path
    cache: Path
    _fetched: dict[str, Path] = field(default_factory=dict[str, Path])

    def folder(self, uri: str) -> Path:
        """The bundle's folder; whether it holds a whole bundle, `open_bundle` says. Raises PlaceError."""
        if "\0" in unquote(uri):
            raise PlaceError(f"{without_secrets(uri)!r}: a place has no NUL in it")
        try:
            parts = urlsplit(uri)
        except ValueError as e:
            raise PlaceError(f"{without_secrets(uri)}: {e}") from e
        if "@" in parts.netloc:
            raise PlaceError(
                f"{without_secrets(uri)}: a bucket's key and secret come from AWS's variables, never from its URI, which stands in messages"
            )
        path = unquote(parts.path)
        if ".." in Path(path).parts:
            raise PlaceError(f"{without_query(uri)}: a path may not go up")
        if parts.scheme == "pvc" and parts.netloc:
            if not _CLAIM.fullmatch(parts.netloc):
                raise PlaceError(f"{without_query(uri)}: {parts.netloc!r} is no claim's name")
            volume = self.volumes / parts.netloc
            if not volume.is_dir():
                raise PlaceError(
                    f"{without_query(uri)}: no volume at {volume}; mount the claim {parts.netloc} there (see kustomize/base/monitoring)"
                )
            return volume / path.lstrip("/")
        if parts.scheme == "file" and path:
            return Path(path)
        if parts.scheme == "s3" and parts.netloc:
            return self._fetched.get(uri) or self._fetch(uri)
        raise PlaceError(f"{without_secrets(uri)}: expected pvc://CLAIM/PATH, s3://BUCKET/PATH or file:///PATH")

    def _fetch(self, uri: str) -> Path:
        target: Path | None = None
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            target = Path(mkdtemp(dir=self.cache))
            filesystem, prefix = open_bucket(uri)
            for name in (MANIFEST, *REQUIRED):
                with filesystem.open_input_stream(f"{prefix}/{name}") as source:
                    data = source.read(FILE_BYTES_MAX + 1)
                if len(data) > FILE_BYTES_MAX:
                    raise PlaceError(f"{without_query(uri)}/{name}: larger than {FILE_BYTES_MAX} bytes")
                (target / name).write_bytes(data)
        except BaseException as e:
            # Half a bundle is of no use, and fills the disk of a job that looks at many
            if target is not None:
                shutil.rmtree(target, ignore_errors=True)
            if isinstance(e, pa.ArrowException | OSError | LogReadError):
                raise PlaceError(f"{without_query(uri)}: can't be fetched: {(str(e).splitlines() or [''])[0][:300]}") from e
            raise
        self._fetched[uri] = target
        return target


def without_secrets(uri: str) -> str:
    """The URI without its options and without what stands before an @, for messages: also of one that can't be taken apart."""
    head, _, rest = without_query(uri).partition("://")
    return f"{head}://{rest.rpartition('@')[2]}" if rest else head.rpartition("@")[2]


@contextmanager
def bundle_places(volumes: Path) -> Generator[BundlePlaces]:
    """What is fetched is gone afterwards."""
    with TemporaryDirectory(prefix="hafnium-bundles-") as cache:
        yield BundlePlaces(volumes, Path(cache))
