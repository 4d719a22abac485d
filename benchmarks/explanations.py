"""How close explanations come to exact Shapley values, on a bundle's own model and reference rows.

    python benchmarks/explanations.py build/bench/serving/bundle

Exact values take all 2^n subsets of the inputs, so a contract of at most 16 inputs. A third of the rows are those with the highest
scores, a third of the next 2,000, a third any. Personal features are not in the reference sample and count as missing.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).parent))
from figures import Figure, publish

from hafnium_contract.bundle import open_bundle
from hafnium_contract.encoding import Matrix
from hafnium_contract.inference_log import FEATURE_PREFIX
from hafnium_training.export import Scorer
from hafnium_transformer.explanation import Explainer, Method

Floats = npt.NDArray[np.float64]
INPUTS_MAX = 16
NEXT_ROWS = 2_000
TOP = 3
FIRST = 5


def exact_values(scorer: Scorer, row: Matrix) -> Floats:
    """Shapley values by definition."""
    n = row.size
    known = ((np.arange(2**n)[:, None] >> np.arange(n)) & 1).astype(bool)
    asked = np.where(known, row, np.float32(np.nan))
    value = np.concatenate([scorer(asked[i:i + 256]) for i in range(0, len(asked), 256)]).astype(np.float64)
    weight = np.array([math.factorial(k) * math.factorial(n - k - 1) / math.factorial(n) for k in range(n)])
    size, out = known.sum(axis=1), np.zeros(n)
    for j in range(n):
        without = np.flatnonzero(~known[:, j])
        out[j] = (weight[size[without]] * (value[without + (1 << j)] - value[without])).sum()
    return out


def compared(found: list[Floats], exact: list[Floats]) -> dict[str, float]:
    """What the table in docs/serving.md shows."""
    rank, sign, first, five, error = [], [], [], [], []
    for a, b in zip(found, exact, strict=True):
        order, own = np.argsort(-np.abs(b)), np.argsort(-np.abs(a))
        top = order[:TOP][np.abs(b[order[:TOP]]) > 0.01 * np.abs(b).max()]
        rank.append(spearmanr(np.abs(a), np.abs(b)).statistic)
        sign.append(np.mean(np.sign(a[top]) == np.sign(b[top])))
        first.append(own[0] == order[0])
        five.append(len(set(own[:FIRST]) & set(order[:FIRST])) / FIRST)
        error.append(np.abs(a - b).max() / np.abs(b).max())
    return {"rank": float(np.mean(rank)), "sign": float(np.mean(sign)), "first": float(np.mean(first)), "five": float(np.mean(five)),
            "error": float(np.median(error))}


def rows_of(path: Path, names: tuple[str, ...], scorer: Scorer, count: int) -> Matrix:
    table = pq.read_table(path / "reference.parquet").to_pandas()
    X = np.full((len(table), len(names)), np.nan, np.float32)
    for j, name in enumerate(names):
        if FEATURE_PREFIX + name in table:
            X[:, j] = table[FEATURE_PREFIX + name]
    order, rng, third = np.argsort(-scorer(X)), np.random.default_rng(0), count // 3
    following = rng.permutation(order[third:third + NEXT_ROWS])[:third]
    return X[np.concatenate([order[:third], following, rng.permutation(len(X))[:third]])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rows", type=int, default=120)
    arguments = parser.parse_args()
    bundle = open_bundle(arguments.bundle)
    names = bundle.contract.input_names
    if len(names) > INPUTS_MAX:
        sys.exit(f"{arguments.bundle}: {len(names)} inputs; exact values can be had for at most {INPUTS_MAX}")
    scorer = Scorer(bundle.model_path.read_bytes())
    rows = rows_of(bundle.path, names, scorer, arguments.rows)
    exact = [exact_values(scorer, row) for row in rows]
    figures: dict[str, Figure] = {}
    ways: list[tuple[str, Method, int]] = [("substitution", "substitution", 2), *((f"shapley_{o}", "shapley", o) for o in (4, 8, 16, 32))]
    for name, method, orders in ways:
        explainer = Explainer.of(len(names), method, orders)
        if explainer is None:
            continue
        found = [explainer.shares(float(scorer(row[None])[0]), scorer(explainer.asked(row)))[0] for row in rows]
        figures[f"{name}_rows"] = Figure(explainer.rows, "", "lower")
        for key, value in compared(found, exact).items():
            figures[f"{name}_{key}"] = Figure(value, "", "lower" if key == "error" else "higher")
    publish("explanations", figures)


if __name__ == "__main__":
    main()
