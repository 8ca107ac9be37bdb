"""Builds ONNX graphs without storing weights: every weight is a ``ConstantOfShape`` node.

The values are such that a model runs without overflow, zeros or denormal numbers: a kernel averages its inputs, a
normalisation has unit scale. So small models can be run as they are, and large ones cost no memory to describe.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

import moirai_sim

_DTYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
_OPSETS = (14, 23)


@dataclass(frozen=True)
class Value:
    """A tensor of the graph being built."""

    name: str
    shape: tuple[int, ...]


class Builder:
    """Appends nodes to a graph; every method returns the new tensor.

    Parameters
    ----------
    opset
        Below 17 layer normalisations are written as their nine elementary operators, as PyTorch did.
    """

    def __init__(self, name: str, *, dtype: str = "float32", opset: int = 17) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype={dtype} is none of {', '.join(_DTYPES)}")
        if not _OPSETS[0] <= opset <= _OPSETS[1]:
            raise ValueError(f"opset={opset} is outside {_OPSETS[0]}..{_OPSETS[1]}")
        self.name = name
        self.dtype = _DTYPES[dtype]
        self.opset = opset
        self._nodes: list[NodeProto] = []
        self._constants: dict[str, TensorProto] = {}
        self._inputs: list[ValueInfoProto] = []
        self._outputs: list[ValueInfoProto] = []
        self._scope: list[str] = []
        self._count: dict[str, int] = {}
        self._weights = 0

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of all nodes made inside."""
        self._scope.append(name)
        yield
        self._scope.pop()

    def model(self) -> ModelProto:
        """Return the finished model."""
        graph = helper.make_graph(self._nodes, self.name, self._inputs, self._outputs, list(self._constants.values()))
        imports = [helper.make_opsetid("", self.opset)]
        return helper.make_model(
            graph,
            opset_imports=imports,
            ir_version=10,
            producer_name="moirai-sim",
            producer_version=moirai_sim.__version__,
        )

    # ---- ends --------------------------------------------------------------------------------------------------------

    def input(self, name: str, shape: Sequence[int], dtype: int | None = None) -> Value:
        """Declare an input of the model, of the model's data type unless another is given."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype or self.dtype, shape))
        return Value(name, tuple(shape))

    def tokens(self, name: str, shape: Sequence[int]) -> Value:
        """Declare an input of token numbers."""
        return self.input(name, shape, TensorProto.INT64)

    def output(self, value: Value) -> None:
        """Declare an output of the model."""
        self._outputs.append(helper.make_tensor_value_info(value.name, self.dtype, value.shape))

    # ---- constants ---------------------------------------------------------------------------------------------------

    def integers(self, values: Sequence[int]) -> Value:
        """Store a list of whole numbers; equal lists are stored once."""
        return self._integer_constant("ints_" + "_".join(map(str, values)), np.array(values, dtype=np.int64))

    def integer(self, value: int) -> Value:
        """Store a whole number as a scalar."""
        return self._integer_constant(f"int_{value}", np.array(value, dtype=np.int64))

    def scalar(self, value: float) -> Value:
        """Store a number of the model's data type; equal numbers are stored once."""
        name = f"scalar_{value:g}"
        if name not in self._constants:
            self._constants[name] = helper.make_tensor(name, self.dtype, [], [value])
        return Value(name, ())

    def _integer_constant(self, name: str, array: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Value:
        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(array, name)
        return Value(name, array.shape)

    def weight(self, shape: Sequence[int], value: float, name: str = "weight") -> Value:
        """Declare a parameter, all of one value near ``value``, without storing it.

        No two near each other are equal: a backend would merge operators that compute the same.
        """
        self._weights += 1
        filler = helper.make_tensor("value", self.dtype, [1], [value * (0.9 + 0.002 * (37 * self._weights % 101))])
        return self.op("ConstantOfShape", [self.integers(shape)], shape, label=name, value=filler)

    # ---- operators ---------------------------------------------------------------------------------------------------

    def op(
        self,
        op_type: str,
        inputs: Sequence[Value | None],
        shape: Sequence[int],
        *,
        label: str = "",
        **attributes: Any,  # noqa: ANN401
    ) -> Value:
        """Append any operator with one output of the given shape; None is an absent optional input."""
        return self.ops(op_type, inputs, [shape], label=label, **attributes)[0]

    def ops(
        self,
        op_type: str,
        inputs: Sequence[Value | None],
        shapes: Sequence[Sequence[int]],
        *,
        label: str = "",
        **attributes: Any,  # noqa: ANN401
    ) -> list[Value]:
        """Append any operator with several outputs."""
        name = "/".join([*self._scope, label or op_type])
        self._count[name] = self._count.get(name, -1) + 1
        name += f"_{self._count[name]}" if self._count[name] else ""
        outputs = [name] + [f"{name}:{i}" for i in range(1, len(shapes))]
        names = [value.name if value else "" for value in inputs]
        self._nodes.append(helper.make_node(op_type, names, outputs, name=name, **attributes))
        return [Value(output, tuple(shape)) for output, shape in zip(outputs, shapes, strict=True)]

    def unary(self, op_type: str, x: Value, **attributes: Any) -> Value:  # noqa: ANN401
        """Append an operator that keeps the shape."""
        return self.op(op_type, [x], x.shape, **attributes)

    def binary(self, op_type: str, a: Value, b: Value) -> Value:
        """Append an elementwise operator with broadcasting."""
        return self.op(op_type, [a, b], np.broadcast_shapes(a.shape, b.shape))

    def add(self, a: Value, b: Value) -> Value:
        """Append an addition."""
        return self.binary("Add", a, b)

    def mul(self, a: Value, b: Value | float) -> Value:
        """Append a multiplication."""
        return self.binary("Mul", a, b if isinstance(b, Value) else self.scalar(b))

    def reshape(self, x: Value, shape: Sequence[int]) -> Value:
        """Append a reshape to a whole shape."""
        return self.op("Reshape", [x, self.integers(shape)], shape)

    def transpose(self, x: Value, order: Sequence[int]) -> Value:
        """Append a transposition."""
        return self.op("Transpose", [x], [x.shape[i] for i in order], perm=list(order))

    def concat(self, values: Sequence[Value], axis: int) -> Value:
        """Append a concatenation."""
        shape = list(values[0].shape)
        shape[axis] = sum(value.shape[axis] for value in values)
        return self.op("Concat", values, shape, axis=axis)

    def split(self, x: Value, sizes: Sequence[int], axis: int) -> list[Value]:
        """Append a split into pieces of the given sizes."""
        shapes = [[*x.shape[:axis], size, *x.shape[axis + 1 :]] for size in sizes]
        return self.ops("Split", [x, self.integers(sizes)], shapes, axis=axis)

    def slice(self, x: Value, start: int, end: int, axis: int) -> Value:
        """Append a slice along one axis."""
        shape = [*x.shape[:axis], end - start, *x.shape[axis + 1 :]]
        bounds = [self.integers([number]) for number in (start, end, axis)]
        return self.op("Slice", [x, *bounds], shape)

    def softmax(self, x: Value) -> Value:
        """Append a softmax over the last axis."""
        return self.unary("Softmax", x, axis=-1)

    def matmul(self, a: Value, b: Value) -> Value:
        """Append a matrix product with broadcast batch axes."""
        batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        return self.op("MatMul", [a, b], [*batch, a.shape[-2], b.shape[-1]])

    def linear(self, x: Value, size: int, *, bias: bool = True) -> Value:
        """Append a fully connected layer on the last axis, as MatMul and Add."""
        y = self.matmul(x, self.weight([x.shape[-1], size], 1 / x.shape[-1]))
        return self.add(self.weight([size], 0.01, "bias"), y) if bias else y

    def embedding(self, table: Value, tokens: Value) -> Value:
        """Append a table look-up."""
        return self.op("Gather", [table, tokens], [*tokens.shape, *table.shape[1:]])

    def layer_norm(self, x: Value) -> Value:
        """Append a layer normalisation over the last axis with scale and bias."""
        scale, bias = self.weight([x.shape[-1]], 1.0, "scale"), self.weight([x.shape[-1]], 0.1, "bias")
        if self.opset >= 17:
            return self.op("LayerNormalization", [x, scale, bias], x.shape, axis=-1, epsilon=1e-5)
        row = [*x.shape[:-1], 1]
        centred = self.binary("Sub", x, self.op("ReduceMean", [x], row, axes=[-1]))
        square = self.binary("Pow", centred, self.scalar(2.0))
        variance = self.add(self.op("ReduceMean", [square], row, axes=[-1]), self.scalar(1e-5))
        normal = self.binary("Div", centred, self.unary("Sqrt", variance))
        return self.add(self.mul(normal, scale), bias)

    def gelu(self, x: Value) -> Value:
        """Append the exact GELU, x (1 + erf(x / sqrt 2)) / 2, as PyTorch exports it."""
        erf = self.unary("Erf", self.binary("Div", x, self.scalar(math.sqrt(2))))
        return self.mul(self.mul(x, self.add(erf, self.scalar(1.0))), 0.5)

    def gelu_tanh(self, x: Value) -> Value:
        """Append the tanh form of GELU that GPT-2 uses."""
        cube = self.mul(self.binary("Pow", x, self.scalar(3.0)), 0.044715)
        tanh = self.unary("Tanh", self.mul(self.add(x, cube), math.sqrt(2 / math.pi)))
        return self.mul(self.mul(x, 0.5), self.add(tanh, self.scalar(1.0)))

    def silu(self, x: Value) -> Value:
        """Append x sigmoid(x)."""
        return self.mul(x, self.unary("Sigmoid", x))

    def conv(
        self,
        x: Value,
        channels: int,
        kernel: int | tuple[int, int] = 1,
        *,
        stride: int = 1,
        padding: int | tuple[int, int] | None = None,
        groups: int = 1,
        bias: bool = False,
    ) -> Value:
        """Append a 2-D convolution; padding keeps the size (at stride 1) unless given."""
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        if padding is None:
            padding = (kernel[0] // 2, kernel[1] // 2)
        pads = (padding, padding) if isinstance(padding, int) else padding
        n, c, *image = x.shape
        size = [(i + 2 * p - k) // stride + 1 for i, p, k in zip(image, pads, kernel, strict=True)]
        fan_in = c // groups * math.prod(kernel)
        inputs = [x, self.weight([channels, c // groups, *kernel], 1 / fan_in)]
        if bias:
            inputs.append(self.weight([channels], 0.01, "bias"))
        return self.op(
            "Conv", inputs, [n, channels, *size],
            kernel_shape=list(kernel), strides=[stride] * 2, pads=[*pads, *pads], group=groups,
        )  # fmt: skip

    def batch_norm(self, x: Value) -> Value:
        """Append a batch normalisation of inference."""
        values = (("scale", 1.0), ("bias", 0.01), ("mean", 0.0), ("variance", 1.0))
        statistics = [self.weight([x.shape[1]], value, name) for name, value in values]
        return self.op("BatchNormalization", [x, *statistics], x.shape, epsilon=1e-5)

    def relu(self, x: Value) -> Value:
        """Append a rectifier."""
        return self.unary("Relu", x)

    def pool(self, kind: str, x: Value, kernel: int, *, stride: int, padding: int = 0, ceil: bool = False) -> Value:
        """Append ``MaxPool`` or ``AveragePool``."""
        n, c, *image = x.shape
        size = [
            -(-(i + 2 * padding - kernel) // stride) + 1 if ceil else (i + 2 * padding - kernel) // stride + 1
            for i in image
        ]
        return self.op(
            kind, [x], [n, c, *size],
            kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[padding] * 4, ceil_mode=int(ceil),
        )  # fmt: skip

    def classifier(self, x: Value, classes: int = 1000) -> Value:
        """Append global average pooling, flattening and a fully connected layer."""
        n, c = x.shape[:2]
        pooled = self.op("GlobalAveragePool", [x], [n, c, 1, 1])
        flat = self.op("Flatten", [pooled], [n, c], axis=1)
        weight, bias = self.weight([classes, c], 1 / c), self.weight([classes], 0.01, "bias")
        return self.op("Gemm", [flat, weight, bias], [n, classes], transB=1)
