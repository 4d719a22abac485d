"""Nobody approves their own model: which approvals count, on one machine as on a cluster."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hafnium_rollout_world import CANDIDATE, OTHER, World, rollout

from hafnium_contract.errors import InputError
from hafnium_rollout import commands
from hafnium_rollout.approvals import Counted, candidate_of, count
from hafnium_rollout.errors import RolloutFileError
from hafnium_rollout.objects import ApprovalSpec
from hafnium_rollout.state_folder import StateFolder, read_approvals
from hafnium_rollout.status import ModelSeen, RolloutStatus


def approval(stage: str, approver: str, digest: str = CANDIDATE) -> ApprovalSpec:
    return ApprovalSpec(model_digest=digest, stage=stage, approver=approver)


def test_the_trainers_approval_does_not_count_and_the_reason_is_told() -> None:
    given = [approval("validation", "thea"), approval("security", "vera"), approval("compliance", "vera", OTHER)]
    assert count(given, CANDIDATE, "thea") == Counted(
        frozenset({"security"}), ("validation by thea, who trained this model",))


def test_somebody_elses_approval_of_the_same_stage_counts_beside_the_trainers() -> None:
    assert count([approval("validation", "thea"), approval("validation", "vera")], CANDIDATE, "thea").stages == {"validation"}


def test_without_a_known_trainer_no_approval_counts() -> None:
    found = count([approval("validation", "vera")], CANDIDATE, "")
    assert found.stages == frozenset()
    assert "isn't known who trained" in found.refused[0]


def test_a_queued_models_trainer_says_nothing_about_the_candidate_under_way() -> None:
    spec = rollout(model={"digest": OTHER, "trainedBy": "otto"})
    assert candidate_of(spec, RolloutStatus()) == (OTHER, "otto")
    under_way = RolloutStatus(candidate=ModelSeen(service="risk-aaaaaaaa", digest=CANDIDATE, trained_by="thea"))
    assert candidate_of(spec, under_way) == (CANDIDATE, "thea")


def test_another_trainer_named_on_the_way_makes_no_approval_count() -> None:
    spec = rollout(model={"digest": CANDIDATE, "trainedBy": "carol"})
    under_way = RolloutStatus(candidate=ModelSeen(service="risk-aaaaaaaa", digest=CANDIDATE, trained_by="alice"))
    assert candidate_of(spec, under_way) == (CANDIDATE, "alice")
    assert count([approval("validation", "alice")], *candidate_of(spec, under_way)).stages == frozenset()


def test_the_trainer_is_remembered_with_the_candidate() -> None:
    world = World()
    world.turn()
    assert world.status.candidate is not None
    assert world.status.candidate.trained_by == "thea"


def test_approvals_are_asked_for_only_where_the_trainer_is_named() -> None:
    with pytest.raises(RolloutFileError, match="trainedBy is required where approvals are"):
        rollout(approvals={"required": ["validation"]}, model={"trainedBy": None})


def test_the_message_of_a_waiting_rollout_says_whose_approval_does_not_count() -> None:
    world = World(rollout(approvals={"required": ["validation"]}, strategy={"steps": [{"weight": 100, "deadline": "1h"}]}))
    observe = world.observe

    def with_refusal(seconds: float) -> object:
        return replace(observe(seconds), approvals_refused=("validation by thea, who trained this model",))

    world.observe = with_refusal  # type: ignore[method-assign,assignment]
    for _ in range(5):
        world.turn()
    assert world.status.reason == "ApprovalMissing"
    assert "validation by thea, who trained this model" in world.status.message
    assert world.weight == 0


def test_the_trainer_cant_approve_from_the_command_line(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path)
    folder.objects.mkdir()
    spec = rollout(approvals={"required": ["validation"]})
    folder.rollout("risk").write_text(json.dumps(spec.model_dump(mode="json", exclude_none=True)))
    with pytest.raises(InputError, match="somebody else has to approve"):
        commands.approve(tmp_path, "risk", "validation", "thea")
    assert not folder.approvals.exists()


def test_on_one_machine_a_digest_is_needed_only_where_there_are_two_models(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path)
    folder.objects.mkdir()
    (tmp_path / "status").mkdir()
    folder.rollout("risk").write_text(json.dumps(rollout(model={"digest": OTHER}).model_dump(mode="json", exclude_none=True)))
    commands.approve(tmp_path, "risk", "validation", "vera")
    with pytest.raises(InputError, match="no model of risk"):
        commands.approve(tmp_path, "risk", "validation", "vera", "a" * 12)
    world = World()
    world.turn()
    folder.status("risk").write_text(world.status.model_dump_json())
    with pytest.raises(InputError, match=f"hafnium rollout approve risk --stage validation --digest {'a' * 64}"):
        commands.approve(tmp_path, "risk", "validation", "vera")
    commands.approve(tmp_path, "risk", "validation", "vera", CANDIDATE)
    assert sorted(a.model_digest for a in read_approvals(folder)) == [CANDIDATE, OTHER]


def test_a_stage_or_reason_that_the_cluster_would_refuse_is_told_here(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path)
    folder.objects.mkdir()
    folder.rollout("risk").write_text(json.dumps(rollout().model_dump(mode="json", exclude_none=True)))
    with pytest.raises(InputError, match=r"--stage 'Model Risk': expected a name such as"):
        commands.approve(tmp_path, "risk", "Model Risk", "vera")
    with pytest.raises(InputError, match=r"--reason: .* it has 1001"):
        commands.abort(tmp_path, "risk", "x" * 1001)
