"""The conformance kit of cost models: one call in a test of a third party's model.

def test_my_model():
    check_cost_model(MyModel(), device)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moirai_sim.costs.model import CostModel, Prediction
from moirai_sim.errors import CheckError
from moirai_sim.graphs.work import make_operator

if TYPE_CHECKING:
    from moirai_sim.clusters.cluster import DeviceType
    from moirai_sim.graphs.operator import Operator

_SOURCES = ("measured", "predicted", "data sheet")


def sample_operators() -> list[Operator]:
    """Return operators of every family, from tiny to large."""
    found = []
    for size in (1, 64, 1024):
        square, rows = (size, size), (size, 768)
        found += [
            make_operator(f"gemm{size}", "Gemm", [square, square, (size,)], [square]),
            make_operator(f"matmul{size}", "MatMul", [(8, *square), (8, *square)], [(8, *square)]),
            make_operator(f"conv{size}", "Conv", [(1, 16, 56, 56), (size, 16, 3, 3)], [(1, size, 54, 54)]),
            make_operator(
                f"depthwise{size}", "Conv", [(1, size, 56, 56), (size, 1, 3, 3)], [(1, size, 54, 54)], {"group": size}
            ),
            make_operator(f"add{size}", "Add", [rows, rows], [rows]),
            make_operator(f"relu{size}", "Relu", [rows], [rows]),
            make_operator(f"norm{size}", "LayerNormalization", [rows, (768,), (768,)], [rows]),
            make_operator(f"softmax{size}", "Softmax", [rows], [rows]),
            make_operator(f"mean{size}", "ReduceMean", [rows], [(size, 1)]),
            make_operator(f"pool{size}", "MaxPool", [(1, size, 56, 56)], [(1, size, 28, 28)], {"kernel_shape": [2, 2]}),
            make_operator(f"transpose{size}", "Transpose", [rows], [(768, size)]),
        ]
    return found


def check_cost_model(model: CostModel, device: DeviceType, operators: Sequence[Operator] | None = None) -> None:
    """Check that a cost model keeps the contract of `moirai_sim.costs.model.CostModel`.

    It must answer every operator with finite times of at least 0, the estimate inside its interval and the flag a bool;
    twice the same; independently of what else is asked in the same call and of the operators' names; an empty list
    with empty arrays; and its card must be JSON that says what the model rests on.

    Parameters
    ----------
    operators
        Must be priced; operators of every family if None.

    Raises
    ------
    CheckError
        With every breach, one a line.
    """
    operators = sample_operators() if operators is None else list(operators)
    problems = _shape_problems(model.predict([], device), 0, "an empty list")
    first = model.predict(operators, device)
    problems += _shape_problems(first, len(operators), f"{len(operators)} operators")
    if not problems:
        for name, bad in (
            ("latency_s is not finite or negative", ~np.isfinite(first.latency_s) | (first.latency_s < 0)),
            (
                "low_s <= latency_s <= high_s is broken",
                ~((first.low_s <= first.latency_s) & (first.latency_s <= first.high_s)),
            ),
        ):
            problems += [f"{operators[i].name}: {name}" for i in np.flatnonzero(bad)]
        backwards = model.predict(operators[::-1], device).latency_s[::-1]
        alone = np.array([model.predict([op], device).latency_s[0] for op in operators])
        for name, other in (("in another order", backwards), ("alone", alone)):
            # Compiled ensembles may add in another order: the last digits are theirs.
            changed = ~np.isclose(first.latency_s, other, rtol=1e-5, atol=0)
            problems += [f"{operators[i].name}: another time when asked {name}" for i in np.flatnonzero(changed)]
        if not np.array_equal(first.latency_s, model.predict(operators, device).latency_s):
            problems.append("the same question has two answers")
        if first.source not in _SOURCES:
            problems.append(f"source is {first.source!r}; known: {', '.join(_SOURCES)}")
    try:
        if not isinstance(model.card, Mapping) or not json.dumps(dict(model.card)) or not model.card:
            problems.append("card: must be a mapping that says what the model rests on")
    except (TypeError, ValueError) as error:
        problems.append(f"card: is not JSON ({error})")
    if not isinstance(model.name, str) or not model.name:
        problems.append("name: must be a word")
    if problems:
        raise CheckError("\n".join(problems))


def _shape_problems(answer: Prediction, size: int, what: str) -> list[str]:
    problems = []
    for field, kind in (("latency_s", "f"), ("low_s", "f"), ("high_s", "f"), ("extrapolated", "b")):
        value = np.asarray(getattr(answer, field))
        if value.shape != (size,) or value.dtype.kind != kind:
            problems.append(
                f"{field}: for {what} has shape {value.shape} and type {value.dtype}, not ({size},) of '{kind}'"
            )
    return problems
