"""Evidence: written once, read back as it was, never skipped in silence."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from hafnium_contract.evidence import (
    EvidenceError,
    EvidenceSpec,
    EvidenceValue,
    ModelEvidence,
    evidence_name,
    read_evidence,
    write_evidence,
)

NOW = datetime(2026, 5, 4, 12, tzinfo=UTC)


def spec(end: datetime = NOW) -> EvidenceSpec:
    return EvidenceSpec(
        model_digest="sha256:" + "ab" * 32, kind="drift", window_start=end - timedelta(hours=1), window_end=end,
        verdict="Fail", samples=1234, values=(EvidenceValue(name="x", statistic="psi", value=0.3, drifted=True),),
        message="x drifted", created_at=end,
    )


def test_evidence_reads_back_as_it_was_written(tmp_path: Path) -> None:
    write_evidence(tmp_path, spec())
    (found,) = read_evidence(tmp_path)
    assert isinstance(found, ModelEvidence)
    assert found.spec == spec()
    assert found.metadata.name == evidence_name(spec()) == "drift-abababab-20260504t120000000z"


def test_one_instant_has_one_name_whatever_its_zone() -> None:
    berlin = timezone(timedelta(hours=2))
    assert evidence_name(spec(datetime(2026, 5, 4, 14, tzinfo=berlin))) == evidence_name(spec(NOW))
    assert evidence_name(spec(datetime(2026, 5, 4, 12, tzinfo=berlin))) != evidence_name(spec(NOW))


def test_evidence_is_never_written_over(tmp_path: Path) -> None:
    write_evidence(tmp_path, spec())
    with pytest.raises(FileExistsError):
        write_evidence(tmp_path, spec())
    assert len(list(tmp_path.iterdir())) == 1


def test_older_evidence_is_left_out_and_the_order_is_that_of_time(tmp_path: Path) -> None:
    for hours in (2, 0, 1):
        write_evidence(tmp_path, spec(NOW + timedelta(hours=hours)))
    found = [e.spec.window_end for e in read_evidence(tmp_path, since=NOW + timedelta(hours=1)) if isinstance(e, ModelEvidence)]
    assert found == [NOW + timedelta(hours=1), NOW + timedelta(hours=2)]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"spec": {}}'])
def test_a_broken_file_shows_as_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "broken.json").write_text(text)
    (found,) = read_evidence(tmp_path)
    assert isinstance(found, EvidenceError)
    assert "broken.json" in str(found)


def test_no_folder_is_no_evidence(tmp_path: Path) -> None:
    assert list(read_evidence(tmp_path / "absent")) == []
