"""Run a policy by name: reduce, place, time, bound, verify. Everything that leaves the package passes through here."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moirai_sim.errors import InputError, InternalError
from moirai_sim.evidence import with_evidence
from moirai_sim.placement import UNANSWERED, Placement
from moirai_sim.policies.base import Request
from moirai_sim.policies.bounds import bound_in_time_ns
from moirai_sim.policies.loads import best_single_device, period_ns
from moirai_sim.policies.reductions import contract_colocated
from moirai_sim.policies.registry import load_policy
from moirai_sim.profiling.telemetry import ENGINES, versions
from moirai_sim.timeline import Timeline
from moirai_sim.verify import verify

if TYPE_CHECKING:
    from collections.abc import Callable

    from moirai_sim.placement import Status
    from moirai_sim.policies.base import Objective
    from moirai_sim.problem import PlacementProblem


def place(problem: PlacementProblem, policy: str = "auto", request: Request | None = None) -> Timeline:
    """Answer a placement problem with a named policy, and prove what can be proven about the answer.

    Co-location groups that can run as one are merged before the policy runs. Its answer is expanded, timed by one
    simulation, given the best lower bound known, and verified.

    Returns
    -------
    Timeline
        Without spans where the policy stopped without an answer (status ``infeasible`` or ``limit``).

    Raises
    ------
    InputError
        If no policy has that name, or the policy refuses the problem.
    InternalError
        If the answer breaks the rules of ``verify``: a bug of the policy.
    """
    started = time.perf_counter()
    request = request or Request()  # latency, a minute, seed 0
    solver = load_policy(policy)
    answer = _ruled_out(problem, request) or place_reduced(problem, solver.place, request)
    timeline = with_evidence(problem, time_placement(problem, answer, request))
    alone = best_single_device(problem)
    return replace(
        timeline,
        policy=policy,
        solve_seconds=time.perf_counter() - started,
        provenance={
            **timeline.provenance,
            "request": {
                "objective": request.objective,
                "time_limit_s": request.time_limit_s,
                "seed": request.seed,
                "workers": request.workers,
                **({"replicas": request.replicas} if request.replicas > 1 else {}),
            },
            **problem.facts,
            "best_single_device": None if alone is None else {"device": problem.devices[alone[0]], "ns": alone[1]},
            "versions": versions(ENGINES),
        },
    )


def place_reduced(
    problem: PlacementProblem, solve: Callable[[PlacementProblem, Request], Placement], request: Request
) -> Placement:
    """Merge what must run together, solve the smaller problem, and return the answer for the original operators."""
    if problem.evidence is not None:  # no policy reads it, and every reduction would have to keep it
        problem = replace(problem, evidence=None)
    if not problem.n_operators:
        return Placement(device=np.zeros(0, dtype=np.int64))
    contraction = contract_colocated(problem)
    if contraction is None:
        return _checked(problem, solve(problem, request), request)
    return contraction.invert(_checked(contraction.problem, solve(contraction.problem, request), request))


def _ruled_out(problem: PlacementProblem, request: Request) -> Placement | None:
    """Return ``infeasible`` where a bound of the whole problem already exceeds what the request allows."""
    limits: tuple[tuple[int | None, Objective, str], ...] = (
        (request.max_latency_ns, "latency", "latency"),
        (request.max_period_ns, "throughput", "period"),
    )
    for limit, objective, what in limits:
        bound = 0 if limit is None else bound_in_time_ns(problem, request, objective)
        if limit is not None and bound > limit:
            reason = f"every placement has a {what} of at least {bound} ns; asked for at most {limit} ns"
            return Placement(device=np.zeros(0, dtype=np.int64), status="infeasible", provenance={"reason": reason})
    return None


def time_placement(problem: PlacementProblem, placement: Placement, request: Request) -> Timeline:
    """Return the verified timeline of a placement with the best bound of its objective.

    One that exceeds a limit of the request is refused: status ``limit``, the reason in the provenance, no spans.

    Raises
    ------
    InternalError
        If the timeline breaks a rule of ``verify``.
    """
    nothing = Timeline(
        status=placement.status,
        policy="",
        network=problem.network,
        makespan_ns=0,
        placement={},
        objective=request.objective,
        lower_bound_ns=placement.lower_bound_ns,
        provenance=placement.provenance,
        max_latency_ns=request.max_latency_ns,
        max_period_ns=request.max_period_ns,
    )
    if placement.status in UNANSWERED:
        return nothing
    from moirai_sim.simulation.engine import simulate

    timeline = simulate(problem, placement, engine="simpy" if problem.network == "fair" else "replay")
    timeline = replace(
        timeline,
        objective=request.objective,
        period_ns=period_ns(problem, placement.devices) if request.is_stream else None,
        max_latency_ns=request.max_latency_ns,
        max_period_ns=request.max_period_ns,
    )
    bound = max(placement.lower_bound_ns, bound_in_time_ns(problem, request))
    broken = limits_broken(timeline)
    if broken:
        reason = f"the policy's answer was refused: {'; '.join(broken)}"
        provenance = {**placement.provenance, "reason": reason}
        limit = request.max_latency_ns if request.objective == "latency" else request.max_period_ns
        status: Status = "infeasible" if limit is not None and bound > limit else "limit"
        return replace(nothing, status=status, lower_bound_ns=bound, provenance=provenance)
    proven = bound >= timeline.objective_ns
    timeline = replace(timeline, lower_bound_ns=bound, status="optimal" if proven else "feasible")
    wrong = verify(problem, timeline)
    if wrong:
        shown = "; ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise InternalError(f"{problem.name}: the answer is wrong: {shown}; please report it with the input")
    return timeline


def limits_broken(timeline: Timeline) -> list[str]:
    """Return one line for each limit of the request that a timeline exceeds."""
    found = (
        ("latency", timeline.latency_ns, timeline.max_latency_ns),
        ("period", timeline.period_ns or 0, timeline.max_period_ns),
    )
    return [f"its {what} is {value} ns, above {limit} ns" for what, value, limit in found if value > (limit or value)]


def _checked(problem: PlacementProblem, placement: Placement, request: Request) -> Placement:
    """Refuse an answer whose shape or status makes no sense, before anything reads it.

    Raises
    ------
    InternalError
        If devices are missing or out of range.
    """
    if placement.status in UNANSWERED:
        return replace(placement, device=np.zeros(0, dtype=np.int64), order=None, transfer_order=None, replicas=())
    for device in (np.asarray(one.device) for one in placement.cycle):
        if device.shape != (problem.n_operators,) or not np.issubdtype(device.dtype, np.integer):
            raise InternalError(f"{problem.name}: a policy must name one device an operator, read shape {device.shape}")
        if len(device) and (device.min() < 0 or device.max() >= problem.n_devices):
            raise InternalError(f"{problem.name}: a policy named a device that does not exist")
    if len(placement.cycle) > request.replicas:
        raise InternalError(f"{problem.name}: a policy answered with more replicas than it was allowed")
    return placement


def require_latency(request: Request, policy: str) -> None:
    """Refuse the throughput objective on behalf of a policy that only knows latency.

    Raises
    ------
    InputError
        If the request asks for throughput.
    """
    if request.objective != "latency":
        raise InputError(
            f"policy '{policy}' minimises latency only; for throughput use milp-throughput, diviml or pipeline-dp"
        )
