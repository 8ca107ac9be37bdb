"""Policy ``diviml``: find modules in the graph, solve them one by one, stitch the answers together."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moirai_sim.placement import Placement
from moirai_sim.policies.auto import Auto
from moirai_sim.policies.cp_model import CpModel
from moirai_sim.policies.milp import Milp
from moirai_sim.policies.milp_throughput import MilpThroughput
from moirai_sim.policies.modules import Module, cut_vertices, modules_of
from moirai_sim.policies.reductions import coarse
from moirai_sim.policies.repeated import repeated
from moirai_sim.policies.repeated_bound import repeated_bound_ns
from moirai_sim.policies.starts import Start, cycle_from, find_starts, start_from, too_wide

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.placement import Status
    from moirai_sim.policies.base import Request
    from moirai_sim.problem import PlacementProblem

MODULE_OPERATORS = 60
"""Modules above this size keep the placement of the heuristic."""
UNITS = 60
"""Number of groups into which a graph is coarsened for throughput."""
TIMED_UNITS = 24
"""The same where latency matters too: that model orders operators pairwise, and grows with the square."""


class DiviML:
    """Module splitting (DiviML, arXiv 2308.00127, from its description; no code was released).

    Latency: the modules are those between cut vertices. In series order, each is solved exactly from the device where
    the one before ended, equal ones once; modules too large for that keep the placement of the best heuristic. What is
    lost against an exact answer is the choice of the device between two modules, which each makes for itself.
    Where the modules repeat themselves, as the layers of a language model do, one of each kind is solved for each kind
    of server, and the layers are shared out by a dynamic programme (`repeated`), with memory.
    Throughput: the graph is coarsened along its topological order into at most 60 groups of equal work, whose exact
    programme (``milp-throughput``) is solved, and expanded. The bound is that of the original: critical path, loads and
    both (`bounds`), not the harmonic mean, which is wrong for unrelated devices. Modules that do not repeat themselves
    are solved without memory. Where they do not fit once they are stitched, without series structure, with co-location
    or under ``fair`` latency is left to ``auto``.
    """

    name: ClassVar[str] = "diviml"

    def place(self, problem: PlacementProblem, request: Request) -> Placement:
        """Return the stitched answer, or that of the best heuristic where it is better."""
        if request.objective == "throughput":
            return _stream(problem, request)
        if request.max_period_ns is not None and problem.network != "fair":
            return _stream(problem, request)
        began = time.perf_counter()
        cuts = cut_vertices(problem)
        if problem.network == "fair" or len(cuts) < 2 or problem.colocation is not None:
            return Auto().place(problem, request)
        starts = find_starts(problem, replace(request, time_limit_s=request.time_limit_s / 4))
        if not starts:
            return Auto().place(problem, request)
        blocks = repeated(problem, replace(request, time_limit_s=request.time_limit_s / 2))
        stitched = None if blocks is None else start_from(problem, blocks.place(), request, self.name)
        bound = 0 if blocks is None else repeated_bound_ns(blocks, request.time_limit_s / 8, request.seed)
        if stitched is None:
            stitched = start_from(problem, _stitch(problem, cuts, starts[0], request), request, self.name)
        if stitched is None:
            left = request.time_limit_s - (time.perf_counter() - began)
            return Auto().place(problem, replace(request, time_limit_s=max(0.0, left)))
        best = min(stitched, starts[0], key=lambda one: one.value_ns)
        facts: dict[str, object] = {"found_by": best.policy, "cuts": len(cuts)}
        if blocks is not None:
            facts |= {"kinds_of_blocks": len(blocks.example), "solves": blocks.solves}
        return replace(best.placement, status="feasible", lower_bound_ns=min(bound, best.value_ns), provenance=facts)


def _stitch(problem: PlacementProblem, cuts: NDArray[np.int64], start: Start, request: Request) -> Placement:
    device = start.placement.device.copy()
    modules = modules_of(problem, cuts)
    solved: dict[tuple[bytes, int], NDArray[np.int64]] = {}
    limit = request.time_limit_s / (2 * len(modules))
    at = -1
    for module in modules:
        first = int(module.entry)
        if len(module.operators) <= MODULE_OPERATORS:
            key = (module.key(), at)
            if key not in solved:
                solved[key] = _solve(module, at, device, limit, request.seed)
            device[module.operators[first:]] = solved[key][first:]
        if module.exit:
            at = int(device[module.operators[-1]])
    return Placement(device=device)


def _solve(module: Module, at: int, device: NDArray[np.int64], limit: float, seed: int) -> NDArray[np.int64]:
    known = device[module.operators].copy()
    if module.entry:
        known[0] = at
    problem = module.between(at if module.entry else -1, -1)
    if too_wide(problem):
        return known
    start = start_from_devices(problem, known)
    answer = CpModel(problem, start).solve(limit, seed=seed)
    return answer.placement.device if answer.placement is not None else known


def start_from_devices(problem: PlacementProblem, device: NDArray[np.int64]) -> int:
    """Return the makespan of a placement run greedily, ns: a horizon for the exact model."""
    from moirai_sim.simulation.replay import replay

    return replay(problem, Placement(device=device)).makespan_ns


def _stream(problem: PlacementProblem, request: Request) -> Placement:
    limited = request.max_latency_ns is not None or request.max_period_ns is not None
    merged = coarse(problem, TIMED_UNITS if limited else UNITS)
    exact = MilpThroughput() if request.objective == "throughput" else Milp()
    answer = merged.invert(exact.place(merged.problem, request))
    if not len(answer.device) or request.replicas > 1 or limited:  # merged operators are harder to fit into memory
        return _best_turns(problem, request, answer)
    return replace(answer, order=None, transfer_order=None)


def _best_turns(problem: PlacementProblem, request: Request, answer: Placement) -> Placement:
    """Return the best of an answer, the simple policies, and cycles of them and of copies of the whole model."""
    if problem.network == "fair":
        return answer
    starts = find_starts(problem, replace(request, time_limit_s=request.time_limit_s / 4))
    pool = [one for start in starts for one in start.placement.cycle]
    pool += answer.cycle if len(answer.device) else ()
    found = [start_from(problem, answer, request, DiviML.name), *starts, cycle_from(problem, pool, request)]
    known = [start for start in found if start is not None]
    if not known:
        return answer if not len(answer.device) else replace(answer, device=answer.device[:0], status="limit")
    best = min(known, key=lambda start: start.value_ns)
    facts = {**answer.provenance, "found_by": best.policy}
    bound = min(answer.lower_bound_ns, best.value_ns)
    status: Status = "optimal" if bound >= best.value_ns else "feasible"
    return replace(best.placement, status=status, lower_bound_ns=bound, provenance=facts)
