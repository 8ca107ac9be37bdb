"""CPOP: the critical path on one device, everything else where it ends first."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moirai_sim.policies.insertion import insertion_schedule
from moirai_sim.policies.ranks import downward_ranks, mean_operator_ns, mean_transfer_ns, upward_ranks

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.placement import Placement
    from moirai_sim.policies.base import Request
    from moirai_sim.problem import PlacementProblem


class Cpop:
    """Put the critical path on the device that runs it fastest; by priority, put the others where they end first.

    Topcuoglu, Hariri, Wu, TPDS 13 (2002), figure 4: priority is upward plus downward rank over mean times, the critical
    path is a path of largest priority from an entry, ready operators are taken by decreasing priority.

    Extensions as for `heft`; of several critical paths the one of smallest indices is taken; what no longer fits the
    critical path's device goes where it ends first.
    """

    name: ClassVar[str] = "cpop"

    def place(self, problem: PlacementProblem, request: Request) -> Placement:
        """Return the placement and the orders of CPOP's schedule."""
        operator, transfer = mean_operator_ns(problem), mean_transfer_ns(problem)
        priority = upward_ranks(problem, operator, transfer) + downward_ranks(problem, operator, transfer)
        path = critical_path(problem, priority)
        pinned = np.full(problem.n_operators, -1, dtype=np.int64)
        if len(path):
            runs = (problem.operator_ns[path] >= 0).all(axis=0)
            time = np.where(runs, problem.operator_ns[path].sum(axis=0), np.iinfo(np.int64).max)
            if runs.any():
                pinned[path] = np.argmin(time[problem.device_type])
        return insertion_schedule(problem, _by_priority(problem, priority), pinned, reserve_ports=True)


def critical_path(problem: PlacementProblem, priority: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the operators of a path from an entry to an exit that keeps to the largest priority."""
    if not problem.n_operators:
        return np.zeros(0, dtype=np.int64)
    indptr, out = problem.successors
    entries = np.flatnonzero(np.diff(problem.predecessors[0]) == 0)
    path = [int(entries[np.argmax(priority[entries])])]
    while indptr[path[-1]] < indptr[path[-1] + 1]:
        consumers = problem.edges[out[indptr[path[-1]] : indptr[path[-1] + 1]], 1]
        path.append(int(consumers[np.argmax(priority[consumers])]))
    return np.array(path, dtype=np.int64)


def _by_priority(problem: PlacementProblem, priority: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the order in which operators are taken: always the ready one of highest priority, ties by index."""
    indptr, out = problem.successors
    consumers = problem.edges[out, 1].tolist() if len(out) else []
    waiting = np.diff(problem.predecessors[0]).tolist()
    ready = [(-float(priority[i]), i) for i, inputs in enumerate(waiting) if inputs == 0]
    heapq.heapify(ready)
    order = []
    while ready:
        _, i = heapq.heappop(ready)
        order.append(i)
        for j in consumers[indptr[i] : indptr[i + 1]]:
            waiting[j] -= 1
            if waiting[j] == 0:
                heapq.heappush(ready, (-float(priority[j]), j))
    return np.array(order, dtype=np.int64)
