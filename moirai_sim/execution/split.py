"""Split a model by a placement into parts: what one worker runs in one call of its backend.

The model is split *after* ONNX Runtime has optimized it, so that the kernels are those of the whole model (fusion and
blocked layouts included) and a part boundary costs no conversion of layout. A tensor that crosses devices inside of a
fused kernel is declared an output of the model before it is optimized, which keeps that fusion from happening.
"""

from __future__ import annotations

import copy
import heapq
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import onnx

from moirai_sim.errors import InputError
from moirai_sim.profiling.backends.onnxruntime import executed_graph, owners

if TYPE_CHECKING:
    from moirai_sim.graphs.operator import OperatorGraph

_CONVERSIONS = ("ReorderInput", "Cast", "Transpose")
"""Kernels that ONNX Runtime inserts between an input of the model and its readers."""


@dataclass(frozen=True)
class TensorSpec:
    """Type and shape of a tensor of the executed graph."""

    dtype: str
    """NumPy's name."""
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Part:
    """Kernels that one device runs in one go: a convex piece of the model."""

    device: str
    kernels: tuple[int, ...]
    """Positions in `Executed.nodes`, in the order in which they run."""
    operators: tuple[str, ...]
    """The user's operators that these kernels stand for."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    awaits: tuple[str, ...]
    """Tensors of other devices that arrive for this part."""
    sends: tuple[tuple[str, tuple[str, ...]], ...]
    """(tensor, target devices), sent when the part ends."""


class Executed:
    """The graph that ONNX Runtime really runs for a model, and which user operator each of its kernels stands for.

    Parameters
    ----------
    model
        The model with its weights.
    graph
        The same model as operators.
    kept
        Tensors that must exist between kernels although ONNX Runtime would fuse them away.
    threads
        Threads of the sessions.
    portable
        Only the rewriting that another backend can follow; ONNX Runtime then optimizes each of its parts further.

    Raises
    ------
    InputError
        If the model exceeds 2 GiB, has free dimensions, or ONNX Runtime refuses it.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        graph: OperatorGraph,
        kept: Sequence[str] = (),
        threads: int = 1,
        *,
        portable: bool = False,
    ) -> None:
        self.portable = portable
        if model.ByteSize() >= onnx.checker.MAXIMUM_PROTOBUF:
            raise InputError(f"{graph.name}: the model with its weights exceeds the 2 GiB of an ONNX file")
        known = {output.name for output in model.graph.output}
        marked = model
        if any(name not in known for name in kept):
            marked = onnx.ModelProto()
            marked.CopyFrom(model)
            marked.graph.output.extend(onnx.ValueInfoProto(name=name) for name in kept if name not in known)
        executed, arrays = executed_graph(marked.SerializeToString(), threads, portable=portable)
        self.model = executed
        self.tensors = {name: TensorSpec(array.dtype.name, array.shape) for name, array in arrays.items()}
        self.outputs = [output.name for output in model.graph.output]
        self.inputs = [value.name for value in executed.graph.input]
        self.weights = {tensor.name: tensor for tensor in executed.graph.initializer}
        self.nodes: list[onnx.NodeProto] = _live(executed.graph.node, self.outputs)
        self.writer = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}
        operator_of = {tensor.name: operator.name for operator in graph for tensor in operator.outputs}
        first = next(iter(graph)).name
        by_node = {operator.name: operator.name for operator in graph}
        self.owner = [name or first for name in owners(self.nodes, self.weights, operator_of, by_node)]

    @cached_property
    def owners(self) -> frozenset[str]:
        """The user's operators that have a kernel of their own; the others are fused into one of these."""
        return frozenset(self.owner)

    def reads(self, i: int) -> list[str]:
        """Return the activations that a kernel reads, each once; inputs of the model among them."""
        return [name for name in dict.fromkeys(self.nodes[i].input) if name and name not in self.weights]

    def with_local_inputs(self, device: Mapping[str, str]) -> Executed:
        """Return the graph with conversions of the model's inputs repeated on every device that reads them.

        The inputs of a model are everywhere, so no device may wait for another one that converts them.
        """
        local = copy.copy(self)
        local.nodes, local.owner, local.tensors = [], [], dict(self.tensors)
        renamed: dict[tuple[str, str], str] = {}
        for node, owner in zip(self.nodes, self.owner, strict=True):
            readers = self._converted_for(node, device)
            for target, reader in readers.items():
                twin = onnx.NodeProto()
                twin.CopyFrom(node)
                twin.name = f"{node.name}@{target}"
                for slot, name in enumerate(node.output):
                    twin.output[slot] = renamed[name, target] = f"{name}@{target}"
                    local.tensors[twin.output[slot]] = self.tensors[name]
                local.nodes.append(twin)
                local.owner.append(reader)
            if not readers:
                slots = [renamed.get((name, device[owner]), name) for name in node.input]
                if slots != list(node.input):
                    twin = onnx.NodeProto()
                    twin.CopyFrom(node)
                    twin.input[:] = slots
                    node = twin
                local.nodes.append(node)
                local.owner.append(owner)
        local.writer = {name: i for i, node in enumerate(local.nodes) for name in node.output if name}
        return local

    def _converted_for(self, node: onnx.NodeProto, device: Mapping[str, str]) -> dict[str, str]:
        """Return the devices, and an operator on each, that read a conversion of model inputs; else nothing."""
        if node.op_type not in _CONVERSIONS or any(name in self.writer for name in node.input):
            return {}
        if any(name in self.outputs for name in node.output):  # one of them has to make it
            return {}
        readers = [owner for other, owner in zip(self.nodes, self.owner, strict=True) if node.output[0] in other.input]
        where = {device[owner]: owner for owner in reversed(readers)}
        return where if len(where) > 1 else {}


def crossing_tensors(graph: OperatorGraph, device: Mapping[str, str]) -> dict[str, str]:
    """Return the tensors that a placement moves between devices, with their producers."""
    return {
        tensor.name: producer
        for producer, consumer, tensors in graph.edges()
        if device[producer] != device[consumer]
        for tensor in tensors
    }


def execute_as(model: onnx.ModelProto, graph: OperatorGraph, device: Mapping[str, str], whole: Executed) -> Executed:
    """Return the executed graph for a placement: the whole model's unless the placement cuts one of its kernels."""
    kept = [name for name, producer in crossing_tensors(graph, device).items() if producer not in whole.owners]
    return (Executed(model, graph, kept, portable=whole.portable) if kept else whole).with_local_inputs(device)


def split(
    executed: Executed, device: Mapping[str, str], order: Sequence[str], *, most_kernels: int | None = None
) -> list[Part]:
    """Split a model into the fewest parts that let every device run its kernels in order and wait for nothing more.

    A new part begins where a kernel needs a tensor of another device that has not arrived for an earlier part, and
    after a kernel that another device waits for. So no kernel starts later than in the placement, and none of the
    parts can wait for itself: every part is a convex piece.

    Parameters
    ----------
    executed
        The kernels.
    device
        Device of every operator.
    order
        All operators in the order in which they shall run.
    most_kernels
        Of a part: more parts, which show what parts cost.

    Returns
    -------
    list[Part]
        In an order in which they could run one after the other.
    """
    position = {name: i for i, name in enumerate(order)}
    where = [device[name] for name in executed.owner]
    sequence = _kernel_order(executed, [position[name] for name in executed.owner])
    targets: dict[str, set[str]] = defaultdict(set)
    for i in sequence:
        for name in executed.reads(i):
            if name in executed.writer and where[executed.writer[name]] != where[i]:
                targets[name].add(where[i])
    groups: list[tuple[str, list[int], list[str]]] = []  # device, kernels, tensors awaited
    current: dict[str, int] = {}  # device -> its open group
    arrived: dict[str, set[str]] = defaultdict(set)
    for i in sequence:
        here = where[i]
        awaited = [name for name in executed.reads(i) if here in targets[name] and name not in arrived[here]]
        if awaited or here not in current:
            current[here] = len(groups)
            groups.append((here, [], awaited))
            arrived[here].update(awaited)
        kernels = groups[current[here]][1]
        kernels.append(i)
        if len(kernels) == most_kernels or any(targets[name] for name in executed.nodes[i].output if name):
            del current[here]
    return _sorted_parts(executed, groups, targets)


def share_places(
    parts: Sequence[Part], size: Mapping[str, int], kept: Collection[str]
) -> tuple[dict[str, int], tuple[int, ...]]:
    """Let tensors that cross devices share memory, which then stays in the caches.

    A tensor takes the place of another one when all parts that write or read that one have run before the part that
    writes it starts, by the order of parts on each device and the tensors that they await: whatever the timing.

    Parameters
    ----------
    parts
        In an order in which they could run.
    size
        Bytes of each tensor.
    kept
        Tensors that keep their place to the end.

    Returns
    -------
    tuple
        The place of each tensor that crosses, and the bytes of each place.
    """
    users: dict[str, int] = defaultdict(int)  # sets of parts as bits of an integer
    for p, part in enumerate(parts):
        for name in (*part.inputs, *part.outputs):
            users[name] |= 1 << p
    place: dict[str, int] = {}
    place_bytes: list[int] = []
    busy: list[int] = []  # [place] parts that use it; 0 where it is never free again
    writer: dict[str, int] = {}
    last: dict[str, int] = {}
    before = [0] * len(parts)
    for p, part in enumerate(parts):
        earlier = [writer[name] for name in part.awaits] + [q for q in [last.get(part.device)] if q is not None]
        for q in earlier:
            before[p] |= before[q] | 1 << q
        last[part.device] = p
        writer.update(dict.fromkeys(part.outputs, p))
        for name, _ in part.sends:
            free = [k for k, used in enumerate(busy) if used and not used & ~before[p]]
            if free:  # the one that fits best: the smallest that is large enough, else the largest
                k = min(free, key=lambda k: (place_bytes[k] < size[name], abs(place_bytes[k] - size[name]), k))
                place_bytes[k] = max(place_bytes[k], size[name])
            else:
                k = len(busy)
                busy.append(0)
                place_bytes.append(size[name])
            place[name] = k
            busy[k] = 0 if name in kept else users[name]
    return place, tuple(place_bytes)


def part_model(executed: Executed, part: Part) -> bytes:
    """Return the part as a model of its own, to be run without further optimization."""
    used = {name for i in part.kernels for name in executed.nodes[i].input}
    graph = onnx.helper.make_graph(
        [],
        "part",
        [_value_info(name, executed.tensors[name]) for name in part.inputs],
        [_value_info(name, executed.tensors[name]) for name in part.outputs],
    )
    graph.node.extend(executed.nodes[i] for i in part.kernels)
    graph.initializer.extend(tensor for name, tensor in executed.weights.items() if name in used)
    model = onnx.helper.make_model(
        graph, opset_imports=executed.model.opset_import, ir_version=executed.model.ir_version
    )
    try:
        return bytes(model.SerializeToString())
    except ValueError as error:  # protobuf's limit of 2 GiB
        raise InputError(
            f"a part of the model on '{part.device}' is too large to be sent to its worker ({error})"
        ) from error


def _live(nodes: Sequence[onnx.NodeProto], outputs: Sequence[str]) -> list[onnx.NodeProto]:
    """Drop nodes that write only tensors which were kept for the optimizer's sake and nobody reads."""
    needed = set(outputs)
    live = []
    for node in reversed(nodes):
        if any(name in needed for name in node.output):
            live.append(node)
            needed.update(node.input)
    return live[::-1]


def _kernel_order(executed: Executed, key: Sequence[int]) -> list[int]:
    """Return the kernels in topological order, as near to the order of their operators as the graph allows."""
    waiting = [0] * len(executed.nodes)
    readers: dict[int, list[int]] = defaultdict(list)
    for i in range(len(executed.nodes)):
        for name in executed.reads(i):
            if name in executed.writer:
                readers[executed.writer[name]].append(i)
                waiting[i] += 1
    ready = [(key[i], i) for i in range(len(waiting)) if not waiting[i]]
    heapq.heapify(ready)
    order = []
    while ready:
        _, i = heapq.heappop(ready)
        order.append(i)
        for j in readers[i]:
            waiting[j] -= 1
            if not waiting[j]:
                heapq.heappush(ready, (key[j], j))
    return order


def _sorted_parts(
    executed: Executed, groups: list[tuple[str, list[int], list[str]]], targets: Mapping[str, set[str]]
) -> list[Part]:
    group_of = {i: g for g, (_, kernels, _) in enumerate(groups) for i in kernels}
    needed_outside = {
        name
        for i, g in group_of.items()
        for name in executed.reads(i)
        if name in executed.writer and group_of[executed.writer[name]] != g
    } | set(executed.outputs)
    parts = []
    for device, kernels, awaits in groups:
        inside = {name for i in kernels for name in executed.nodes[i].output}
        reads = dict.fromkeys(name for i in kernels for name in executed.reads(i) if name not in inside)
        writes = [name for i in kernels for name in executed.nodes[i].output if name in needed_outside]
        sends = tuple((name, tuple(sorted(targets[name]))) for name in writes if targets.get(name))
        operators = tuple(dict.fromkeys(executed.owner[i] for i in kernels))
        parts.append(Part(device, tuple(kernels), operators, tuple(reads), tuple(writes), tuple(awaits), sends))
    return parts  # only the first kernel of a group waits, so groups stand in an order in which they could run


def _value_info(name: str, spec: TensorSpec) -> onnx.ValueInfoProto:
    dtype = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
    return onnx.helper.make_tensor_value_info(name, dtype, spec.shape)
