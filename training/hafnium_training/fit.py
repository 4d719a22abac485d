"""Mini-batch training: seeded, single-threaded, stopped by validation PR-AUC.

The same data, hyperparameters and seed give the same weights to the bit, in any process of one machine: the number of threads
changes the order of sums, so it is fixed to one (at these sizes a second thread gains nothing; the search uses the other core).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hafnium_contract.encoding import Matrix
from hafnium_contract.errors import HafniumError
from hafnium_training.dataset import Dataset, Split
from hafnium_training.hyperparameters import Hyperparameters
from hafnium_training.losses import (
    Hint,
    causes,
    monotonicity,
    moved,
    nearby,
    positive_weight,
    prior_correction,
    smoothness,
    supervised,
)
from hafnium_training.network import MonotoneNetwork, Prepared, Preprocessing, joined
from hafnium_training.ranking import average_precision

MASKED_SHARE = 0.02
"""Share of values that training hides: a feature that was never missing in history will be, when its store is down."""
WARM_UP = 0.1
PATIENCE = 15
"""Epochs without a better validation PR-AUC before training stops."""
SMOOTHED_EPOCHS = 3
"""The PR-AUC that decides is a mean over so many epochs: on forty positives the best single epoch is often a lucky early one."""
EXTRA_LOSS_ROWS = 256
"""Rows of a batch that the two regularisers look at: they are averages, and each costs a forward pass."""
HINT_ROWS_MAX = 4096
GRADIENT_MAX = 1.0
AVERAGE = 0.98
"""Decay of the running mean of the weights, per step. With few positives single steps jump; their mean does not."""
ROWS_AT_ONCE = 65_536
STEPS_PER_EPOCH_MAX = 400
"""Files of many million rows: an epoch is this many random batches."""


@dataclass(frozen=True)
class Prepare:
    """A split after preprocessing: made once, shared by all trials of a search (tensors only: it is sent to workers)."""

    preprocessing: Preprocessing
    train: Prepared
    train_y: Tensor
    validation: Prepared
    validation_y: npt.NDArray[np.int8]
    hints: tuple[Hint, ...]


@dataclass(frozen=True)
class Epoch:
    """Where training stands after an epoch (from 1)."""

    number: int
    loss: float
    validation_pr_auc: float
    """Mean over the last SMOOTHED_EPOCHS epochs."""


@dataclass(frozen=True)
class Fitted:
    """The best network of a training, and how it came about."""

    network: MonotoneNetwork
    prior_correction: float
    """To be added to its logit: the loss weighed positives more than they are."""
    epochs: tuple[Epoch, ...]
    best: Epoch


@contextmanager
def deterministic() -> Generator[None]:
    """One thread and only operations with a fixed order of sums; put back as it was afterwards.

    The debug mode "error" is the same switch as `torch.use_deterministic_algorithms(True)`, which would first import
    torch's compiler for a setting of its own: five seconds.
    """
    threads, mode = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    torch.set_num_threads(1)
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.set_num_threads(threads)


def prepare(split: Split, seed: int) -> Prepare:
    """Scalings from the training part, and all parts brought to scale (float32 tensors)."""
    with torch.no_grad(), deterministic():
        preprocessing = Preprocessing(split.train.contract, split.train.X)
        hints: list[Hint] = []
        rng = np.random.default_rng(seed)
        for cause in causes(split.train.contract):
            some = np.sort(rng.permutation(split.train.rows)[:HINT_ROWS_MAX])
            part = split.train.take(some)
            hints.append(Hint(cause, _prepared(preprocessing, part.X), _prepared(preprocessing, moved(part, cause))))
        return Prepare(
            preprocessing, _prepared(preprocessing, split.train.X), torch.tensor(split.train.y, dtype=torch.float32),
            _prepared(preprocessing, split.validation.X), np.array(split.validation.y), tuple(hints),
        )


def _prepared(preprocessing: Preprocessing, X: Matrix) -> Prepared:
    parts = [preprocessing(torch.tensor(X[i:i + ROWS_AT_ONCE])).to(torch.float32) for i in range(0, len(X), ROWS_AT_ONCE)]
    return joined(parts)


def fit(
    prepared: Prepare, hyper: Hyperparameters, *, epochs: int, seed: int, on_epoch: Callable[[Epoch], None] | None = None,
) -> Fitted:
    """Trains at most `epochs` epochs. `on_epoch` hears of each one, and may raise to end a trial early.

    Raises HafniumError when the loss is not finite (a learning rate far too high).
    """
    with deterministic():
        return _fit(prepared, hyper, epochs, seed, on_epoch)


def _fit(
    data: Prepare, hyper: Hyperparameters, epochs: int, seed: int, on_epoch: Callable[[Epoch], None] | None,
) -> Fitted:
    rows, positives = len(data.train_y), int(data.train_y.sum())
    weight = positive_weight(positives, rows, hyper.positive_power)
    network = MonotoneNetwork(data.preprocessing, hyper, seed)
    descent = _AdamW(network, hyper.weight_decay)
    generator = torch.Generator().manual_seed(seed + 1)
    batch = min(hyper.batch_rows, rows)
    per_epoch = min(math.ceil(rows / batch), STEPS_PER_EPOCH_MAX)
    hidden = _Hidden(data.preprocessing)
    unseen = _unseen(data)
    hints = data.hints if hyper.monotonicity > 0 else ()

    step = 0
    history: list[Epoch] = []
    best: Epoch | None = None
    best_weights = descent.mean.clone()
    recent: deque[float] = deque(maxlen=SMOOTHED_EPOCHS)
    for number in range(1, epochs + 1):
        # shuffled once per epoch, so that a batch is a slice
        order = torch.randperm(rows, generator=generator)[:per_epoch * batch]
        shuffled, labels = data.train.take(order), data.train_y[order]
        total = 0.0
        for start in range(0, len(order), batch):
            y = labels[start:start + batch]
            rate = hyper.learning_rate * _schedule(step / (per_epoch * epochs))
            step += 1
            # One forward pass for everything that a step needs: at this size a pass costs the same for 1,000 rows as for 2,000.
            seen = hidden(shuffled.part(start, start + batch), generator)
            few = min(EXTRA_LOSS_ROWS, len(y))
            parts = [seen, nearby(seen.part(0, few), generator)]
            for hint in hints:
                some = torch.randint(len(hint.before.codes), (EXTRA_LOSS_ROWS,), generator=generator)
                parts += [hint.before.take(some), hint.after.take(some)]
            logit = network(joined(parts))
            loss = supervised(logit[:len(y)], y, weight)
            loss = loss + hyper.smoothness * smoothness(logit[:few], logit[len(y):len(y) + few])
            for i in range(len(hints)):
                at = len(y) + few + 2 * i * EXTRA_LOSS_ROWS
                before, after = logit[at:at + 2 * EXTRA_LOSS_ROWS].split(EXTRA_LOSS_ROWS)
                loss = loss + hyper.monotonicity * monotonicity(before, after)
            descent.step(loss, rate)
            total += float(loss.detach())
        if not math.isfinite(total):
            raise HafniumError(f"training diverged in epoch {number} (loss {total}); lower learningRate ({hyper.learning_rate:g})")
        with descent.averaged():
            _as_unknown(network, unseen)
            recent.append(average_precision(data.validation_y, logits(network, data.validation)))
        score = sum(recent) / len(recent)
        history.append(Epoch(number, total / per_epoch, score))
        if best is None or score > best.validation_pr_auc:
            best = history[-1]
            best_weights = descent.mean.clone()
        if on_epoch is not None:
            on_epoch(history[-1])
        if number - best.number >= PATIENCE:
            break
    if best is None:
        raise HafniumError(f"epochs must be at least 1, got {epochs}")
    descent.weights.copy_(best_weights)
    _as_unknown(network, unseen)
    network.requires_grad_(False)
    return Fitted(network, prior_correction(weight), tuple(history), best)


def _unseen(data: Prepare) -> tuple[Tensor, ...]:
    """Codes of each category that no row of the training part has. Missing and unknown are taught by hiding."""
    return tuple(
        torch.nonzero(torch.bincount(data.train.codes[:, i], minlength=size + 2)[:size] == 0)[:, 0]
        for i, size in enumerate(data.preprocessing.category_sizes)
    )


def _as_unknown(network: MonotoneNetwork, unseen: tuple[Tensor, ...]) -> None:
    """What training never saw scores as the unknown does: its row of the table is still the random one that it began with."""
    with torch.no_grad():
        for table, codes in zip(network.tables, unseen, strict=True):
            table[codes] = table[-1].clone()


class _AdamW:
    """AdamW (Loshchilov & Hutter, ICLR 2019) with a running mean of the weights, over all parameters as one vector.

    torch.optim would import torch's compiler at the first step (five seconds), and update each of the twenty small tensors by
    itself. Here the parameters are views of one vector and so are their gradients.
    """

    def __init__(self, network: MonotoneNetwork, weight_decay: float) -> None:
        parameters = list(network.parameters())
        self.weights = torch.cat([p.detach().reshape(-1) for p in parameters])
        self.gradient = torch.zeros_like(self.weights)
        self.first, self.second = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        self.mean = self.weights.clone()
        self.weight_decay = weight_decay
        self.count = 0
        at = 0
        for p in parameters:
            end = at + p.numel()
            p.data = self.weights[at:end].view_as(p)
            p.grad = self.gradient[at:end].view_as(p)
            at = end

    def step(self, loss: Tensor, rate: float) -> None:
        self.gradient.zero_()
        loss.backward()
        self.count += 1
        size = float(self.gradient.norm())
        if size > GRADIENT_MAX:
            self.gradient.mul_(GRADIENT_MAX / size)
        self.first.lerp_(self.gradient, 0.1)
        self.second.mul_(0.999).addcmul_(self.gradient, self.gradient, value=0.001)
        root = (self.second / (1.0 - 0.999**self.count)).sqrt_().add_(1e-8)
        self.weights.mul_(1.0 - rate * self.weight_decay)
        self.weights.addcdiv_(self.first, root, value=-rate / (1.0 - 0.9**self.count))
        # a short memory at first, or the mean would keep the random start
        self.mean.lerp_(self.weights, 1.0 - min(AVERAGE, self.count / (self.count + 10.0)))

    @contextmanager
    def averaged(self) -> Generator[None]:
        """The network with the mean of the weights."""
        current = self.weights.clone()
        self.weights.copy_(self.mean)
        yield
        self.weights.copy_(current)


def logits(network: MonotoneNetwork, rows: Prepared) -> npt.NDArray[np.float64]:
    """Logit per row, in the precision of `rows`."""
    with torch.no_grad():
        count = len(rows.codes)
        parts = [
            network(rows.part(i, i + ROWS_AT_ONCE)).mean(dim=1) for i in range(0, count, ROWS_AT_ONCE)
        ]
        return torch.cat(parts).numpy().astype(np.float64)


def score_rows(data: Dataset, preprocessing: Preprocessing, network: MonotoneNetwork) -> npt.NDArray[np.float64]:
    """Uncalibrated logits of a dataset through the network, float32 like in training."""
    with torch.no_grad():
        return logits(network, _prepared(preprocessing, data.X))


def _schedule(done: float) -> float:
    """Share of the peak learning rate: linear warm-up, then a half cosine down to 2 %."""
    if done < WARM_UP:
        return 0.1 + 0.9 * done / WARM_UP
    return 0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * (done - WARM_UP) / (1.0 - WARM_UP)))


class _Hidden:
    """Hides a small share of the values that may be missing, so that the "was missing" flags mean something."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        filled = (preprocessing.fill - preprocessing.center) / preprocessing.scale
        filled = torch.where(preprocessing.heavy, torch.sign(filled) * torch.log1p(torch.abs(filled)), filled)
        filled = ((filled - preprocessing.mean) / preprocessing.deviation).to(torch.float32)
        flag = {column: k for k, column in enumerate(preprocessing.masked)}
        self.monotone_fill = filled[preprocessing.monotone_index] * preprocessing.direction.to(torch.float32)
        self.free_fill = filled[preprocessing.free_index]
        # which flag belongs to which column; columns without one read the extra column of zeros
        self.monotone_flag = torch.tensor([flag.get(i, len(flag)) for i in preprocessing.monotone_at], dtype=torch.int64)
        self.free_flag = torch.tensor([flag.get(i, len(flag)) for i in preprocessing.free_at], dtype=torch.int64)
        self.missing_row = torch.tensor(preprocessing.category_sizes, dtype=torch.int64)

    def __call__(self, rows: Prepared, generator: torch.Generator) -> Prepared:
        count = len(rows.codes)
        hide = (torch.rand(rows.missing.shape, generator=generator) < MASKED_SHARE).to(torch.float32)
        padded = torch.cat([hide, torch.zeros(count, 1)], dim=1)
        monotone, free = padded[:, self.monotone_flag], padded[:, self.free_flag]
        codes = rows.codes
        if codes.shape[1]:
            draw = torch.rand(codes.shape, generator=generator)
            codes = torch.where(draw < MASKED_SHARE / 2, self.missing_row, codes)
            codes = torch.where(draw > 1.0 - MASKED_SHARE / 2, self.missing_row + 1, codes)
        return Prepared(
            torch.lerp(rows.monotone, self.monotone_fill.expand_as(rows.monotone), monotone),
            torch.lerp(rows.free, self.free_fill.expand_as(rows.free), free),
            torch.maximum(rows.missing, hide), codes,
        )
