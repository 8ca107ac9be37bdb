"""Operator families and the dimensions that drive their cost.

A family is a set of operator types that run on the same kind of kernel. Each operator becomes one row of numbers; what
`m`, `n`, `k` mean depends on the family and is written beside each rule below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from moirai_sim.errors import InputError
from moirai_sim.graphs.attention import attention_size
from moirai_sim.graphs.operator import DTYPE_BITS
from moirai_sim.graphs.work import einsum_axes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.graphs.operator import Operator

Shape = Sequence[int]
Dimensions = tuple[float, float, float, float, float, float]

_NONE: Mapping[str, Any] = MappingProxyType({})

_MEMBERS: dict[str, str] = {
    "gemm": "Gemm MatMul MatMulInteger MatMulIntegerToFloat DynamicQuantizeMatMul MatMulNBits QLinearMatMul "
    "FusedMatMul FusedGemm Linear",
    "conv": "Conv ConvTranspose ConvInteger QLinearConv FusedConv NhwcFusedConv DeformConv",
    "normalization": "LayerNormalization SimplifiedLayerNormalization SkipLayerNormalization RMSNormalization "
    "BatchNormalization InstanceNormalization GroupNormalization LRN MeanVarianceNormalization LpNormalization "
    "SkipSimplifiedLayerNormalization",
    "softmax": "Softmax LogSoftmax Hardmax",
    "reduction": "ReduceMean ReduceSum ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp "
    "ReduceSumSquare ArgMax ArgMin CumSum TopK",
    "pooling": "MaxPool AveragePool LpPool GlobalMaxPool GlobalAveragePool GlobalLpPool MaxUnpool MaxRoiPool RoiAlign",
    "movement": "Transpose Concat Split Slice Gather GatherND GatherElements Scatter ScatterND ScatterElements Reshape "
    "Flatten Squeeze Unsqueeze Expand Tile Pad Identity Cast DepthToSpace SpaceToDepth Resize Upsample OneHot Range "
    "ConstantOfShape Compress ReverseSequence Trilu NonZero Shape Constant EyeLike ReorderInput ReorderOutput",
    "attention": "Attention MultiHeadAttention GroupQueryAttention PagedAttention",
    "moe": "MoE QMoE",
}
FAMILY: dict[str, str] = {op: family for family, ops in _MEMBERS.items() for op in ops.split()}
"""Family of an ONNX operator type; those not listed are ``elementwise``. MatMul splits in two: see `family`."""

FAMILIES = (
    "gemm", "batched-matmul", "conv", "elementwise", "normalization", "softmax", "reduction", "pooling", "movement",
    "attention", "moe",
)  # fmt: skip
"""All families. A fused kernel belongs to the family of its main part and carries the work of all its parts."""

_SECOND = {"QLinearMatMul": 3, "QLinearConv": 3}
"""Position of the second operand where scale and zero point of the first stand before it."""

COLUMNS = (
    "batch", "m", "n", "k", "width", "extra", "flops", "read_bytes", "write_bytes", "weight_bytes", "bits", "parts",
)  # fmt: skip
"""Columns of the table that `describe` returns."""


def family(op_type: str, inputs: Sequence[Shape], attributes: Mapping[str, Any] = _NONE) -> str:
    """Return the family of an operator; a MatMul is batched where both operands have a batch axis above 1.

    An Einsum of two operands that sums over letters of both is a batched product, whose batch may be 1.
    """
    if op_type == "Einsum":
        return "batched-matmul" if _contracts(inputs, attributes) else "elementwise"
    name = FAMILY.get(op_type, "elementwise")
    if name == "gemm":
        second = _second(op_type, inputs)
        if len(second) > 2 and math.prod(_batch(second, attributes)) > 1:
            return "batched-matmul"
    return name


def _second(op_type: str, inputs: Sequence[Shape]) -> Shape:
    """Return the shape of the second operand of a product, () where it is missing.

    That of `MatMulNBits` lies in blocks, (n, blocks, bytes), or as published data has it, (k, n): never in a batch.
    """
    at = _SECOND.get(op_type, 1)
    return inputs[at] if len(inputs) > at and op_type != "MatMulNBits" else ()


def _batch(second: Shape, attributes: Mapping[str, Any]) -> Shape:
    """Return the batch axes of the second operand of a product."""
    return second[1:-1] if attributes.get("transBatchB") else second[:-2]


def dimensions(
    op_type: str, inputs: Sequence[Shape], outputs: Sequence[Shape], attributes: Mapping[str, Any]
) -> Dimensions:
    """Return (batch, m, n, k, width, extra) of an operator; missing shapes count as scalars."""
    if op_type == "Einsum" and _contracts(inputs, attributes):
        return _einsum(str(attributes["equation"]), *inputs)
    rule = FAMILY.get(op_type, "elementwise")
    out = outputs[0] if outputs else ()
    first = inputs[0] if inputs else ()
    elements = float(math.prod(out))
    last = float(out[-1]) if out else 1.0
    if rule == "gemm":  # batch x (m, k) times (k, n)
        second = _second(op_type, inputs)
        deep = -1
        if attributes.get("transA") and len(first) > 1:
            deep = 0 if attributes.get("transBatchA") else -2
        k = float(first[deep]) if first else 1.0
        n = last if len(second) > 1 or op_type == "MatMulNBits" else 1.0
        batch = float(math.prod(_batch(second, attributes))) if len(second) > 2 else 1.0
        return batch, max(elements / max(n * batch, 1.0), 1.0), n, k, 1.0, 0.0
    if rule == "conv":  # implicit matrix product per group; width: window, extra: stride
        weight = _second(op_type, inputs)
        groups = float(attributes.get("group", 1) or 1)
        window = float(math.prod(weight[2:])) or 1.0
        channels = float(out[1]) if len(out) > 1 else 1.0
        strides = attributes.get("strides") or (1,)
        if op_type == "ConvTranspose":  # every input pixel is multiplied by the window, and the results are added up
            into = float(first[1]) if len(first) > 1 else 1.0
            columns = float(weight[1]) * window if len(weight) > 1 else window
            return groups, math.prod(first) / max(into, 1.0), columns, into / groups, 1.0, float(strides[0])
        per_group = float(first[1]) / groups if len(first) > 1 else 1.0
        return groups, elements / max(channels, 1.0), channels / groups, per_group * window, window, float(strides[0])
    if rule in ("normalization", "softmax", "reduction"):  # m rows of k values each
        size = float(math.prod(first))
        if rule == "reduction":
            k = size / max(elements, 1.0)
        else:
            axis = int(attributes.get("axis", 1 if op_type in ("BatchNormalization", "LRN") else -1))
            axis += len(first) if axis < 0 else 0
            k = float(math.prod(first[axis:]) if rule == "normalization" else first[axis]) if first else 1.0
        run = float(math.prod(first[2:])) if op_type == "BatchNormalization" else last  # width: values of one factor
        return 1.0, size / max(k, 1.0), 1.0, max(k, 1.0), run, 0.0
    if rule == "pooling":  # m results, each from a window of k values; n channels; width: row, extra: stride
        shape = attributes.get("kernel_shape")
        seen = float(math.prod(shape)) if shape else float(math.prod(first)) / max(elements, 1.0)
        strides = attributes.get("strides") or (1,)
        channels = float(first[1]) if len(first) > 1 else 1.0
        return 1.0, elements, channels, seen, float(first[-1]) if first else 1.0, float(strides[0])
    if rule == "attention":  # batch x width heads; m queries, n keys, k values a head; extra: key-value heads
        core = attention_size(op_type, inputs, outputs, attributes)
        kv_heads = core.kv_heads if core.causal else -core.kv_heads  # below 0 where every query sees every key
        return core.batch, core.queries, core.keys, core.depth, core.heads, kv_heads
    if rule == "moe":  # m tokens of k values; batch local experts of n hidden values; width of them for each token
        experts = inputs[2] if len(inputs) > 2 else (1, 1, 1)
        share = float(attributes.get("local_share", 1.0))
        m = float(math.prod(first[:-1])) if first else 1.0
        hidden = float(first[-1]) if first else 1.0
        packed, at = (
            (8 // int(attributes.get("expert_weight_bits", 4)), (2, 5, 8)) if op_type == "QMoE" else (1, (2, 4, 6))
        )
        each = packed * sum(math.prod(inputs[i][1:]) for i in at if len(inputs) > i and len(inputs[i]) > 1)
        n = each / (3 * hidden) if each else elements  # gate, up and down, in whatever layout
        return float(experts[0]) if experts else 1.0, m, n, hidden, float(attributes.get("k", 1)), share
    # Element-wise and movement: m results, n operands; width: values in a row that are treated alike.
    if rule == "movement":
        return 1.0, elements, float(len(inputs)), last, _moved(op_type, inputs, out, attributes), float(len(first))
    run, constant = (elements, 0.0) if all(shape == out for shape in inputs) else _alike(inputs, out)
    return 1.0, elements, float(len(inputs)), last, run, constant


def _einsum_terms(equation: str) -> tuple[list[str], set[str]]:
    """Return the terms of an equation, and the letters of its result: without one those that occur once."""
    given, arrow, result = equation.replace(" ", "").partition("->")
    return given.split(","), set(result) if arrow else {letter for letter in given if given.count(letter) == 1}


def _contracts(inputs: Sequence[Shape], attributes: Mapping[str, Any]) -> bool:
    """Tell whether an Einsum sums over a letter of both of its two operands."""
    terms, kept = _einsum_terms(str(attributes.get("equation", "")))
    return len(inputs) == len(terms) == 2 and bool(set(terms[0]) & set(terms[1]) - kept - {"."})


def _einsum(equation: str, left: Shape, right: Shape) -> Dimensions:
    """Return the sizes of the product of two tensors: letters of both that stay are its batch, others its contraction.

    An ellipsis stands for the axes that the letters beside it leave over.
    """
    terms, kept = _einsum_terms(equation)
    letters = []
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, (left, right), strict=True):
        names = einsum_axes(term, len(shape))
        for name, length in zip(names, shape, strict=True):
            sizes[name] = max(sizes.get(name, 1), length)
        letters.append(set(names))
    one, other = letters
    kept |= {name for name in sizes if name.startswith(".")}
    batch, k = one & other & kept, (one & other) - kept

    def size(names: set[str]) -> float:
        return float(math.prod(sizes[name] for name in names))

    return size(batch), size(one - other), size(other - one), size(k), 1.0, 0.0


def _alike(inputs: Sequence[Shape], out: Shape) -> tuple[float, float]:
    """Return how many values in a row meet the same kinds of operands, and whether one of those is constant there."""
    run, first = 1.0, None
    for axis in range(1, len(out) + 1):
        if out[-axis] == 1:
            continue
        kinds = [len(shape) >= axis and shape[-axis] != 1 for shape in inputs]
        first = first or kinds
        if kinds != first:
            break
        run *= out[-axis]
    return run, float(first is not None and not all(first))


def _moved(op_type: str, inputs: Sequence[Shape], out: Shape, attributes: Mapping[str, Any]) -> float:
    """Return how many values in a row are moved together."""
    first = inputs[0] if inputs else ()
    if op_type == "Transpose":
        perm = list(attributes.get("perm") or range(len(first))[::-1])
        stay = 0
        while stay < len(perm) and perm[-1 - stay] == len(perm) - 1 - stay:
            stay += 1
        return float(math.prod(first[len(first) - stay :]))
    if op_type in ("Concat", "Split", "Gather"):
        axis = int(attributes.get("axis", 0))
        shape = out if op_type == "Split" else first
        axis += len(shape) if axis < 0 else 0
        return float(math.prod(shape[axis + (op_type == "Gather") :]))
    return float(out[-1]) if out else 1.0


_REMEMBERED = 10_000
"""Distinct shapes whose dimensions `describe` keeps: of more, the garbage collector's rounds cost what that saves."""


def describe(operators: Sequence[Operator]) -> tuple[list[str], NDArray[np.float64]]:
    """Return the family of every operator and its row of `COLUMNS`, [n, len(COLUMNS)].

    Raises
    ------
    InputError
        If the shapes and attributes of an operator do not fit together.
    """
    names: list[str] = []
    flat: list[float] = []  # one list: millions of small tuples would keep the garbage collector busy
    seen: dict[tuple[Any, ...], tuple[str, tuple[float, ...]]] = {}
    for op in operators:
        inputs = tuple([t.shape for t in op.inputs])
        attributes = op.attributes
        outputs = tuple([t.shape for t in op.outputs])
        key = (op.op_type, inputs, outputs, repr(attributes) if attributes else "")
        known = seen.get(key)
        if known is None:
            try:
                sizes = dimensions(op.op_type, inputs, outputs, attributes)
                known = family(op.op_type, inputs, attributes), tuple(map(float, sizes))
            except (TypeError, ValueError, LookupError, ArithmeticError) as error:
                raise InputError(
                    f"operator '{op.name}': {op.op_type} of shapes {inputs} with attributes {dict(attributes)} cannot "
                    f"be priced ({error}); give those that ONNX asks for"
                ) from error
            if len(seen) < _REMEMBERED:
                seen[key] = known
        names.append(known[0])
        flat += (
            *known[1],
            op.flops, op.read_bytes, op.write_bytes, op.weight_bytes, DTYPE_BITS.get(op.dtype, 32), len(op.parts),
        )  # fmt: skip
    return names, np.array(flat, dtype=np.float64).reshape(-1, len(COLUMNS))
