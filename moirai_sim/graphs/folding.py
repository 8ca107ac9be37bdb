"""Values of nodes that read only constants: the arithmetic that exporters leave around shapes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moirai_sim.graphs.onnx_types import StaticType
from moirai_sim.graphs.work import VIEWS

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx import NodeProto

    Array = NDArray[np.generic]

_MAX_SCALARS = 16
_MAX_INTEGERS = 4096
_INTEGERS = frozenset({"int64", "int32", "bool"})

NEVER_FOLDED = frozenset(
    (
        "DequantizeLinear",
        "Bernoulli",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Multinomial",
    )
)
"""Run every time even on constants: weights are stored quantised, and random numbers differ."""
SHARE_STORAGE = VIEWS | {"Transpose"}
"""Folded on a weight they make no second copy: a tied embedding, transposed for the output, counts once."""
_BOUND_BY_INPUT = frozenset({"NonZero", "Unique", "Compress"})
"""Their output shape depends on values, but is at most a few times the size of the input."""


def is_small(kind: StaticType) -> bool:
    """Tell whether the values of a constant are kept: all that shapes are computed from is; weights are not."""
    return kind.elements <= (_MAX_INTEGERS if kind.dtype in _INTEGERS else _MAX_SCALARS)


def shape_content(node: NodeProto, shape: tuple[int, ...]) -> Array:
    """Return the value of a ``Shape`` or ``Size`` node, which needs only the shape of its input."""
    if node.op_type == "Size":
        return np.array(math.prod(shape), dtype=np.int64)
    bounds = {attribute.name: attribute.i for attribute in node.attribute}
    return np.array(shape[bounds.get("start", 0) : bounds.get("end")], dtype=np.int64)


def evaluate(
    node: NodeProto, inputs: Sequence[Array | None], kinds: Sequence[StaticType | None], opset: Mapping[str, int]
) -> list[Array] | None:
    """Return the values of the outputs of a node that reads only small constants.

    Parameters
    ----------
    inputs
        Values by position, None for an absent input.
    kinds
        Inferred types of the outputs: nothing large is ever computed, because it could exhaust memory.

    Returns
    -------
    list or None
        None where the outputs are large, or the reference implementation cannot run the node.
    """
    small = all(kind is not None and is_small(kind) for kind in kinds)
    if not small and node.op_type not in _BOUND_BY_INPUT:
        return None
    from onnx.reference import ReferenceEvaluator

    feeds = {name: value for name, value in zip(node.input, inputs, strict=False) if value is not None}
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            found = ReferenceEvaluator(node, opsets=dict(opset)).run(None, feeds)
    except Exception:  # noqa: BLE001 - whatever fails here, the node is merely not computed ahead
        return None
    return [np.asarray(value) for value in found]
