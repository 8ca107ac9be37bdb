"""Anytime improvement of any start over the compiled replay."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np

from moirai_sim.placement import Placement
from moirai_sim.policies.annealing import anneal, anneal_order
from moirai_sim.policies.groups import groups_of, no_room
from moirai_sim.policies.starts import CHEAP, find_starts
from moirai_sim.simulation.replay import arrays_of, replay, workspace_for
from moirai_sim.simulation.schedule import placement_from_schedule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from moirai_sim.policies.base import Request
    from moirai_sim.problem import PlacementProblem

    Ints = NDArray[np.int64]

ROUND_OPERATORS = 15_000_000
"""Operators that the replays of one round may run: about a second."""
COLD = 2e-5
"""Last temperature of a round, as a share of the makespan."""
HOT = (0.02, 0.01, 0.01, 0.001)
"""First temperatures of the rounds, in turn."""
BRANCHES = 2
"""So many of the best starts are improved by themselves before the best of them goes on alone."""


class Search:
    """Simulated annealing from the best answers of the cheap policies, in rounds that restart from the best so far.

    Kirkpatrick, Gelatt, Vecchi, "Optimization by Simulated Annealing", Science 220 (1983), over the makespan that the
    compiled replay gives, with moves that follow the graph (see `annealing`). Rounds change, in turn, devices under the
    upward rank, devices under the order of the best so far, and that order. Equal seeds and numbers of rounds give
    equal answers; the time limit decides how many rounds there are. Under ``fair`` the links count as ports. A request
    for throughput is refused.
    """

    name: ClassVar[str] = "search"

    def place(self, problem: PlacementProblem, request: Request) -> Placement:
        """Return the best placement found within ``request.time_limit_s``, with its orders."""
        from moirai_sim.policies.run import require_latency

        require_latency(request, self.name)
        started = time.perf_counter()
        ported = problem.with_network("one-port") if problem.network == "fair" else problem
        starts = [start.placement for start in find_starts(ported, request, CHEAP)]
        if not starts:
            return no_room("no heuristic finds a placement that fits the memory")
        left = request.time_limit_s - (time.perf_counter() - started)
        answer = improve(ported, starts, time_limit_s=max(0.0, left), seed=request.seed)
        return answer if ported is problem else replace(answer, transfer_order=None)


def improve(
    problem: PlacementProblem,
    starts: Sequence[Placement],
    *,
    time_limit_s: float | None = None,
    rounds: int | None = None,
    seed: int = 0,
    target_ns: int = 0,
) -> Placement:
    """Return a placement at least as good as the best of ``starts``, with its orders.

    Parameters
    ----------
    problem
        Under ``none``, ``one-port`` or ``half-duplex``.
    starts
        Placements that respect supported devices, memory and co-location; so do all on the way.
    time_limit_s, rounds
        When to stop, 10 rounds where neither is given; without a time limit, equal ``rounds`` and ``seed`` give equal
        answers.
    target_ns
        Stop as soon as this is reached, because it is proven that nothing is better.
    """
    clock = time.perf_counter
    rounds = 10 if rounds is None and time_limit_s is None else rounds
    deadline = None if time_limit_s is None else clock() + time_limit_s
    walk = _Walk(problem, seed)
    found = sorted((walk.start(start) for start in starts), key=lambda branch: branch.value_ns)
    branches = found[:BRANCHES]
    best = branches[0]
    done = 0
    pace: float | None = None
    while (rounds is None or done < rounds) and best.value_ns > target_ns:
        steps = walk.steps if done else max(1, walk.steps // 20)  # a first look, which also measures the pace
        if deadline is not None:
            left = deadline - clock()
            if pace is not None:
                steps = min(steps, int(left / pace))
            if left <= 0 or steps < 1:
                break
        began = clock()
        at = done % len(branches) if done < 2 * BRANCHES else 0
        branches[at] = walk.round(branches[at], done, steps)
        pace = (clock() - began) / steps
        best = min(best, branches[at], key=lambda branch: branch.value_ns)
        done += 1
        if done >= 2 * BRANCHES:
            branches = [best]
    facts: dict[str, object] = {"rounds": done, "steps_a_round": walk.steps, "seed": seed}
    return replace(best.placement, provenance=best.placement.provenance | facts)


class _Branch(NamedTuple):
    """One line of improvement."""

    value_ns: int
    placement: Placement
    """With its orders."""


class _Walk:
    """The compiled search on one problem."""

    def __init__(self, problem: PlacementProblem, seed: int) -> None:
        self.problem = problem
        self.seed = seed
        self.arrays = arrays_of(problem)
        self.workspace = workspace_for(self.arrays)
        self.groups = groups_of(problem)
        self.members = _csr(self.groups.of, len(self.groups.weight))
        self.inputs = _csr(self.arrays.consumer.astype(np.int64), problem.n_operators)
        self.steps = int(np.clip(ROUND_OPERATORS // max(1, problem.n_operators), 100, 100_000))

    def start(self, placement: Placement) -> _Branch:
        """Begin a branch: by the placement's own orders, or greedily where that is faster."""
        own, ranked = replay(self.problem, placement), self._greedy(placement.device.astype(np.int64), None)
        if own.makespan_ns > ranked.value_ns:
            return ranked
        return _Branch(own.makespan_ns, placement_from_schedule(self.problem, placement, own))

    def round(self, branch: _Branch, index: int, steps: int) -> _Branch:
        """Return the branch after a round, at least as good."""
        seed = (self.seed * 1_000_003 + index) % 2**32
        device, turn = branch.placement.device.astype(np.int64), np.array(branch.placement.order)
        found_device, found_turn = device.copy(), turn.copy()
        hot = HOT[index % len(HOT)]
        if index % 4 == 3:
            turn *= max(1, branch.value_ns // max(1, len(turn)))  # positions, spread like times
            anneal_order(self.arrays, self.workspace, device, turn, found_turn, seed, steps, hot, COLD)
        else:
            anneal(
                self.arrays, self.workspace, self.groups, *self.members, *self.inputs,
                self.problem.memory_bytes.copy(), index % 2 == 0, turn, device, found_device,
                seed, steps, hot, COLD,
            )  # fmt: skip
        after = self._greedy(found_device, None if index % 2 == 0 else found_turn)
        return after if after.value_ns < branch.value_ns else branch

    def _greedy(self, device: Ints, turn: Ints | None) -> _Branch:
        placement = Placement(device=device)
        schedule = replay(self.problem, placement, turn=turn)
        return _Branch(schedule.makespan_ns, placement_from_schedule(self.problem, placement, schedule))


def _csr(keys: Ints, size: int) -> tuple[Ints, Ints]:
    indptr = np.zeros(size + 1, dtype=np.int64)
    np.cumsum(np.bincount(keys, minlength=size), out=indptr[1:])
    return indptr, np.argsort(keys, kind="stable").astype(np.int64)
