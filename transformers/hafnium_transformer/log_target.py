"""Where the inference log's files go: a folder, or a bucket (`s3://bucket/prefix`). Each file is there whole or not at all."""

from __future__ import annotations

import os
import secrets
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, cast
from urllib.parse import urlsplit

from hafnium_contract.errors import InputError

CLOSE_S = 8.0
"""Time for the last rows when the server stops. A target that takes longer loses what it was not done with."""


class LogTarget(Protocol):
    """Used by the log's thread only."""

    def write(self, table: Any, when: datetime, model_version: str, name: str) -> None:
        """Writes one file (a pyarrow table) into its partition. Raises whatever its storage raises."""
        ...


def log_target(place: str) -> LogTarget:
    """A folder's path or an s3:// URI → target. Raises InputError for any other scheme."""
    scheme = urlsplit(place).scheme
    if scheme in ("", "file"):
        return Folder(Path(urlsplit(place).path if scheme else place))
    if scheme != "s3" or not urlsplit(place).netloc:
        raise InputError(f"--inference_log: expected a folder or s3://BUCKET/PREFIX, got {place!r}")
    return Bucket(place)


class Folder:
    """A folder of this machine, or of a volume. Files are written beside their place, synced and renamed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, table: Any, when: datetime, model_version: str, name: str) -> None:
        import pyarrow.parquet as pq  # 0.4 s to import, and only the log's thread needs it

        from hafnium_contract.inference_log import OF_FEW_VALUES, partition

        target = partition(self._folder, when, model_version)
        target.mkdir(parents=True, exist_ok=True)
        temporary = target / f".{name}.tmp"
        try:
            with temporary.open("wb") as f:
                pq.write_table(table, f, compression="zstd", use_dictionary=cast(Any, list(OF_FEW_VALUES)))
                f.flush()
                os.fsync(f.fileno())
            temporary.rename(target / f"{name}.parquet")
        finally:
            temporary.unlink(missing_ok=True)


class Bucket:
    """An S3 bucket, or what speaks its protocol. An object appears when its upload ends.

    Credentials and region are AWS's usual ones (environment, files, the pod's role). Another endpoint stands in the URI:
    `s3://bucket/prefix?endpoint_override=HOST:PORT&scheme=http`.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._opened: tuple[Any, str] | None = None

    def write(self, table: Any, when: datetime, model_version: str, name: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        from hafnium_contract.inference_log import OF_FEW_VALUES, partition

        whole = pa.BufferOutputStream()  # made first: an upload that breaks off in the middle might end as an object
        pq.write_table(table, whole, compression="zstd", use_dictionary=cast(Any, list(OF_FEW_VALUES)))
        filesystem, prefix = self._open()
        path = partition(Path(prefix), when, model_version) / f"{name}.parquet"
        try:
            with filesystem.open_output_stream(path.as_posix(), compression=None) as f:
                f.write(whole.getvalue())
        except BaseException:
            self._opened = None  # a connection that failed is opened anew
            raise

    def _open(self) -> tuple[Any, str]:
        if self._opened is None:
            from pyarrow.fs import FileSystem

            filesystem, prefix = FileSystem.from_uri(self._uri)
            self._opened = (filesystem, prefix)
        return self._opened


def file_name(when: datetime) -> str:
    """Names begin with their time, so that sorted names are in order; the end tells writers apart."""
    return f"part-{when:%Y%m%dT%H%M%S%f}-{secrets.token_hex(4)}"
