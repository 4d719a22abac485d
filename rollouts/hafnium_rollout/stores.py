"""Where the commands find rollouts and leave wishes: one protocol, for the state folder of one machine here and for a cluster in
kubernetes/store.py. A store reads and asks; it never moves traffic."""

from __future__ import annotations

import getpass
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import yaml
from pydantic import ValidationError

from hafnium_contract.contract_file import read_yaml
from hafnium_contract.errors import HafniumError
from hafnium_contract.evidence import EvidenceSpec
from hafnium_contract.whole_files import write_atomically
from hafnium_rollout.errors import StateError, UnknownRollout
from hafnium_rollout.objects import ModelApproval, ModelRollout, UserAction, load_rollout
from hafnium_rollout.standing import Standing, digest_at, known_status, standing_of
from hafnium_rollout.state_folder import EvidenceReader, StateFolder, read_json
from hafnium_rollout.status import RolloutStatus


@dataclass(frozen=True, slots=True)
class Approval:
    """One approval, and when it was given, as far as that is known."""

    digest: str
    stage: str
    approver: str
    time: datetime | None = None


class RolloutStore(Protocol):
    """What a command needs to know, and the two things that it may write."""

    shared: bool
    """Others change the ModelRollout while somebody reads about it, so an approval has to say which model it means."""

    def names(self) -> list[str]:
        """Of all rollouts that are wanted."""
        ...

    def rollout(self, name: str) -> ModelRollout:
        """The object that is wanted. Raises UnknownRollout."""
        ...

    def wanted(self, name: str) -> str:
        """Digest of the model that is asked for, whatever else of the object can't be read. Raises UnknownRollout, StateError or
        RolloutFileError."""
        ...

    def status(self, name: str) -> RolloutStatus:
        """Its status; an empty one when the controller hasn't looked yet. Raises UnknownRollout or StateError."""
        ...

    def known_status(self, name: str) -> tuple[RolloutStatus, tuple[str, ...]]:
        """The same, where a newer operator may have written it, and the fields that are left out for that."""
        ...

    def standing(self, name: str) -> Standing:
        """As much of its status as a wish needs, whatever else can't be read. Raises UnknownRollout."""
        ...

    def asked(self, name: str, status: RolloutStatus) -> bool:
        """Somebody's wish waits for the controller."""
        ...

    def ask(self, name: str, action: UserAction) -> str:
        """Leaves a wish. Returns the one that it took the place of, in words; mostly there is none. Raises StateError where it would
        take the place of one that nobody has acted on yet: only an Abort may."""
        ...

    def by_hand(self, name: str, wish: Mapping[str, str]) -> str:
        """What a person does to leave that wish without this command."""
        ...

    def approve(self, approval: ModelApproval) -> None:
        """Writes an approval."""
        ...

    def approvals(self) -> list[Approval]:
        """All that were given."""
        ...

    def evidence(self) -> tuple[EvidenceSpec, ...]:
        """All findings of jobs."""
        ...

    def record(self, name: str) -> Path | None:
        """Where the controller records its turns; None where that can't be read from here."""
        ...

    def whoami(self) -> str:
        """Who asks, as far as this place knows."""
        ...


class FolderStore:
    """The state folder of `hafnium up`. Whoever can write the folder can ask and approve."""

    shared = False

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folder = StateFolder(root)

    def names(self) -> list[str]:
        return self._folder.rollout_names()

    def rollout(self, name: str) -> ModelRollout:
        path = self._folder.rollout(name)
        if not path.is_file():
            raise self._unknown(name)
        return load_rollout(path)

    def wanted(self, name: str) -> str:
        path = self._folder.rollout(name)
        if not path.is_file():
            raise self._unknown(name)
        # The copy is what the controller goes on with while the file is broken.
        for readable in (path, self._folder.last_good(name)):
            try:
                digest = digest_at(read_yaml(readable)[0], "spec", "model", "digest")
            except (HafniumError, yaml.YAMLError, ValueError):
                continue
            if digest is not None:
                return digest
        return load_rollout(path).spec.model.digest  # every problem with its line

    def _status_data(self, name: str) -> Any:
        """None when the controller hasn't looked yet."""
        try:
            return read_json(self._folder.status(name))
        except FileNotFoundError as e:
            if self._folder.rollout(name).is_file():
                return None
            raise self._unknown(name) from e

    def status(self, name: str) -> RolloutStatus:
        data = self._status_data(name)
        try:
            return RolloutStatus.model_validate(data) if data is not None else RolloutStatus()
        except ValidationError as e:
            raise StateError(f"{self._folder.status(name)}: can't be read: {e}") from e

    def known_status(self, name: str) -> tuple[RolloutStatus, tuple[str, ...]]:
        data = self._status_data(name)
        try:
            return known_status(data) if data is not None else (RolloutStatus(), ())
        except ValidationError as e:
            raise StateError(f"{self._folder.status(name)}: can't be read: {e}") from e

    def standing(self, name: str) -> Standing:
        try:
            return standing_of(self._status_data(name))
        except StateError as e:
            return Standing(doubt=str(e))

    def _unknown(self, name: str) -> UnknownRollout:
        known = ", ".join(self.names()) or "none"
        return UnknownRollout(f"no ModelRollout {name!r} in {self._root}; there are: {known}")

    def asked(self, name: str, status: RolloutStatus) -> bool:
        return any(self._folder.actions.glob(f"ModelRollout-{name}.*.json"))

    def ask(self, name: str, action: UserAction) -> str:
        write_atomically(self._folder.actions / f"ModelRollout-{name}.{action.id}.json", action.model_dump_json(indent=1))
        return ""  # a file for each: they are acted on in the order of their ids

    def by_hand(self, name: str, wish: Mapping[str, str]) -> str:
        return f"write {self._folder.actions / f'ModelRollout-{name}.by-hand.json'} with {json.dumps(dict(wish))}"

    def approve(self, approval: ModelApproval) -> None:
        path = self._folder.approvals / f"{approval.metadata.name}-{secrets.token_hex(3)}.json"
        write_atomically(path, approval.model_dump_json(indent=1))

    def approvals(self) -> list[Approval]:
        out: list[Approval] = []
        for path in [*sorted(self._folder.approvals.glob("*.json")), *sorted(self._folder.objects.glob("ModelApproval-*.yaml"))]:
            try:
                found = ModelApproval.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))).spec
                when = datetime.fromtimestamp(path.stat().st_mtime, UTC)
            except (OSError, ValueError, yaml.YAMLError):
                continue  # approves nothing; the controller says so
            out.append(Approval(found.model_digest, found.stage, found.approver, when))
        return out

    def evidence(self) -> tuple[EvidenceSpec, ...]:
        return EvidenceReader(self._folder.evidence).read()[0]

    def record(self, name: str) -> Path | None:
        return self._folder.record(name)

    def whoami(self) -> str:
        return getpass.getuser()


Where = Path | RolloutStore


def store_at(where: Where) -> RolloutStore:
    """A path is the state folder there."""
    return FolderStore(where) if isinstance(where, Path) else where
