"""The HTML report that a person looks at: Evidently's plots, with our PSI as its drift method.

Evidently's own PSI uses bins of equal width and drops nulls; its automatic choice of method flips at 1,000 rows. So one method
of ours is registered with it and pinned for every column, and Evidently's number is checked against ours: `<name>.json` has
both. Missing values are not in its plots (it drops them): the evidence has their shares.

Evidently and pandas are imported when the first report is written: 3.6 s and 250 MB.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hafnium_contract.evidence import EvidenceSpec
from hafnium_contract.model_contract import Feature, ModelContract
from hafnium_contract.whole_files import write_atomically
from hafnium_monitoring.comparison import SCORE
from hafnium_monitoring.psi import SCORE_QUANTILES, Binning, feature_binning, psi_test, quantile_binning
from hafnium_monitoring.samples import Sample
from hafnium_monitoring.settings import DriftRules, ReportSettings

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 1
METHOD = "hafnium_psi"
UNKNOWN_LABEL = "(unknown)"
EQUAL_TOLERANCE = 1e-9


@dataclass(frozen=True)
class _Column:
    """One column of the report: its bins, and how its values are shown."""

    name: str
    binning: Binning
    labels: tuple[str, ...]
    """Category code + 1 → label; empty for numbers."""
    threshold: float
    drifted: bool

    def psi(self, current: npt.NDArray[np.float32], reference: npt.NDArray[np.float32]) -> float:
        """PSI of the present values, as Evidently sees them."""
        present = [x[~np.isnan(x)] for x in (current, reference)]
        return psi_test(*(self.binning.counts(x) for x in present), ordered=self.binning.ordered).psi

    def shown(self, values: npt.NDArray[np.float32]) -> Any:
        """Numbers as they are, categories by name, missing as None."""
        if not self.labels:
            return values.astype(np.float64)
        known = (values >= 0) & (values < len(self.labels) - 1)
        codes = np.where(known, values, -1).astype(np.int64) + 1
        return [None if math.isnan(v) else self.labels[c] for v, c in zip(values, codes, strict=True)]

    def encoded(self, series: pd.Series[Any]) -> npt.NDArray[np.float32]:
        """The inverse of `shown`."""
        if not self.labels:
            return np.asarray(series, np.float32)
        codes = {label: i - 1 for i, label in enumerate(self.labels)}
        return np.array([codes[str(v)] for v in series], np.float32)


class _OurPsi:
    """The drift method that Evidently calls: it gives the column's name with the values, nulls dropped.

    Evidently's registry is global and never forgets, so one object is registered once and told the columns of each run.
    """

    def __init__(self) -> None:
        self.columns: dict[str, _Column] = {}
        self.registered = False

    def __call__(self, reference: pd.Series[Any], current: pd.Series[Any], kind: Any, threshold: float) -> tuple[float, bool]:
        column = self.columns[str(reference.name)]
        # Whether it drifted is decided over all features together (Benjamini-Hochberg), so it is told, not computed here.
        return column.psi(column.encoded(current), column.encoded(reference)), column.drifted


_METHOD = _OurPsi()


def _register() -> None:
    if _METHOD.registered:
        return
    from evidently.legacy.calculations.stattests import StatTest, register_stattest
    from evidently.legacy.core import ColumnType

    kinds = [ColumnType.Numerical, ColumnType.Categorical]
    method: Callable[..., tuple[float, bool]] = _METHOD
    register_stattest(StatTest(METHOD, "PSI on reference quantiles (Hafnium)", kinds, 0.1), method)
    _METHOD.registered = True


def write_report(
    settings: ReportSettings, name: str, evidence: EvidenceSpec, contract: ModelContract, window: Sample, reference: Sample,
    rules: DriftRules,
) -> Path:
    """Writes `<folder>/<name>-<time of the run>.html` and `.json` (window against reference); returns the HTML's path.

    Each run has its own: a window that is judged again finds its evidence written, and must not replace the report that this links to.
    Old ones are removed once this run's evidence is written (`write_with_report`).
    Columns without any value on one side can't be plotted and are listed in the JSON under `notInReport`. Raises whatever
    Evidently raises.
    """
    import evidently
    import pandas as pd
    from evidently import DataDefinition, Dataset, Report
    from evidently.metrics import ValueDrift

    assert settings.folder is not None  # noqa: S101 - the caller asked for a report
    rng = np.random.default_rng(rules.seed)
    current, base = _thin(window, settings.rows_max, rng), _thin(reference, settings.rows_max, rng)
    drifted = {v.name for v in evidence.values if v.drifted and v.compared_with == "reference"}
    columns = _columns(contract, base, drifted, rules)
    usable = [c for c in columns if _has_values(current, c.name) and _has_values(base, c.name)]
    _METHOD.columns = {c.name: c for c in usable}
    _register()
    definition = DataDefinition(
        numerical_columns=[c.name for c in usable if not c.labels], categorical_columns=[c.name for c in usable if c.labels],
    )
    frames = [
        Dataset.from_pandas(pd.DataFrame({c.name: c.shown(_values(side, c.name)) for c in usable}), data_definition=definition)
        for side in (current, base)
    ]
    metrics = [ValueDrift(column=c.name, method=METHOD, threshold=c.threshold) for c in usable]
    snapshot = Report(metrics, include_tests=True).run(frames[0], frames[1])
    theirs = {m["config"]["column"]: float(m["value"]) for m in snapshot.dict()["metrics"]}
    checked = [_cross_check(c, theirs[c.name], current, base) for c in usable]
    settings.folder.mkdir(parents=True, exist_ok=True)
    html = settings.folder / f"{name}-{evidence.created_at.astimezone(UTC):%Y%m%dt%H%M%S%fz}.html"
    write_atomically(html, snapshot.get_html_str(as_iframe=False))
    write_atomically(html.with_suffix(".json"), json.dumps({
        "schemaVersion": SCHEMA_VERSION, "evidence": evidence.model_dump(mode="json"),
        "evidently": {"version": evidently.__version__, "method": METHOD,
                      "rows": {"window": current.rows, "reference": base.rows}, "columns": checked},
        "notInReport": [c.name for c in columns if c not in usable],
    }, indent=2, allow_nan=False))
    return html


def _columns(contract: ModelContract, base: Sample, drifted: set[str], rules: DriftRules) -> list[_Column]:
    def column(f: Feature) -> _Column:
        labels = (UNKNOWN_LABEL, *f.categories) if f.dtype == "category" else ()
        return _Column(f.name, feature_binning(f, base.features[f.name]), labels, f.drift.threshold, f.name in drifted)

    features = [column(f) for f in contract.inputs if f.name in base.features and f.drift.test == "psi"]
    scores = _Column(SCORE, quantile_binning(base.score, SCORE_QUANTILES), (), rules.score_threshold, SCORE in drifted)
    return [*features, scores]


def _values(sample: Sample, name: str) -> npt.NDArray[np.float32]:
    return sample.score if name == SCORE else sample.features[name]


def _has_values(sample: Sample, name: str) -> bool:
    return bool((~np.isnan(_values(sample, name))).any())


def _thin(sample: Sample, rows_max: int, rng: np.random.Generator) -> Sample:
    if sample.rows <= rows_max:
        return sample
    mask = np.zeros(sample.rows, np.bool_)
    mask[rng.choice(sample.rows, rows_max, replace=False)] = True
    return sample.where(mask)


def _cross_check(column: _Column, theirs: float, current: Sample, base: Sample) -> dict[str, Any]:
    ours = column.psi(_values(current, column.name), _values(base, column.name))
    return {"column": column.name, "evidently": theirs, "ours": ours, "equal": abs(ours - theirs) <= EQUAL_TOLERANCE}


def remove_report(evidence: EvidenceSpec) -> None:
    """Removes the report of evidence that wasn't written: nothing links to it."""
    if evidence.report:
        html = Path(evidence.report)
        for path in (html, html.with_suffix(".json")):
            with suppress(OSError):
                path.unlink()


def prune(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` drift reports (HTML with its JSON)."""
    reports = sorted(folder.glob("drift-*.html"), key=lambda p: (p.stat().st_mtime_ns, p.name))
    for html in reports[: max(0, len(reports) - keep)]:
        html.unlink(missing_ok=True)
        html.with_suffix(".json").unlink(missing_ok=True)
