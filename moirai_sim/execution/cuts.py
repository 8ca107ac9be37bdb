"""What the operators of a model take where they run, and what one more part costs.

On one device the model runs whole, in a plain session, and cut at every kernel, in parts as the executor makes them.
Every kernel is then timed with the inputs, the layout and the caches that it has in the model, and the difference of
the two runs, for each cut, is what a part costs: one more call of the backend, and what is cold then. No tensor
crosses devices, so no placement over several devices is seen.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from moirai_sim.execution.measure import covered_operators, load_order, time_plain

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moirai_sim.execution.measure import Crew, Subject

_ROUNDS = 8
_PLAIN_RUNS = 6


@dataclass(frozen=True)
class Cuts:
    """Times of one model on one device."""

    operator_ns: Mapping[str, int]
    """The user's operators that have a kernel; they add up to ``whole_ns``."""
    whole_ns: int
    """The model in a plain session."""
    part_ns: int
    """Of one more part, at least 0."""


def time_cuts(workers: Crew, subject: Subject, device: str) -> Cuts:
    """Time a model whole and cut at every kernel, in turn, so that a slow spell meets both.

    Parameters
    ----------
    workers
        Running workers.
    subject
        The model.
    device
        Name of the device to run on.
    """
    operators = list(subject.graph.operators)
    loaded = load_order(workers, subject, dict.fromkeys(operators, device), operators, every_kernel=True)
    try:
        loaded.run()
        subject.load_plain(workers, device)
        wholes: list[float] = []
        makespans: list[int] = []
        times: dict[int, list[int]] = defaultdict(list)  # of each part
        for _ in range(_ROUNDS):
            wholes.append(median(time_plain(workers, [device], _PLAIN_RUNS)[device]))
            for run in loaded.run_hot():
                makespans.append(run.makespan_ns)
                for request, i, _, start, end in run.records[device].runs:
                    if request == run.request:
                        times[i].append(end - start)
        kernel_ns = [median(times[i]) for i in range(len(loaded.parts))]
    finally:
        if workers.processes:
            loaded.close()
    whole = median(wholes)
    alone = _without_calls(kernel_ns, whole)
    operator_ns: dict[str, float] = defaultdict(float)
    covered = covered_operators(loaded.executed, subject.graph, loaded.parts, loaded.placement)
    for part, ns in zip(loaded.parts, alone, strict=True):
        owner = loaded.executed.owner[part.kernels[0]]
        main = max((owner, *covered[part]), key=lambda name: subject.graph[name].flops)
        operator_ns[main] += ns  # another placement may cut the kernel, and the light members leave its work behind
    cost = (median(makespans) - whole) / max(len(loaded.parts) - 1, 1)
    return Cuts({name: max(1, round(ns)) for name, ns in operator_ns.items()}, round(whole), max(0, round(cost)))


def time_contention(workers: Crew, subject: Subject) -> float:
    """Return how much longer a model takes while all devices run it than while one does, at least 1."""
    for name in workers.names:
        subject.load_plain(workers, name)
    ratios = []
    for _ in range(_ROUNDS):
        alone = [median(time_plain(workers, [name], _PLAIN_RUNS)[name]) for name in workers.names]
        together = time_plain(workers, workers.names, _PLAIN_RUNS)
        ratios += [median(together[name]) / one for name, one in zip(workers.names, alone, strict=True)]
    return max(1.0, median(ratios))


def _without_calls(kernel_ns: list[float], whole: float) -> list[float]:
    """Return the times of kernels without the calls around them, equal for all, so that they add up to the whole."""
    low, high = 0.0, max(kernel_ns)
    for _ in range(60):
        call = (low + high) / 2
        if sum(max(ns - call, 0.0) for ns in kernel_ns) > whole:
            low = call
        else:
            high = call
    alone = [max(ns - high, 0.0) for ns in kernel_ns]
    scale = whole / sum(alone) if sum(alone) else 0.0
    return [ns * scale for ns in alone]
