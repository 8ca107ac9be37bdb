"""Anytime improvement of any start over the compiled replay."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np

from moirai_sim.placement import Placement
from moirai_sim.policies.annealing import anneal, anneal_order
from moirai_sim.policies.groups import csr, groups_of, no_room
from moirai_sim.policies.neighbourhoods import better_nearby
from moirai_sim.policies.period_search import improve_period
from moirai_sim.policies.starts import CHEAP, find_starts, start_from
from moirai_sim.simulation.list_scheduling import arrays_of, workspace_for
from moirai_sim.simulation.replay import replay
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
HOTTER = (1, 5, 20)
"""Factors of these temperatures, in turn as long as four rounds change nothing: the answer may be a trap."""
NEIGHBOURHOODS = 8
"""Neighbourhoods that are solved exactly once four rounds in turn changed nothing."""
NEIGHBOURHOOD_OPERATORS = 150
"""Above this size the time is better spent on annealing."""
BRANCHES = 2
"""So many of the best starts are looked at; the best after that goes on alone."""


class Search:
    """Simulated annealing from the best answers of the cheap policies, in rounds that restart from the best so far.

    Kirkpatrick, Gelatt, Vecchi, "Optimization by Simulated Annealing", Science 220 (1983), over the makespan that the
    compiled replay gives, with moves that follow the graph (see `annealing`). Rounds change, in turn, devices under the
    upward rank, devices under the order of the best so far, and that order; where four in turn change nothing, small
    neighbourhoods of the best are solved exactly (see `neighbourhoods`). Equal seeds and numbers of rounds give
    equal answers; the time limit decides how many rounds there are. Under ``fair`` the links count as ports.
    For throughput it is the period that is annealed (see `period_search`), by one placement without turns.
    """

    name: ClassVar[str] = "search"

    def place(self, problem: PlacementProblem, request: Request) -> Placement:
        """Return the best placement found within ``request.time_limit_s``, with its orders."""
        if request.objective == "throughput":
            return _pipeline(problem, request)
        started = time.perf_counter()
        ported = problem.with_network("one-port") if problem.network == "fair" else problem
        anyhow = replace(request, max_latency_ns=None)  # from what breaks the limit, search may come to what keeps it
        starts = [start.placement for start in find_starts(ported, anyhow, CHEAP)]
        if not starts:
            return no_room("no heuristic finds a placement that fits the memory")
        left = request.time_limit_s - (time.perf_counter() - started)
        answer = improve(ported, starts, time_limit_s=max(0.0, left), seed=request.seed)
        return answer if ported is problem else replace(answer, transfer_order=None)


def _pipeline(problem: PlacementProblem, request: Request) -> Placement:
    """Improve the period of the best start; under ``fair`` the ports stand for the links."""
    started = time.perf_counter()
    linear = problem.with_network("one-port") if problem.network == "fair" else problem
    starts = find_starts(linear, replace(request, replicas=1), CHEAP)
    if not starts:
        return no_room("no heuristic finds a placement that fits the memory and the limits")
    left = request.time_limit_s - (time.perf_counter() - started)
    answer = improve_period(linear, starts[0].placement, time_limit_s=max(0.0, left), seed=request.seed)
    if request.max_latency_ns is not None and start_from(linear, answer, request, "search") is None:
        answer = starts[0].placement  # with its orders, by which it keeps the limit
    return answer if linear is problem else replace(answer, transfer_order=None)


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
    rounds = 10 if rounds is None and time_limit_s is None else rounds
    return Improvement(problem, starts, seed).run(time_limit_s=time_limit_s, rounds=rounds, target_ns=target_ns)


class Improvement:
    """A search that can be stopped and taken up again: two runs of one round are one run of two.

    Parameters
    ----------
    problem, starts, seed
        As for `improve`.
    """

    def __init__(self, problem: PlacementProblem, starts: Sequence[Placement], seed: int = 0) -> None:
        self._walk = _Walk(problem, seed)
        found = sorted((self._walk.start(start) for start in starts), key=lambda branch: branch.value_ns)
        self._branches = found[:BRANCHES]
        self._best = found[0]
        self._done, self._vain = 0, 0
        self._pace: float | None = None

    def offer(self, placement: Placement) -> None:
        """Go on from a placement that was found elsewhere, if it is better."""
        self._best = min(self._best, self._walk.start(placement), key=lambda branch: branch.value_ns)

    def run(self, *, time_limit_s: float | None = None, rounds: int | None = None, target_ns: int = 0) -> Placement:
        """Return the best placement after some more rounds, as many as asked for or as the time allows."""
        clock = time.perf_counter
        deadline = None if time_limit_s is None else clock() + time_limit_s
        last = None if rounds is None else self._done + rounds
        while (last is None or self._done < last) and self._best.value_ns > target_ns:
            look = self._done < len(self._branches)  # a first look at each, which also measures the pace
            steps = max(1, self._walk.steps // 20) if look else self._walk.steps
            if deadline is not None:
                left = deadline - clock()
                if self._pace is not None:
                    steps = min(steps, int(left / self._pace))
                if left <= 0 or steps < 1:
                    break
            began = clock()
            before = self._branches[self._done] if look else self._best
            factor = HOTTER[self._vain // len(HOT) % len(HOTTER)]
            after = self._walk.round(before, self._done, steps, factor)
            self._pace = (clock() - began) / steps
            self._vain = 0 if look or after.value_ns < self._best.value_ns else self._vain + 1
            self._best = min(self._best, after, key=lambda branch: branch.value_ns)
            self._done += 1
            if self._vain > 0 and self._vain % len(HOT) == 0 and self._best.value_ns > target_ns:
                nearby = self._walk.neighbourhoods(self._best, self._done, deadline)
                self._vain = 0 if nearby.value_ns < self._best.value_ns else self._vain
                self._best = nearby
        facts: dict[str, object] = {"rounds": self._done, "steps_a_round": self._walk.steps, "seed": self._walk.seed}
        best = self._best.placement
        return replace(best, provenance=best.provenance | facts)


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
        self.members = csr(self.groups.of, len(self.groups.weight))
        self.inputs = csr(self.arrays.edges["consumer"].astype(np.int64), problem.n_operators)
        self.steps = int(np.clip(ROUND_OPERATORS // max(1, problem.n_operators), 100, 100_000))

    def start(self, placement: Placement) -> _Branch:
        """Begin a branch: by the placement's own orders, or greedily where that is faster."""
        own, ranked = replay(self.problem, placement), self._greedy(placement.device.astype(np.int64), None)
        if own.makespan_ns > ranked.value_ns:
            return ranked
        return _Branch(own.makespan_ns, placement_from_schedule(self.problem, placement, own))

    def round(self, branch: _Branch, index: int, steps: int, factor: int) -> _Branch:
        """Return the branch after a round, at least as good; ``factor`` of the usual temperature."""
        seed = (self.seed * 1_000_003 + index) % 2**32
        device, turn = branch.placement.device.astype(np.int64), np.array(branch.placement.order)
        found_device, found_turn = device.copy(), turn.copy()
        hot = factor * HOT[index % len(HOT)]
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

    def neighbourhoods(self, branch: _Branch, index: int, deadline: float | None) -> _Branch:
        """Return the branch after exact solves of neighbourhoods, at least as good."""
        if self.problem.n_operators > NEIGHBOURHOOD_OPERATORS or self.problem.n_devices < 2:
            return branch
        rng = np.random.default_rng((self.seed, index))
        for _ in range(NEIGHBOURHOODS):
            left = None if deadline is None else deadline - time.perf_counter()
            if left is not None and left <= 0:
                break
            found = better_nearby(self.problem, branch.placement, rng, time_limit_s=left)
            if found is not None:
                branch = min(branch, self.start(found), key=lambda one: one.value_ns)
        return branch

    def _greedy(self, device: Ints, turn: Ints | None) -> _Branch:
        placement = Placement(device=device)
        schedule = replay(self.problem, placement, turn=turn)
        return _Branch(schedule.makespan_ns, placement_from_schedule(self.problem, placement, schedule))
