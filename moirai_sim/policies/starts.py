"""Known answers to begin with: what the cheap policies find, on one footing, the best first."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moirai_sim.errors import InputError
from moirai_sim.policies.cycles import best_cycle, whole_models
from moirai_sim.policies.loads import fits, period_ns
from moirai_sim.policies.registry import load_policy, policy_names
from moirai_sim.simulation.replay import replay
from moirai_sim.simulation.schedule import placement_from_schedule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moirai_sim.placement import Placement
    from moirai_sim.policies.base import Request
    from moirai_sim.problem import PlacementProblem

CHEAP = ("single", "heft", "heft-blind", "cpop", "met", "m-topo", "m-etf", "m-sct", "getf", "random")
"""Policies that answer thousands of operators within seconds, in the order in which they are tried."""
QUICK = ("single", "heft", "met", "m-topo", "m-etf")
"""Those of them that need no linear programme."""
BY_READY = ("m-etf", "m-sct", "getf")
"""Those that look at every ready operator on every device, turn after turn."""
MOST_STEPS = 3_000_000_000
"""Looks, at a few nanoseconds each, above which those are left out; nothing stops them once they run."""
MOST_ENTRIES = 300_000_000
"""Entries of a table of tensors by devices, eight bytes each, above which a policy that keeps one is left out."""
TABLED = ("heft", "heft-blind", "cpop", *BY_READY)
"""Policies that keep one."""
MOST_ROUTES = 200_000
"""Tensors times pairs of devices above which no exact model is built: a row or an interval each, and no clock."""
SKIPPED_OPERATORS = 2_000
"""Above this size a policy is left out once half of the time is gone; below, none takes a second."""

IMPROVED_OPERATORS = 3_000
"""Above this size a start is not improved before an exact solver gets it."""


@dataclass(frozen=True, eq=False)
class Start:
    """An answer with its orders, and what it costs."""

    placement: Placement
    value_ns: int
    policy: str


def find_starts(problem: PlacementProblem, request: Request, names: Sequence[str] = QUICK) -> list[Start]:
    """Return the answers of the named policies, best first; those that do not answer are left out.

    Where placements may take turns, the best cycle of these answers and of copies of the whole model is one more.
    """
    started = time.perf_counter()
    found: list[Start] = []
    pool: list[Placement] = []
    anyhow = replace(request, max_period_ns=None)
    for name in names:
        late = problem.n_operators > SKIPPED_OPERATORS and time.perf_counter() - started > request.time_limit_s / 2
        if name not in policy_names() or (found and (late or too_large(problem, name))):
            continue
        try:
            answer = load_policy(name).place(problem, replace(request, time_limit_s=request.time_limit_s / 4))
        except InputError:  # a policy that refuses this kind of problem
            continue
        start = start_from(problem, answer, request, name)
        if start is not None:
            found.append(start)
        if request.replicas > 1 and request.is_stream:
            alone = start or start_from(problem, answer, anyhow, name)
            pool += [] if alone is None else alone.placement.cycle
    if request.replicas > 1 and request.is_stream:
        turns = cycle_from(problem, pool, request)
        found += [] if turns is None else [turns]
    return sorted(found, key=lambda start: start.value_ns)


def too_large(problem: PlacementProblem, policy: str) -> bool:
    """Tell whether a simple policy would take more time or memory than an answer beside others is worth."""
    n, k, q = problem.n_operators, problem.n_devices, len(problem.tensor_bytes)
    steps = n * problem.width * k if policy in BY_READY else 0
    return steps > MOST_STEPS or (policy in TABLED and (n + q) * k > MOST_ENTRIES)


def too_wide(problem: PlacementProblem) -> bool:
    """Tell whether an exact model, with a choice for each way that a tensor can go, would take too long to build."""
    return len(problem.tensor_bytes) * problem.n_devices**2 > MOST_ROUTES


def improved_start(problem: PlacementProblem, request: Request) -> Start | None:
    """Return a good answer within about a second: the horizon and the first solution of an exact solver."""
    from moirai_sim.policies.search import improve

    request = replace(request, max_latency_ns=None)  # from what breaks the limit, search may come to what keeps it
    starts = find_starts(problem, request, (*QUICK, "random"))
    if not starts or problem.n_operators > IMPROVED_OPERATORS:
        return starts[0] if starts else None
    answer = improve(problem, [start.placement for start in starts], rounds=1, seed=request.seed)
    better = start_from(problem, answer, request, "search")
    return better if better is not None and better.value_ns < starts[0].value_ns else starts[0]


def cycle_from(problem: PlacementProblem, pool: Sequence[Placement], request: Request) -> Start | None:
    """Return the best cycle of a pool of placements and of copies of the whole model; None where none keeps the limits.

    Placements that break the limit on latency are left out of it.
    """
    alone = replace(request, max_period_ns=None)
    known = (start_from(problem, one, alone, "cycle") for one in (*pool, *whole_models(problem)))
    turns = best_cycle(problem, [start.placement for start in known if start is not None], request.replicas)
    return None if turns is None else start_from(problem, turns, request, "cycle")


def start_from(problem: PlacementProblem, answer: Placement, request: Request, policy: str) -> Start | None:
    """Time an answer and write down its orders; None where it breaks a limit or there is none."""
    if len(answer.device) != problem.n_operators or not fits(problem, answer.devices):
        return None
    timed = [_timed(problem, one, request) for one in answer.cycle]
    latency = max(makespan for makespan, _ in timed)
    period = period_ns(problem, answer.devices) if request.is_stream else 0
    if latency > (request.max_latency_ns or latency) or period > (request.max_period_ns or period):
        return None
    first, *others = (placement for _, placement in timed)
    value = period if request.objective == "throughput" else latency
    return Start(replace(first, replicas=tuple(others)), value, policy)


def _timed(problem: PlacementProblem, answer: Placement, request: Request) -> tuple[int, Placement]:
    schedule = replay(problem, answer)
    if answer.order is not None:  # greedy timing of the same devices may be faster than the policy's own order
        greedy = replay(problem, replace(answer, order=None, transfer_order=None))
        matters = request.objective == "latency" or request.max_latency_ns is not None
        if matters and greedy.makespan_ns < schedule.makespan_ns:
            schedule = greedy
    return schedule.makespan_ns, placement_from_schedule(problem, answer, schedule)
