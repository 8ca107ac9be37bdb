"""A part run by PyTorch, called as a session of ONNX Runtime is: an optional extra, never imported by the core.

Every node becomes one call of PyTorch's eager mode, in the order of the graph. The graph is one that ONNX Runtime has
rewritten as far as other backends can follow (`Executed` with ``portable``), so besides the operators of
ONNX it holds the fused ones of ONNX Runtime's ``com.microsoft`` domain. What an operator means is defined at
https://onnx.ai/onnx/operators and in ONNX Runtime's ``docs/ContribOperators.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from moirai_sim.errors import InputError
from moirai_sim.execution.torch_place import TorchPlace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.execution.backends import Copies

Call = Callable[..., Any]
"""Takes the inputs of a node in ONNX's order, None for one left out; returns a tensor, or a tuple of several."""


@dataclass(frozen=True)
class Node:
    """One node while its call is made."""

    op_type: str
    at: Mapping[str, Any]
    """Attributes."""
    constants: tuple[NDArray[Any] | None, ...]
    """Values of the inputs that are constants."""
    outputs: int
    opset: int

    def ints(self, name: str, slot: int | None = None) -> list[int] | None:
        """Return integers of an attribute, or of a constant input where newer opsets have one; None where neither."""
        if name in self.at:
            return [int(value) for value in self.at[name]]
        value = None if slot is None or slot >= len(self.constants) else self.constants[slot]
        return None if value is None else [int(size) for size in value.ravel()]

    def needed(self, name: str, slot: int) -> list[int]:
        """Do what `ints` does where there must be some."""
        found = self.ints(name, slot)
        if found is None:
            raise InputError(f"PyTorch cannot run {self.op_type} here: '{name}' is not constant")
        return found

    def number(self, name: str, default: float) -> float:
        """Return a number of an attribute."""
        return float(self.at.get(name, default))

    def axis(self, default: int) -> int:
        """Return the attribute ``axis``."""
        return int(self.at.get("axis", default))


class TorchSession:
    """A model that PyTorch runs on CPU threads or a GPU.

    Parameters
    ----------
    model
        Serialised, its weights inside.
    threads
        Threads within an operator on a CPU; they are those of the whole process.
    place
        Where it runs; None is the host.

    Raises
    ------
    InputError
        If an operator has no call here.
    """

    def __init__(self, model: bytes, threads: int = 1, place: TorchPlace | None = None) -> None:
        import torch

        torch.set_num_threads(threads)
        self._torch, self._place = torch, place or TorchPlace()
        graph = onnx.load_model_from_string(model)
        opset = next((entry.version for entry in graph.opset_import if not entry.domain), 17)
        values = {tensor.name: onnx.numpy_helper.to_array(tensor).copy() for tensor in graph.graph.initializer}
        self.inputs = [value.name for value in graph.graph.input if value.name not in values]
        self.outputs = [value.name for value in graph.graph.output]
        slots: dict[str, int] = {}
        here = self._place.device
        constants = {slots.setdefault(n, len(slots)): torch.from_numpy(value).to(here) for n, value in values.items()}
        self._slot = {name: slots.setdefault(name, len(slots)) for name in (*self.inputs, *self.outputs)}
        last: dict[str, int] = {}
        for number, node in enumerate(graph.graph.node):
            last.update(dict.fromkeys((*node.input, *node.output), number))
        kept = {"", *values, *self._slot}
        self._steps: list[tuple[Call, list[int], list[int], list[int]]] = []
        """What to call, with which slots, where to put its results, and which slots nobody reads any more."""
        for number, node in enumerate(graph.graph.node):
            reads = [slots.setdefault(name, len(slots)) if name else -1 for name in node.input]
            writes = [slots.setdefault(name, len(slots)) if name else -1 for name in node.output]
            dead = [slots[n] for n in dict.fromkeys((*node.input, *node.output)) if n not in kept and last[n] == number]
            call = _call(torch, node, [values.get(name) for name in node.input], opset)
            self._steps.append((call, reads, writes, dead))
        # The last slot, at -1, is that of inputs left out.
        self._held: list[Any] = [constants.get(slot) for slot in range(len(slots) + 1)]

    def get_inputs(self) -> list[onnx.ValueInfoProto]:
        """Return what the model reads; only the names say anything."""
        return [onnx.ValueInfoProto(name=name) for name in self.inputs]

    def run(self, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Run once and return arrays of their own."""
        given = [(self._slot[name], self._tensor(feeds[name]).to(self._place.device)) for name in self.inputs]
        found = self._run(given)
        return [found[self._slot[name]].contiguous().cpu().numpy() for name in outputs]

    def bind(
        self, inputs: Mapping[str, Any], outputs: Mapping[str, Any], fetched: Copies = (), returned: Copies = ()
    ) -> Any:  # noqa: ANN401
        """Return what `run_with_iobinding` takes: see `moirai_sim.execution.backends.Backend.bind`."""
        return (
            [(here, self._tensor(array)) for here, array in fetched],
            [(self._slot[name], self._tensor(inputs[name])) for name in self.inputs],
            [(self._slot[name], self._tensor(target)) for name, target in outputs.items()],
            [(self._tensor(array), here) for here, array in returned],
        )

    def run_with_iobinding(self, binding: Any) -> None:  # noqa: ANN401
        """Run once on bound memory; all is done and copied when it returns."""
        fetched, given, wanted, returned = binding
        for target, source in fetched:
            target.copy_(source, non_blocking=True)
        found = self._run(given)
        for slot, target in wanted:
            target.copy_(found[slot])
        for target, source in returned:
            target.copy_(source, non_blocking=True)
        self._place.finish()

    def _tensor(self, array: Any) -> Any:  # noqa: ANN401
        """Return a tensor over the memory of an array; a tensor is one already."""
        if isinstance(array, self._torch.Tensor):
            return array
        return self._torch.from_numpy(array if array.flags.writeable else array.copy())

    def _run(self, given: Sequence[tuple[int, Any]]) -> list[Any]:
        held = self._held.copy()
        for slot, tensor in given:
            held[slot] = tensor
        with self._torch.inference_mode():
            for call, reads, writes, dead in self._steps:
                result = call(*[held[slot] for slot in reads])
                if type(result) is tuple:
                    for slot, tensor in zip(writes, result, strict=False):
                        held[slot] = tensor
                    held[-1] = None
                else:
                    held[writes[0]] = result
                for slot in dead:
                    held[slot] = None
        return held


def _call(torch: Any, node: onnx.NodeProto, constants: Sequence[NDArray[Any] | None], opset: int) -> Call:  # noqa: ANN401
    at = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    made = Node(node.op_type, at, tuple(constants), len(node.output), opset)
    if node.op_type in _PLAIN:
        function = torch
        for word in _PLAIN[node.op_type].split("."):
            function = getattr(function, word)
        return function  # type: ignore[no-any-return]
    if node.op_type not in _MADE:
        raise InputError(f"PyTorch cannot run the operator {node.op_type} here; place it on another device")
    return _MADE[node.op_type](torch, made)


_PLAIN = {
    "Relu": "relu", "Sigmoid": "sigmoid", "Tanh": "tanh", "Exp": "exp", "Erf": "erf", "Sqrt": "sqrt", "Neg": "neg",
    "Log": "log", "Abs": "abs", "Reciprocal": "reciprocal", "Floor": "floor", "Ceil": "ceil", "Sin": "sin",
    "Cos": "cos", "Sign": "sign", "Not": "logical_not", "Softplus": "nn.functional.softplus",
    "HardSwish": "nn.functional.hardswish", "Add": "add", "Sub": "sub", "Mul": "mul", "Pow": "pow",
    "MatMul": "matmul", "Equal": "eq", "Greater": "gt", "Less": "lt", "GreaterOrEqual": "ge", "LessOrEqual": "le",
    "And": "logical_and", "Or": "logical_or", "Where": "where",
}  # fmt: skip


def _variadic(name: str, *, mean: bool = False) -> Callable[[Any, Node], Call]:
    def make(torch: Any, _node: Node) -> Call:  # noqa: ANN401
        function = getattr(torch, name)

        def run(first: Any, *others: Any) -> Any:  # noqa: ANN401
            total = first
            for other in others:
                total = function(total, other)
            return total / (1 + len(others)) if mean else total

        return run

    return make


def _divide(torch: Any, _node: Node) -> Call:  # noqa: ANN401
    def run(a: Any, b: Any) -> Any:  # noqa: ANN401
        return torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc")  # as ONNX divides integers

    return run


def _activation(torch: Any, node: Node) -> Call:  # noqa: ANN401
    """Return what a fused kernel does to its result in place."""
    name = node.at.get("activation", b"").decode()
    parameters = [float(value) for value in node.at.get("activation_params", ())]
    if not name:
        return lambda x: x
    if name in ("Relu", "Sigmoid", "Tanh"):
        return getattr(torch, f"{name.lower()}_")  # type: ignore[no-any-return]
    if name == "LeakyRelu":
        slope = parameters[0] if parameters else node.number("activation_alpha", 0.01)
        return lambda x: torch.nn.functional.leaky_relu_(x, slope)
    if name == "Clip" and len(parameters) == 2:
        return lambda x: x.clamp_(*parameters)
    if name == "HardSigmoid" and len(parameters) == 2:
        return lambda x: x.mul_(parameters[0]).add_(parameters[1]).clamp_(0, 1)
    raise InputError(f"PyTorch cannot run {node.op_type} with the activation {name} here")


def _spatial(node: Node, axes: int) -> tuple[list[int], list[int], list[int], list[int]]:
    """Return strides, dilations, and the pads before and after each spatial axis."""
    if node.at.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise InputError(f"PyTorch cannot run {node.op_type} with auto_pad here; give its pads")
    pads = node.ints("pads") or [0] * 2 * axes
    return node.ints("strides") or [1] * axes, node.ints("dilations") or [1] * axes, pads[:axes], pads[axes:]


def _around(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Return pads as PyTorch's ``pad`` takes them: last axis first."""
    return [pad for pair in zip(reversed(before), reversed(after), strict=True) for pad in pair]


def _conv(torch: Any, node: Node) -> Call:  # noqa: ANN401
    shape = None if node.constants[1] is None else np.shape(node.constants[1])
    if shape is None:
        raise InputError(f"PyTorch cannot run {node.op_type} here: its weight is not constant")
    axes = len(shape) - 2
    stride, dilation, before, after = _spatial(node, axes)
    group, then, functional = int(node.at.get("group", 1)), _activation(torch, node), torch.nn.functional
    if node.op_type == "ConvTranspose":
        if before != after or node.ints("output_shape"):
            raise InputError("PyTorch cannot run ConvTranspose with uneven pads here")
        transposed = getattr(functional, f"conv_transpose{axes}d")
        more = node.ints("output_padding") or 0
        return lambda x, w, b=None: transposed(x, w, b, stride, before, more, group, dilation)
    convolve = getattr(functional, f"conv{axes}d")
    around = _around(before, after) if before != after else None
    pads = [0] * axes if around else before

    def run(x: Any, w: Any, b: Any = None, z: Any = None) -> Any:  # noqa: ANN401
        y = convolve(functional.pad(x, around) if around else x, w, b, stride, pads, dilation, group)
        return then(y if z is None else y.add_(z))

    return run


def _max_pool(torch: Any, node: Node) -> Call:  # noqa: ANN401
    kernel = node.needed("kernel_shape", -1)
    stride, dilation, before, after = _spatial(node, len(kernel))
    pool, functional = getattr(torch.nn.functional, f"max_pool{len(kernel)}d"), torch.nn.functional
    around = _around(before, after) if before != after else None
    pads, up = ([0] * len(kernel) if around else before), bool(node.at.get("ceil_mode", 0))
    if not around:
        return lambda x: pool(x, kernel, stride, pads, dilation, up)
    return lambda x: pool(functional.pad(x, around, value=-torch.inf), kernel, stride, pads, dilation, up)


def _average_pool(torch: Any, node: Node) -> Call:  # noqa: ANN401
    kernel = node.needed("kernel_shape", -1)
    stride, _, before, after = _spatial(node, len(kernel))
    pool, functional = getattr(torch.nn.functional, f"avg_pool{len(kernel)}d"), torch.nn.functional
    up, inside = bool(node.at.get("ceil_mode", 0)), bool(node.at.get("count_include_pad", 0))
    if before == after:
        return lambda x: pool(x, kernel, stride, before, up, inside)
    if up:
        raise InputError("PyTorch cannot run AveragePool with uneven pads and ceil_mode here")
    around = _around(before, after)
    counts: list[Any] = []

    def run(x: Any) -> Any:  # noqa: ANN401
        y = pool(functional.pad(x, around), kernel, stride)
        if not inside:  # the mean over what is not padding
            if not counts:
                counts.append(pool(functional.pad(torch.ones_like(x[:1, :1]), around), kernel, stride))
            y.div_(counts[0])
        return y

    return run


def _global_pool(reduce: str) -> Callable[[Any, Node], Call]:
    def make(torch: Any, _node: Node) -> Call:  # noqa: ANN401
        function = getattr(torch, reduce)
        return lambda x: function(x, dim=tuple(range(2, x.dim())), keepdim=True)

    return make


def _gemm(torch: Any, node: Node) -> Call:  # noqa: ANN401
    left, right = (bool(node.at.get(name, 0)) for name in ("transA", "transB"))
    alpha, beta, then = node.number("alpha", 1), node.number("beta", 1), _activation(torch, node)

    def run(a: Any, b: Any, c: Any = None) -> Any:  # noqa: ANN401
        a, b = a.t() if left else a, b.t() if right else b
        y = torch.addmm(c, a, b, beta=beta, alpha=alpha) if c is not None else torch.mm(a, b)
        return then(y.mul_(alpha) if c is None and alpha != 1 else y)

    return run


def _fused_matmul(torch: Any, node: Node) -> Call:  # noqa: ANN401
    if node.at.get("transBatchA", 0) or node.at.get("transBatchB", 0):
        raise InputError("PyTorch cannot run FusedMatMul with turned batches here")
    left, right = (bool(node.at.get(name, 0)) for name in ("transA", "transB"))
    alpha = node.number("alpha", 1)
    return lambda a, b: torch.matmul(
        a.transpose(-1, -2) if left else a, b.transpose(-1, -2) if right else b
    ).mul_(alpha)  # fmt: skip


def _batch_norm(torch: Any, node: Node) -> Call:  # noqa: ANN401
    normalise, epsilon = torch.nn.functional.batch_norm, node.number("epsilon", 1e-5)
    return lambda x, scale, bias, mean, variance: normalise(x, mean, variance, scale, bias, False, 0.0, epsilon)


def _layer_norm(torch: Any, node: Node) -> Call:  # noqa: ANN401
    normalise, epsilon, axis = torch.nn.functional.layer_norm, node.number("epsilon", 1e-5), node.axis(-1)
    if node.outputs > 1:
        raise InputError("PyTorch cannot run LayerNormalization with statistics as outputs here")
    return lambda x, scale, bias=None: normalise(x, x.shape[axis:], scale, bias, epsilon)


def _skip_layer_norm(torch: Any, node: Node) -> Call:  # noqa: ANN401
    normalise, epsilon, several = torch.nn.functional.layer_norm, node.number("epsilon", 1e-12), node.outputs > 1

    def run(x: Any, skip: Any, gamma: Any, beta: Any = None, bias: Any = None) -> Any:  # noqa: ANN401
        total = x + skip if bias is None else x + skip + bias
        y = normalise(total, total.shape[-1:], gamma, beta, epsilon)
        return (y, None, None, total) if several else y

    return run


def _root_mean_square(torch: Any, node: Node) -> Call:  # noqa: ANN401
    epsilon, axis = node.number("epsilon", 1e-5), node.axis(-1)
    return lambda x, scale: torch.nn.functional.rms_norm(x, x.shape[axis:], scale, epsilon)


def _softmax(torch: Any, node: Node) -> Call:  # noqa: ANN401
    if node.opset >= 13:
        return partial(torch.softmax, dim=node.axis(-1))
    axis = node.axis(1)  # older: all axes from this one on are one
    return lambda x: torch.softmax(x.flatten(axis % x.dim()), -1).view(x.shape)


def _gelu(torch: Any, node: Node) -> Call:  # noqa: ANN401
    fast = node.op_type == "FastGelu" or node.at.get("approximate", b"none") == b"tanh"
    gelu = partial(torch.nn.functional.gelu, approximate="tanh" if fast else "none")
    return lambda x, bias=None: gelu(x if bias is None else x + bias)


def _quick_gelu(torch: Any, node: Node) -> Call:  # noqa: ANN401
    alpha = node.number("alpha", 1.702)
    return lambda x: x * torch.sigmoid(x * alpha)


def _clip(torch: Any, node: Node) -> Call:  # noqa: ANN401
    if "min" in node.at or "max" in node.at or len(node.constants) == 1:
        return partial(torch.clamp, min=node.at.get("min"), max=node.at.get("max"))
    return lambda x, low=None, high=None: x if low is None and high is None else torch.clamp(x, low, high)


def _reduce(name: str) -> Callable[[Any, Node], Call]:
    def make(torch: Any, node: Node) -> Call:  # noqa: ANN401
        axes, keep = node.ints("axes", 1), bool(node.at.get("keepdims", 1))
        function = getattr(torch, name)
        return lambda x, *_: function(x, dim=tuple(axes or range(x.dim())), keepdim=keep)

    return make


def _reshape(_torch: Any, node: Node) -> Call:  # noqa: ANN401
    shape = node.needed("shape", 1)
    if 0 not in shape or node.at.get("allowzero", 0):
        return lambda x, *_: x.reshape(shape)
    return lambda x, *_: x.reshape([size or x.shape[i] for i, size in enumerate(shape)])


def _unsqueeze(_torch: Any, node: Node) -> Call:  # noqa: ANN401
    axes = node.needed("axes", 1)

    def run(x: Any, *_: Any) -> Any:  # noqa: ANN401
        rank = x.dim() + len(axes)
        for axis in sorted(axis % rank for axis in axes):
            x = x.unsqueeze(axis)
        return x

    return run


def _squeeze(_torch: Any, node: Node) -> Call:  # noqa: ANN401
    axes = node.ints("axes", 1)
    return lambda x, *_: x.squeeze() if axes is None else x.squeeze(tuple(axes))


def _slice(_torch: Any, node: Node) -> Call:  # noqa: ANN401
    starts, ends = node.needed("starts", 1), node.needed("ends", 2)
    axes = node.ints("axes", 3) or list(range(len(starts)))
    steps = node.ints("steps", 4) or [1] * len(starts)
    if min(steps) < 1:
        raise InputError("PyTorch cannot run Slice backwards here")

    def run(x: Any, *_: Any) -> Any:  # noqa: ANN401
        cut = [slice(None)] * x.dim()
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
            cut[axis] = slice(start, end, step)
        return x[tuple(cut)]

    return run


def _split(torch: Any, node: Node) -> Call:  # noqa: ANN401
    axis, sizes, count = node.axis(0), node.ints("split", 1), node.outputs
    return lambda x, *_: torch.split(x, sizes or -(-x.shape[axis] // count), axis)


def _gather(torch: Any, node: Node) -> Call:  # noqa: ANN401
    axis = node.axis(0)

    def run(x: Any, index: Any) -> Any:  # noqa: ANN401
        rows = torch.remainder(index.reshape(-1), x.shape[axis])  # an index may count from the end
        at = axis % x.dim()
        return torch.index_select(x, at, rows).reshape(x.shape[:at] + index.shape + x.shape[at + 1 :])

    return run


def _cast(torch: Any, node: Node) -> Call:  # noqa: ANN401
    kind = getattr(torch, np.dtype(onnx.helper.tensor_dtype_to_np_dtype(node.at["to"])).name)
    return lambda x: x.to(kind)


def _lrn(torch: Any, node: Node) -> Call:  # noqa: ANN401
    normalise, size = torch.nn.functional.local_response_norm, int(node.at["size"])
    alpha, beta, bias = node.number("alpha", 1e-4), node.number("beta", 0.75), node.number("bias", 1.0)
    return lambda x: normalise(x, size, alpha, beta, bias)


def _transpose(_torch: Any, node: Node) -> Call:  # noqa: ANN401
    order = node.ints("perm")
    return lambda x: x.permute(order or tuple(reversed(range(x.dim()))))


_MADE: dict[str, Callable[[Any, Node], Call]] = {
    "Div": _divide, "Sum": _variadic("add"), "Mean": _variadic("add", mean=True), "Max": _variadic("maximum"),
    "Min": _variadic("minimum"), "Conv": _conv, "FusedConv": _conv, "ConvTranspose": _conv, "MaxPool": _max_pool,
    "AveragePool": _average_pool, "GlobalAveragePool": _global_pool("mean"), "GlobalMaxPool": _global_pool("amax"),
    "Gemm": _gemm, "FusedGemm": _gemm, "FusedMatMul": _fused_matmul, "TransposeMatMul": _fused_matmul,
    "BatchNormalization": _batch_norm, "LayerNormalization": _layer_norm, "SkipLayerNormalization": _skip_layer_norm,
    "SimplifiedLayerNormalization": _root_mean_square, "RMSNormalization": _root_mean_square, "LRN": _lrn,
    "Softmax": _softmax, "Gelu": _gelu, "FastGelu": _gelu, "BiasGelu": _gelu, "QuickGelu": _quick_gelu, "Clip": _clip,
    "LeakyRelu": lambda torch, node: partial(torch.nn.functional.leaky_relu, negative_slope=node.number("alpha", 0.01)),
    "Elu": lambda torch, node: partial(torch.nn.functional.elu, alpha=node.number("alpha", 1.0)),
    "HardSigmoid": lambda _torch, node: lambda x: (
        x * node.number("alpha", 0.2) + node.number("beta", 0.5)
    ).clamp(0, 1),
    "ReduceSum": _reduce("sum"), "ReduceMean": _reduce("mean"), "ReduceMax": _reduce("amax"),
    "ReduceMin": _reduce("amin"),
    "Identity": lambda _torch, _node: lambda x: x, "Dropout": lambda _torch, _node: lambda x, *_: x,
    "Concat": lambda torch, node: lambda *xs: torch.cat(xs, node.axis(1)),
    "Flatten": lambda _torch, node: lambda x: x.reshape(int(np.prod(x.shape[: node.axis(1)])), -1),
    "Expand": lambda _torch, node: lambda x, *_: x * x.new_ones(node.needed("shape", 1)),
    "Reshape": _reshape, "Transpose": _transpose, "Unsqueeze": _unsqueeze, "Squeeze": _squeeze, "Slice": _slice,
    "Split": _split, "Gather": _gather, "Cast": _cast,
}  # fmt: skip
