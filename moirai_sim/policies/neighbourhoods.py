"""Large neighbourhoods: a few operators of a known answer are placed anew, exactly, while the others keep their place.

Shaw, "Using Constraint Programming and Local Search Methods to Solve Vehicle Routing Problems", CP (1998).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moirai_sim.policies.cp_model import CpModel
from moirai_sim.simulation.replay import replay

if TYPE_CHECKING:
    from numpy.random import Generator
    from numpy.typing import NDArray

    from moirai_sim.placement import Placement
    from moirai_sim.problem import PlacementProblem
    from moirai_sim.simulation.schedule import Schedule

LEAST, MOST = 10, 25
"""Operators of a neighbourhood."""
MOST_DEVICES = 16
"""Devices that they may go to: the model grows with the square."""
WORK = 0.5
"""Work of one exact solve, in CP-SAT's deterministic seconds."""


def better_nearby(
    problem: PlacementProblem, placement: Placement, rng: Generator, *, time_limit_s: float | None = None
) -> Placement | None:
    """Return an answer that differs from ``placement`` in one random neighbourhood; None where none is found.

    CP-SAT looks only for answers that are faster by its model. Equal states of ``rng`` give equal answers as long as
    the time limit is not met.

    Parameters
    ----------
    problem
        Under ``none``, ``one-port`` or ``half-duplex``.
    placement
        With its orders.
    """
    schedule = replay(problem, placement)
    free = _neighbourhood(problem, placement, schedule, rng)
    allowed = np.outer(free, _devices(problem, placement, free, rng))
    allowed |= placement.device[:, None] == np.arange(problem.n_devices)
    model = CpModel(problem, schedule.makespan_ns - 1, allowed)
    model.keep_order(placement.device, schedule, ~free)
    model.hint(placement, schedule)
    limit = 1e6 if time_limit_s is None else time_limit_s
    return model.solve(limit, seed=int(rng.integers(2**31)), work=WORK).placement


def _devices(
    problem: PlacementProblem, placement: Placement, free: NDArray[np.bool_], rng: Generator
) -> NDArray[np.bool_]:
    """Return [k] where the free ones may go: anywhere, or of many devices to their own and some random ones."""
    k = problem.n_devices
    if k <= MOST_DEVICES:
        return np.ones(k, dtype=np.bool_)
    own = np.unique(placement.device[free])
    chosen = np.zeros(k, dtype=np.bool_)
    chosen[[*own, *rng.permutation(k)][:MOST_DEVICES]] = True
    return chosen


def _neighbourhood(
    problem: PlacementProblem, placement: Placement, schedule: Schedule, rng: Generator
) -> NDArray[np.bool_]:
    """Return [n] who is placed anew: neighbours in time or in the graph, or a stretch of what is waited for."""
    n = problem.n_operators
    size = min(n, int(rng.integers(LEAST, MOST + 1)))
    kind = ("time", "graph", "critical")[int(rng.integers(3))]
    free = np.zeros(n, dtype=np.bool_)
    if kind == "time":
        apart = np.abs(schedule.operator_start_ns - schedule.operator_start_ns[int(rng.integers(n))])
        free[np.argsort(apart, kind="stable")[:size]] = True
        return free
    chosen = [int(rng.integers(n))] if kind == "graph" else _critical(problem, placement, schedule, rng)[: size // 2]
    free[chosen] = True
    while len(chosen) < size:
        near = np.unique(problem.edges[free[problem.edges].any(axis=1)])
        new = near[~free[near]]
        if not len(new):
            break
        picked = rng.permutation(new)[: min(size - len(chosen), 4)]
        free[picked] = True
        chosen += picked.tolist()
    return free


def _critical(problem: PlacementProblem, placement: Placement, schedule: Schedule, rng: Generator) -> list[int]:
    """Return operators that wait for each other, from a random one of the critical path back."""
    end, start = schedule.operator_end_ns, schedule.operator_start_ns
    at = int(np.argmax(end))
    path = [at]
    while True:
        inputs = problem.edges[problem.edges[:, 1] == at, 0]
        before = np.flatnonzero((placement.device == placement.device[at]) & (end <= start[at]))
        waited = np.setdiff1d(np.union1d(inputs, before), path)
        if not len(waited):
            break
        at = int(waited[np.argmax(end[waited])])
        path.append(at)
    return path[int(rng.integers(len(path))) :]
