"""Exact cycles of placements for a stream of requests, under limits on latency and period: one model a length."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moirai_sim.placement import Placement
from moirai_sim.policies.bounds import FAR, bound_in_time_ns
from moirai_sim.policies.loads import period_ns
from moirai_sim.policies.milp import FAILED, TOO_WIDE, answer_of, longest_ns, proven_ns, read_placement, solve
from moirai_sim.policies.starts import Start, cycle_from, find_starts, start_from, too_wide
from moirai_sim.policies.stream_model import StreamModel

if TYPE_CHECKING:
    from moirai_sim.policies.base import Request
    from moirai_sim.policies.milp import MilpAnswer
    from moirai_sim.problem import PlacementProblem


def stream(problem: PlacementProblem, request: Request) -> Placement:
    """Return the best cycle of up to ``request.replicas`` placements within the limits, by an exact model a length.

    Whichever objective and limit the request has; with neither replicas nor a limit it is the policy's plain model.
    """
    ends = time.perf_counter() + request.time_limit_s
    starts = find_starts(problem, replace(request, time_limit_s=request.time_limit_s / 4))
    best = starts[0] if starts else None
    pool = [one for start in starts for one in start.placement.cycle]
    least = bound_in_time_ns(problem, request)
    if too_wide(problem):
        return answer_of(best, least, {"solver": None, "reason": TOO_WIDE})
    proven, solved, failed = FAR, [], list[str]()
    for turns in range(1, request.replicas + 1):
        if best is not None and best.value_ns <= least:
            break
        if turns > 1 and time.perf_counter() > ends:  # `proven` then says nothing of longer cycles
            break
        left = (ends - time.perf_counter()) / (request.replicas - turns + 1)
        model, known = _model(problem, request, turns, best, pool)
        answer = solve(model, request, None if known is None else model.columns_of(known.placement.cycle), left)
        solved.append({"turns": turns, "solver_status": answer.status, "nodes": answer.nodes})
        if answer.status in FAILED:
            failed.append(answer.status)
        if answer.columns is not None:
            found = start_from(problem, _read(model, answer), request, "milp")
            if found is not None:
                pool += found.placement.cycle
                best = found if best is None or found.value_ns < best.value_ns else best
        infeasible = answer.status.startswith("infeasible") and known is None
        share = turns if request.objective == "throughput" else 1
        proven = min(proven, FAR if infeasible else -(-proven_ns(model, answer.bound) // share))
        if infeasible and turns == 1 and request.max_period_ns is None:
            break  # each placement of a longer cycle would be an answer too
    else:
        least = max(least, proven)
    facts: dict[str, object] = {"solver": "HiGHS", "models": solved}
    if best is None:
        asked = request.max_period_ns if request.objective == "throughput" else request.max_latency_ns
        beyond = proven >= FAR or proven > (asked or FAR)
        status = "infeasible" if beyond else "error" if failed else "limit"
        return Placement(device=np.zeros(0, dtype=np.int64), status=status, provenance=facts)  # type: ignore[arg-type]
    bound = min(least, best.value_ns)
    return replace(
        best.placement,
        status="optimal" if bound >= best.value_ns else "feasible",
        lower_bound_ns=bound,
        provenance={**facts, "found_by": best.policy},
    )


def _model(
    problem: PlacementProblem, request: Request, turns: int, best: Start | None, pool: list[Placement]
) -> tuple[StreamModel, Start | None]:
    """Return the model of cycles of ``turns`` placements, and a known one of that length, if there is one."""
    known = None
    exactly = [one for one in (best, cycle_from(problem, pool, replace(request, replicas=turns))) if one is not None]
    for one in exactly:
        cycle = one.placement.cycle
        if turns % len(cycle) == 0:  # the same again and again has the same period
            first, *others = cycle * (turns // len(cycle))
            again = start_from(problem, replace(first, replicas=tuple(others)), request, one.policy)
            known = again if known is None or (again and again.value_ns < known.value_ns) else known
    longest = longest_ns(problem)
    if request.objective == "latency":
        makespan: int | None = known.value_ns if known else longest
        period = turns * min(longest, request.max_period_ns or longest)
    else:
        makespan = request.max_latency_ns
        period = turns * (period_ns(problem, known.placement.devices) if known else longest)
    return StreamModel(problem, turns, request.objective, makespan, period), known


def _read(model: StreamModel, answer: MilpAnswer) -> Placement:
    cycle = []
    n, k = model.copy.duration.shape
    for r in range(model.turns):
        own = np.where(model.map[r] >= 0, answer.columns[model.map[r]], 0.0)  # type: ignore[index]
        if model.timed:
            cycle.append(read_placement(model.copy, own))
        else:
            cycle.append(Placement(device=own[: n * k].reshape(n, k).argmax(axis=1).astype(np.int64)))
    first, *others = cycle
    return replace(first, replicas=tuple(others))
