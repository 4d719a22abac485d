"""What a graph has to look like to serve a contract. Whoever loads one asks here: the predictor, and the command that makes bundles.

Only names, types and shapes: that a graph of the right form also gives scores is seen by asking it for some.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hafnium_contract.bundle import INPUT_NAME, INTERVAL_OUTPUT, SCORE_OUTPUT
from hafnium_contract.errors import BundleError
from hafnium_contract.model_contract import ModelContract

_FLOAT = "tensor(float)"
_OUTPUTS: tuple[tuple[str, list[int], str], ...] = (
    (SCORE_OUTPUT, [], "a score in [0, 1] for each row"),
    (INTERVAL_OUTPUT, [2], "the range around each score, lower ≤ score ≤ upper; answers and logs show it"),
)


def check_graph(where: Path, contract: ModelContract, session: Any) -> None:
    """Raises BundleError when a graph (an onnxruntime.InferenceSession) does not fit the contract."""
    columns = len(contract.inputs)
    inputs: list[Any] = list(session.get_inputs())
    found = [i.name for i in inputs]
    if found != [INPUT_NAME]:
        raise BundleError(f"{where}: expected one input {INPUT_NAME!r}, the graph has {found}")
    shape = list(inputs[0].shape)
    if inputs[0].type != _FLOAT or len(shape) != 2 or isinstance(shape[0], int) or shape[1] != columns:
        raise BundleError(
            f"{where}: input {INPUT_NAME!r} is {inputs[0].type} {shape}; the contract's {columns} inputs need "
            f"{_FLOAT} [batch, {columns}]"
        )
    outputs: dict[str, Any] = {o.name: o for o in session.get_outputs()}
    for name, tail, meaning in _OUTPUTS:
        expected = f"{_FLOAT} {['batch', *tail]}"
        if name not in outputs:
            raise BundleError(f"{where}: output {name!r} is missing; the graph has {sorted(outputs)}. Expected {expected}: {meaning}")
        got = outputs[name]
        if got.type != _FLOAT or len(got.shape) != 1 + len(tail) or list(got.shape)[1:] != tail:
            raise BundleError(f"{where}: output {name!r} is {got.type} {got.shape}, expected {expected}")
