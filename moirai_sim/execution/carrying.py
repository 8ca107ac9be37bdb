"""What it costs a core to send and to receive over a network: its time, which what it computes meanwhile waits for.

Nothing but the network stack of the system moves the bytes of emulated links, on the cores that compute. One device
runs a chain of products while tensors leave it, while tensors reach it, and while neither happens.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import onnx
from onnx import helper

from moirai_sim.execution.measure import Subject, load_order, typical_ns
from moirai_sim.graphs.onnx_reader import read_model
from moirai_sim.profiling.backends.onnxruntime import random_array

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from moirai_sim.execution.measure import Crew, Loaded, Timed

_TENSORS, _ROWS, _COLUMNS = 6, 512, 64
"""Tensors that are sent, 128 KiB each, one after the other."""
_NS_PER_BYTE = 100.0
"""More is no cost of a core but a disturbance."""
_PRODUCTS, _SIDE = 16, 512
"""The chain: about as long as they are under way at 1 Gbps, and half of it at least."""


class Carrying(NamedTuple):
    """Time of its core that a device spends, ns for each byte; at least 0."""

    send_ns_per_byte: float
    receive_ns_per_byte: float


class CarryingTimer:
    """Times the chain on one device, beside tensors for and from another.

    Parameters
    ----------
    workers
        Running workers.
    device, other
        On cores of their own.
    """

    def __init__(self, workers: Crew, device: str, other: str) -> None:
        self._device = device
        model = _model()
        subject = Subject(model, read_model(model, name="carrying"))
        order = list(subject.graph.operators)  # sources, products, readers: as the model has them
        places = {"alone": (device, device), "sends": (device, other), "receives": (other, device)}
        self._loaded: dict[str, Loaded] = {}
        for what, (source, reader) in places.items():
            where = {"s": source, "c": device, "r": reader}
            self._loaded[what] = load_order(
                workers, subject, {name: where[name[0]] for name in order}, order, most_kernels=1
            )
            self._loaded[what].run()

    def time(self, patience_s: float) -> dict[str, list[Timed]]:
        """Return runs of the chain, by what happens beside it, and for how long that goes on (``sends: for``, ...)."""
        found: dict[str, list[Timed]] = defaultdict(list)
        for what, loaded in self._loaded.items():
            mine = [part for part in loaded.parts if part.device == self._device]
            kinds = [loaded.executed.nodes[part.kernels[0]].op_type for part in mine]
            for run in loaded.run_hot(patience_s=patience_s):
                ends = [end for *_, end in run.records[self._device].runs]
                sent = [end for kind, end in zip(kinds, ends, strict=True) if kind == "Relu"]
                done = [end for kind, end in zip(kinds, ends, strict=True) if kind == "MatMul"]
                found[what].append((done[-1] - max(sent, default=run.origin), run.disturbed))
                arrived = [at for record in run.records.values() for *_, at in record.arrivals]
                if arrived:  # a latency delays the first as long as the last
                    lasted = (max(arrived) - min(arrived)) * _TENSORS // (_TENSORS - 1)
                    found[f"{what}: for"].append((lasted, run.disturbed))
        return found

    def close(self) -> None:
        """Let the workers forget the chain."""
        for loaded in self._loaded.values():
            loaded.close()


def carrying(rounds: Sequence[Mapping[str, list[Timed]]], *, quiet: bool) -> Carrying:
    """Return what rounds of `CarryingTimer.time` tell."""

    def typical(what: str) -> float:
        return typical_ns([found[what] for found in rounds], quiet=quiet)

    alone, costs = typical("alone"), []
    for what in ("sends", "receives"):
        took = typical(what)
        moved = _TENSORS * _ROWS * _COLUMNS * 4 * min(1.0, took / max(typical(f"{what}: for"), 1.0))
        costs.append(float(np.clip((took - alone) / moved, 0.0, _NS_PER_BYTE)))
    return Carrying(*costs)


def _model() -> onnx.ModelProto:
    """Return sources of tensors, a chain of products that needs none of them, and readers."""
    weight = random_array((_SIDE, _SIDE), np.dtype(np.float32)) / np.float32(_SIDE**0.5)

    def value(name: str, *shape: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    def node(kind: str, inputs: list[str], output: str) -> onnx.NodeProto:
        return helper.make_node(kind, inputs, [output], name=output)

    nodes = [node("Relu", [f"s{i}"], f"s{i + 1}") for i in range(_TENSORS)]
    nodes += [node("MatMul", [f"c{i}", "w"], f"c{i + 1}") for i in range(_PRODUCTS)]
    nodes += [node("Neg", [f"s{i + 1}"], f"r{i + 1}") for i in range(_TENSORS)]
    graph = helper.make_graph(
        nodes,
        "carrying",
        [value("s0", _ROWS, _COLUMNS), value("c0", _SIDE // 4, _SIDE)],
        [*(value(f"r{i + 1}", _ROWS, _COLUMNS) for i in range(_TENSORS)), value(f"c{_PRODUCTS}", _SIDE // 4, _SIDE)],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
