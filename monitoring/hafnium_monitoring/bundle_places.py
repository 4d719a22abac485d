"""A bundle's storageUri, as KServe takes it → a folder of this machine.

`pvc://CLAIM/PATH` is a folder of the volumes that the job mounts, one per claim (`--volumes`); `s3://` is fetched; `file://` is what it
says. What is fetched needs no trust: a bundle is opened by its digest, and every file's hash is checked.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import unquote, urlsplit

import pyarrow as pa

from hafnium_contract.bundle import MANIFEST, REQUIRED
from hafnium_monitoring.errors import LogReadError, PlaceError
from hafnium_monitoring.log_places import open_bucket, without_query

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
        parts = urlsplit(uri)
        path = unquote(parts.path)
        if ".." in Path(path).parts:
            raise PlaceError(f"{uri}: a path may not go up")
        if parts.scheme == "pvc" and parts.netloc:
            volume = self.volumes / parts.netloc
            if not volume.is_dir():
                raise PlaceError(f"{uri}: no volume at {volume}; mount the claim {parts.netloc} there (see kustomize/base/monitoring)")
            return volume / path.lstrip("/")
        if parts.scheme == "file" and path:
            return Path(path)
        if parts.scheme == "s3" and parts.netloc:
            return self._fetched.get(uri) or self._fetch(uri)
        raise PlaceError(f"{without_query(uri)}: expected pvc://CLAIM/PATH, s3://BUCKET/PATH or file:///PATH")

    def _fetch(self, uri: str) -> Path:
        target = self.cache / str(len(self._fetched))
        target.mkdir(parents=True)
        try:
            filesystem, prefix = open_bucket(uri)
            for name in (MANIFEST, *REQUIRED):
                with filesystem.open_input_stream(f"{prefix}/{name}") as source:
                    data = source.read(FILE_BYTES_MAX + 1)
                if len(data) > FILE_BYTES_MAX:
                    raise PlaceError(f"{without_query(uri)}/{name}: larger than {FILE_BYTES_MAX} bytes")
                (target / name).write_bytes(data)
        except (pa.ArrowException, OSError, LogReadError) as e:
            raise PlaceError(f"{without_query(uri)}: can't be fetched: {str(e).splitlines()[0][:300]}") from e
        self._fetched[uri] = target
        return target


@contextmanager
def bundle_places(volumes: Path) -> Generator[BundlePlaces]:
    """What is fetched is gone afterwards."""
    with TemporaryDirectory(prefix="hafnium-bundles-") as cache:
        yield BundlePlaces(volumes, Path(cache))
