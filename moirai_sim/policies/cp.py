"""Policy ``cp``: the exact model of intervals, solved by OR-Tools CP-SAT."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moirai_sim.errors import InputError
from moirai_sim.placement import Placement
from moirai_sim.policies.bounds import bound_in_time_ns
from moirai_sim.policies.cp_model import CpModel
from moirai_sim.policies.milp import TOO_WIDE, answer_of, longest_ns
from moirai_sim.policies.run import require_latency
from moirai_sim.policies.starts import improved_start, too_wide
from moirai_sim.simulation.replay import replay

if TYPE_CHECKING:
    from moirai_sim.policies.base import Request
    from moirai_sim.problem import PlacementProblem


class Cp:
    """Exact placement and order for latency as constraint programming over optional intervals.

    The semantics are those of ``milp``; what differs is the solver (Laborie, Rogerie, Shaw and Vilim, "IBM ILOG CP
    optimizer for scheduling", 2018, describe the modelling style; CP-SAT is OR-Tools').
    """

    name: ClassVar[str] = "cp"

    def place(self, problem: PlacementProblem, request: Request) -> Placement:
        """Return an optimum, or the best answer within the time limit with the solver's bound."""
        require_latency(request, self.name)
        if problem.network == "fair":
            raise InputError(f"{self.name}: 'fair' transfers have no fixed length; use --network one-port, or auto")
        started = time.perf_counter()
        start = improved_start(problem, request)
        if too_wide(problem):
            return answer_of(start, bound_in_time_ns(problem, request), {"solver": None, "reason": TOO_WIDE})
        horizon = start.value_ns if start else longest_ns(problem)
        model = CpModel(problem, horizon)
        if start:
            model.hint(start.placement, replay(problem, start.placement))
        built = time.perf_counter() - started
        answer = model.solve(max(0.1, request.time_limit_s - built), seed=request.seed, workers=request.workers)
        placement = answer.placement
        if placement is None and start:
            placement = start.placement
        if placement is None:
            return Placement(
                device=np.zeros(0, dtype=np.int64),
                status="infeasible" if answer.status == "infeasible" else "limit",
                provenance={"solver": "CP-SAT"},
            )
        bound = max(answer.bound_ns, bound_in_time_ns(problem, request))
        value = replay(problem, placement).makespan_ns
        return Placement(
            device=placement.device,
            order=placement.order,
            transfer_order=placement.transfer_order,
            status="optimal" if bound >= value else "feasible",
            lower_bound_ns=min(bound, value),
            provenance={"solver": "CP-SAT", "start": start.policy if start else None},
        )
