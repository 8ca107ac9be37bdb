"""What it costs that a tensor crosses from one worker to another, measured on the workers that run placements.

A chain of kernels is run with every tensor crossing between two devices, and all in one part on one device. The
difference, for each crossing, is what a placement pays: one more part, waking the reader, and reading data that lies in
the cache of another core. Nothing of it shows where only the message itself is timed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper

from moirai_sim.execution.measure import WARM_UP, Loaded, Subject, Timed, load_order, typical_ns, undisturbed
from moirai_sim.graphs.onnx_reader import read_model
from moirai_sim.profiling.backends.onnxruntime import random_array

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.execution.workers import Workers

_CHAIN = 24
"""Kernels, at most; both kinds run on both devices."""
_COLUMNS = 64
_LARGE = 2**20
"""Tensors from here on need less warming, and over slow links much time."""
_BUDGET_S = 5.0
"""Of a size: fewer repeats where they take longer, as over slow links or where the machine is never left alone."""
_FOLDS = 3
"""Each fold of the rounds tells a time of its own, so that their spread shows how well it is known."""


@dataclass(frozen=True)
class Hop:
    """What one crossing costs, from each fold of the measurements."""

    source: str
    target: str
    bytes: int
    times_s: NDArray[np.float64]
    """[folds] both directions in turn, seconds; above zero even where noise hides the crossing."""


def time_hops(workers: Workers, source: str, target: str, *, sizes: Sequence[int], repeats: int = 9) -> Iterator[Hop]:
    """Time crossings between two devices, to and fro in turn.

    Parameters
    ----------
    workers
        Running workers.
    source, target
        Names of two devices.
    sizes
        Of the tensor, bytes.
    repeats
        Undisturbed bursts of each chain, alternating between crossing and staying so that a slow spell meets both.
    """
    floor_s = 1e-9  # more data cannot cost less, though noise may say so where kernels take long
    for size in sizes:
        length = 8 if size > _LARGE else _CHAIN
        model = _chain(length, size)
        subject = Subject(model, read_model(model, name="chain"))
        names = [operator.name for operator in subject.graph]
        loaded: list[Loaded] = []
        try:
            for pair in ((source, target), (source, source), (target, target)):
                device = {name: pair[i % 2] for i, name in enumerate(names)}
                loaded.append(load_order(workers, subject, device, names))
            for chain in loaded:
                for _ in range(WARM_UP if size < _LARGE else 1):
                    chain.run()
            rounds: list[list[list[Timed]]] = [[] for _ in loaded]  # by chain
            end = time.monotonic() + _BUDGET_S
            while len(rounds[0]) < _FOLDS or (
                min(sum(map(undisturbed, own)) for own in rounds) < repeats and time.monotonic() < end
            ):
                for own, chain in zip(rounds, loaded, strict=True):
                    own.append([run.timed for run in chain.run_hot()])
            crossing, *own = np.array([[typical_ns(rows[i::_FOLDS]) for i in range(_FOLDS)] for rows in rounds])
            more_s = (crossing - np.mean(own, axis=0)) / (length - 1) / 1e9  # half of the chain runs on each device
            yield Hop(source, target, size, np.maximum(more_s, floor_s))
            floor_s = max(floor_s, float(np.median(more_s)))
        finally:
            for chain in loaded:
                if workers.processes:
                    chain.close()


def _chain(length: int, size: int) -> onnx.ModelProto:
    """Return a chain over tensors of ``size`` bytes, as rows of 64: in turn two products and two rectifications.

    A product has data fetched while it multiplies, and waits little for what lies in another core's cache; an
    elementwise kernel waits for all of it. Models have both.
    """
    weight = random_array((_COLUMNS, _COLUMNS), np.dtype(np.float32)) / np.float32(_COLUMNS**0.5)
    shape = [max(size // (4 * _COLUMNS), 1), _COLUMNS]
    nodes = [
        helper.make_node("Relu", [f"t{i}"], [f"t{i + 1}"], name=f"n{i}")
        if i // 2 % 2
        else helper.make_node("MatMul", [f"t{i}", "w"], [f"t{i + 1}"], name=f"n{i}")
        for i in range(length)
    ]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("t0", f"t{length}")]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], [onnx.numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
