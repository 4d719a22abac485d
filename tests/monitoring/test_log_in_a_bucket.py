"""Drift of an inference log that lies in a bucket of a real S3: the same finding as from a folder, and words when it can't be read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hafnium_s3 import S3
from pyarrow.fs import FileSystem, LocalFileSystem, copy_files

from hafnium_contract.bundle import open_bundle
from hafnium_contract.errors import InputError
from hafnium_contract.evidence import EvidenceSpec
from hafnium_monitoring.bundle_places import bundle_places
from hafnium_monitoring.drift import DriftOptions, run_drift
from hafnium_monitoring.errors import PlaceError
from hafnium_monitoring.log_places import BucketPlace, FolderPlace, log_place

from .conftest import NOW, START, World, change

DRIFTED = change("geo_risk_score", lambda v: v * 0)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with S3(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


def put(s3: S3, folder: Path, path: str) -> str:
    """Copies a folder into the bucket; the URI that it has there."""
    filesystem: Any
    filesystem, _ = FileSystem.from_uri(s3.uri(path))
    filesystem.create_dir(path.partition("/")[0])
    copy_files(str(folder), path, source_filesystem=LocalFileSystem(), destination_filesystem=filesystem)
    return s3.uri(path)


def look(world: World, logs: tuple[Path | str, ...]) -> EvidenceSpec:
    options = DriftOptions(
        bundle=world.candidate.path, logs=logs, start=START, end=NOW, stable_bundle=world.stable.path, rules=world.rules)
    return run_drift(options, NOW).evidence


@pytest.mark.slow
def test_a_bucket_gives_the_same_evidence_as_the_folder(world: World, s3: S3) -> None:
    world.log("candidate", 1_500, DRIFTED)
    world.log("stable", 1_500)
    in_folder = look(world, world.logs)
    assert in_folder.verdict == "Fail"
    in_bucket = look(world, tuple(put(s3, folder, f"logs/same/{folder.name}") for folder in world.logs))
    assert in_bucket == in_folder


@pytest.mark.slow
def test_a_prefix_without_files_is_no_data_and_a_damaged_object_an_error_that_names_it(world: World, s3: S3) -> None:
    world.log("candidate", 1_500)
    both = look(world, (put(s3, world.logs[0], "logs/other/x"), s3.uri("logs/nobody")))
    assert both.verdict == "NoData"
    assert "the stable arm has too few rows" in both.message
    assert look(world, (s3.uri("logs/nobody"),)).verdict == "NoData"
    next(world.logs[0].glob("date=*/*/part-*.parquet")).write_bytes(b"PAR1 torn")
    found = look(world, (put(s3, world.logs[0], "logs/torn"),))
    assert found.verdict == "Error"
    assert "s3://logs/torn/date=2026-01-15" in found.message
    assert s3.environment["AWS_SECRET_ACCESS_KEY"] not in found.message


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_an_error_and_never_no_data(world: World, s3: S3) -> None:
    found = look(world, (s3.uri("absent/x"),))
    assert found.verdict == "Error"
    assert "s3://absent/x: there is no bucket absent" in found.message


@pytest.mark.slow
def test_a_bundle_in_a_bucket_is_fetched_once_and_checked(world: World, s3: S3, tmp_path: Path) -> None:
    uri = put(s3, world.candidate.path, "logs/models/b1")
    with bundle_places(tmp_path) as places:
        first = places.folder(uri)
        assert open_bundle(first, expect_digest=world.candidate.manifest.digest).manifest == world.candidate.manifest
        assert places.folder(uri) == first
        with pytest.raises(PlaceError, match="can't be fetched"):
            places.folder(s3.uri("logs/models/none"))
    assert not first.exists()


def test_a_claim_is_a_folder_of_the_volumes(tmp_path: Path) -> None:
    (tmp_path / "bundles/v1").mkdir(parents=True)
    with bundle_places(tmp_path) as places:
        assert places.folder("pvc://bundles/v1") == tmp_path / "bundles/v1"
        assert places.folder("file:///somewhere/v1") == Path("/somewhere/v1")
        for uri, words in (("pvc://other/v1", "mount the claim other"), ("pvc://bundles/../secret", "may not go up"),
                           ("gs://b/v1", "expected pvc://"), ("v1", "expected pvc://"),
                           ("pvc://../etc/x", "no claim's name"), ("pvc://./bundles/v1", "no claim's name"), ("pvc://[x/y", "Invalid IPv6"),
                           ("file:///a%00b", "NUL")):
            with pytest.raises(PlaceError, match=words):
                places.folder(uri)


@pytest.mark.parametrize("uri", ["s3://KEY:sEcReT@models/x?region=eu", "gs://KEY:sEcReT@models/x", "s3://KEY:sEcReT@[models/x"])
def test_a_bundles_uri_with_a_secret_is_refused_and_never_shown(uri: str, tmp_path: Path) -> None:
    with bundle_places(tmp_path) as places, pytest.raises(PlaceError) as e:
        places.folder(uri)
    assert "sEcReT" not in str(e.value)
    assert "models/x" in str(e.value)


def test_a_fetch_that_failed_leaves_nothing_behind_and_the_next_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with bundle_places(tmp_path) as places:
        for name in ("a", "b", "a"):
            with pytest.raises(PlaceError, match=f"s3://models/{name}: can't be fetched"):
                places.folder(f"s3://models/{name}?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1")
        assert list(places.cache.iterdir()) == []


def test_places_are_told_apart() -> None:
    assert isinstance(log_place("/var/log/x"), FolderPlace)
    assert isinstance(log_place(Path("s3:/x")), FolderPlace)
    assert isinstance(log_place("file:///var/log/x"), FolderPlace)
    assert isinstance(log_place("s3://b/p"), BucketPlace)
    for place in ("gs://b/p", "s3:///p", "http://h/p?token=secret"):
        with pytest.raises(InputError, match="s3://BUCKET/PREFIX") as e:
            log_place(place)
        assert "secret" not in str(e.value)
    with pytest.raises(InputError, match="AWS's variables"):
        log_place("s3://key:secret@b/p")
    with pytest.raises(InputError, match="unknown option 'regoin'"):
        log_place("s3://b/p?regoin=x").files(START, "1")
