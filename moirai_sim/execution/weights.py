"""Weights that tell outputs apart: models of the zoo and the light models of ``onnx`` have one value a weight.

With constant weights a wrongly wired model gives the right answer. Each value is multiplied by a random factor near
one, which keeps signs and magnitudes, so that nothing overflows, vanishes or becomes a denormal number.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from moirai_sim.errors import InputError
from moirai_sim.profiling.backends.onnxruntime import random_array


def with_random_weights(model: onnx.ModelProto, *, seed: int = 0) -> onnx.ModelProto:
    """Return the model with the weights that its ``ConstantOfShape`` nodes fill made random initializers.

    Raises
    ------
    InputError
        If the weights exceed the 2 GiB of an ONNX file.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    filled = [
        node
        for node in model.graph.node
        if node.op_type == "ConstantOfShape" and node.input[0] in constants and _value(node) not in (None, 0.0)
    ]
    shapes = [tuple(int(size) for size in numpy_helper.to_array(constants[node.input[0]])) for node in filled]
    total = sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes) * 4
    if total + model.ByteSize() >= onnx.checker.MAXIMUM_PROTOBUF:
        raise InputError(f"{model.graph.name}: {total / 2**30:.3g} GiB of weights exceed the 2 GiB of an ONNX file")
    fresh = onnx.ModelProto()
    fresh.CopyFrom(model)
    names = {node.output[0] for node in filled}
    kept = [node for node in fresh.graph.node if not (node.op_type == "ConstantOfShape" and node.output[0] in names)]
    del fresh.graph.node[:]
    fresh.graph.node.extend(kept)
    for number, (node, shape) in enumerate(zip(filled, shapes, strict=True)):
        dtype = onnx.helper.tensor_dtype_to_np_dtype(node.attribute[0].t.data_type)
        factor = np.clip(1 + 0.3 * random_array(shape, np.dtype(np.float32), seed + number), 0.4, 1.6)
        array = (np.float32(_value(node) or 0) * factor).astype(dtype)
        fresh.graph.initializer.append(numpy_helper.from_array(array, node.output[0]))
    return fresh


def _value(node: onnx.NodeProto) -> float | None:
    """Return the floating point value that a node fills with; None for another type."""
    if not node.attribute:
        return 0.0
    tensor = node.attribute[0].t
    floating = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
    return float(numpy_helper.to_array(tensor).ravel()[0]) if tensor.data_type in floating else None
