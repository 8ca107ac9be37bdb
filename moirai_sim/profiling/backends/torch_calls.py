"""Operators of ONNX as calls of PyTorch's eager mode: what the PyTorch backend of profiles times."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moirai_sim.graphs.operator import Operator

DTYPES: dict[str, str] = {
    "float32": "float32", "tf32": "float32", "float16": "float16", "bfloat16": "bfloat16", "float64": "float64",
    "float8": "float8_e4m3fn", "int64": "int64", "int32": "int32", "int8": "int8", "uint8": "uint8", "bool": "bool",
}  # fmt: skip
"""PyTorch's type of the tensors that hold each data type; tf32 is float32 whose products run on tensor cores."""
RESULTS = {"float8": "bfloat16", "int8": "int32"}
"""Data type of a product of matrices, where it is another than that of its operands."""
_FP8_MULTIPLE = 16


class Unsupported(Exception):  # noqa: N818 - says what it is
    """An operator that PyTorch cannot run here; it is left out of the profile and counted."""


@dataclass(frozen=True)
class Attributes:
    """Attributes of an ONNX operator, with their defaults."""

    values: Mapping[str, Any]

    def ints(self, name: str, default: Sequence[int]) -> list[int]:
        """Return a list of integers."""
        return [int(x) for x in self.values.get(name, default)]

    def int(self, name: str, default: int) -> int:
        """Return an integer."""
        return int(self.values.get(name, default))


def call_of(torch: Any, operator: Operator) -> Callable[..., object]:  # noqa: ANN401
    """Return the PyTorch call of an operator; it takes the inputs in ONNX order.

    Raises
    ------
    Unsupported
        If none is known, or the attributes or shapes are of a kind that it does not take.
    """
    if operator.dtype == "float8":
        return _scaled_mm(torch, operator)
    make = _CALLS.get(operator.op_type)
    if make is not None:
        return make(torch, operator, Attributes(operator.attributes))
    simple = _UNARY.get(operator.op_type) or _BINARY.get(operator.op_type)
    if simple is None:
        raise Unsupported(f"{operator.op_type}: no PyTorch call is known")
    function = torch
    for part in simple.split("."):
        function = getattr(function, part)
    if operator.op_type in _UNARY:
        return lambda x, *_: function(x)
    if len(operator.inputs) < 2:
        raise Unsupported(f"{operator.op_type}: of one input it does nothing")
    return lambda *inputs: functools.reduce(function, inputs)  # Sum, Max and Min take any number


_UNARY = {
    "Relu": "relu", "Sigmoid": "sigmoid", "Tanh": "tanh", "Exp": "exp", "Erf": "erf",
    "Sqrt": "sqrt", "Neg": "neg", "Log": "log", "Abs": "abs", "Identity": "clone", "Softplus": "nn.functional.softplus",
    "HardSwish": "nn.functional.hardswish", "LeakyRelu": "nn.functional.leaky_relu", "Reciprocal": "reciprocal",
}  # fmt: skip
_BINARY = {"Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div", "Pow": "pow", "Max": "maximum", "Min": "minimum",
           "Sum": "add"}  # fmt: skip


def _scaled_mm(torch: Any, op: Operator) -> Callable[..., object]:  # noqa: ANN401
    """Return a product of 8-bit floats with a 16-bit result; the second operand lies column by column, as it must."""
    shapes = [tensor.shape for tensor in op.inputs]
    if op.op_type != "MatMul" or [len(shape) for shape in shapes] != [2, 2] or not hasattr(torch, "_scaled_mm"):
        raise Unsupported(f"{op.op_type} {op.dtype}: only products of two matrices are timed")
    if any(side % _FP8_MULTIPLE for side in (*shapes[0], *shapes[1])):
        raise Unsupported(f"{op.op_type} {op.dtype}: sides must be multiples of {_FP8_MULTIPLE}")
    scales: list[Any] = []

    def run(a: Any, b: Any) -> object:  # noqa: ANN401
        if not scales:
            scales.append(torch.ones((), device=a.device))
        columns = b.view(b.shape[1], b.shape[0]).t()
        return torch._scaled_mm(a, columns, scale_a=scales[0], scale_b=scales[0], out_dtype=torch.bfloat16)

    return run


def _gemm(torch: Any, _op: Operator, at: Attributes) -> Callable[..., object]:  # noqa: ANN401
    def run(a: Any, b: Any, *c: Any) -> object:  # noqa: ANN401
        a = a.t() if at.int("transA", 0) else a
        b = b.t() if at.int("transB", 0) else b
        return torch.addmm(c[0], a, b) if c and c[0].numel() else torch.mm(a, b)

    return run


def _window(op: Operator, at: Attributes, kernel: Sequence[int]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Return strides, dilations, and the pads before and after each spatial axis."""
    axes = len(kernel)
    stride, dilation = at.ints("strides", [1] * axes), at.ints("dilations", [1] * axes)
    auto, pads = str(at.values.get("auto_pad", "NOTSET")), [0] * 2 * axes
    if auto == "NOTSET":
        pads = at.ints("pads", pads)
    elif auto.startswith("SAME"):
        sides = zip(op.inputs[0].shape[2:], kernel, stride, dilation, strict=True)
        total = [max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0) for n, k, s, d in sides]
        less, more = [t // 2 for t in total], [t - t // 2 for t in total]
        pads = less + more if auto == "SAME_UPPER" else more + less
    if len(pads) != 2 * axes:
        raise Unsupported(f"{op.op_type}: {len(pads)} pads for {axes} spatial axes")
    return stride, dilation, pads[:axes], pads[axes:]


def _around(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Return pads as PyTorch's ``pad`` takes them: last axis first."""
    return [pad for pair in zip(reversed(before), reversed(after), strict=True) for pad in pair]


def _conv(torch: Any, op: Operator, at: Attributes) -> Callable[..., object]:  # noqa: ANN401
    kernel, functional = op.inputs[1].shape[2:], torch.nn.functional
    function = getattr(functional, f"conv{len(kernel)}d")
    stride, dilation, before, after = _window(op, at, kernel)
    around = _around(before, after) if before != after else None
    pads, group = 0 if around else before, at.int("group", 1)

    def run(x: Any, w: Any, *b: Any) -> object:  # noqa: ANN401
        bias = b[0] if b and b[0].dim() == 1 and b[0].numel() else None
        return function(functional.pad(x, around) if around else x, w, bias, stride, pads, dilation, group)

    return run


def _max_pool(torch: Any, op: Operator, at: Attributes) -> Callable[..., object]:  # noqa: ANN401
    kernel, functional = at.ints("kernel_shape", []), torch.nn.functional
    function = getattr(functional, f"max_pool{len(kernel)}d")
    stride, dilation, before, after = _window(op, at, kernel)
    own = before == after and all(2 * p <= k for p, k in zip(before, kernel, strict=True))  # PyTorch's limit
    around, pads, up = None if own else _around(before, after), before if own else 0, bool(at.int("ceil_mode", 0))

    def run(x: Any) -> object:  # noqa: ANN401
        padded = functional.pad(x, around, value=-torch.inf) if around else x
        return function(padded, kernel, stride, pads, dilation, up)

    return run


def _average_pool(torch: Any, op: Operator, at: Attributes) -> Callable[..., object]:  # noqa: ANN401
    kernel = at.ints("kernel_shape", [])
    function = getattr(torch.nn.functional, f"avg_pool{len(kernel)}d")
    stride, dilation, before, after = _window(op, at, kernel)
    if before != after or max(dilation) > 1:
        raise Unsupported(f"{op.op_type}: uneven pads and dilations are not timed")
    up, inside = (bool(at.int(name, 0)) for name in ("ceil_mode", "count_include_pad"))
    return lambda x: function(x, kernel, stride, before, up, inside)


def _reduce(name: str) -> Callable[..., Callable[..., object]]:
    def make(torch: Any, op: Operator, at: Attributes) -> Callable[..., object]:  # noqa: ANN401
        source, result = op.inputs[0].shape, op.outputs[0].shape
        if "axes" in at.values:
            axes = at.ints("axes", [])
        elif len(source) == len(result):
            axes = [i for i, (a, b) in enumerate(zip(source, result, strict=True)) if a != b]
        else:
            axes = list(range(len(result), len(source)))
        function, keep = getattr(torch, name), len(source) == len(result)
        return lambda x, *_: function(x, dim=tuple(axes) or (len(source) - 1,), keepdim=keep)

    return make


def _layer_norm(torch: Any, op: Operator, at: Attributes) -> Callable[..., object]:  # noqa: ANN401
    shape = op.inputs[0].shape[at.int("axis", -1) :]
    return lambda x, *rest: torch.nn.functional.layer_norm(x, shape, *rest[:2])


def _batch_norm(torch: Any, _op: Operator, _at: Attributes) -> Callable[..., object]:  # noqa: ANN401
    return lambda x, scale, bias, mean, var: torch.nn.functional.batch_norm(x, mean, var, scale, bias)


def _attention(torch: Any, op: Operator, at: Attributes) -> Callable[..., object]:  # noqa: ANN401
    if len(op.inputs) < 3 or len(op.inputs[0].shape) != 4:
        raise Unsupported(f"{op.op_type}: only separate (batch, heads, length, depth) inputs are timed")
    if any(tensor.elements for tensor in op.inputs[4:]) or at.values.get("softcap"):
        raise Unsupported(f"{op.op_type}: past keys and a soft cap are not timed")
    attend = torch.nn.functional.scaled_dot_product_attention
    grouped = op.inputs[0].shape[1] != op.inputs[1].shape[1]
    causal = bool(at.int("is_causal", 0))

    def run(q: Any, k: Any, v: Any, *mask: Any) -> object:  # noqa: ANN401
        given = mask[0] if mask and mask[0].numel() else None
        return attend(q, k, v, attn_mask=given, is_causal=causal, enable_gqa=grouped)

    return run


def _gelu(torch: Any, _op: Operator, at: Attributes) -> Callable[..., object]:  # noqa: ANN401
    approximate = str(at.values.get("approximate", "none"))
    return lambda x: torch.nn.functional.gelu(x, approximate=approximate)


def _transpose(_torch: Any, op: Operator, at: Attributes) -> Callable[..., object]:  # noqa: ANN401
    order = at.ints("perm", list(range(len(op.inputs[0].shape)))[::-1])
    return lambda x: _copy(x.permute(order))  # also where all axes that move are of one element


def _gather(torch: Any, op: Operator, at: Attributes) -> Callable[..., object]:  # noqa: ANN401
    (shape, picked), axis = (tensor.shape for tensor in op.inputs), at.int("axis", 0)
    if len(picked) == 1:
        return lambda x, index: torch.index_select(x, axis, index)
    axis %= len(shape)
    result = (*shape[:axis], *picked, *shape[axis + 1 :])
    return lambda x, index: torch.index_select(x, axis, index).view(result)


def _slice(_torch: Any, op: Operator, at: Attributes) -> Callable[..., object]:  # noqa: ANN401
    """Return a copy of a block: from the starts where they are attributes, else from the first element.

    Newer models give starts and ends as inputs, whose values an operator of a graph does not carry.
    """
    size, axes = op.outputs[0].shape, at.ints("axes", range(len(op.inputs[0].shape)))
    first = dict(zip(axes, at.ints("starts", []), strict=False))
    whole = op.inputs[0].shape
    start = [first.get(axis, 0) + (n if first.get(axis, 0) < 0 else 0) for axis, n in enumerate(whole)]
    if any(s + n > all_ for s, n, all_ in zip(start, size, whole, strict=True)):
        raise Unsupported(f"{op.op_type}: {size} from {start} is outside of {whole}")
    block = tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))
    return lambda x, *_: _copy(x[block])


def _split(torch: Any, op: Operator, at: Attributes) -> Callable[..., object]:  # noqa: ANN401
    axis = at.int("axis", 0)
    sizes = [tensor.shape[axis] for tensor in op.outputs]
    return lambda x, *_: tuple(_copy(part) for part in torch.split(x, sizes, axis))


def _copy(x: Any) -> Any:  # noqa: ANN401
    """Return a tensor of its own memory: what the operator of ONNX writes, where PyTorch gives a view."""
    return x.new_empty(x.shape).copy_(x)


def _pad(torch: Any, op: Operator, at: Attributes) -> Callable[..., object]:  # noqa: ANN401
    """Return constant padding: of the attribute where it is one, else all of it behind; see `_slice`."""
    whole, size = op.inputs[0].shape, op.outputs[0].shape
    if str(at.values.get("mode", "constant")) != "constant":
        raise Unsupported(f"{op.op_type}: only constant padding is timed")
    behind = [0] * len(whole) + [n - m for m, n in zip(whole, size, strict=True)]
    pads = at.ints("pads", behind)
    around, value = _around(pads[: len(whole)], pads[len(whole) :]), float(at.values.get("value", 0))
    return lambda x, *_: torch.nn.functional.pad(x, around, value=value)


def _clip(torch: Any, _op: Operator, at: Attributes) -> Callable[..., object]:  # noqa: ANN401
    low, high = at.values.get("min"), at.values.get("max")

    def run(x: Any, *bounds: Any) -> object:  # noqa: ANN401
        given = [bound if bound.numel() else None for bound in bounds]
        return torch.clamp(x, *(given or (low, high)))

    return run


def _cast(torch: Any, op: Operator, _at: Attributes) -> Callable[..., object]:  # noqa: ANN401
    if op.outputs[0].dtype not in DTYPES:
        raise Unsupported(f"{op.op_type}: not timed to {op.outputs[0].dtype}")
    kind = getattr(torch, DTYPES[op.outputs[0].dtype])
    return lambda x: x.to(kind, copy=True)


def _rms_norm(torch: Any, op: Operator, at: Attributes) -> Callable[..., object]:  # noqa: ANN401
    shape, epsilon = op.inputs[0].shape[at.int("axis", -1) :], float(at.values.get("epsilon", 1e-5))
    return lambda x, scale: torch.nn.functional.rms_norm(x, shape, scale, epsilon)


def _lrn(torch: Any, _op: Operator, at: Attributes) -> Callable[..., object]:  # noqa: ANN401
    alpha, beta, bias = (float(at.values.get(*item)) for item in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0)))
    return lambda x: torch.nn.functional.local_response_norm(x, at.int("size", 1), alpha, beta, bias)


def _int_mm(torch: Any, op: Operator, _at: Attributes) -> Callable[..., object]:  # noqa: ANN401
    shapes = [tensor.shape for tensor in op.inputs]
    if [len(shape) for shape in shapes] != [2, 2] or {t.dtype for t in op.inputs} != {"int8"}:
        raise Unsupported(f"{op.op_type}: only products of two signed matrices without zero points are timed")
    k, n = shapes[1]

    def run(a: Any, b: Any) -> object:  # noqa: ANN401
        # From Hopper on, 8-bit matrix units take operands that lie along the contraction; the data is random anyway.
        return torch._int_mm(a, b.view(n, k).t() if a.is_cuda else b)

    return run


_CALLS: dict[str, Callable[[Any, Operator, Attributes], Callable[..., object]]] = {
    "MatMul": lambda torch, _op, _at: torch.matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": lambda _torch, _op, _at: lambda x: x.mean(dim=tuple(range(2, x.dim())), keepdim=True),
    "ReduceSum": _reduce("sum"),
    "ReduceMean": _reduce("mean"),
    "ReduceMax": _reduce("amax"),
    "LayerNormalization": _layer_norm,
    "BatchNormalization": _batch_norm,
    "Softmax": lambda torch, _op, at: lambda x: torch.softmax(x, at.int("axis", -1)),
    "Attention": _attention,
    "Gelu": _gelu,
    "Transpose": _transpose,
    "Concat": lambda torch, _op, at: lambda *xs: torch.cat(xs, at.int("axis", 0)),
    "Gather": _gather,
    "Slice": _slice,
    "Split": _split,
    "Pad": _pad,
    "Clip": _clip,
    "Cast": _cast,
    "Expand": lambda _torch, op, _at: lambda x, *_: _copy(x.expand(op.outputs[0].shape)),
    "Where": lambda torch, _op, _at: torch.where,
    "RMSNormalization": _rms_norm,
    "MatMulInteger": _int_mm,
    "LRN": _lrn,
    "Einsum": lambda torch, _op, at: lambda *xs: torch.einsum(str(at.values["equation"]), *xs),
}
