"""Production's Fail processes over many rollouts at once, as arrays: 1,000 rollouts in each world would take `decide` an hour.

It is the same mathematics written a second time, and so it could drift away: tests/rollouts/test_bench_rollouts.py holds it against
`judge`, look by look, on random paths of every world, to nine digits. The schedule is fixed: shadow, 240 looks at 5 %, 240 at 25 %.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import climb
import numpy as np
import worlds
from rivals import NEVER, Paths
from worlds import Floats, Ints

from hafnium_rollout.intake import alpha_parts, alphas_of
from hafnium_rollout.objects import RolloutSpec
from hafnium_rollout.statistics import dispersion, tilt

_RATIOS = np.array(tilt.FAIL_RATIOS)
_PRICES = np.array(tilt.FAIL_PRICES)
_NOTHING = -1e6


def log_e_fail(kc: Floats, nc: Floats, ks: Floats, ns: Floats, phi: Floats, *, restarts: bool) -> Floats:
    """ln of the e-value against "no worse", after each look, [rollout, look]. Arguments as in tilt.add_fail, looks of 30 s."""
    rollouts, looks = kc.shape
    out = np.empty((rollouts, looks))
    sums = np.zeros((rollouts, len(_RATIOS)))
    running = np.full_like(sums, _NOTHING)
    begun, since = 0, 0.0
    for i in range(looks):
        rho = (nc[:, i] / ns[:, i])[:, None]
        x = _RATIOS * (1.0 + rho) / (1.0 + rho * _RATIOS)
        gains = (kc[:, i, None] * np.log(x) - ks[:, i, None] * np.log((1.0 + rho * _RATIOS) / (1.0 + rho))) / phi[:, i, None]
        sums += gains
        plain = _log_of_shares(sums)
        if not restarts:
            out[:, i] = plain
            continue
        if since >= tilt.RESTART_EVERY_S:
            begun, since = begun + 1, 0.0
            running = np.logaddexp(running, math.log(tilt.restart_share(begun)))
        running = np.maximum(running + gains, _NOTHING)
        since += worlds.LOOK_S if i else 0.0  # the very first look has no look before it to be counted from
        all_begun = np.logaddexp(plain + math.log(tilt.PLAIN_SHARE), _log_of_shares(running))
        out[:, i] = np.logaddexp(all_begun, math.log(tilt.waiting_share(begun)))
    return out


def _log_of_shares(logs: Floats) -> Floats:
    values = logs - _PRICES
    top = values.max(axis=1)
    return top + np.log(np.exp(values - top[:, None]).sum(axis=1))


@dataclass(frozen=True)
class Evidence:
    """ln of the e-values of both gates after each look, and what they must reach."""

    errors: Floats
    latency: Floats
    goal_errors: float
    goal_latency: float

    def fails_at(self) -> Ints:
        """Look of the first Fail per rollout; NEVER if there is none."""
        failed = (self.errors >= self.goal_errors) | (self.latency >= self.goal_latency)
        return np.where(failed.any(axis=1), np.argmax(failed, axis=1), NEVER)


def evidence(paths: Paths, spec: RolloutSpec, phi: list[tuple[climb.Phi, climb.Phi]] | None) -> Evidence:
    """The sample's errors and latency gates over the paths. `phi`: per rollout, as measured; None: not given."""
    def phis(which: int, nc: Ints, ns: Ints) -> Floats:
        if phi is None:
            return np.ones(nc.shape)
        shares = nc / (nc + ns)
        return np.array([
            [dispersion.at_weight(p[which].phi, 0.5, w, p[which].clump) for w in row]
            for p, row in zip(phi, shares.tolist(), strict=True)
        ])

    restarts = phi is not None
    errors = log_e_fail(
        paths.bad_c, paths.total_c, paths.bad_s, paths.total_s, phis(0, paths.total_c, paths.total_s), restarts=restarts)
    asked = phis(1, paths.asked_c, paths.asked_s)
    slow = [
        log_e_fail(paths.slow_c[..., k], paths.asked_c, paths.slow_s[..., k], paths.asked_s, asked, restarts=restarts) for k in (1, 2)
    ]
    parts = alpha_parts(spec)
    goals = {g.name: math.log(1.0 / alphas_of(g, parts)[0]) for g in spec.gates if g.counted}
    return Evidence(errors, np.logaddexp(slow[0], slow[1]) - math.log(2.0), goals["errors"], goals["latency"])
