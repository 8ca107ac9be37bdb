"""Policy ``diviml``: find modules in the graph, solve them one by one, stitch the answers together."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moirai_sim.placement import Placement
from moirai_sim.policies.auto import Auto
from moirai_sim.policies.cp_model import CpModel
from moirai_sim.policies.milp_throughput import MilpThroughput
from moirai_sim.policies.modules import Module, cut_vertices, modules_of
from moirai_sim.policies.reductions import Contraction, chains, contract
from moirai_sim.policies.starts import Start, find_starts, start_from

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.policies.base import Request
    from moirai_sim.problem import PlacementProblem

MODULE_OPERATORS = 60
"""Modules above this size keep the placement of the heuristic."""
UNITS = 60
"""Number of groups into which a graph is coarsened for throughput."""


class DiviML:
    """Module splitting (DiviML, arXiv 2308.00127, from its description; no code was released).

    Latency: the modules are those between cut vertices. In series order, each is solved exactly from the device where
    the one before ended, equal ones once; modules too large for that keep the placement of the best heuristic. What is
    lost against an exact answer is the choice of the device between two modules, which each makes for itself.
    Throughput: the graph is coarsened along its topological order into at most 60 groups of equal work, whose exact
    programme (``milp-throughput``) is solved, and expanded. The bound is that of the original: critical path, loads and
    both (`bounds`), not the harmonic mean, which is wrong for unrelated devices. Without series structure, with binding
    memory or under ``fair`` latency is left to ``auto``.
    """

    name: ClassVar[str] = "diviml"

    def place(self, problem: PlacementProblem, request: Request) -> Placement:
        """Return the stitched answer, or that of the best heuristic where it is better."""
        if request.objective == "throughput":
            return _throughput(problem, request)
        cuts = cut_vertices(problem)
        if problem.network == "fair" or len(cuts) < 2 or problem.colocation is not None:
            return Auto().place(problem, request)
        starts = find_starts(problem, replace(request, time_limit_s=request.time_limit_s / 4))
        if not starts:
            return Auto().place(problem, request)
        stitched = start_from(problem, _stitch(problem, cuts, starts[0], request), request, self.name)
        best = min([one for one in (stitched, starts[0]) if one], key=lambda one: one.value_ns)
        return replace(best.placement, status="feasible", provenance={"found_by": best.policy, "cuts": len(cuts)})


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
    start = start_from_devices(problem, known)
    answer = CpModel(problem, start).solve(limit, seed=seed)
    return answer.placement.device if answer.placement is not None else known


def start_from_devices(problem: PlacementProblem, device: NDArray[np.int64]) -> int:
    """Return the makespan of a placement run greedily, ns: a horizon for the exact model."""
    from moirai_sim.simulation.replay import replay

    return replay(problem, Placement(device=device)).makespan_ns


def _throughput(problem: PlacementProblem, request: Request) -> Placement:
    merged = _coarse(problem)
    answer = merged.invert(MilpThroughput().place(merged.problem, request))
    if not len(answer.device) and not merged.lossless:  # merged operators are harder to fit into memory
        answer = Auto().place(problem, request)
    return replace(answer, order=None, transfer_order=None)


def _coarse(problem: PlacementProblem) -> Contraction:
    """Merge chains, then neighbours in topological order until each group holds a 60th of the work."""
    coarse = contract(problem, chains(problem))
    if coarse.problem.n_operators <= UNITS:
        return coarse
    work = np.where(problem.operator_ns < 0, 0, problem.operator_ns).min(axis=1)
    order = problem.topological_order
    before = np.concatenate([[0], np.cumsum(work[order])[:-1]])
    group = np.empty(problem.n_operators, dtype=np.int64)
    group[order] = np.minimum(UNITS * before // max(1, int(work.sum())), UNITS - 1)
    return contract(problem, group)
