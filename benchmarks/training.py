"""`make bench-training`: how good models are on the simulator and, where the file is at hand, on the ULB card-fraud data.

HAFNIUM_ULB names creditcard.csv (docs/contracts.md says where to get it). Each figure is measured on what follows the training in time.
"""

from __future__ import annotations

import os
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pandas as pd
from sklearn.metrics import average_precision_score, roc_auc_score

sys.path.insert(0, str(Path(__file__).parent))
from figures import Figure, publish

from hafnium_contract.contract_file import load_contract
from hafnium_contract.encoding import assemble, encode_column
from hafnium_contract.progress import Silent
from hafnium_training.feature_store import join, write_repo
from hafnium_training.pipeline import TrainOptions, train
from hafnium_training.simulation import simulate
from hafnium_training.tables import event_times, feature_column, labels, read_table

EXAMPLES = Path(__file__).parents[1] / "examples"
SEEDS = (1, 2, 3)


def tested(contract_file: Path, data: Path, until: datetime, folder: Path, seed: int) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
    """Trains with what was known at `until`; scores and labels of all rows after it."""
    contract = load_contract(contract_file)
    result = train(TrainOptions(contract_file, data, folder / f"{data.stem}-{seed}", seed=seed, until=until), Silent())
    frame = read_table(data, contract)
    times = event_times(contract, frame)
    columns = {f.name: encode_column(f, frame[column]) for f in contract.features if (column := feature_column(f)) is not None}
    matrix = assemble(contract, columns, times.astype("int64").to_numpy() / 1e6)
    later = (times >= pd.Timestamp(until)).to_numpy()
    session = ort.InferenceSession(str(result.bundle.model_path))
    (score,) = session.run(["score"], {"features": matrix[later]})
    return np.asarray(score), labels(contract, frame).to_numpy()[later], frame[later]


def card_precision(score: np.ndarray, y: np.ndarray, frame: pd.DataFrame, cards: int = 100) -> float:
    """Mean over days of the share of compromised cards among the `cards` highest scored of the day (Le Borgne et al.)."""
    table = pd.DataFrame({"day": frame["event_time"].dt.date, "card": frame["customer_id"], "score": score, "y": y})
    per_card = table.groupby(["day", "card"], as_index=False).agg(score=("score", "max"), y=("y", "max"))
    top = per_card.sort_values("score", ascending=False).groupby("day").head(cards)
    return float(top.groupby("day")["y"].mean().mean())


def main() -> None:
    figures: dict[str, Figure] = {}
    skipped: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        contract = EXAMPLES / "unified-risk" / "contract.yaml"
        pr, card = [], []
        for seed in SEEDS:
            simulate(folder / f"sim{seed}", days=90, seed=seed)
            repo, table = folder / f"repo{seed}", folder / f"table{seed}.parquet"
            write_repo(load_contract(contract), folder / f"sim{seed}", repo)
            join(load_contract(contract), repo, folder / f"sim{seed}", table)
            score, y, frame = tested(contract, table, datetime(2026, 3, 15, tzinfo=UTC), folder, seed)
            pr.append(float(average_precision_score(y, score)))
            card.append(card_precision(score, y, frame))
        figures["sim_pr_auc"] = Figure(float(np.median(pr)), "", "higher", rounds=tuple(pr))
        figures["sim_card_precision_100"] = Figure(float(np.median(card)), "", "higher", rounds=tuple(card))
        ulb = os.environ.get("HAFNIUM_ULB")
        if ulb is None:
            skipped.append("ulb_auc, ulb_ap: set HAFNIUM_ULB to creditcard.csv")
        else:
            contract = EXAMPLES / "creditcard" / "contract.yaml"
            times = event_times(load_contract(contract), read_table(Path(ulb), load_contract(contract))).sort_values()
            until = times.iloc[int(0.7 * len(times))].to_pydatetime()
            auc, ap = [], []
            for seed in SEEDS:
                score, y, _ = tested(contract, Path(ulb), until, folder, seed)
                auc.append(float(roc_auc_score(y, score)))
                ap.append(float(average_precision_score(y, score)))
            figures["ulb_auc"] = Figure(float(np.median(auc)), "", "higher", rounds=tuple(auc))
            figures["ulb_ap"] = Figure(float(np.median(ap)), "", "higher", goal=0.70, rounds=tuple(ap))
    sys.exit(1 if publish("training", figures, skipped) else 0)


if __name__ == "__main__":
    main()
