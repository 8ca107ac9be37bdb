"""Conditions of fusion rules that a pattern cannot say: on shapes, constants and memory layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from moirai_sim.graphs.operator import Operator, Tensor


class KernelLike(Protocol):
    """What conditions read of a kernel."""

    @property
    def type(self) -> str:
        """Type that rules match."""

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Tensors read from outside."""

    @property
    def root(self) -> Operator:
        """The last operator."""

    @property
    def main(self) -> Operator:
        """The operator that does most."""


Match = Sequence[KernelLike]
"""The kernels of a match, the last one to run first."""
_Condition = Callable[[Match, frozenset[str]], bool]

_BLOCK = 16
"""Channels that ONNX Runtime keeps together in its blocked layout on a CPU with 512-bit vectors."""
_ALIGNMENT = 4
"""Input channels of a convolution in the blocked layout are a multiple of this."""


def _constant(kernel: KernelLike) -> Tensor:
    return next(tensor for tensor in kernel.root.inputs if tensor.weight)


def constant_per_channel(match: Match, _blocked: frozenset[str]) -> bool:
    """Tell whether a convolution is scaled or shifted by one constant a channel, which folds into its weights."""
    shape, channels = _constant(match[0]).shape, match[1].root.outputs[0].shape[1]
    window = (1,) * (len(match[1].root.outputs[0].shape) - 2)
    return shape in ((), (channels, *window), (1, channels, *window))


def bias_of_matrix(match: Match, _blocked: frozenset[str]) -> bool:
    """Tell whether a vector is added to the product with a matrix."""
    add, matmul = match
    bias, product = _constant(add), matmul.root.outputs[0]
    return len(matmul.main.inputs[1].shape) == 2 and bias.shape == product.shape[-1:]


def rows_added(match: Match, _blocked: frozenset[str]) -> bool:
    """Tell whether the sum that a layer normalisation reads is one that its kernel can do itself."""
    first, second = match[1].root.inputs[:2]
    result = match[1].root.outputs[0].shape
    if len(result) not in (2, 3) or result not in (first.shape, second.shape):
        return False
    return first.shape == second.shape or {first.shape[-2:], second.shape[-2:]} == {result[-2:]}


def vector_added(match: Match, _blocked: frozenset[str]) -> bool:
    """Tell whether the sum before an activation is with a vector along the last axis."""
    return _constant(match[1]).shape == match[1].root.outputs[0].shape[-1:]


def last_axes_swapped(match: Match, _blocked: frozenset[str]) -> bool:
    """Tell whether a transposition swaps the last two axes only, which a matrix product can read directly."""
    order = match[1].root.attributes.get("perm")
    rank = len(match[1].root.outputs[0].shape)
    return order == (*range(rank - 2), rank - 1, rank - 2)


def scalar_factor(match: Match, _blocked: frozenset[str]) -> bool:
    """Tell whether a product is scaled by one number; a constant numerator is no factor."""
    scale = match[0] if match[0].type in ("Mul", "Div") else match[1]
    if scale.root.op_type == "Div" and not scale.root.inputs[1].weight:
        return False
    return _constant(scale).elements == 1


def matrix_result(match: Match, _blocked: frozenset[str]) -> bool:
    """Tell whether the result is a matrix; a Gemm of more axes has reshapes around it."""
    return len(match[0].root.outputs[0].shape) == 2


def same_elements(match: Match, _blocked: frozenset[str]) -> bool:
    """Tell whether one loop can compute both."""
    return match[0].root.outputs[0].elements == match[1].root.outputs[0].elements


def same_layout(match: Match, blocked: frozenset[str]) -> bool:
    """Tell whether a convolution can add the other operand to its result as it writes it.

    In the blocked layout both must be blocked; outside of it only ``Add`` is known.
    """
    addition, conv = match[0].root, match[1]
    if len(addition.inputs) != 2 or addition.inputs[0].shape != addition.inputs[1].shape:
        return False
    if conv.root.outputs[0].name in blocked:
        return all(tensor.name in blocked for tensor in addition.inputs)
    return addition.op_type == "Add"


_FOLLOWS_INPUT = frozenset({
    "BatchNormalization", "Relu", "Sigmoid", "Tanh", "LeakyRelu", "Clip", "HardSigmoid", "QuickGelu", "Gelu", "Add",
    "Sum", "Mul", "Resize", "Upsample",
})  # fmt: skip
_POOLING = frozenset({"MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"})


def blocked_values(kernels: Iterable[KernelLike]) -> frozenset[str]:
    """Return the tensors that ONNX Runtime keeps in its blocked layout (NCHWc), given kernels in execution order."""
    blocked: set[str] = set()
    for kernel in kernels:
        if _is_blocked(kernel, blocked):
            blocked.update(tensor.name for tensor in kernel.root.outputs)
    return frozenset(blocked)


def _is_blocked(kernel: KernelLike, blocked: set[str]) -> bool:
    shape = kernel.root.outputs[0].shape
    if len(shape) != 4 or kernel.root.outputs[0].dtype != "float32":
        return False
    if kernel.type in ("Conv", "FusedConv"):
        return _is_blocked_conv(kernel.main)
    read = [tensor for tensor in kernel.inputs if tensor.name and not tensor.weight]
    if kernel.type in _POOLING:
        return shape[1] % _BLOCK == 0
    if kernel.type == "Concat":
        return all(tensor.name in blocked and tensor.shape[1] % _BLOCK == 0 for tensor in read)
    if kernel.type in _FOLLOWS_INPUT:
        return bool(read) and all(tensor.name in blocked for tensor in read)
    return False


def _is_blocked_conv(conv: Operator) -> bool:
    weight = conv.inputs[1]
    if not weight.weight or len(weight.shape) != 4:
        return False
    channels, per_group = weight.shape[:2]
    groups = conv.attributes.get("group", 1)
    if not isinstance(groups, int) or groups == 1:
        return per_group < _BLOCK or per_group % _ALIGNMENT == 0
    if channels % _BLOCK:
        return False
    depthwise = per_group == 1 and channels == groups
    return depthwise or (per_group % _BLOCK == 0 and channels // groups % _BLOCK == 0)


CONDITIONS: dict[str, _Condition] = {
    condition.__name__: condition
    for condition in (
        constant_per_channel, bias_of_matrix, rows_added, vector_added, last_axes_swapped, scalar_factor, matrix_result,
        same_elements, same_layout,
    )
}  # fmt: skip
"""Conditions by the name that rules use."""
