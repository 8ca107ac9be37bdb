"""ONNX -> OperatorGraph: real work only, with shapes, operations and bytes.

One pass over the nodes in topological order. A node either *folds*, because all that it reads is constant (weights
that nodes make or reshape, shape arithmetic), or becomes an `Operator`. Nodes of equal signature (type, attributes,
input types, small constants) are inferred and priced once, so a model of a million operators is read in linear time.

Reading is safe: external data is never opened, and declared sizes are checked before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import networkx as nx
import onnx
from onnx import defs, helper, numpy_helper, shape_inference

from moirai_sim.errors import InputError
from moirai_sim.files import sha256
from moirai_sim.graphs.contrib import STANDARD_TWIN, contrib_shapes
from moirai_sim.graphs.folding import NEVER_FOLDED, SHARE_STORAGE, evaluate, is_small, shape_content
from moirai_sim.graphs.onnx_types import (
    DTYPES,
    StaticType,
    check_dimensions,
    checked_size,
    has_subgraph,
    plain_attributes,
    static_type,
    tensor_content,
    tensor_type,
)
from moirai_sim.graphs.operator import Operator, OperatorGraph, Tensor
from moirai_sim.graphs.work import ABSENT, VIEWS, make_operator

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_FLOATING = frozenset({"float64", "float32", "float16", "bfloat16", "float8", "float4"})


@dataclass(slots=True)
class _Value:
    """A tensor during reading."""

    type: StaticType
    tensor: Tensor
    root: str
    """The weight whose storage this constant uses; empty for an activation."""
    content: NDArray[np.generic] | None
    """The values of a small constant."""
    key: tuple[object, ...]
    """What shape inference may depend on."""


class _Result(NamedTuple):
    """What all nodes of one signature share."""

    types: tuple[StaticType | None, ...]
    """Of the outputs; None where an output is left out, or its shape is not known and nothing needs it."""
    contents: tuple[NDArray[np.generic] | None, ...]
    """Of the outputs of a folded node."""
    operator: Operator | None
    """The pattern of the operator; None for a folded node."""


def read_onnx(
    path: Path | str, *, name: str | None = None, dimensions: Mapping[str, int] | None = None
) -> OperatorGraph:
    """Read an ONNX file.

    Parameters
    ----------
    path
        The ``.onnx`` file. Weights in external files are not needed.
    name
        Name of the graph; the file's stem if None.
    dimensions
        Sizes for symbolic dimensions of the inputs, e.g. ``{"batch": 8}``.

    Raises
    ------
    InputError
        If the file is no ONNX model, is broken or cyclic, has dimensions that are not known, declares tensors of absurd
        size, or holds an operator whose outputs have no known shape.
    """
    path = Path(path)
    model = load_onnx(path)
    source: dict[str, object] = {"path": path.name, "sha256": sha256(path)}
    if dimensions:
        source["dimensions"] = dict(dimensions)
    return read_model(model, name=name or path.stem, place=str(path), dimensions=dimensions, source=source)


def load_onnx(path: Path) -> onnx.ModelProto:
    """Decode an ONNX file, without its external data.

    Raises
    ------
    InputError
        If the file is missing or is no ONNX model.
    """
    try:
        return onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name an existing .onnx file") from error
    except Exception as error:  # protobuf raises types of its own
        raise InputError(f"{path}: is not an ONNX model, or is cut short; export it again") from error


def read_model(
    model: onnx.ModelProto,
    *,
    name: str,
    place: str = "",
    dimensions: Mapping[str, int] | None = None,
    source: Mapping[str, object] | None = None,
) -> OperatorGraph:
    """Read an ONNX model in memory; see `read_onnx`. ``place`` begins every error message."""
    place = place or name
    if not model.graph.node:
        raise InputError(f"{place}: the model has no operators; name a file that holds a whole model")
    if not _is_text(model.graph):
        raise InputError(f"{place}: a name is not valid UTF-8, the file is damaged; export it again")
    check_dimensions(model, dimensions or {}, place)
    if model.functions:
        from onnx import inliner

        try:
            model = inliner.inline_local_functions(model)
        except Exception as error:  # the C++ side raises several types
            raise InputError(
                f"{place}: the functions of the model cannot be expanded ({error}); export it again"
            ) from error
    digraph = _Reader(model, place, dimensions or {}).read()
    if not len(digraph):
        raise InputError(f"{place}: every output is constant, nothing is left to run; check the outputs of the export")
    opset = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    facts: dict[str, object] = {"opset": opset, "producer": f"{model.producer_name} {model.producer_version}".strip()}
    outputs = [info.name for info in model.graph.output]
    return OperatorGraph(name, digraph, source=dict(source or {}) | facts | {"outputs": outputs})


def _is_text(graph: onnx.GraphProto) -> bool:
    """Tell whether all names are text; protobuf hands out the bytes of those that are not."""
    nodes = ((node.name, node.op_type, node.domain, *node.input, *node.output) for node in graph.node)
    values = (
        value.name for values in (graph.input, graph.output, graph.initializer, graph.value_info) for value in values
    )
    return all(isinstance(text, str) for text in chain(chain.from_iterable(nodes), values))


def node_names(nodes: Sequence[onnx.NodeProto]) -> list[str]:
    """Return the operator name of every node: its own, else its first output's; repeats get ``#2``, ``#3``, ..."""
    names: list[str] = []
    own = {node.name for node in nodes}
    taken: set[str] = set()
    copies: dict[str, int] = {}
    for node in nodes:
        name = base = node.name or next(filter(None, node.output), node.op_type)
        while name in taken or (name in own and name != node.name):
            copies[base] = copies.get(base, 1) + 1
            name = f"{base}#{copies[base]}"
        taken.add(name)
        names.append(name)
    return names


class _Reader:
    """The state of one pass over a model."""

    def __init__(self, model: onnx.ModelProto, place: str, dimensions: Mapping[str, int]) -> None:
        self.graph = model.graph
        self.place = place
        self.dimensions = dimensions
        self.opset_imports = list(model.opset_import)
        self.opset = {"" if entry.domain == "ai.onnx" else entry.domain: entry.version for entry in model.opset_import}
        self.declared = {info.name: info.type for info in (*self.graph.value_info, *self.graph.output)}
        self.values: dict[str, _Value] = {}
        self.results: dict[tuple[object, ...], _Result] = {}
        self.read_names = {name for node in self.graph.node for name in node.input}
        self.read_names |= {info.name for info in self.graph.output}

    def read(self) -> nx.DiGraph:
        """Return the graph of `OperatorGraph`."""
        self._read_initializers()
        self._read_inputs()
        names = node_names(self.graph.node)
        operators: dict[str, Operator] = {}
        producer: dict[str, str] = {}
        for i in self._order():
            operator = self._read_node(self.graph.node[i], names[i])
            if operator is not None:
                operators[names[i]] = operator
                producer |= dict.fromkeys(self.graph.node[i].output, names[i])
        producer.pop("", None)
        live = self._live(operators, producer)
        digraph = nx.DiGraph()
        counted: set[str] = set()
        for name in operators:
            if name in live:
                digraph.add_node(name, operator=self._with_weights(operators[name], counted))
        for name in digraph:
            flows: dict[str, list[Tensor]] = {}
            for tensor in dict.fromkeys(operators[name].inputs):
                if tensor.name in producer:
                    flows.setdefault(producer[tensor.name], []).append(tensor)
            for origin, tensors in flows.items():
                digraph.add_edge(origin, name, tensors=tuple(tensors))
        return digraph

    def _live(self, operators: Mapping[str, Operator], producer: Mapping[str, str]) -> set[str]:
        """Return the operators that some output of the model needs."""
        stack = [producer[info.name] for info in self.graph.output if info.name in producer]
        live = set(stack)
        while stack:
            for tensor in operators[stack.pop()].inputs:
                origin = producer.get(tensor.name)
                if origin is not None and origin not in live:
                    live.add(origin)
                    stack.append(origin)
        return live

    def _with_weights(self, operator: Operator, counted: set[str]) -> Operator:
        """Return the operator with the bytes of the weights that no earlier operator reads."""
        if operator.op_type in VIEWS:
            return operator
        size = 0
        for tensor in operator.inputs:
            root = self.values[tensor.name].root if tensor.weight else ""
            if root and root not in counted:
                counted.add(root)
                size += tensor.bytes
        return replace(operator, weight_bytes=size) if size else operator

    # ---- values that exist before any node runs ----------------------------------------------------------------------

    def _read_initializers(self) -> None:
        problems: list[str] = []
        if self.graph.sparse_initializer:
            problems.append(f"{self.place}: sparse initializers are not supported; store the weights densely")
        for tensor in self.graph.initializer:
            try:
                kind = tensor_type(tensor, f"initializer '{tensor.name}'", self.place)
            except InputError as error:
                problems += error.problems
                continue
            self._add(tensor.name, kind, tensor.name, tensor_content(tensor) if is_small(kind) else None)
        if problems:
            raise InputError(problems)

    def _read_inputs(self) -> None:
        problems: list[str] = []
        for info in self.graph.input:
            if info.name in self.values:  # before IR version 4 initializers are listed among the inputs too
                continue
            try:
                self._add(info.name, static_type(info.type, f"input '{info.name}'", self.place, self.dimensions))
            except InputError as error:
                problems += error.problems
        if problems:
            raise InputError(problems)

    def _add(self, name: str, kind: StaticType, root: str = "", content: NDArray[np.generic] | None = None) -> None:
        tensor = Tensor(name, kind.shape, kind.dtype, weight=bool(root))
        key = (kind, bool(root), None if content is None else content.tobytes())
        self.values[name] = _Value(kind, tensor, root, content, key)

    # ---- nodes -------------------------------------------------------------------------------------------------------

    def _order(self) -> Sequence[int]:
        """Return the positions of the nodes in topological order: the file's own, unless it is not sorted."""
        nodes = self.graph.node
        writer: dict[str, int] = {}
        problems = []
        for i, node in enumerate(nodes):
            for output in filter(None, node.output):
                if output in writer or output in self.values:
                    problems.append(f"{self.place}: '{output}' is written twice; give every value one writer")
                writer[output] = i
        links = []
        for i, node in enumerate(nodes):
            for name in filter(None, node.input):
                if name in writer:
                    links.append((writer[name], i))
                elif name not in self.values:
                    reader = f"operator '{node.name or i}' ({node.op_type})"
                    problems.append(f"{self.place}: {reader} reads '{name}', which nothing writes; export it again")
        if problems:
            raise InputError(problems)
        if all(first < second for first, second in links):
            return range(len(nodes))
        digraph = nx.DiGraph()
        digraph.add_nodes_from(range(len(nodes)))
        digraph.add_edges_from(links)
        try:
            return list(nx.lexicographical_topological_sort(digraph))
        except nx.NetworkXUnfeasible:
            names = node_names(nodes)
            cycle = " -> ".join(names[i] for i, _ in nx.find_cycle(digraph))
            raise InputError(f"{self.place}: the operators form a cycle: {cycle}; a model must be acyclic") from None

    def _read_node(self, node: onnx.NodeProto, name: str) -> Operator | None:
        """Add the outputs of a node to the values, and return its operator unless it folds."""
        inputs = [self.values[x] if x else None for x in node.input]
        while inputs and inputs[-1] is None:
            inputs.pop()
        signature = (
            node.op_type, node.domain, tuple(map(bool, node.output)), tuple(v and v.key for v in inputs),
            tuple(attribute.SerializeToString(deterministic=True) for attribute in node.attribute),
        )  # fmt: skip
        result = self.results.get(signature)
        if result is None:
            result, shared = self._result(node, name, inputs)
            if shared:
                self.results[signature] = result
        if result.operator is None:
            aliases = node.op_type in SHARE_STORAGE and inputs and inputs[0] is not None
            for output, kind, content in zip(node.output, result.types, result.contents, strict=True):
                if kind is not None:
                    self._add(output, kind, inputs[0].root if aliases and inputs[0] else output, content)
            return None
        for output, kind in zip(node.output, result.types, strict=True):
            if kind is not None:
                self._add(output, kind)
        pattern = result.operator
        return Operator(
            name, pattern.op_type,
            tuple(ABSENT if value is None else value.tensor for value in inputs),
            tuple(self.values[x].tensor if kind else ABSENT for x, kind in zip(node.output, result.types, strict=True)),
            pattern.attributes, pattern.dtype, pattern.flops, pattern.read_bytes, pattern.write_bytes,
            bytes_only=pattern.bytes_only,
        )  # fmt: skip

    def _result(self, node: onnx.NodeProto, name: str, inputs: Sequence[_Value | None]) -> tuple[_Result, bool]:
        """Return what the node gives, and whether all nodes of its signature give the same."""
        what = f"operator '{name}' ({node.op_type})"
        if has_subgraph(node):
            raise InputError(f"{self.place}: {what} runs a subgraph, which cannot be placed; export the model unrolled")
        inferred = self._infer(node, what, inputs)
        foldable = node.op_type not in NEVER_FOLDED and all(value is None or value.root for value in inputs)
        contents = self._contents(node, inputs, inferred) if foldable or node.op_type in ("Shape", "Size") else None
        if contents is not None:
            kinds = tuple(StaticType(helper.np_dtype_to_tensor_dtype(array.dtype), array.shape) for array in contents)
            small = tuple(c if is_small(kind) else None for c, kind in zip(contents, kinds, strict=True))
            return _Result(kinds, small, None), True
        types, shared = self._complete(node, what, inferred)
        if foldable:
            return _Result(types, (None,) * len(types), None), shared
        read = [ABSENT if value is None else value.tensor for value in inputs]
        written = [Tensor("", kind.shape, kind.dtype) if kind else ABSENT for kind in types]
        attributes = plain_attributes(node)
        try:
            operator = make_operator(
                name, node.op_type, read, written, attributes, _arithmetic(node.op_type, read, written)
            )
        except InputError as error:
            raise InputError(f"{self.place}: {problem}" for problem in error.problems) from error
        return _Result(types, (), operator), shared

    def _infer(self, node: onnx.NodeProto, what: str, inputs: Sequence[_Value | None]) -> list[StaticType | None]:
        """Return the types of the outputs that the operator's schema or our rules can tell."""
        op_type = STANDARD_TWIN.get(node.op_type, node.op_type)
        domain = "" if node.domain == "ai.onnx" or op_type != node.op_type else node.domain
        try:
            schema = defs.get_schema(op_type, self.opset.get(domain, onnx.defs.onnx_opset_version()), domain)
        except defs.SchemaError:
            return self._infer_contrib(node, what, inputs)
        if op_type != node.op_type:
            standard = [a for a in node.attribute if a.name in schema.attributes]
            node = helper.make_node(op_type, node.input[:3], node.output)
            node.attribute.extend(standard)
        types = {x: value.type.proto() for x, value in zip(node.input, inputs, strict=False) if value is not None}
        contents = {
            x: numpy_helper.from_array(value.content, x)
            for x, value in zip(node.input, inputs, strict=False)
            if value is not None and value.content is not None
        }
        try:
            found = shape_inference.infer_node_outputs(schema, node, types, contents, opset_imports=self.opset_imports)
        except Exception as error:  # the C++ side raises several types
            reason = " ".join(str(error).split())
            raise InputError(f"{self.place}: {what} does not fit its inputs ({reason}); export it again") from error
        return [self._inferred(found[x], what) if x in found else None for x in node.output]

    def _inferred(self, proto: onnx.TypeProto, what: str) -> StaticType | None:
        """Return what inference found, if that is a whole static type."""
        kind = proto.tensor_type
        if kind.elem_type not in DTYPES or not kind.HasField("shape"):
            return None
        if not all(dim.HasField("dim_value") for dim in kind.shape.dim):
            return None
        return checked_size(
            StaticType(kind.elem_type, tuple(dim.dim_value for dim in kind.shape.dim)), what, self.place
        )

    def _infer_contrib(
        self, node: onnx.NodeProto, what: str, inputs: Sequence[_Value | None]
    ) -> list[StaticType | None]:
        """Return the types of the outputs of an operator without an ONNX schema, where our rules know it."""
        try:
            shapes = contrib_shapes(
                node.op_type, [ABSENT.shape if v is None else v.type.shape for v in inputs], plain_attributes(node)
            )
        except (LookupError, TypeError, ValueError, ZeroDivisionError) as error:
            raise InputError(f"{self.place}: {what} does not fit its inputs; export it again") from error
        kinds: list[StaticType | None] = [None] * len(node.output)
        dtype = next((v.type.onnx_dtype for v in inputs if v and v.type.dtype in _FLOATING), None)
        if shapes and dtype is not None:
            for i, (output, shape) in enumerate(zip(node.output, shapes, strict=False)):
                own = node.op_type == "GroupQueryAttention" and i and self._declares(output)  # how it keeps its cache
                kinds[i] = checked_size(StaticType(dtype, shape), what, self.place) if output and not own else None
        return kinds

    def _declares(self, output: str) -> bool:
        """Tell whether the model declares the shape of a value that is read, with sizes that are known."""
        if output not in self.declared or output not in self.read_names:
            return False
        kind = self.declared[output].tensor_type
        if not kind.HasField("shape") or kind.elem_type not in DTYPES:
            return False
        axes = kind.shape.dim
        return all(axis.HasField("dim_value") or axis.dim_param in self.dimensions for axis in axes)

    def _complete(
        self, node: onnx.NodeProto, what: str, inferred: Sequence[StaticType | None]
    ) -> tuple[tuple[StaticType | None, ...], bool]:
        """Fill in types that only the model declares; whether other nodes of the signature may reuse the result."""
        types = list(inferred)
        shared = True
        for i, output in enumerate(node.output):
            if types[i] is not None or not output:
                continue
            shared = False
            if output not in self.read_names:
                continue
            if output not in self.declared:
                raise InputError(
                    f"{self.place}: {what} has an output '{output}' whose shape is not known: the operator type is "
                    "new to us, or its shape depends on data; declare the shape in the model's value_info"
                )
            types[i] = static_type(self.declared[output], f"output '{output}' of {what}", self.place, self.dimensions)
        return tuple(types), shared

    def _contents(
        self, node: onnx.NodeProto, inputs: Sequence[_Value | None], inferred: Sequence[StaticType | None]
    ) -> list[NDArray[np.generic]] | None:
        """Return the values of the outputs of a node, where they can be computed ahead."""
        if node.op_type in ("Shape", "Size") and inputs[0] is not None:
            return [shape_content(node, inputs[0].type.shape)]
        if any(value is not None and value.content is None for value in inputs):
            return None
        return evaluate(node, [None if value is None else value.content for value in inputs], inferred, self.opset)


def _arithmetic(op_type: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> str:
    """Return the data type that an operator computes in."""
    if op_type == "DynamicQuantizeMatMul" and len(inputs) > 1:  # which quantises its first operand itself
        return inputs[1].dtype
    if inputs and (op_type.startswith("QLinear") or op_type.endswith("Integer") or op_type == "MatMulIntegerToFloat"):
        return inputs[0].dtype
    return next((t.dtype for t in inputs if t.dtype in _FLOATING), (inputs or outputs)[0].dtype)
