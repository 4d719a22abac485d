"""Two plots of the results, as small SVG files beside the JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

mpl.use("svg")
mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "hafnium", "font.size": 9})

SHOWN = (
    ("Hafnium, φ measured", "#1b6ca8"), ("Argo Rollouts, 5 min each look, failureLimit 3, tuned", "#d1733c"),
    ("Flagger, threshold 5, tuned", "#b8a13a"), ("z-test at each look, tuned", "#8a5aa8"), ("Mann-Whitney every 30 min, tuned", "#6b8f5e"),
)


def draw(results: Any, wanted: list[str], folder: Path) -> None:
    """rollouts-false.svg: false rollbacks by world; rollouts-delay.svg: requests until rollback by harm."""
    rules = [(n, c) for n, c in SHOWN if n in results.aa]
    figure, axes = plt.subplots(figsize=(8, 3.2))
    for i, (name, colour) in enumerate(rules):
        values = [1000 * f / of if of else 0.0 for f, of in (results.aa[name].get(w, (0, 0)) for w in wanted)]
        axes.bar(np.arange(len(wanted)) + i * 0.16, np.maximum(values, 0.5), 0.15, color=colour, label=name)
    axes.axhline(10, color="black", linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    axes.set_ylim(0.3, 1500)
    axes.set_xticks(np.arange(len(wanted)) + 0.16 * (len(rules) - 1) / 2, wanted)
    axes.set_ylabel("false rollbacks per 1,000 (0 drawn as .5)")
    _save(figure, axes, folder / "rollouts-false.svg")
    names = [n for n in results.delays if n != "+1 pt after 60 min"]
    if not names:
        return
    figure, axes = plt.subplots(figsize=(8, 3.2))
    for i, (name, colour) in enumerate((n, c) for n, c in SHOWN if any(n in results.delays[h] for h in names)):
        for j, harm in enumerate(names):
            row = results.delays[harm].get(name)
            if row is None or not np.isfinite(row["median"]):
                continue
            x = j + i * 0.16
            axes.plot([x, x], [row["median"], row["p90"] if np.isfinite(row["p90"]) else 1e6], color=colour, linewidth=2)
            axes.plot([x], [row["median"]], "o", color=colour, markersize=5, label=name if j == 0 else None)
    axes.set_yscale("log")
    axes.set_ylim(100, 60_000)
    axes.set_xticks(np.arange(len(names)) + 0.32, names)
    axes.set_ylabel("candidate requests: median (dot) to p90")
    _save(figure, axes, folder / "rollouts-delay.svg")


def _save(figure: Any, axes: Any, path: Path) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncol=2)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
