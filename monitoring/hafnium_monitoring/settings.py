"""What can be set, with a unit and the reason for each default."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class DriftRules:
    """When movement counts as drift. docs/drift.md explains each to an SRE."""

    alpha: float = 0.05
    """Chance of any false Fail over all looks of one rollout, when nothing but harmless movement happens."""
    looks: int = 72
    """Windows that one rollout looks at: 24 h at 5 % and 48 h at 25 % with hourly windows."""
    null_psi: float = 0.02
    """PSI up to this is harmless, whatever the number of rows."""
    score_threshold: float = 0.05
    """The owners' limit of the score distribution's shift, as PSI."""
    missing_margin: float = 0.01
    """A share of missing, unknown or degraded values may move by this much (one point) and nobody cares."""
    missing_threshold: float = 0.02
    """It counts from this much on: significantly more than the margin, and at least two points."""
    min_rows: int = 1_000
    """Fewer rows in either arm are NoData: bins thin out and every test is blind to a PSI of 0.1."""
    rows_max: int = 200_000
    """Rows per arm in memory; at 200,000 a PSI is known to ± 0.0005, more rows decide nothing."""
    seed: int = 0
    """Of the sample beyond `rows_max`."""


ReportWhen = Literal["always", "findings", "never"]


@dataclass(frozen=True)
class ReportSettings:
    """The HTML report: 4 MB each and some seconds of CPU."""

    folder: Path | None = None
    """None: beside the evidence, in `reports/`."""
    when: ReportWhen = "always"
    """`findings`: only when the verdict is Fail or Inconclusive (the loop's default: its windows are short)."""
    keep: int = 20
    """Older reports are removed: 20 are 80 MB."""
    rows_max: int = 20_000
    """Rows per side in the plots; the verdict always uses all."""


@dataclass(frozen=True)
class LoopSettings:
    """`--every`: one machine's CronJob."""

    every_s: float = 10.0
    """Seconds between two looks at the log."""
    window_s_max: float = 60.0
    """A window ends as soon as both arms have enough rows, at the latest after this."""
    log_lag_s: float = 2.0
    """A window ends at least this long before now. It is longer by what is known of the transformer (with a state folder its
    arguments, else its default of 10 s): rows that are not on the disk yet would be missing, and not alike in both arms."""
    settle_s: float = 5.0
    """After a route changed, the next window begins this much later, so that it lies wholly after the change."""
    rules: DriftRules = field(default_factory=DriftRules)
    report: ReportSettings = field(default_factory=lambda: ReportSettings(when="findings"))
