"""What it costs that a tensor crosses from one worker to another, measured on the workers that run placements.

A chain of light kernels is run twice: with every tensor crossing between two devices, and all on one device. The
difference per crossing is what a placement pays: waking the reader, starting one more part, and reading data that lies
in the cache of another core. Nothing of it shows where only the message itself is timed.
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

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.execution.workers import Workers

SIZES = tuple(2**k for k in (10, 13, 15, 16, 17, 18, 19, 20, 21, 22, 24))
"""Tensor sizes to time: 1 KiB to 16 MiB, dense where activations are."""
_CHAIN = 24
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


def time_hops(
    workers: Workers, source: str, target: str, *, sizes: Sequence[int] = SIZES, repeats: int = 15
) -> Iterator[Hop]:
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
    for size in sizes:
        length = int(np.clip(_MEMORY_BYTES // size, 4, _CHAIN))
        model = _chain(length, max(size // 4, 1))
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
            rounds: list[list[int]] = []
            end = time.monotonic() + _BUDGET_S
            while len(rounds) < repeats and (len(rounds) < _MIN_REPEATS or time.monotonic() < end):
                rounds.append([_makespan(chain) for chain in loaded])
            took = np.array(rounds, dtype=np.float64)
            staying = np.median(took[:, 1:], axis=0).mean()  # devices may differ: half of the chain runs on each
            yield Hop(source, target, size, np.maximum(took[:, 0] - staying, 1) / (length - 1) / 1e9)
        finally:
            for chain in loaded:
                if workers.processes:
                    chain.close()


def _makespan(chain: Loaded) -> int:
    origin, records = chain.run()
    return max(end for record in records.values() for *_, end in record.runs) - origin


def _chain(length: int, elements: int) -> onnx.ModelProto:
    """Return a chain of negations: the lightest kernel that reads and writes all of its data."""
    nodes = [helper.make_node("Neg", [f"t{i}"], [f"t{i + 1}"], name=f"n{i}") for i in range(length)]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [elements]) for name in ("t0", f"t{length}")]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
