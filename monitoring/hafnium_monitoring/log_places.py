"""Where an inference log is read from: a folder (of this machine, of a volume) or a bucket (`s3://BUCKET/PREFIX`), as the transformer
writes it.

Credentials and region of a bucket are AWS's usual ones (environment, files, the pod's role); another endpoint stands in the URI, as for
the transformer's `--inference_log`: `?endpoint_override=HOST:PORT&scheme=http`. Of an object only what is needed is fetched: its footer,
and then the columns that are asked for.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl, urlsplit

from hafnium_contract.errors import InputError
from hafnium_contract.inference_log import partition
from hafnium_monitoring.errors import LogReadError

FILES_MAX = 200_000
"""Of one partition (a day of one model). The transformer writes one file every ten seconds, so a hundred of its processes make 900,000
in a day: merge files, or look at shorter times, before that many are listed."""
S3_TIMEOUT_S = 10.0
"""Of one request, and to connect. A job has an activeDeadlineSeconds; this makes it say why."""

OPTIONS = frozenset({"endpoint_override", "scheme", "region", "allow_bucket_creation"})
"""Of a URI. The last one is the transformer's: who reads makes no bucket."""


@dataclass(frozen=True)
class LogFile:
    """One file of a log. `name` is unique and is what messages say; `order` sorts by time."""

    place: LogPlace
    name: str

    @property
    def order(self) -> str:
        return self.name.rpartition("/")[2]


class LogPlace(Protocol):
    """A log's files. Raises OSError (FileNotFoundError when a file is gone) and LogReadError."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    def missing(self) -> bool:
        """There is no such folder: nothing was logged yet, or it is written elsewhere."""
        ...

    def files(self, day: datetime, model_version: str) -> Sequence[LogFile]:
        """Finished files of one day and one model, in any order; none when there is no such partition."""
        ...

    def source(self, file: LogFile) -> Any:
        """What pyarrow's ParquetFile takes, positioned at the start."""
        ...

    def changed(self, file: LogFile) -> datetime | None:
        """When the file was last written; None when it is gone."""
        ...


def log_place(given: Path | str) -> LogPlace:
    """A folder's path or an s3:// URI → place. Raises InputError for any other scheme."""
    text = str(given)
    scheme = urlsplit(text).scheme
    if isinstance(given, Path) or scheme == "":
        return FolderPlace(Path(given))
    if scheme == "file" and urlsplit(text).path:
        return FolderPlace(Path(urlsplit(text).path))
    if scheme != "s3" or not urlsplit(text).netloc:
        raise InputError(f"--log: expected a folder or s3://BUCKET/PREFIX, got {without_query(text)!r}")
    if "@" in urlsplit(text).netloc:
        raise InputError("--log: a bucket's key and secret come from AWS's variables, never from its URI, which stands in messages")
    return BucketPlace(text)


def log_places(given: Sequence[Path | str]) -> tuple[LogPlace, ...]:
    """Each place once, however it is spelt: a log that is read twice has each row twice. Raises InputError as `log_place`."""
    found: dict[object, LogPlace] = {}
    for one in given:
        place = log_place(one)
        found.setdefault(_address(place), place)
    return tuple(found.values())


def _address(place: LogPlace) -> object:
    if isinstance(place, FolderPlace):
        return os.path.realpath(place.folder)
    if isinstance(place, BucketPlace):
        return place.address
    return place


def without_query(uri: str) -> str:
    """The URI without its options, for messages."""
    return uri.partition("?")[0]


@dataclass(frozen=True)
class FolderPlace:
    """A folder of this machine."""

    folder: Path

    @property
    def name(self) -> str:
        return str(self.folder)

    def missing(self) -> bool:
        return not self.folder.exists()

    def files(self, day: datetime, model_version: str) -> Sequence[LogFile]:
        folder = partition(self.folder, day, model_version)
        try:
            # Not glob: it takes a folder that it may not read for an empty one
            with os.scandir(folder) as found:
                names = [e.name for e in found if e.name.startswith("part-") and e.name.endswith(".parquet")]
        except FileNotFoundError:
            if self.folder.exists() and not self.folder.is_dir():
                raise LogReadError(f"{self.folder}: an inference log is a folder, and this is none") from None
            return []
        except OSError as e:
            raise LogReadError(f"{folder}: can't be listed ({e.strerror}), so nothing is known of its rows") from e
        return [LogFile(self, str(folder / name)) for name in names]

    def source(self, file: LogFile) -> Any:
        return file.name

    def changed(self, file: LogFile) -> datetime | None:
        try:
            return datetime.fromtimestamp(Path(file.name).stat().st_mtime, UTC)
        except FileNotFoundError:
            return None


class BucketPlace:
    """A bucket of S3, or of what speaks its protocol. Not safe between threads."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._opened: tuple[Any, str] | None = None

    @property
    def name(self) -> str:
        return without_query(self._uri)

    @property
    def address(self) -> tuple[str, str, str]:
        """Endpoint, bucket and prefix: URIs that mean the same have the same."""
        parts = urlsplit(self._uri)
        return dict(parse_qsl(parts.query)).get("endpoint_override", ""), parts.netloc, parts.path.strip("/")

    def missing(self) -> bool:
        return False  # a prefix is there when something is below it

    def files(self, day: datetime, model_version: str) -> Sequence[LogFile]:
        from pyarrow.fs import FileSelector, FileType

        filesystem, prefix = self._open()
        folder = partition(Path(prefix), day, model_version).as_posix()
        try:
            found = filesystem.get_file_info(FileSelector(folder, recursive=False, allow_not_found=True))
        except OSError as e:
            raise self._unreadable(e) from e
        if len(found) > FILES_MAX:
            raise LogReadError(f"{without_query(self._uri)}: {len(found)} files in {folder}; at most {FILES_MAX} are read")
        return [
            LogFile(self, f"s3://{i.path}") for i in found
            if i.type == FileType.File and i.base_name.startswith("part-") and i.extension == "parquet"
        ]

    def source(self, file: LogFile) -> Any:
        return self._open()[0].open_input_file(file.name.removeprefix("s3://"))

    def changed(self, file: LogFile) -> datetime | None:
        try:
            return self._open()[0].get_file_info(file.name.removeprefix("s3://")).mtime
        except OSError as e:
            raise self._unreadable(e) from e

    def _unreadable(self, e: OSError) -> LogReadError:
        self._opened = None  # a connection that failed is opened anew
        return LogReadError(f"{without_query(self._uri)}: the bucket can't be read: {str(e).splitlines()[0][:300]}")

    def _open(self) -> tuple[Any, str]:
        if self._opened is None:
            from pyarrow.fs import FileType

            filesystem, prefix = open_bucket(self._uri)
            bucket = prefix.partition("/")[0]
            try:
                # A prefix without files is a log without rows; a bucket that isn't there is a wrong address
                if filesystem.get_file_info(bucket).type == FileType.NotFound:
                    raise LogReadError(f"{without_query(self._uri)}: there is no bucket {bucket}")
            except OSError as e:
                raise self._unreadable(e) from e
            self._opened = (filesystem, prefix)
        return self._opened


def open_bucket(uri: str) -> tuple[Any, str]:
    """s3:// URI → (pyarrow filesystem with limits on time and retries, path in it). Raises InputError and LogReadError.

    `FileSystem.from_uri` reads the same options and knows no limits: the SDK's own retries take longer than a job lives.
    """
    import pyarrow as pa
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem, resolve_s3_region

    parts = urlsplit(uri)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if unknown := sorted(set(options) - OPTIONS):
        raise InputError(f"{without_query(uri)}: unknown option {unknown[0]!r}; expected {', '.join(sorted(OPTIONS))}")
    try:
        region = options.get("region")
        if region is None and "endpoint_override" not in options:
            region = resolve_s3_region(parts.netloc)
        filesystem = S3FileSystem(
            region=region, endpoint_override=options.get("endpoint_override"), scheme=options.get("scheme"),
            connect_timeout=S3_TIMEOUT_S, request_timeout=S3_TIMEOUT_S, retry_strategy=AwsStandardS3RetryStrategy(max_attempts=3),
        )
    except (pa.ArrowException, OSError, ValueError) as e:
        raise LogReadError(f"{without_query(uri)}: {str(e).splitlines()[0][:300]}") from e
    return filesystem, f"{parts.netloc}/{parts.path.strip('/')}".rstrip("/")
