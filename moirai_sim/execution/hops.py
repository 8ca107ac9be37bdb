"""What it costs that a tensor crosses from one worker to another, measured on the workers that run placements.

A chain of kernels is run with every tensor crossing between two devices, and all in one part on one device. The
difference, for each crossing, is what a placement pays beside a part of its own: waking the reader, and reading data
that lies in the cache of another core. Nothing of it shows where only the message itself is timed. The calls of the
chain's parts are in it too; its kernels are small, so that they are little.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
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
_LARGE = 2**17
"""Larger tensors make a shorter chain, which fits into quiet moments, and need less warming."""
_FOLDS = 3
"""Each fold of the rounds tells a time of its own, so that their spread shows how well it is known."""


@dataclass
class Hop:
    """A crossing between two devices, to and fro in turn, and what was measured of it in any number of visits."""

    source: str
    target: str
    size: int
    """Of the tensor, bytes."""
    rounds: tuple[list[list[Timed]], ...] = field(default_factory=lambda: ([], [], []))
    """Bursts of runs of the chain that crosses, and of those that stay on one device each."""

    @property
    def known(self) -> int:
        """Rounds of each chain in which nothing disturbed one of the runs."""
        return min(sum(map(undisturbed, own)) for own in self.rounds)

    @property
    def _length(self) -> int:
        return 8 if self.size > _LARGE else _CHAIN

    def time(self, workers: Workers, *, enough: int, budget_s: float) -> None:
        """Time the chains in turn, so that a slow spell meets each, once at least.

        Parameters
        ----------
        workers
            Running workers.
        enough
            So many rounds that are known end the visit.
        budget_s
            Of this visit.
        """
        model = _chain(self._length, self.size)
        subject = Subject(model, read_model(model, name="chain"))
        names = [operator.name for operator in subject.graph]
        loaded: list[Loaded] = []
        try:
            for pair in ((self.source, self.target), (self.source,) * 2, (self.target,) * 2):
                device = {name: pair[i % 2] for i, name in enumerate(names)}
                loaded.append(load_order(workers, subject, device, names))
            for chain in loaded:
                for _ in range(1 if self.size > _LARGE else WARM_UP):
                    chain.run()
            end = time.monotonic() + budget_s
            before = self.known
            while True:
                for own, chain in zip(self.rounds, loaded, strict=True):
                    own.append([run.timed for run in chain.run_hot()])
                if self.known - before >= enough or time.monotonic() > end:
                    return
        finally:
            for chain in loaded:
                if workers.processes:
                    chain.close()

    def times_s(self) -> NDArray[np.float64]:
        """Return what one crossing costs, [folds] seconds; not above zero where noise hides it."""
        crossing, *stays = np.array([[typical_ns(fold) for fold in _folds(own)] for own in self.rounds])
        more_s: NDArray[np.float64] = (crossing - np.mean(stays, axis=0)) / (self._length - 1) / 1e9
        return more_s  # half of the chain runs on each device


def _folds(rounds: list[list[Timed]]) -> list[list[list[Timed]]]:
    """Return the rounds with undisturbed runs, or all if there is none, dealt out; all in each that would go empty."""
    known = [own for own in rounds if undisturbed(own)] or rounds
    return [known[i::_FOLDS] or known for i in range(_FOLDS)]


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
