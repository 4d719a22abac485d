"""One rollout from its first look to its end, through the whole production `decide`: objects in, decisions out, nothing replaced."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

import findings
import numpy as np
import worlds

from hafnium_contract.bundle import Bundle
from hafnium_contract.evidence import EvidenceSpec
from hafnium_local.manifest_writer import Pace, Serving, model_rollout
from hafnium_rollout.actions import Decision, EnsureCandidate, LowerPods, Promote, RetireService, Rollback, SetShadow, SetWeight
from hafnium_rollout.decide import decide
from hafnium_rollout.objects import ModelRollout, UserAction, parse_rollout
from hafnium_rollout.observation import Counts, GateLook, LiveRoute, Look, Observation, RouteSeen, Series, ServiceSeen
from hafnium_rollout.statistics import dispersion
from hafnium_rollout.status import RolloutStatus

START = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
CANDIDATE, STABLE = "sha256:" + "a" * 64, "sha256:" + "b" * 64
SHADOW_LOOKS = 14
"""Looks until the first live weight: ten of shadow and those in which weights are taken over."""
STEP_LOOKS = 243
CHANGE = SHADOW_LOOKS + STEP_LOOKS
LOOKS_MAX = 900
DRIFT_LOOKS = 119
"""A drift window: an hour, but for the look in which the weight is taken over."""
HISTORY_LOOKS = 7 * 2880
"""A week: what an operator's Prometheus holds without being asked."""
_LOOK = timedelta(seconds=worlds.LOOK_S)
PACE = Pace(
    shadow_samples=1000, shadow_deadline="20m", weights=((5, "2h", 2000, "150m"), (25, "2h", 5000, "150m")), slower_than="90ms",
    drift_waited_for=("weight",),
)
"""The owners' gates and sample sizes; only the times are a twelfth and a twenty-fourth of theirs."""


@dataclass(frozen=True)
class Ending:
    """How it went. Requests and looks are those of the candidate since the harm began, up to the decision."""

    phase: str
    reason: str
    message: str
    requests: int
    pairs: int
    minutes: float
    looks: int
    skipped: int
    """Steps that a person skipped at their deadline."""

    @property
    def rolled_back(self) -> bool:
        return self.phase == "RolledBack"


def sample(phi_errors: Phi | None, phi_latency: Phi | None, *, shadow: bool = True) -> ModelRollout:
    """The ModelRollout that `hafnium` writes for a bundle, with the dispersion that an operator measured (None: not measured)."""
    named = SimpleNamespace(manifest=SimpleNamespace(model_name="risk", model_version="2", digest=CANDIDATE), digest8="a" * 8)
    data: dict[str, Any] = model_rollout(cast(Bundle, named), "file:///bundles/2", Serving(), PACE)
    spec = data["spec"]
    if shadow:
        spec["strategy"]["steps"][0]["minDwell"] = "5m"
    else:
        del spec["strategy"]["steps"][0]
        spec["gates"] = [g for g in spec["gates"] if "scores" not in g]
    for gate in spec["gates"]:
        phi = {"errors": phi_errors, "latency": phi_latency}.get(gate["name"])
        if phi is not None:
            gate["compare"] = {**gate["compare"], "dispersion": {"phi": phi.phi, "weight": 0.5, "clump": phi.clump}}
    return parse_rollout(data, "sample")


@dataclass(frozen=True)
class Phi:
    """Dispersion of one gate, as an operator measured it: at an even split, and the part that is the same at every weight."""

    phi: float
    clump: float


def measure_phi(world: str, rng: np.random.Generator) -> tuple[Phi, Phi]:
    """φ of errors and of slow requests from a week of the stable model: once with its pods in two halves, once with 5 % of them."""
    found: list[list[dispersion.Measured]] = []
    for share in (0.5, 0.05):
        shape = (1, HISTORY_LOOKS)
        arms = worlds.arms(world if world in ("wave", "retries", "noise") else "constant", rng, shape, 0, worlds.Harm())
        na = rng.binomial(worlds.REQUESTS, share, shape)
        nb = worlds.REQUESTS - na
        (ba, ta), (bb, tb) = worlds.bad_counts(world, rng, na, arms.bad_candidate), worlds.bad_counts(world, rng, nb, arms.bad_stable)
        sa, sb = worlds.slow_counts(rng, na, arms.late_candidate)[0], worlds.slow_counts(rng, nb, arms.late_stable)[0]
        columns = [(ba[0], ta[0], bb[0], tb[0]), *((sa[:, i], na[0], sb[:, i], nb[0]) for i in (1, 2))]
        found.append([
            dispersion.measure([dispersion.ArmsLook(*x) for x in zip(*(c.tolist() for c in four), strict=True)], worlds.LOOK_S)
            for four in columns
        ])
    each = [Phi(large.phi, dispersion.clump_of(large, small)) for large, small in zip(*found, strict=True)]
    return each[0], Phi(max(p.phi for p in each[1:]), max(p.clump for p in each[1:]))


class Climb:
    """A rollout and the world around it. `step` is one look."""

    def __init__(
        self, world: str, seed: tuple[int, ...], harm: worlds.Harm, phi: tuple[Phi, Phi] | None, *, shadow: bool = True,
        drift: bool = True, person_skips: bool = False,
    ) -> None:
        """`phi`: dispersion of errors and of slow requests as measured; None: not given. `person_skips`: at a deadline a person goes on,
        so that the rollout is exposed to all looks of all weights."""
        self.rng = np.random.default_rng(np.random.SeedSequence(seed))
        self.world, self.harm, self.shadow = world, harm, shadow
        self.rollout = sample(*(phi or (None, None)), shadow=shadow)
        self.person_skips, self.skipped = person_skips, 0
        self.status = RolloutStatus()
        self.route = RouteSeen("risk", None, 0, shadow=False)
        self.now = START
        self.look = 0
        self.managed: frozenset[str] = frozenset()
        self.service = self.rollout.service_name(CANDIDATE)
        change = CHANGE if shadow else STEP_LOOKS
        self.arms = worlds.arms(world, self.rng, (1, LOOKS_MAX), change, harm)
        self.innocent = worlds.arms(world, self.rng, (1, LOOKS_MAX), change, worlds.Harm()) if harm.live_only else self.arms
        self.counts: dict[int, tuple[Any, ...]] = {}
        self.drift = findings.Drift(self.rng, world, harm.drift) if drift else None
        self.window_from = -1
        self.window_step = -1
        self.evidence: tuple[EvidenceSpec, ...] = ()

    def run(self, *, to_end: bool = True) -> Ending:
        """To the end of the rollout, or until the candidate gets all requests (which then counts as promoted)."""
        requests = pairs = looks = 0
        ends = ("Promoted", "RolledBack", *(() if self.person_skips else ("Paused",)))
        while self.status.phase not in ends and self.look < LOOKS_MAX - 1:
            had = self.step()
            if self.status.rollback is not None and self.status.phase != "RolledBack":
                if had is not None and self.look - 1 >= self.harm.from_look:
                    requests, pairs, looks = requests + had[0], pairs + had[1], looks + 1
                return self._ending("RolledBack", self.status.rollback.reason, self.status.rollback.message, requests, pairs, looks)
            if not to_end and self.route.weight == 100:
                return self._ending("Promoted", "reached 100 %", "", requests, pairs, looks)
            # A look that begins before the weight is seen counts for no rule, here and for the rivals.
            if had is None:
                continue
            if self.look - 1 >= self.harm.from_look:
                requests, pairs, looks = requests + had[0], pairs + had[1], looks + 1
        return self._ending(self.status.phase, self.status.reason, self.status.message, requests, pairs, looks)

    def _ending(self, phase: str, reason: str, message: str, requests: int, pairs: int, looks: int) -> Ending:
        return Ending(phase, reason, message, requests, pairs, looks * worlds.LOOK_S / 60.0, self.look, self.skipped)

    def step(self) -> tuple[int, int] | None:
        """One look. Returns (candidate requests, pairs) if the look counted, else None."""
        started = self.now
        self.now += _LOOK
        weight = self.route.weight if self.route.candidate is not None else 0
        look, had = self._see(started, weight)
        live = LiveRoute(
            {self.route.stable: 100 - weight, **({self.service: weight} if weight else {})} if weight < 100 else {self.service: 100},
            frozenset({self.service}) if self.route.shadow else frozenset(),
        )
        services = {"risk": ServiceSeen("risk", STABLE, ready=True)}
        if self.managed:
            services[self.service] = ServiceSeen(self.service, CANDIDATE, ready=True)
        seen = Observation(
            services=services, declared=self.managed | {"risk"}, managed=self.managed, route=self.route, live=live, look=look,
            evidence=self.evidence, actions=self._person(),
        )
        before = self.status.step
        decision = self.decided(seen)
        self.status = decision.status
        counted = before is not None and self.status.step is not None and before.weight_effective_since is not None and (
            started >= before.weight_effective_since + self.rollout.spec.strategy.scrape_lag)
        for action in decision.actions:
            match action:
                case EnsureCandidate():
                    self.managed = frozenset({self.service})
                case SetShadow():
                    self.route = RouteSeen("risk", self.service, 0, shadow=True)
                case SetWeight():
                    self.route = RouteSeen("risk", self.service, action.weight, shadow=False)
                case Promote():
                    self.route = RouteSeen(action.service, None, 0, shadow=False)
                case Rollback():
                    self.route = RouteSeen("risk", None, 0, shadow=False)
                case RetireService():
                    self.managed = frozenset()
                case LowerPods():
                    pass  # none were raised
        self.look += 1
        self._monitor()
        return had if counted else None

    def decided(self, seen: Observation) -> Decision:
        """Production's answer to what was seen."""
        return decide(self.rollout, self.status, seen, self.now)

    def _person(self) -> tuple[UserAction, ...]:
        if not self.person_skips or self.status.phase != "Paused":
            return ()
        self.skipped += 1
        return (UserAction(type="SkipStep", id=f"skip-{self.look}", candidate_digest=CANDIDATE, reason="go on"),)

    def _see(self, started: datetime, weight: int) -> tuple[Look, tuple[int, int]]:
        key = -1 if self.route.shadow else weight
        if key not in self.counts:
            self.counts[key] = self._draw(key)
        nc, ns, cb, ct, sb, st, c_slow, s_slow = self.counts[key]
        i = self.look
        requests, pairs = nc[i], 0
        errors = GateLook((Series(Counts(sb[i], st[i]), Counts(cb[i], ct[i])),))
        slow = GateLook(tuple(
            Series(Counts(s_slow[i][k], ns[i]), Counts(c_slow[i][k], nc[i]), f"> {worlds.BOUNDS_MS[k]:g} ms") for k in (1, 2)))
        gates = {"errors": errors, "latency": slow}
        if self.shadow:
            differences: tuple[float, ...] = ()
            if self.route.shadow:
                pairs = requests
                differences = tuple(score_differences(self.rng, requests, self.harm.score).tolist())
            gates["scores"] = GateLook((Series(Counts(0, ns[i]), Counts(0, nc[i])),), differences)
        live = not self.route.shadow
        return Look(started, self.now, gates, ns[i], nc[i] if live else 0, nc[i]), (requests, pairs)

    def _draw(self, key: int) -> tuple[Any, ...]:
        """All looks' counts at one weight (−1: shadow)."""
        harm, arms = self.harm, self.arms
        if key == -1 and harm.live_only:
            harm, arms = worlds.Harm(), self.innocent
        total = np.full(LOOKS_MAX, worlds.REQUESTS)
        nc = total if key == -1 else self.rng.binomial(total, key / 100.0)
        ns = total if key == -1 else total - nc
        cb, ct = worlds.bad_counts(self.world, self.rng, nc, arms.bad_candidate[0])
        sb, st = worlds.bad_counts(self.world, self.rng, ns, arms.bad_stable[0])
        c_slow = worlds.slow_counts(self.rng, nc, arms.late_candidate[0], harm.slow)
        s_slow = worlds.slow_counts(self.rng, ns, arms.late_stable[0])
        return tuple(x.tolist() for x in (nc, ns, cb, ct, sb, st, c_slow, s_slow))

    def _monitor(self) -> None:
        """The drift job: a window of an hour whenever one is full since the step's weight was seen."""
        step = self.status.step
        if self.drift is None or step is None or step.weight_effective_since is None or not step.weight_observed:
            self.window_from = -1
            return
        if self.window_from < 0 or step.index != self.window_step:
            self.window_from, self.window_step = self.look + 1, step.index  # the scrape's lag has passed by then
            return
        if self.look - self.window_from < DRIFT_LOOKS:
            return
        rows = int(worlds.REQUESTS * DRIFT_LOOKS * step.weight_observed / 100)
        found = self.drift.window(rows, worlds.REQUESTS * DRIFT_LOOKS - rows)
        self.evidence = (*self.evidence, EvidenceSpec(
            model_digest=CANDIDATE, kind="drift", window_start=START + self.window_from * _LOOK, window_end=self.now,
            verdict=found.verdict, samples=rows, message=found.message, both_arms=found.both_arms, created_at=self.now,
        ))
        self.window_from = self.look


def score_differences(rng: np.random.Generator, count: int, shift: float) -> worlds.Floats:
    """Candidate − stable on the same requests: a little noise everywhere, and one request in fifty that jumps by .3; mean `shift`."""
    jump = np.where(rng.random(count) < 0.02, 0.294, -0.006)
    return np.clip(rng.normal(shift, 0.03, count) + jump, -1.0, 1.0)
