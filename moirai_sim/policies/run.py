"""Run a policy by name: reduce, place, time, bound, verify. Everything that leaves the package passes through here."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moirai_sim.errors import InputError, InternalError
from moirai_sim.placement import Placement
from moirai_sim.policies.base import Request
from moirai_sim.policies.bounds import lower_bound_ns
from moirai_sim.policies.loads import best_single_device, period_ns
from moirai_sim.policies.reductions import contract_colocated
from moirai_sim.policies.registry import load_policy
from moirai_sim.timeline import Timeline
from moirai_sim.verify import verify

if TYPE_CHECKING:
    from collections.abc import Callable

    from moirai_sim.problem import PlacementProblem

UNANSWERED = ("infeasible", "limit", "error")
"""Statuses of an answer that places nothing."""


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
    answer = place_reduced(problem, solver.place, request)
    timeline = time_placement(problem, answer, request)
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
            },
            "problem": {"name": problem.name, **problem.provenance},
            "cost_share": dict(problem.cost_share),
            "best_single_device": None if alone is None else {"device": problem.devices[alone[0]], "ns": alone[1]},
        },
    )


def place_reduced(
    problem: PlacementProblem, solve: Callable[[PlacementProblem, Request], Placement], request: Request
) -> Placement:
    """Merge what must run together, solve the smaller problem, and return the answer for the original operators."""
    if problem.operator_low_ns is not None:  # no policy reads them, and every reduction would have to keep them
        problem = replace(problem, operator_low_ns=None, operator_high_ns=None)
    if not problem.n_operators:
        return Placement(device=np.zeros(0, dtype=np.int64))
    contraction = contract_colocated(problem)
    if contraction is None:
        return _checked(problem, solve(problem, request))
    return contraction.invert(_checked(contraction.problem, solve(contraction.problem, request)))


def time_placement(problem: PlacementProblem, placement: Placement, request: Request) -> Timeline:
    """Return the verified timeline of a placement with the best bound of its objective.

    Raises
    ------
    InternalError
        If the timeline breaks a rule of ``verify``.
    """
    if placement.status in UNANSWERED:
        return Timeline(
            status=placement.status,
            policy="",
            network=problem.network,
            makespan_ns=0,
            placement={},
            objective=request.objective,
            lower_bound_ns=placement.lower_bound_ns,
            provenance=placement.provenance,
        )
    timeline = _simulate(problem, placement)
    period = period_ns(problem, placement.device) if request.objective == "throughput" else None
    timeline = replace(timeline, objective=request.objective, period_ns=period)
    bound = max(placement.lower_bound_ns, lower_bound_ns(problem, request.objective))
    proven = bound >= timeline.objective_ns
    timeline = replace(timeline, lower_bound_ns=bound, status="optimal" if proven else "feasible")
    wrong = verify(problem, timeline)
    if wrong:
        shown = "; ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise InternalError(f"{problem.name}: the answer is wrong: {shown}; please report it with the input")
    return timeline


def _simulate(problem: PlacementProblem, placement: Placement) -> Timeline:
    if problem.network == "fair":
        from moirai_sim.simulation.engine import simulate

        return simulate(problem, placement, engine="simpy")
    from moirai_sim.simulation.replay import replay
    from moirai_sim.simulation.schedule import timeline_from_schedule

    return timeline_from_schedule(problem, placement, replay(problem, placement))


def _checked(problem: PlacementProblem, placement: Placement) -> Placement:
    """Refuse an answer whose shape or status makes no sense, before anything reads it.

    Raises
    ------
    InternalError
        If devices are missing or out of range.
    """
    if placement.status in UNANSWERED:
        return replace(placement, device=np.zeros(0, dtype=np.int64), order=None, transfer_order=None)
    device = np.asarray(placement.device)
    if device.shape != (problem.n_operators,) or not np.issubdtype(device.dtype, np.integer):
        raise InternalError(f"{problem.name}: a policy must name one device an operator, read shape {device.shape}")
    if len(device) and (device.min() < 0 or device.max() >= problem.n_devices):
        raise InternalError(f"{problem.name}: a policy named a device that does not exist")
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
