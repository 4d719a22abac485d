"""A bundle is whole or it is nothing, and no byte of it changes unseen."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hafnium_contract.bundle import MANIFEST, REQUIRED, Bundle, check_destination, manifest_digest, open_bundle, write_bundle
from hafnium_contract.contract_file import load_contract, read_contract
from hafnium_contract.errors import BundleError, HafniumError, InputError

CONTRACT = Path(__file__).parents[2] / "examples" / "unified-risk" / "contract.yaml"


def files() -> dict[str, bytes]:
    return {name: name.encode() for name in REQUIRED} | {"contract.yaml": CONTRACT.read_bytes()}


def write(out: Path, content: dict[str, bytes] | None = None, version: str = "v1") -> Bundle:
    return write_bundle(out, content or files(), contract=load_contract(CONTRACT), model_version=version,
                        data_digest="sha256:" + "0" * 64, git_commit="unknown", seed=1, opset=20)


def test_a_written_bundle_opens_and_the_same_content_has_the_same_digest(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one"), write(tmp_path / "two")
    assert one.manifest.digest == two.manifest.digest
    assert write(tmp_path / "one").manifest == one.manifest, "writing it again changes nothing"
    assert write(tmp_path / "three", version="v2").manifest.digest != one.manifest.digest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "three", "two"], "no staging folder stays"


def test_another_bundle_is_never_written_over_one(tmp_path: Path) -> None:
    write(tmp_path / "b")
    with pytest.raises(BundleError, match="a bundle never changes"):
        write(tmp_path / "b", version="v2")


def test_a_contract_file_that_is_not_the_contract_s_leaves_no_bundle_behind(tmp_path: Path) -> None:
    other = CONTRACT.read_bytes().replace(b"threshold: 0.", b"threshold: 0.0")
    assert other != CONTRACT.read_bytes()
    with pytest.raises(BundleError, match=r"bundle .*/b: contract\.yaml: has digest .*; nothing was left behind") as e:
        write(tmp_path / "b", files() | {"contract.yaml": other})
    assert "/." not in str(e.value), "the staging folder's name says nothing to anybody"
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "b")


def test_a_contract_is_read_once_with_its_bytes(tmp_path: Path) -> None:
    found, raw = read_contract(CONTRACT)
    assert found == load_contract(CONTRACT)
    assert raw == CONTRACT.read_bytes()
    (tmp_path / "c.yaml").write_bytes(b"name: \xff")
    with pytest.raises(InputError, match=r"not UTF-8 text \(byte 6\)"):
        read_contract(tmp_path / "c.yaml")


def test_a_place_or_a_version_that_no_bundle_can_have_is_an_input_error_before_anything_is_written(tmp_path: Path) -> None:
    check_destination(tmp_path / "not" / "there" / "yet", "v1.2")
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file" / "b", tmp_path / "file" / "deep" / "b"):
        with pytest.raises(InputError, match=r"--out .*/b: can't be written: .*/file is a file"):
            check_destination(out)
        with pytest.raises(BundleError, match="can't be written"):
            write(out)
    for version in ("v 1", "", "-v", "v" * 64, "v1\n"):
        with pytest.raises(InputError, match="--model-version"):
            check_destination(tmp_path / "b", version)


@pytest.mark.parametrize("name", [*REQUIRED, MANIFEST])
def test_a_changed_byte_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "b").path / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(BundleError, match=name):
        open_bundle(tmp_path / "b")


@pytest.mark.parametrize("name", [*REQUIRED, MANIFEST])
def test_a_missing_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (write(tmp_path / "b").path / name).unlink()
    with pytest.raises(BundleError, match=name):
        open_bundle(tmp_path / "b")


def test_an_extra_file_is_refused(tmp_path: Path) -> None:
    (write(tmp_path / "b").path / "extra.pkl").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"does not list: extra\.pkl"):
        open_bundle(tmp_path / "b")


def _forge(path: Path, **changes: object) -> None:
    manifest = json.loads((path / MANIFEST).read_text()) | changes
    manifest["digest"] = manifest_digest(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def test_an_unknown_schema_version_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "b")
    _forge(tmp_path / "b", schemaVersion=7)
    with pytest.raises(BundleError, match="schemaVersion 7; this Hafnium knows 1"):
        open_bundle(tmp_path / "b")


def test_a_manifest_that_leads_out_of_the_bundle_is_refused(tmp_path: Path) -> None:
    bundle = write(tmp_path / "b")
    _forge(bundle.path, files=bundle.manifest.files | {"../secret": "sha256:" + "0" * 64})
    with pytest.raises(BundleError, match="not a plain file name"):
        open_bundle(bundle.path)


def test_another_contract_or_digest_is_refused(tmp_path: Path) -> None:
    bundle = write(tmp_path / "b")
    other = "sha256:" + "1" * 64
    with pytest.raises(BundleError, match=other):
        open_bundle(bundle.path, expect_contract=other)
    with pytest.raises(BundleError, match=other):
        open_bundle(bundle.path, expect_digest=other)
    _forge(bundle.path, contractDigest=other)
    with pytest.raises(BundleError, match=r"contract\.yaml.*the model was made for"):
        open_bundle(bundle.path)


def test_a_manifest_of_rubbish_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "b").path / MANIFEST
    for rubbish in (b"", b"[]", b"{", b"\xff\xff", b'{"schemaVersion": 1}'):
        path.write_bytes(rubbish)
        with pytest.raises(BundleError, match=MANIFEST):
            open_bundle(tmp_path / "b")


def test_no_such_bundle_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such bundle"):
        open_bundle(tmp_path / "nothing")


def test_a_missing_part_is_named_before_anything_is_written(tmp_path: Path) -> None:
    content = files()
    del content["model_card.md"]
    with pytest.raises(BundleError, match=r"model_card\.md"):
        write(tmp_path / "b", content)
    assert not (tmp_path / "b").exists()


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    """A file size limit stands in for the full disk: the kernel then refuses the write in the same place."""
    pid = os.fork()
    if pid == 0:  # a child of its own: the limit must not reach the test run
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            write(tmp_path / "b", files() | {"model.onnx": b"x" * 10_000})
        except HafniumError as e:
            os._exit(0 if "can't be written" in str(e) else 3)
        os._exit(4)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert list(tmp_path.iterdir()) == []
