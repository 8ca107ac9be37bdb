"""Policy ``milp-throughput``: DiviML's mixed-integer programme for the period of a pipelined stream."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moirai_sim.errors import InputError
from moirai_sim.placement import Placement
from moirai_sim.policies.bounds import lower_bound_ns
from moirai_sim.policies.loads import device_loads_ns, fits, period_ns
from moirai_sim.policies.milp import longest_ns, proven_ns, solve
from moirai_sim.policies.milp_model import MilpModel
from moirai_sim.policies.starts import find_starts
from moirai_sim.policies.symmetry import relabel_by_load

if TYPE_CHECKING:
    from moirai_sim.policies.base import Request
    from moirai_sim.problem import PlacementProblem


class MilpThroughput:
    """The least largest load of a device or port over all placements (DiviML, arXiv 2308.00127).

    Requests stream through the placed model; a saturated pipeline finishes one each period, which is the largest load.
    Loads may be spread over the devices in any way, not only in contiguous pieces (compare ``pipeline-dp``). Extension:
    devices that can be swapped are told apart by load. Not modelled: replicas of operators (data parallelism).
    """

    name: ClassVar[str] = "milp-throughput"

    def place(self, problem: PlacementProblem, request: Request) -> Placement:
        """Return an optimum, or the best answer within the time limit with the solver's bound."""
        if request.objective != "throughput":
            raise InputError(f"policy '{self.name}' minimises the period; ask with --objective throughput")
        ported = problem.with_network("none") if problem.network == "fair" else problem
        starts = find_starts(ported, request)
        start = None
        if starts:
            device = starts[0].placement.device
            device = relabel_by_load(ported, device, device_loads_ns(ported, device))
            start = replace(starts[0], placement=Placement(device=device))
        horizon = start.value_ns if start else longest_ns(ported)
        model = MilpModel(ported, horizon, "throughput")
        answer = solve(model, request, start, request.time_limit_s)
        facts: dict[str, object] = {"solver": "HiGHS", "columns": model.n_columns, "nodes": answer.nodes}
        if answer.status.startswith("infeasible"):
            return Placement(device=np.zeros(0, dtype=np.int64), status="infeasible", provenance=facts)
        best = start.placement.device if start else None
        if answer.columns is not None:
            n, k = problem.n_operators, problem.n_devices
            found = answer.columns[: n * k].reshape(n, k).argmax(axis=1).astype(np.int64)
            if fits(ported, found) and (best is None or period_ns(ported, found) < period_ns(ported, best)):
                best = found
        if best is None:
            return Placement(device=np.zeros(0, dtype=np.int64), status="limit", provenance=facts)
        value = period_ns(ported, best)
        bound = max(min(value, proven_ns(model, answer.bound)), lower_bound_ns(ported, "throughput"))
        return Placement(
            device=best, status="optimal" if bound >= value else "feasible", lower_bound_ns=bound, provenance=facts
        )
