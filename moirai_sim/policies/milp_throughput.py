"""Policy ``milp-throughput``: DiviML's mixed-integer programme for the period of a pipelined stream."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moirai_sim.errors import InputError
from moirai_sim.placement import Placement
from moirai_sim.policies.bounds import bound_in_time_ns
from moirai_sim.policies.loads import device_loads_ns, fits, period_ns
from moirai_sim.policies.milp import FAILED, TOO_WIDE, answer_of, columns_of, longest_ns, proven_ns, solve
from moirai_sim.policies.milp_model import MilpModel
from moirai_sim.policies.starts import find_starts, too_wide
from moirai_sim.policies.stream import stream
from moirai_sim.policies.symmetry import relabel_by_load

if TYPE_CHECKING:
    from moirai_sim.policies.base import Request
    from moirai_sim.problem import PlacementProblem


class MilpThroughput:
    """The least largest load of a device or port over all placements (DiviML, arXiv 2308.00127).

    Requests stream through the placed model; a saturated pipeline finishes one each period, which is the largest load.
    Loads may be spread over the devices in any way, not only in contiguous pieces (compare ``pipeline-dp``). With
    ``replicas`` the model is solved for cycles of 1, 2, ... placements (`stream_model`), until one reaches the bound of
    all; under ``max_latency_ns`` the starts and orders of a request alone are part of it, as in ``milp``. Extension:
    devices that can be swapped are told apart by load. Under ``fair`` the ports stand for the links, which proves
    nothing.
    """

    name: ClassVar[str] = "milp-throughput"

    def place(self, problem: PlacementProblem, request: Request) -> Placement:
        """Return an optimum, or the best answer within the time limit with the solver's bound."""
        if request.objective != "throughput":
            raise InputError(f"policy '{self.name}' minimises the period; ask with --objective throughput")
        ported = problem.with_network("one-port") if problem.network == "fair" else problem
        if request.replicas > 1 or request.max_latency_ns is not None:
            answer = stream(ported, request)
        else:
            answer = _alone(ported, request)
        if ported is not problem:  # what one-port forbids, fair may allow
            answer = replace(answer, lower_bound_ns=0, status="limit" if not len(answer.device) else "feasible")
        return answer


def _alone(ported: PlacementProblem, request: Request) -> Placement:
    started = time.perf_counter()
    starts = find_starts(ported, request)
    start = None
    if starts:
        device = starts[0].placement.device
        device = relabel_by_load(ported, device, device_loads_ns(ported, device))
        start = replace(starts[0], placement=Placement(device=device))
    if too_wide(ported):
        return answer_of(start, bound_in_time_ns(ported, request), {"solver": None, "reason": TOO_WIDE})
    horizon = start.value_ns if start else longest_ns(ported)
    model = MilpModel(ported, horizon, "throughput")
    built = time.perf_counter() - started
    first = columns_of(model, start.placement) if start else None
    answer = solve(model, request, first, max(0.1, request.time_limit_s - built))
    facts: dict[str, object] = {"solver": "HiGHS", "columns": model.n_columns, "nodes": answer.nodes}
    if answer.status in FAILED:
        facts["solver_status"] = answer.status
    if answer.status.startswith("infeasible") and start is None:
        return Placement(device=np.zeros(0, dtype=np.int64), status="infeasible", provenance=facts)
    best = start.placement.device if start else None
    if answer.columns is not None:
        n, k = ported.n_operators, ported.n_devices
        found = answer.columns[: n * k].reshape(n, k).argmax(axis=1).astype(np.int64)
        if fits(ported, found) and (best is None or period_ns(ported, found) < period_ns(ported, best)):
            best = found
    if best is None:
        status = "error" if answer.status in FAILED else "limit"
        return Placement(device=np.zeros(0, dtype=np.int64), status=status, provenance=facts)  # type: ignore[arg-type]
    value = period_ns(ported, best)
    bound = max(min(value, proven_ns(model, answer.bound)), bound_in_time_ns(ported, request))
    return Placement(
        device=best, status="optimal" if bound >= value else "feasible", lower_bound_ns=bound, provenance=facts
    )
