"""Policy ``auto``, the default: exact where that can be proven in time, else the best found, with its gap."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moirai_sim.placement import Placement
from moirai_sim.policies.bounds import FAR, lower_bound_ns
from moirai_sim.policies.cp_model import CpModel
from moirai_sim.policies.decompose import decompose, near_cut_bound_ns
from moirai_sim.policies.loads import fits, memory_binds
from moirai_sim.policies.modules import cut_vertices, modules_of
from moirai_sim.policies.reductions import chains, contract
from moirai_sim.policies.registry import load_policy, policy_names
from moirai_sim.policies.search import improve
from moirai_sim.policies.starts import CHEAP, Start, find_starts, start_from
from moirai_sim.simulation.replay import replay

if TYPE_CHECKING:
    from moirai_sim.placement import Status
    from moirai_sim.policies.base import Policy, Request
    from moirai_sim.problem import Network, PlacementProblem

EXACT_OPERATORS = 40
"""Modules (and whole problems) of up to this size are tried exactly."""
BOUND_OPERATORS = 3_000
"""Up to this size a bound by near-cuts is sought."""
SURROGATES: tuple[Network, ...] = ("one-port", "none")
"""Networks under which ``fair`` problems are answered."""
PIPELINES = ("pipeline-dp", "diviml", "milp-throughput")
FIRST_ROUNDS = 2
"""Rounds of search, below a second each, that are run whatever the time limit: exact methods need a good horizon."""
FEWER = 0.9
"""Chains are searched as a whole where that leaves at most this share of the operators."""
FEW_DEVICES = 16
"""Decomposition looks at every pair of devices for every module; with more devices it is left out."""


class Auto:
    """Every cheap policy, then an exact method by the problem's structure, or search and a bound.

    Small modules in series: exact by decomposition. A small problem: exact by CP-SAT. Otherwise the search of policy
    ``search``, first with chains as single operators, and a proven bound from the series structure that remains when
    little work is left out. The answer is never worse than that of any policy it starts from. Under ``fair``, which is
    not linear, the candidates are found under ``one-port`` and ``none`` and the simulator picks.
    """

    name: ClassVar[str] = "auto"

    def place(self, problem: PlacementProblem, request: Request) -> Placement:
        """Return the best answer found within the time limit, with the best bound."""
        if request.objective == "throughput":
            return _throughput(problem, request)
        return _fair(self, problem, request) if problem.network == "fair" else _latency(problem, request)


def _latency(problem: PlacementProblem, request: Request) -> Placement:
    clock = _Clock(request)
    starts = find_starts(problem, clock.request(0.3), CHEAP)
    best = starts[0] if starts else None
    bound = lower_bound_ns(problem)
    steps = [f"{start.policy} {start.value_ns}" for start in starts]

    def left_to_prove() -> bool:
        return bound < FAR if best is None else best.value_ns > bound

    if left_to_prove() and best is not None and problem.n_operators <= BOUND_OPERATORS:
        known = [start.placement for start in starts]
        first = improve(problem, known, rounds=FIRST_ROUNDS, seed=request.seed, target_ns=bound)
        best = _better(best, start_from(problem, first, request, "search"))
    series = _series(problem)
    if left_to_prove() and series and best is not None:
        outcome = decompose(
            problem, upper_ns=best.value_ns, time_limit_s=clock.left(0.9), workers=request.workers, seed=request.seed
        )
        bound = max(bound, outcome.bound_ns)
        steps.append(f"decomposition bound {outcome.bound_ns} in {outcome.solves} solves")
        if outcome.placement is not None:
            best = _better(best, start_from(problem, outcome.placement, request, "decomposition"))
    small = problem.n_operators <= EXACT_OPERATORS
    if left_to_prove() and small:  # most small problems need no more than this
        best, bound = _by_cp(problem, request, min(2.0, clock.left(0.2)), best, bound, steps)
    if left_to_prove():
        if not small:
            best = _better(best, _search_chains(problem, clock.request(0.4), bound))
        best = _better(best, _search(problem, clock.request(0.4 if small else 0.6), starts, best, bound))
        if small and left_to_prove():
            best, bound = _by_cp(problem, request, clock.left(0.8), best, bound, steps)
        if best is not None and _can_be_bounded(problem) and not series:
            near = near_cut_bound_ns(
                problem, upper_ns=best.value_ns, time_limit_s=clock.left(0.9), workers=request.workers,
                seed=request.seed,
            )  # fmt: skip
            steps.append(f"near-cut bound {near}")
            bound = max(bound, near)
    return _answer(best, bound, steps)


def _throughput(problem: PlacementProblem, request: Request) -> Placement:
    if problem.network == "fair":  # a period counts the loads of devices only, as under ``none``
        answer = _throughput(problem.with_network("none"), request)
        return replace(answer, order=None, transfer_order=None)
    clock = _Clock(request)
    starts = find_starts(problem, clock.request(0.3), CHEAP)
    steps = [f"{start.policy} {start.value_ns}" for start in starts]
    best, bound = (starts[0] if starts else None), lower_bound_ns(problem, "throughput")
    for name in PIPELINES:
        if name not in policy_names() or (best is not None and best.value_ns <= bound):
            continue
        answer = load_policy(name).place(problem, clock.request(0.5))
        bound = max(bound, answer.lower_bound_ns)
        best = _better(best, start_from(problem, answer, request, name))
    return _answer(best, bound, steps)


def _fair(policy: Policy, problem: PlacementProblem, request: Request) -> Placement:
    """Answer for the linear networks, and let the simulator of the real one choose."""
    from moirai_sim.simulation.engine import simulate

    clock = _Clock(request)
    candidates: list[Placement] = []
    bound = 0
    status: Status = "limit"
    for network in SURROGATES:
        answer = policy.place(replace(problem, network=network), clock.request(0.4))
        if network == "none":  # nothing is slower there than under fair sharing
            bound = answer.lower_bound_ns
        if len(answer.device) == problem.n_operators:
            candidates += [answer, replace(answer, order=None, transfer_order=None)]
        else:
            status = answer.status
    for name in CHEAP:
        if name in policy_names() and (not candidates or clock.left(1.0) > 0):
            answer = load_policy(name).place(problem, clock.request(0.5))
            if len(answer.device) == problem.n_operators and fits(problem, answer.device):
                candidates.append(answer)
    found = [(simulate(problem, one, engine="simpy").makespan_ns, one) for one in candidates]
    if not found:
        return Placement(device=np.zeros(0, dtype=np.int64), status=status)
    value, best = min(found, key=lambda pair: pair[0])
    return replace(best, lower_bound_ns=min(bound, value), status="feasible")


def _series(problem: PlacementProblem) -> bool:
    """Tell whether series decomposition is exact and promising: small modules, and nothing that joins them."""
    if memory_binds(problem) or problem.colocation is not None or problem.n_devices > FEW_DEVICES:
        return False
    cuts = cut_vertices(problem)
    if len(cuts) < 2:
        return False
    return max(len(module.operators) for module in modules_of(problem, cuts)) <= EXACT_OPERATORS


def _can_be_bounded(problem: PlacementProblem) -> bool:
    return problem.n_operators <= BOUND_OPERATORS and problem.n_devices <= FEW_DEVICES


def _by_cp(
    problem: PlacementProblem, request: Request, time_limit_s: float, best: Start | None, bound: int, steps: list[str]
) -> tuple[Start | None, int]:
    from moirai_sim.policies.milp import longest_ns

    model = CpModel(problem, best.value_ns if best else longest_ns(problem))
    if best is not None:
        model.hint(best.placement, replay(problem, best.placement))
    answer = model.solve(time_limit_s, seed=request.seed, workers=request.workers)
    steps.append(f"cp {answer.status} {answer.makespan_ns} bound {answer.bound_ns}")
    if answer.placement is not None:
        best = _better(best, start_from(problem, answer.placement, request, "cp"))
    if best is None:
        return None, FAR if answer.status == "infeasible" else bound
    return best, max(bound, answer.bound_ns)


def _search(
    problem: PlacementProblem, request: Request, starts: list[Start], best: Start | None, bound: int
) -> Start | None:
    known = [start.placement for start in ([best] if best else []) + starts]
    if not known:
        return None
    answer = improve(problem, known, time_limit_s=request.time_limit_s, seed=request.seed, target_ns=bound)
    return start_from(problem, answer, request, "search")


def _search_chains(problem: PlacementProblem, request: Request, bound: int) -> Start | None:
    """Search with every chain as one operator: far fewer choices, and most good answers keep chains together."""
    coarse = contract(problem, chains(problem))
    if coarse.problem.n_operators > FEWER * problem.n_operators:
        return None
    clock = _Clock(request)
    starts = [start.placement for start in find_starts(coarse.problem, clock.request(0.3), CHEAP)]
    if not starts:
        return None
    answer = improve(coarse.problem, starts, time_limit_s=clock.left(0.9), seed=request.seed, target_ns=bound)
    return start_from(problem, coarse.invert(answer), request, "search of chains")


def _better(best: Start | None, other: Start | None) -> Start | None:
    if best is None or (other is not None and other.value_ns < best.value_ns):
        return other
    return best


def _answer(best: Start | None, bound: int, steps: list[str]) -> Placement:
    facts: dict[str, object] = {"steps": steps}
    if best is None:
        status: Status = "infeasible" if bound >= FAR else "limit"
        return Placement(device=np.zeros(0, dtype=np.int64), status=status, provenance=facts)
    return replace(
        best.placement,
        status="optimal" if bound >= best.value_ns else "feasible",
        lower_bound_ns=min(bound, best.value_ns),
        provenance={**facts, "found_by": best.policy},
    )


class _Clock:
    """Shares of what is left of a request's time limit."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._end = time.perf_counter() + request.time_limit_s

    def left(self, share: float) -> float:
        """Return a share of the seconds that are left."""
        return max(0.0, share * (self._end - time.perf_counter()))

    def request(self, share: float) -> Request:
        """Return the request with a share of the time that is left."""
        return replace(self._request, time_limit_s=self.left(share))
