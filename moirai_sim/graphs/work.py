"""Work of an operator: floating point operations and bytes moved, by ONNX operator type.

Rules
-----
* A multiply-add is two operations; a comparison, a transcendental function or a division is one.
* A composite operator counts what its textbook decomposition counts, so that a GELU costs the same fused or not.
* Attention counts the full score matrix, also where it is causal: that is what the dense kernels compute.
* An operator reads each of its inputs once and writes each of its outputs once. Operators that pick (``Gather``,
  ``Slice``) read only what they pick. Views move nothing.
* ``Dropout`` at inference is a view, as ``Identity`` is.

Absent optional inputs are tensors without a name and with shape ``(0,)``, so that positions keep their meaning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from moirai_sim.errors import InputError
from moirai_sim.graphs.attention import attention_size
from moirai_sim.graphs.operator import DTYPE_BITS, Operator, Tensor

ABSENT = Tensor("", (0,))
"""Stands for an optional input or output that a node leaves out."""

VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout"})
"""Operator types that only rename their first input: no operations, no bytes."""

_Shapes = Sequence[Tensor]
_Flops = Callable[[_Shapes, _Shapes, Mapping[str, object]], int]


class Work(NamedTuple):
    """What one run of an operator costs."""

    flops: int
    read_bytes: int
    write_bytes: int
    bytes_only: bool
    """The operator type is not in the table: ``flops`` is 0 and says nothing."""


def operator_work(op_type: str, inputs: _Shapes, outputs: _Shapes, attributes: Mapping[str, object]) -> Work:
    """Return the work of one operator.

    Parameters
    ----------
    op_type
        ONNX operator type, without its domain.
    inputs, outputs
        Tensors by position; absent optional ones are `ABSENT`.
    attributes
        ONNX attributes; defaults of the specification are assumed where one is missing.
    """
    if op_type in VIEWS:
        return Work(0, 0, 0, bytes_only=False)
    read = _READ[op_type](inputs, outputs, attributes) if op_type in _READ else sum(tensor.bytes for tensor in inputs)
    write = sum(tensor.bytes for tensor in outputs)
    if op_type in _CACHED:
        write -= sum(_kept(tensor, op_type, inputs, outputs, attributes) for tensor in outputs[1:])
    if op_type not in FLOPS:
        return Work(0, read, write, bytes_only=True)
    return Work(FLOPS[op_type](inputs, outputs, attributes), read, write, bytes_only=False)


def make_operator(
    name: str,
    op_type: str,
    inputs: Sequence[Tensor | Sequence[int]],
    outputs: Sequence[Tensor | Sequence[int]],
    attributes: Mapping[str, object] | None = None,
    dtype: str = "float32",
) -> Operator:
    """Return an operator with its work filled in.

    Parameters
    ----------
    inputs, outputs
        Tensors, or bare shapes, which become activations of type ``dtype``.

    Raises
    ------
    InputError
        If the data type is unknown or the shapes do not fit the operator type.
    """
    if dtype not in DTYPE_BITS:
        raise InputError(f"operator '{name}': unknown data type '{dtype}'; known: {', '.join(DTYPE_BITS)}")
    read = tuple(_as_tensor(item, f"{name}:in{i}", dtype) for i, item in enumerate(inputs))
    written = tuple(_as_tensor(item, f"{name}:out{i}", dtype) for i, item in enumerate(outputs))
    attributes = dict(attributes or {})
    try:
        work = operator_work(op_type, read, written, attributes)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        shapes = f"inputs {[t.shape for t in read]}, outputs {[t.shape for t in written]}, attributes {attributes}"
        raise InputError(
            f"operator '{name}': {shapes} do not fit {op_type}; give them as the ONNX specification has them"
        ) from error
    weight_bytes = 0 if op_type in VIEWS else sum(tensor.bytes for tensor in read if tensor.weight)
    return Operator(
        name, op_type, read, written, attributes, dtype,
        work.flops, work.read_bytes, work.write_bytes, weight_bytes, work.bytes_only,
    )  # fmt: skip


def _as_tensor(item: Tensor | Sequence[int], name: str, dtype: str) -> Tensor:
    return item if isinstance(item, Tensor) else Tensor(name, tuple(item), dtype)


def _number(attributes: Mapping[str, object], name: str, default: int) -> int:
    return int(attributes.get(name, default))  # type: ignore[call-overload, no-any-return]  # checked by ONNX


def _present(tensors: _Shapes, index: int) -> bool:
    return len(tensors) > index and tensors[index] != ABSENT


def _per_output(operations: int) -> _Flops:
    return lambda _inputs, outputs, _attributes: operations * outputs[0].elements


def _per_input(operations: int) -> _Flops:
    return lambda inputs, _outputs, _attributes: operations * inputs[0].elements


def _pairwise(inputs: _Shapes, outputs: _Shapes, _attributes: Mapping[str, object]) -> int:
    return (len(inputs) - 1) * outputs[0].elements


_ACTIVATION_FLOPS = {"": 0, "Relu": 1, "LeakyRelu": 2, "Clip": 2, "HardSigmoid": 4, "Sigmoid": 1, "Tanh": 1, "Gelu": 5}


def _activation_flops(attributes: Mapping[str, object]) -> int:
    """Return the operations an element of the activation that is fused into a kernel; 2 of one that is not listed."""
    return _ACTIVATION_FLOPS.get(str(attributes.get("activation", "")), 2)


def _conv(weight: int, *added: int) -> _Flops:
    """Convolution whose kernel, (channels out, channels in / group, *window), is input ``weight``.

    ``added`` are the inputs that are added to the result: the bias, and another tensor.
    """

    def flops(inputs: _Shapes, outputs: _Shapes, attributes: Mapping[str, object]) -> int:
        per_output = 2 * math.prod(inputs[weight].shape[1:])
        per_output += sum(_present(inputs, i) for i in added)
        per_output += _activation_flops(attributes)
        return per_output * outputs[0].elements

    return flops


def _conv_transpose(inputs: _Shapes, outputs: _Shapes, _attributes: Mapping[str, object]) -> int:
    bias = outputs[0].elements if _present(inputs, 2) else 0
    return 2 * inputs[0].elements * math.prod(inputs[1].shape[1:]) + bias


def _gemm(inputs: _Shapes, outputs: _Shapes, attributes: Mapping[str, object]) -> int:
    depth = inputs[0].shape[0 if _number(attributes, "transA", 0) else 1]
    per_output = 2 * depth + _present(inputs, 2) + _activation_flops(attributes)
    return per_output * outputs[0].elements


def _matmul(inputs: _Shapes, outputs: _Shapes, attributes: Mapping[str, object]) -> int:
    shape, depth = inputs[0].shape, -1
    if _number(attributes, "transA", 0) and len(shape) > 1:
        depth = 0 if _number(attributes, "transBatchA", 0) else -2
    return 2 * outputs[0].elements * shape[depth]


def _matmul_nbits(_inputs: _Shapes, outputs: _Shapes, attributes: Mapping[str, object]) -> int:
    return 2 * outputs[0].elements * int(attributes["K"])  # type: ignore[call-overload, no-any-return]


def _einsum(inputs: _Shapes, outputs: _Shapes, attributes: Mapping[str, object]) -> int:
    """Count a product of all operands at each index, and an addition where it is summed."""
    terms = str(attributes["equation"]).replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, tensor in zip(terms, inputs, strict=True):
        for axis, size in zip(einsum_axes(term, len(tensor.shape)), tensor.shape, strict=True):
            sizes[axis] = max(sizes.get(axis, 1), size)
    space = math.prod(sizes.values())
    return space * (len(inputs) - (space <= outputs[0].elements))


def einsum_axes(term: str, rank: int) -> list[str]:
    """Return a name for each axis of an operand of an Einsum: its letter, or its place in the ellipsis, last first."""
    head, dots, tail = term.partition("...")
    between = [f".{i}" for i in range(rank - len(head) - len(tail))][::-1] if dots else []
    return [*head, *between, *tail]


def _attention(inputs: _Shapes, outputs: _Shapes, attributes: Mapping[str, object]) -> int:
    """``com.microsoft.Attention`` (one packed projection) and ``ai.onnx.Attention`` (separate Q, K, V)."""
    projection = 0
    if "num_heads" in attributes:
        batch, length, hidden = inputs[0].shape
        projection = batch * length * inputs[1].shape[1] * (2 * hidden + _present(inputs, 2))
    return projection + _scores("Attention", inputs, outputs, attributes)


def _multi_head_attention(inputs: _Shapes, outputs: _Shapes, attributes: Mapping[str, object]) -> int:
    bias = sum(t.elements for t in inputs[:3]) if _present(inputs, 3) else 0
    return bias + _scores("MultiHeadAttention", inputs, outputs, attributes)


def _grouped_query_attention(inputs: _Shapes, outputs: _Shapes, attributes: Mapping[str, object]) -> int:
    rotary = 3 * sum(t.elements for t in inputs[:2]) if _number(attributes, "do_rotary", 0) else 0
    return rotary + _scores("GroupQueryAttention", inputs, outputs, attributes)


def _scores(op_type: str, inputs: _Shapes, outputs: _Shapes, attributes: Mapping[str, object]) -> int:
    """Attention core: scores, scaling and masking (2), softmax (5), weighted values."""
    size = attention_size(op_type, [t.shape for t in inputs], [t.shape for t in outputs], attributes)
    scores = size.batch * size.heads * size.queries * size.keys
    return scores * (2 * size.depth + 2 * size.value_depth + 7)


def _mixture_of_experts(inputs: _Shapes, _outputs: _Shapes, attributes: Mapping[str, object]) -> int:
    """``com.microsoft.MoE``: each token passes ``k`` experts; weights are (experts, ., .) at inputs 2, 4 and 6."""
    return _experts(inputs, attributes, (2, 4, 6), 1)


def _quantized_experts(inputs: _Shapes, _outputs: _Shapes, attributes: Mapping[str, object]) -> int:
    """``com.microsoft.QMoE``: as ``MoE``, but weights are at inputs 2, 5 and 8, several to a byte."""
    return _experts(inputs, attributes, (2, 5, 8), 8 // _number(attributes, "expert_weight_bits", 4))


def _experts(inputs: _Shapes, attributes: Mapping[str, object], positions: tuple[int, ...], packed: int) -> int:
    active = inputs[1].shape[0] * _number(attributes, "k", 1)
    weights = [packed * math.prod(inputs[i].shape[1:]) for i in positions if _present(inputs, i)]
    return active * (2 * sum(weights) + weights[0] // inputs[0].shape[-1])  # and the activation


def _recurrent(inputs: _Shapes, _outputs: _Shapes, _attributes: Mapping[str, object]) -> int:
    steps = inputs[0].shape[0] * inputs[0].shape[1]
    bias = inputs[3].elements if _present(inputs, 3) else 0
    return steps * (2 * inputs[1].elements + 2 * inputs[2].elements + bias)


def _pool(_inputs: _Shapes, outputs: _Shapes, attributes: Mapping[str, object]) -> int:
    window: tuple[int, ...] = attributes["kernel_shape"]  # type: ignore[assignment]  # checked by ONNX
    return outputs[0].elements * math.prod(window)


def _lrn(_inputs: _Shapes, outputs: _Shapes, attributes: Mapping[str, object]) -> int:
    return (_number(attributes, "size", 1) + 5) * outputs[0].elements


def _resize(inputs: _Shapes, outputs: _Shapes, attributes: Mapping[str, object]) -> int:
    taps = {"linear": 2, "cubic": 4}.get(str(attributes.get("mode", "nearest")))
    scaled = sum(a != b for a, b in zip(inputs[0].shape, outputs[0].shape, strict=True))
    return 2 * int(taps**scaled) * outputs[0].elements if taps else 0


def _scatter(inputs: _Shapes, _outputs: _Shapes, attributes: Mapping[str, object]) -> int:
    return inputs[2].elements if attributes.get("reduction", "none") != "none" else 0


def _top_k(inputs: _Shapes, outputs: _Shapes, attributes: Mapping[str, object]) -> int:
    """Heap selection: n log2 k comparisons."""
    k = outputs[0].shape[_number(attributes, "axis", -1)]
    return inputs[0].elements * math.ceil(math.log2(max(k, 2)))


def _fourier(_inputs: _Shapes, outputs: _Shapes, attributes: Mapping[str, object]) -> int:
    """Count 5 n log2 n for n complex numbers; the last axis of the output holds their two parts."""
    length = outputs[0].shape[_number(attributes, "axis", -2)]
    return 5 * outputs[0].elements // 2 * math.ceil(math.log2(max(length, 2)))


_ONE_PER_OUTPUT = (
    "Abs", "Acos", "Acosh", "Add", "And", "Asin", "Asinh", "Atan", "Atanh", "BitShift", "BitwiseAnd", "BitwiseNot",
    "BitwiseOr", "BitwiseXor", "Cast", "CastLike", "Ceil", "Celu", "Cos", "Cosh", "Div", "Equal", "Erf", "Exp",
    "Floor", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "Log", "Mod", "Mul", "Neg",
    "Not", "Or", "Pow", "Reciprocal", "Relu", "Round", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh", "Softsign",
    "Sqrt", "Sub", "Tan", "Tanh", "ThresholdedRelu", "Where", "Xor",
)  # fmt: skip
_ONE_PER_INPUT = (
    "ArgMax", "ArgMin", "CumSum", "GlobalAveragePool", "GlobalMaxPool", "ReduceL1", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceProd", "ReduceSum", "Unique",
)  # fmt: skip
_NO_FLOPS = (
    "CenterCropPad", "Compress", "Concat", "ConstantOfShape", "DepthToSpace", "Expand", "EyeLike", "Gather",
    "GatherElements", "GatherND", "NonZero", "OneHot", "Pad", "Range", "ReorderInput", "ReorderOutput",
    "ReverseSequence", "Shape", "Size", "Slice", "SpaceToDepth", "Split", "Tile", "Transpose", "Trilu",
)  # fmt: skip

FLOPS: dict[str, _Flops] = {
    **dict.fromkeys(_ONE_PER_OUTPUT, _per_output(1)),
    **dict.fromkeys(_ONE_PER_INPUT, _per_input(1)),
    **dict.fromkeys(_NO_FLOPS, _per_output(0)),
    **dict.fromkeys(VIEWS, _per_output(0)),
    **dict.fromkeys(("Sum", "Mean", "Max", "Min"), _pairwise),
    **dict.fromkeys(("Clip", "LeakyRelu", "PRelu", "Elu", "Selu", "Softplus", "HardSwish"), _per_output(2)),
    **dict.fromkeys(("ReduceL2", "ReduceSumSquare", "ReduceLogSum", "GlobalLpPool", "LpNormalization"), _per_input(2)),
    **dict.fromkeys(("Swish", "QuickGelu", "DequantizeLinear"), _per_output(2)),
    **dict.fromkeys(("HardSigmoid", "Mish", "QuantizeLinear", "ReduceLogSumExp"), _per_input(4)),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), _per_output(5)),
    "DynamicQuantizeLinear": _per_input(6),
    "Gelu": _per_output(5),
    "BiasGelu": _per_output(6),
    "FastGelu": lambda i, o, _a: (8 + _present(i, 1)) * o[0].elements,
    "BatchNormalization": _per_output(2),
    **dict.fromkeys(("LayerNormalization", "GroupNormalization", "GroupNorm", "InstanceNormalization"), _per_output(7)),
    **dict.fromkeys(("MeanVarianceNormalization",), _per_output(5)),
    **dict.fromkeys(("RMSNormalization", "SimplifiedLayerNormalization"), _per_output(4)),
    "SkipLayerNormalization": lambda i, o, _a: (8 + _present(i, 4)) * o[0].elements,
    "SkipSimplifiedLayerNormalization": lambda i, o, _a: (5 + _present(i, 3)) * o[0].elements,
    "EmbedLayerNormalization": _per_output(9),
    "RotaryEmbedding": _per_output(3),
    "LRN": _lrn,
    **dict.fromkeys(("MaxPool", "AveragePool", "LpPool"), _pool),
    "Conv": _conv(1, 2),
    "FusedConv": _conv(1, 2, 3),
    "DeformConv": _conv(1, 3),
    "ConvInteger": _conv(1),
    "QLinearConv": _conv(3, 8),
    "ConvTranspose": _conv_transpose,
    **dict.fromkeys(("Gemm", "FusedGemm"), _gemm),
    **dict.fromkeys(("MatMul", "FusedMatMul", "MatMulInteger", "QLinearMatMul", "MatMulIntegerToFloat"), _matmul),
    "DynamicQuantizeMatMul": _matmul,
    "MatMulNBits": _matmul_nbits,
    "Einsum": _einsum,
    "Attention": _attention,
    "MultiHeadAttention": _multi_head_attention,
    "GroupQueryAttention": _grouped_query_attention,
    "PagedAttention": lambda i, o, a: _scores("PagedAttention", i, o, a),
    "MoE": _mixture_of_experts,
    "QMoE": _quantized_experts,
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _recurrent),
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    "GridSample": _per_output(8),
    **dict.fromkeys(("ScatterND", "ScatterElements"), _scatter),
    "TopK": _top_k,
    **dict.fromkeys(("DFT", "STFT"), _fourier),
}
"""Floating point operations by operator type, from (inputs, outputs, attributes)."""


def _picked(inputs: _Shapes, outputs: _Shapes, _attributes: Mapping[str, object]) -> int:
    """Read what is picked, and the indices that say where."""
    return outputs[0].bytes + sum(tensor.bytes for tensor in inputs[1:])


def _experts_read(inputs: _Shapes, _outputs: _Shapes, attributes: Mapping[str, object]) -> int:
    """Read the weights of no more experts than there are (token, choice) pairs."""
    experts, choices = inputs[2].shape[0], inputs[1].shape[0] * _number(attributes, "k", 1)
    weights = sum(tensor.bytes for tensor in inputs[2:])
    return inputs[0].bytes + inputs[1].bytes + weights * min(experts, choices) // experts


def _packed_read(inputs: _Shapes, _outputs: _Shapes, attributes: Mapping[str, object]) -> int:
    """Read weights of a few bits each, in bytes of several, whatever type the tensors are said to have."""
    rows, columns = (_number(attributes, name, 0) for name in ("K", "N"))
    weights = -(-rows * columns * _number(attributes, "bits", 4) // 8) or inputs[1].bytes
    return inputs[0].bytes + weights + sum(tensor.bytes for tensor in inputs[2:])


_CACHED = ("Attention", "GroupQueryAttention", "MultiHeadAttention")


def _kept(present: Tensor, op_type: str, inputs: _Shapes, outputs: _Shapes, attributes: Mapping[str, object]) -> int:
    """Return the bytes of a cache that were there before: runtimes that serve add to it, and do not copy it."""
    if len(present.shape) != 4 or not present.shape[2]:  # absent, or scores
        return 0
    size = attention_size(op_type, [t.shape for t in inputs], [t.shape for t in outputs], attributes)
    return present.bytes * max(present.shape[2] - size.queries, 0) // present.shape[2]


_READ: dict[str, _Flops] = {
    **dict.fromkeys(("Gather", "GatherElements", "GatherND", "Slice"), _picked),
    **dict.fromkeys(("Shape", "Size", "EyeLike"), lambda _i, _o, _a: 0),
    "EmbedLayerNormalization": lambda i, o, _a: 3 * o[0].bytes + sum(t.bytes for t in i[:2]),
    **dict.fromkeys(("MoE", "QMoE"), _experts_read),
    "MatMulNBits": _packed_read,
}
