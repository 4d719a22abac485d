"""What people have asked for: actions, each acted on once. Pure."""

from __future__ import annotations

from hafnium_rollout.objects import UserAction
from hafnium_rollout.status import IDS_MAX
from hafnium_rollout.turn import Turn


def open_actions(turn: Turn) -> list[UserAction]:
    spec = turn.rollout.spec.action
    given = [*turn.seen.actions, *([spec] if spec is not None else [])]
    return [a for a in given if a.id not in turn.status.handled_actions]


def handled(turn: Turn, action: UserAction) -> Turn:
    handled = (*turn.status.handled_actions, action.id)[-IDS_MAX:]
    return turn.update(handled_actions=handled, last_action_id=action.id)


def in_words(action: UserAction, otherwise: str) -> str:
    """Why, and who: the sentence that history keeps of a person's word."""
    why = action.reason or otherwise
    return f"{why} (by {action.requested_by})" if action.requested_by else why
