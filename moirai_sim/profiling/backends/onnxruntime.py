"""ONNX Runtime on a CPU: the one way in which this package makes sessions, and the graph that they really run.

What is priced must be what runs, so profilers and executors share `make_session`. ONNX Runtime rewrites a model before
it runs it: it fuses operators and keeps image tensors in a blocked layout (NCHWc) between convolutions.
`executed_graph` returns that rewritten graph with the shapes of all its tensors, and `kernel_model` makes a model of
one node of it.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort

from moirai_sim.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FATAL = 4
_IR_VERSION = 10
_BLOCK = 1 << 20
_MAX_COPIES = 16
_LAYOUT_SUFFIX = re.compile(r"(_bn|_mul)?_nchwc$")
"""What ONNX Runtime appends to the name of an output to name the node that writes it in the blocked layout."""
_PROBE_IN, _PROBE_OUT = "probe_in", "probe_out"


@cache
def share_memory() -> None:
    """Let the sessions of this process that ask for it take working memory from one pool.

    The parts of a model run one after the other; with a pool each, every part would work in memory that is cold.
    """
    place = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(place, None)


def make_session(
    model: bytes | Path,
    threads: int = 1,
    *,
    optimize: bool = True,
    portable: bool = False,
    save: Path | None = None,
    shared: bool = False,
) -> Any:  # noqa: ANN401
    """Return an ``onnxruntime.InferenceSession`` on the CPU.

    Operators run one after the other (sequential mode) on ``threads`` threads that sleep when they wait: a spinning
    thread would slow the other worker of a shared core.

    Parameters
    ----------
    model
        Serialised model or the file that holds it.
    threads
        Threads within an operator; with 1 everything runs on the calling thread, so the caller's pinning holds.
    optimize
        All graph optimizations; False runs the nodes as they stand (for graphs that were optimized before).
    portable
        Only optimizations that another backend can follow: fused operators, but no blocked layout of images.
    save
        Where ONNX Runtime writes the graph that it runs.
    shared
        Take working memory from the pool of the process; see `share_memory`.

    Raises
    ------
    InputError
        If ONNX Runtime refuses the model.
    """
    options = ort.SessionOptions()
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.log_severity_level = _FATAL  # it warns that a saved graph runs only on like hardware: known and meant
    level = ort.GraphOptimizationLevel
    most = level.ORT_ENABLE_EXTENDED if portable else level.ORT_ENABLE_ALL
    options.graph_optimization_level = most if optimize else level.ORT_DISABLE_ALL
    if shared:
        share_memory()
        options.add_session_config_entry("session.use_env_allocators", "1")
    if save is not None:
        options.optimized_model_filepath = str(save)
    try:
        source = str(model) if isinstance(model, Path) else model
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises classes of its own that share no public base
        name = model if isinstance(model, Path) else "model"
        raise InputError(f"{name}: ONNX Runtime cannot run it ({error})") from error


_NUMPY: dict[str, Any] = {
    "tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16,
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}  # fmt: skip


def random_array(shape: Sequence[int], dtype: np.dtype[Any], seed: int = 0) -> NDArray[Any]:
    """Return data that costs what real data costs: normal, no zeros, no denormals. Integers are 0 or 1.

    Large arrays repeat a block of a million values: drawing them all would take longer than the measurement.
    """
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape, dtype=np.int64))
    block = min(size, _BLOCK)
    if np.issubdtype(dtype, np.floating):
        return np.resize(rng.standard_normal(block, dtype=np.float32).astype(dtype), shape)
    return np.resize(rng.integers(0, 2, size=block).astype(dtype), shape)


def random_feeds(session: Any, seed: int = 0) -> dict[str, NDArray[Any]]:  # noqa: ANN401
    """Return random inputs for a session.

    Raises
    ------
    InputError
        If an input has a free dimension or a type that is no plain tensor.
    """
    feeds = {}
    for value in session.get_inputs():
        if not all(isinstance(size, int) for size in value.shape) or value.type not in _NUMPY:
            raise InputError(
                f"input '{value.name}' is {value.type} {value.shape}; fix every dimension of the model first"
            )
        feeds[value.name] = random_array(value.shape, np.dtype(_NUMPY[value.type]), seed)
    return feeds


def executed_graph(
    model: bytes | Path, threads: int = 1, *, portable: bool = False
) -> tuple[onnx.ModelProto, dict[str, NDArray[Any]]]:
    """Return the graph that ONNX Runtime really runs for a model, and the shape and type of every tensor in it.

    The model is run once to learn the shapes of all intermediate results. The arrays are stride-0 views that say shape
    and type and hold nothing. ``portable`` is that of `make_session`.
    """
    executed, feeds = _rewritten(model, threads, portable=portable)
    graph = executed.graph
    traced = onnx.ModelProto()
    traced.CopyFrom(executed)
    produced = [name for node in graph.node for name in node.output if name]
    del traced.graph.output[:]
    traced.graph.output.extend(onnx.ValueInfoProto(name=name) for name in produced)
    values = make_session(traced.SerializeToString(), threads, optimize=False).run(produced, feeds)
    known = feeds | dict(zip(produced, values, strict=True))
    return executed, {name: np.broadcast_to(np.zeros((), value.dtype), value.shape) for name, value in known.items()}


def portable_model(model: bytes | Path) -> bytes:
    """Return a model as ONNX Runtime rewrites it where another backend must be able to follow."""
    return bytes(_rewritten(model, 1, portable=True)[0].SerializeToString())


def _rewritten(model: bytes | Path, threads: int, *, portable: bool) -> tuple[onnx.ModelProto, dict[str, NDArray[Any]]]:
    """Return the graph that ONNX Runtime makes of a model, and random inputs for it."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "executed.onnx"
            session = make_session(model, threads, portable=portable, save=path)
            executed = onnx.load(str(path))
    except Exception as error:  # of ONNX Runtime, of the system, or of protobuf that finds half a file
        make_session(model, threads, portable=portable)  # says so if the model is to blame
        raise InputError(
            f"folder '{_temporary()}': ONNX Runtime cannot write there what it makes of the model ({error}); free some "
            "of its space, or set TMPDIR to a folder with more"
        ) from error
    feeds = random_feeds(session)
    used = [value for value in executed.graph.input if value.name in feeds]  # drops those of constants folded away
    del executed.graph.input[:]
    executed.graph.input.extend(used)
    return executed, feeds


def _temporary() -> str:
    try:
        return tempfile.gettempdir()
    except OSError:  # no folder takes a file
        return os.environ.get("TMPDIR", "/tmp")  # noqa: S108 - it names what the user can change


def owners(
    nodes: Sequence[onnx.NodeProto],
    weights: Container[str],
    operator_of: Mapping[str, str],
    by_node: Mapping[str, str] = MappingProxyType({}),
) -> tuple[str | None, ...]:
    """Return the user's operator that each executed node stands for: the last one, where nodes were fused.

    A node in the blocked layout writes a tensor of another name, but is itself named for the tensor of the user's model
    that it stands for. A change of layout belongs to the operator whose result it converts, or to the first reader
    where it converts an input of the model. Other nodes that ONNX Runtime made up (a matrix product and the flattening
    around it) belong to the operator that reads their result.

    Parameters
    ----------
    nodes
        In execution order.
    weights
        Names of constants.
    operator_of
        Tensor of the user's model -> operator that writes it.
    by_node
        Name of a node of the user's model -> its operator. An elementwise node may keep its name and yet read and
        write tensors in the blocked layout.
    """
    writer = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    reader: dict[str, int] = {}
    for i, node in enumerate(nodes):
        for name in node.input:
            reader.setdefault(name, i)
    owner: list[str | None] = []
    for node in nodes:
        names = [*node.output, _LAYOUT_SUFFIX.sub("", node.name)]
        found = next((operator_of[name] for name in names if name in operator_of), by_node.get(node.name))
        if found is None and node.op_type.startswith("Reorder"):
            sources = (owner[writer[name]] for name in node.input if name in writer and name not in weights)
            found = next((name for name in sources if name is not None), None)
        owner.append(found)
    for i in reversed(range(len(nodes))):
        if owner[i] is None:
            owner[i] = next((owner[reader[name]] for name in nodes[i].output if name in reader), None)
    return tuple(owner)


@dataclass(frozen=True)
class KernelGraph:
    """An executed graph without its large weights, which are known by shape and type only, so that it stays small."""

    nodes: tuple[onnx.NodeProto, ...]
    """In execution order."""
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
    """Shape and type of every tensor: inputs, weights, results."""
    weights: Mapping[str, NDArray[Any] | None]
    """Weights by name; the value where it decides what runs (integers, scalars), else None."""
    opsets: tuple[onnx.OperatorSetIdProto, ...]


def kernel_graph(model: bytes | Path, threads: int = 1) -> KernelGraph:
    """Return the kernels that ONNX Runtime runs for a model; see `executed_graph`."""
    executed, arrays = executed_graph(model, threads)
    weights: dict[str, NDArray[Any] | None] = {}
    tensors: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
        name: (array.shape, array.dtype) for name, array in arrays.items()
    }
    for weight in executed.graph.initializer:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(weight.data_type))
        tensors[weight.name] = (tuple(weight.dims), dtype)
        decides = not np.issubdtype(dtype, np.floating) or int(np.prod(weight.dims)) == 1
        weights[weight.name] = onnx.numpy_helper.to_array(weight).copy() if decides else None
    return KernelGraph(
        tuple(_copy(node) for node in executed.graph.node), tensors, weights, tuple(executed.opset_import)
    )


def kernel_key(node: onnx.NodeProto, graph: KernelGraph) -> tuple[object, ...]:
    """Return what decides a node's time: type, attributes, and shape, type and decisive value of each input."""
    operands: list[tuple[object, ...] | None] = []
    for name in node.input:
        if not name:
            operands.append(None)
            continue
        shape, dtype = graph.tensors[name]
        value = graph.weights.get(name)
        operands.append((shape, dtype.str, name in graph.weights, None if value is None else value.tobytes()))
    attributes = tuple(sorted(attribute.SerializeToString(deterministic=True) for attribute in node.attribute))
    return node.domain, node.op_type, attributes, tuple(operands), len(node.output)


def kernel_model(node: onnx.NodeProto, graph: KernelGraph, cache_bytes: int) -> tuple[bytes, int]:
    """Return a model of several equal nodes, and their number.

    The copies share their activations, which are what the previous operator just wrote and so are warm in the model
    too, but have a weight each, together above ``cache_bytes``: a weight is not read twice in one run of a model.
    Nothing reads what they write; the output of the model is that of `probe_model`, so both have the same overhead.
    """
    operands = [name for name in dict.fromkeys(node.input) if name]
    size = sum(_bytes(graph, name) for name in operands if name in graph.weights)
    copies = int(np.clip(-(-cache_bytes // max(size, 1)), 1 if size > cache_bytes else 4, _MAX_COPIES))
    initializers, nodes = [], []
    for copy in range(copies):
        twin = _copy(node)
        twin.name = f"copy{copy}"
        for slot, name in enumerate(node.input):
            if name in graph.weights:
                twin.input[slot] = f"{name}#{copy}"
        for slot, name in enumerate(node.output):
            twin.output[slot] = f"{name}#{copy}" if name else ""
        initializers += [
            onnx.numpy_helper.from_array(_weight(graph, name, copy), f"{name}#{copy}")
            for name in operands
            if name in graph.weights
        ]
        nodes.append(twin)
    inputs = [
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(dtype), shape)
        for name in operands
        if name not in graph.weights
        for shape, dtype in [graph.tensors[name]]
    ]
    return _model(nodes, inputs, initializers, graph.opsets), copies


def probe_model() -> bytes:
    """Return a model that does nothing: what a run costs besides its operators."""
    return _model([], [], [], (onnx.helper.make_opsetid("", 17),))


def _model(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    initializers: list[onnx.TensorProto],
    opsets: Sequence[onnx.OperatorSetIdProto],
) -> bytes:
    tensor = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [*nodes, onnx.helper.make_node("Identity", [_PROBE_IN], [_PROBE_OUT])],
        "kernel",
        [*inputs, tensor(_PROBE_IN, onnx.TensorProto.FLOAT, [1])],
        [tensor(_PROBE_OUT, onnx.TensorProto.FLOAT, [1])],
        initializers,
    )
    model = onnx.helper.make_model(graph, opset_imports=list(opsets), ir_version=_IR_VERSION)
    return bytes(model.SerializeToString())


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    twin = onnx.NodeProto()
    twin.CopyFrom(node)
    return twin


def _bytes(graph: KernelGraph, name: str) -> int:
    shape, dtype = graph.tensors[name]
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def _weight(graph: KernelGraph, name: str, seed: int) -> NDArray[Any]:
    value = graph.weights[name]
    if value is not None:
        return value
    shape, dtype = graph.tensors[name]
    weight = random_array(shape, dtype, seed)
    weight *= np.asarray(0.1, dtype)  # results of deep products stay finite
    return np.abs(weight) if len(shape) == 1 else weight  # a variance has no sign
