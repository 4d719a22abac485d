"""What a demo decides beforehand and what it makes of the end: pure, so every case is cheap to show."""

from __future__ import annotations

import json
import re
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from hafnium_contract.contract_file import load_contract, parse_contract
from hafnium_contract.errors import InputError
from hafnium_contract.model_contract import ModelContract
from hafnium_local.demo.plan import EXPECTED_GATES, FAULTS, DemoOptions, FaultKind, cutoffs, fault_of, money_fields
from hafnium_local.demo.play import prepared
from hafnium_local.demo.traces import Ended
from hafnium_local.demo.verdict import judge
from hafnium_local.faults import parse_fault

EXAMPLES = Path(__file__).parents[2] / "examples"
DIGEST = "sha256:" + "a" * 64
PROMOTED = Ended(DIGEST, "Promoted", "Promoted", "all is well", ["Promoted"])
GOOD_REPLAY: dict[str, Any] = {
    "answered": 1000, "lost": 0, "unanswered": 0, "failed": 0, "refused": 0, "retries": 3, "by_version": {"v1": 600, "v2": 400},
    "p50_ms": 5.0, "p95_ms": 9.0, "p99_ms": 20.0,
}


def rejected(*gates: str) -> Ended:
    return Ended(DIGEST, "RolledBack", "GateFailed", "it drifted", list(gates))


def contract(*features: dict[str, Any]) -> ModelContract:
    return parse_contract({
        "schemaVersion": 1, "name": "third", "version": "1", "owner": "o", "description": "-",
        "data": {"eventTime": {"column": "t"}, "label": {"column": "y"}, "labelTime": {"delay": "0s"}},
        "features": [{"description": "-"} | f for f in features], "decision": {"threshold": 0.5},
    })


@pytest.mark.parametrize("fault", FAULTS)
def test_the_demo_is_good_when_each_fault_is_stopped_by_what_it_gives(fault: FaultKind) -> None:
    for gate in EXPECTED_GATES[fault]:
        verdict = judge(fault, PROMOTED, rejected(gate), GOOD_REPLAY, 200.0)
        assert verdict.good, verdict.wrong


@pytest.mark.parametrize(
    ("v2", "v3", "replay", "says"),
    [
        (rejected("errors"), rejected("drift"), {}, "v2 was not promoted"),
        (None, None, {}, "did not end"),
        (PROMOTED, PROMOTED, {}, "v3 .units. was not rejected"),
        (PROMOTED, rejected("latency"), {}, "for another reason .latency."),
        (PROMOTED, rejected("drift"), {"lost": 1}, "1 requests were lost"),
        (PROMOTED, rejected("drift"), {"unanswered": 2}, "2 requests were lost"),
        (PROMOTED, rejected("drift"), {"refused": 1, "last_error": "status 422"}, "got an error for an answer: status 422"),
        (PROMOTED, rejected("drift"), {"failed": 1}, "1 requests got an error"),
        (PROMOTED, rejected("drift"), {"answered": 0}, "no request was answered"),
    ],
)
def test_whatever_went_differently_is_said(v2: Ended | None, v3: Ended | None, replay: dict[str, int], says: str) -> None:
    verdict = judge("units", v2, v3, GOOD_REPLAY | replay, 200.0)
    assert not verdict.good
    assert any(re.search(says, sentence) for sentence in verdict.wrong), verdict.wrong


def test_a_demo_without_any_summary_is_not_good() -> None:
    assert not judge("units", PROMOTED, rejected("drift"), {}, 1.0).good


def test_simulated_data_is_cut_at_midnights_and_a_file_at_its_rows() -> None:
    first, last = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 3, 2, tzinfo=UTC)
    days = cutoffs(first, last, {}, simulated=True, age_max=timedelta(days=3))
    assert (days.v1, days.v2, days.replay_from) == (datetime(2026, 2, 15, tzinfo=UTC), datetime(2026, 2, 24, tzinfo=UTC), days.v2)
    assert days.replay_until == datetime(2026, 2, 27, tzinfo=UTC), "later, the store's values would be too old"
    at = {0.5: first + timedelta(hours=7), 0.7: first + timedelta(hours=9)}
    rows = cutoffs(first, last, at, simulated=False, age_max=None)
    assert (rows.v1, rows.v2) == (at[0.5], at[0.7])
    assert rows.replay_until > last, "the last row is replayed too"


def test_data_that_is_too_short_is_refused() -> None:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    with pytest.raises(InputError, match="too short"):
        cutoffs(moment, moment, {0.5: moment, 0.7: moment}, simulated=False, age_max=None)


def test_the_units_fault_finds_money_by_its_unit_else_numbers_that_pass_validation_else_any() -> None:
    money = {"name": "a", "dtype": "float", "range": [0, 1], "unit": "USD", "source": {"request": "Amount"}, "outOfRange": "clamp"}
    number = {"name": "b", "dtype": "int", "range": [0, 9], "outOfRange": "clamp"}
    strict = {"name": "e", "dtype": "float", "range": [18, 100], "outOfRange": "reject"}
    flag = {"name": "c", "dtype": "bool"}
    assert money_fields(contract(number, flag, money)) == ["Amount"]
    assert money_fields(contract(flag, number, strict)) == ["b"]
    assert money_fields(contract(flag, strict)) == ["e"]
    with pytest.raises(InputError, match="no request field is a number"):
        fault_of("units", contract(flag))


def test_a_stale_feed_is_a_stale_store_where_there_are_views_and_a_stuck_request_where_there_are_none() -> None:
    assert fault_of("stale", load_contract(EXAMPLES / "unified-risk" / "contract.yaml")) is None
    fault = fault_of("stale", load_contract(EXAMPLES / "creditcard" / "contract.yaml"))
    assert fault is not None
    assert fault.kind == "stale"


@pytest.mark.parametrize("kind", ["units", "slow", "crash"])
def test_fault_options_are_what_the_proxy_understands(kind: FaultKind) -> None:
    fault = fault_of(kind, load_contract(EXAMPLES / "creditcard" / "contract.yaml"))
    assert fault is not None
    assert parse_fault(fault.kind, json.dumps(fault.options)).kind == kind


def options(work: Path, **changes: Any) -> DemoOptions:
    return DemoOptions(work=work, contract=EXAMPLES / "unified-risk" / "contract.yaml", data=None, **{"fault": "units", **changes})


def test_a_demo_empties_only_its_own_folder_and_only_when_no_other_demo_runs_there(tmp_path: Path) -> None:
    work = tmp_path / "work"
    with prepared(options(work), resume=False):
        (work / "result").touch()
        with pytest.raises(InputError, match="another demo runs there"), prepared(options(work), resume=False):
            pass
    with prepared(options(work), resume=False):
        assert not (work / "result").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    for resume in (False, True):
        with pytest.raises(InputError), prepared(options(tmp_path / "mine"), resume=resume):
            pass
    assert list((tmp_path / "mine").iterdir()) == [tmp_path / "mine" / "thesis.txt"]


def test_a_demo_is_resumed_with_the_options_that_it_began_with(tmp_path: Path) -> None:
    work = tmp_path / "work"
    with prepared(options(work), resume=False):
        (work / "result").touch()
    with prepared(options(work, port=None), resume=True):
        assert (work / "result").exists()
    with pytest.raises(InputError, match="was asked for"), prepared(options(work, fault="crash"), resume=True):
        pass


def test_a_port_in_use_is_noticed_before_anything_is_done(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match="something else listens"), \
                prepared(options(tmp_path / "work", port=taken.getsockname()[1]), resume=False):
            pass
    assert not (tmp_path / "work").exists()
