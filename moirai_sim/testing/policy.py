"""``check_policy``: what every policy must do, as a third party's test suite runs it in one line."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moirai_sim.errors import InputError, InternalError
from moirai_sim.placement import UNANSWERED
from moirai_sim.policies.base import Request
from moirai_sim.policies.run import place_reduced, time_placement
from moirai_sim.testing.brute_force import optimal_makespan_ns, optimal_period_ns
from moirai_sim.testing.problems import small_problem

if TYPE_CHECKING:
    from moirai_sim.placement import Placement
    from moirai_sim.policies.base import Objective, Policy
    from moirai_sim.problem import PlacementProblem


def check_policy(policy: Policy, *, objective: Objective = "latency", time_limit_s: float = 20.0) -> None:
    """Hold a policy to the rules that every answer of the package keeps.

    On a dozen small problems (each network, binding memory, shared tensors, co-location, operators that a device cannot
    run, work without length, no edges, one operator, one device):

    - it has a name and a docstring that says what it is, and leaves the problem as it was;
    - it answers, or says ``infeasible`` or ``limit``; ``infeasible`` only where there is no answer;
    - its answer passes ``verify``: devices, memory, co-location, orders that can be run;
    - its bound is at most the true optimum, found by brute force, and ``optimal`` is only claimed of an optimum
      (latency under ``fair`` excepted, whose optimum is not known);
    - equal requests give equal answers.

    A policy may refuse a network with an `InputError`, but not all of them.

    Parameters
    ----------
    policy
        An instance, as its entry point's class makes it.
    objective
        What the policy minimises.

    Raises
    ------
    AssertionError
        With every rule broken and the problem on which it broke.
    """
    broken = []
    if not getattr(type(policy), "name", "") or not (type(policy).__doc__ or "").strip():
        broken.append("the class needs a name and a docstring that cites its method")
    request = Request(objective=objective, time_limit_s=time_limit_s, seed=1)
    answered = 0
    for problem in conformance_problems():
        try:
            found = _check(policy, problem, request)
        except InputError as refusal:
            if not str(refusal).strip():
                broken.append(f"{problem.name} ({problem.network}): refused without a reason")
            continue
        answered += 1
        broken += [f"{problem.name} ({problem.network}): {line}" for line in found]
    if not answered:
        broken.append("the policy refuses every problem")
    if broken:
        raise AssertionError("\n".join([f"policy '{policy.name}' breaks {len(broken)} rules:", *broken]))


def conformance_problems() -> list[PlacementProblem]:
    """Return the problems of `check_policy`, small enough for brute force."""
    return [
        small_problem(1, network="none"),
        small_problem(2, network="one-port"),
        small_problem(3, network="half-duplex", operators=4),
        small_problem(4, network="one-port", memory=0.6),
        small_problem(5, network="one-port", memory=0.35),  # often too little
        small_problem(6, network="one-port", shared_tensors=True, operators=4, devices=3),
        small_problem(7, network="one-port", colocated=True),
        small_problem(8, network="one-port", unsupported=True),
        small_problem(9, network="one-port", density=0.0),
        small_problem(10, network="one-port", density=1.0, operators=4),
        small_problem(11, network="one-port", operators=1),
        small_problem(12, network="one-port", devices=1),
        small_problem(13, network="fair"),
    ]


def _check(policy: Policy, problem: PlacementProblem, request: Request) -> list[str]:
    before = [array.copy() for array in _arrays(problem)]
    first = place_reduced(problem, policy.place, request)
    if any(not np.array_equal(a, b) for a, b in zip(before, _arrays(problem), strict=True)):
        return ["the policy changed the problem"]
    best = optimal_makespan_ns(problem) if request.objective == "latency" else optimal_period_ns(problem)
    if first.status in UNANSWERED:
        return ["says infeasible, but there is an answer"] if first.status == "infeasible" and best is not None else []
    if best is None:
        return ["answers, but nothing fits"]
    broken = []
    known = request.objective == "throughput" or problem.network != "fair"
    if known and first.lower_bound_ns > best:
        broken.append(f"claims the bound {first.lower_bound_ns} ns; the optimum is {best} ns")
    try:
        timeline = time_placement(problem, first, request)
    except InternalError as error:  # names the rules of verify that the answer breaks
        return [*broken, str(error)]
    if known and first.status == "optimal" and timeline.objective_ns != best:
        broken.append(f"claims an optimum of {timeline.objective_ns} ns; it is {best} ns")
    second = place_reduced(problem, policy.place, request)
    if not _same(first, second):
        broken.append("two equal requests give two answers")
    return broken


def _arrays(problem: PlacementProblem) -> list[np.ndarray]:
    return [problem.operator_ns, problem.edges, problem.transfer_ns, problem.weight_bytes, problem.memory_bytes]


def _same(a: Placement, b: Placement) -> bool:
    orders = [(a.device, b.device), (a.order, b.order), (a.transfer_order, b.transfer_order)]
    return all((x is None and y is None) or np.array_equal(x, y) for x, y in orders) and a.status == b.status  # type: ignore[arg-type]
