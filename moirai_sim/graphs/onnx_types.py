"""Static types, sizes and attributes of ONNX protos, checked before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, TypeProto, helper, numpy_helper

from moirai_sim.errors import InputError, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_ELEMENTS = 2**37
"""Largest tensor taken seriously: 512 GiB of float32. A file that declares more is broken or hostile."""

DTYPES: dict[int, str] = {
    TensorProto.FLOAT: "float32", TensorProto.DOUBLE: "float64", TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16", TensorProto.FLOAT8E4M3FN: "float8", TensorProto.FLOAT8E4M3FNUZ: "float8",
    TensorProto.FLOAT8E5M2: "float8", TensorProto.FLOAT8E5M2FNUZ: "float8", TensorProto.FLOAT4E2M1: "float4",
    TensorProto.INT64: "int64", TensorProto.INT32: "int32", TensorProto.INT16: "int16", TensorProto.INT8: "int8",
    TensorProto.INT4: "int4", TensorProto.UINT64: "uint64", TensorProto.UINT32: "uint32", TensorProto.UINT16: "uint16",
    TensorProto.UINT8: "uint8", TensorProto.UINT4: "uint4", TensorProto.BOOL: "bool",
}  # fmt: skip
"""Our spelling of ONNX element types; others (text, complex numbers) cannot be placed."""

_TYPED_FIELD = {
    TensorProto.FLOAT: "float_data", TensorProto.DOUBLE: "double_data", TensorProto.INT64: "int64_data",
    TensorProto.UINT64: "uint64_data", TensorProto.UINT32: "uint64_data",
}  # fmt: skip
_SUBGRAPHS = (AttributeProto.GRAPH, AttributeProto.GRAPHS)
_PLAIN_ATTRIBUTES = (
    AttributeProto.FLOAT, AttributeProto.INT, AttributeProto.STRING,
    AttributeProto.FLOATS, AttributeProto.INTS, AttributeProto.STRINGS,
)  # fmt: skip


class StaticType(NamedTuple):
    """Element type and shape of a tensor."""

    onnx_dtype: int
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """Our spelling of the element type."""
        return DTYPES[self.onnx_dtype]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def proto(self) -> TypeProto:
        """Return the ONNX form."""
        return helper.make_tensor_type_proto(self.onnx_dtype, self.shape)


def static_type(proto: TypeProto, what: str, place: str, dimensions: Mapping[str, int]) -> StaticType:
    """Return the static type of a value.

    Raises
    ------
    InputError
        If the value is no tensor, has an unsupported element type, a dynamic dimension that ``dimensions`` does not
        fix, or more than `MAX_ELEMENTS` elements.
    """
    if not proto.HasField("tensor_type"):
        raise InputError(f"{place}: {what} is not a tensor; only tensors can be placed: export the model without it")
    kind = proto.tensor_type
    if kind.elem_type not in DTYPES:
        raise InputError(f"{place}: {what} has the element type {_type_name(kind.elem_type)}; export it as numbers")
    if not kind.HasField("shape"):
        raise InputError(f"{place}: {what} has no shape; export the model with static shapes")
    shape = []
    for axis, dim in enumerate(kind.shape.dim):
        size = dim.dim_value if dim.HasField("dim_value") else dimensions.get(dim.dim_param, -1)
        if size < 0:
            label = f"'{dim.dim_param}'" if dim.dim_param else "without a name"
            cure = f"fix it by '{place}?{dim.dim_param}=1'" if dim.dim_param else "export the model with static shapes"
            raise InputError(f"{place}: {what} has a dynamic dimension {label} at axis {axis}; {cure}")
        shape.append(size)
    return checked_size(StaticType(kind.elem_type, tuple(shape)), what, place)


def check_dimensions(model: ModelProto, dimensions: Mapping[str, int], place: str) -> None:
    """Refuse sizes for symbolic dimensions that no value of the model has.

    Raises
    ------
    InputError
        Naming each.
    """
    values = chain(model.graph.input, model.graph.output, model.graph.value_info)
    known = {dim.dim_param for value in values for dim in value.type.tensor_type.shape.dim if dim.dim_param}
    cure = "the model has no symbolic dimension, its sizes are fixed" if not known else ""
    problems = [
        f"{place}: no dimension is called '{name}'; {cure or did_you_mean(name, sorted(known))}"
        for name in dimensions
        if name not in known
    ]
    if problems:
        raise InputError(problems)


def checked_size(kind: StaticType, what: str, place: str) -> StaticType:
    """Return ``kind``, or raise `InputError` if it is absurdly large."""
    if kind.elements > MAX_ELEMENTS:
        size = f"{kind.elements:.3g} elements (shape {list(kind.shape)})"
        raise InputError(f"{place}: {what} declares {size}; at most {MAX_ELEMENTS:.3g} are read: repair the shape")
    return kind


def tensor_type(tensor: TensorProto, what: str, place: str) -> StaticType:
    """Return the static type of a stored tensor, and check that its content has the size that it declares.

    Raises
    ------
    InputError
        If the element type is unsupported, the size absurd, or the content cut short.
    """
    if tensor.data_type not in DTYPES:
        raise InputError(f"{place}: {what} has the element type {_type_name(tensor.data_type)}; store it as numbers")
    if any(size < 0 for size in tensor.dims):
        raise InputError(f"{place}: {what} has a negative dimension in {list(tensor.dims)}; export the model again")
    kind = checked_size(StaticType(tensor.data_type, tuple(tensor.dims)), what, place)
    if tensor.data_location == TensorProto.EXTERNAL:
        return kind
    if tensor.HasField("raw_data"):
        bits = _bits(tensor.data_type)
        expected, found = (kind.elements * bits + 7) // 8, len(tensor.raw_data)
    else:
        per_item = 8 // _bits(tensor.data_type) if _bits(tensor.data_type) < 8 else 1
        expected = -(-kind.elements // per_item)
        found = len(getattr(tensor, _TYPED_FIELD.get(tensor.data_type, "int32_data")))
    if expected != found:
        unit = "bytes" if tensor.HasField("raw_data") else "values"
        shape = f"shape {list(tensor.dims)} needs {expected} {unit}, {found} are stored"
        raise InputError(f"{place}: {what}: {shape}; export the model again")
    return kind


def tensor_content(tensor: TensorProto) -> NDArray[np.generic] | None:
    """Return the values of a stored tensor whose size was checked; None where they lie in another file."""
    if tensor.data_location == TensorProto.EXTERNAL:
        return None
    content: NDArray[np.generic] = numpy_helper.to_array(tensor)
    return content


def plain_attributes(node: NodeProto) -> dict[str, object]:
    """Return the attributes that are numbers, text, or tuples of them."""
    attributes = {}
    for attribute in node.attribute:
        if attribute.type in _PLAIN_ATTRIBUTES:
            attributes[attribute.name] = _plain(helper.get_attribute_value(attribute))
    return attributes


def has_subgraph(node: NodeProto) -> bool:
    """Tell whether a node runs a graph of its own (If, Loop, Scan)."""
    return any(attribute.type in _SUBGRAPHS for attribute in node.attribute)


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return tuple(_plain(item) for item in value) if isinstance(value, Iterable) else value


def _bits(data_type: int) -> int:
    from moirai_sim.graphs.operator import DTYPE_BITS

    return DTYPE_BITS[DTYPES[data_type]]


def _type_name(data_type: int) -> str:
    names = TensorProto.DataType.DESCRIPTOR.values_by_number
    return names[data_type].name if data_type in names else f"number {data_type}"
