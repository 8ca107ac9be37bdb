"""What it costs that a tensor crosses from one worker to another, measured on the workers that run placements.

A chain of kernels is run with every tensor crossing between two devices, all in one part on one device, and on one
device with every kernel a part of its own. The difference of the first two, for each crossing, is what a placement
pays: one more part, waking the reader, and reading data that lies in the cache of another core. Nothing of it shows
where only the message itself is timed. The difference of the last two is the cost of the part alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper

from moirai_sim.execution.measure import WARM_UP, Loaded, Subject, load_order
from moirai_sim.graphs.onnx_reader import read_model
from moirai_sim.profiling.backends.onnxruntime import random_array

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.execution.workers import Workers

_CHAIN = 24
_COLUMNS = 64
_LARGE = 2**20
"""Tensors from here on need less warming, and over slow links much time."""
_BUDGET_S, _MIN_REPEATS = 1.5, 3
"""Of a size: fewer repeats where they take longer, as over slow links."""
_MEMORY_BYTES = 2**29
"""A chain's tensors fill no more than this."""


@dataclass(frozen=True)
class Hop:
    """Repeated times of one crossing."""

    source: str
    target: str
    bytes: int
    times_s: NDArray[np.float64]
    """[repeats] both directions in turn, seconds; above zero even where noise hides the crossing."""
    part_s: NDArray[np.float64]
    """[repeats] of these, what one more part costs that no tensor crosses to, seconds."""


def time_hops(workers: Workers, source: str, target: str, *, sizes: Sequence[int], repeats: int = 15) -> Iterator[Hop]:
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
        Runs of a chain at most, alternating between crossing and staying so that a slow spell meets both.
    """
    floor_s = np.full(2, 1e-9)  # more data cannot cost less, though noise may say so where kernels take long
    for size in sizes:
        length = int(np.clip(_MEMORY_BYTES // size, 4, _CHAIN))
        model = _chain(length, size)
        subject = Subject(model, read_model(model, name="chain"))
        names = [operator.name for operator in subject.graph]
        loaded: list[Loaded] = []
        try:
            for pair, cut in (
                ((source, target), False),
                ((source, source), False),
                ((target, target), False),
                ((source, source), True),
                ((target, target), True),
            ):
                device = {name: pair[i % 2] for i, name in enumerate(names)}
                loaded.append(load_order(workers, subject, device, names, every_kernel=cut))
            for chain in loaded:
                for _ in range(WARM_UP if size < _LARGE else 1):
                    chain.run()
            rounds: list[list[float]] = []
            end = time.monotonic() + _BUDGET_S
            while len(rounds) < repeats and (len(rounds) < _MIN_REPEATS or time.monotonic() < end):
                rounds.append([float(np.median([run.makespan_ns for run in chain.run_hot()])) for chain in loaded])
            crossing, *own = np.array(rounds, dtype=np.float64).T
            staying = np.median(own[:2], axis=1).mean()  # devices may differ: half of the chain runs on each
            cuts = np.mean(own[2:], axis=0)
            more_s = (np.array([crossing, cuts]) - staying) / (length - 1) / 1e9
            crossing_s, part_s = np.maximum(more_s, floor_s[:, None])
            floor_s = np.maximum(floor_s, np.median(more_s, axis=1) if size == sizes[0] else 0)
            yield Hop(source, target, size, crossing_s, part_s)
        finally:
            for chain in loaded:
                if workers.processes:
                    chain.close()


def _chain(length: int, size: int) -> onnx.ModelProto:
    """Return a chain of products of ``size`` bytes, as rows of 64, with one matrix of 64 x 64.

    A product reads its data as convolutions and other products do: not in one stream, which a core would fetch ahead.
    """
    weight = random_array((_COLUMNS, _COLUMNS), np.dtype(np.float32)) / np.float32(_COLUMNS**0.5)
    shape = [max(size // (4 * _COLUMNS), 1), _COLUMNS]
    nodes = [helper.make_node("MatMul", [f"t{i}", "w"], [f"t{i + 1}"], name=f"n{i}") for i in range(length)]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("t0", f"t{length}")]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], [onnx.numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
