"""Policy ``auto``, the default: exact where that can be proven in time, else the best found, with its gap."""

from __future__ import annotations

import functools
import time
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moirai_sim.placement import Placement
from moirai_sim.policies.bounds import FAR, lower_bound_ns
from moirai_sim.policies.cp_model import CpModel
from moirai_sim.policies.cycles import best_cycle, whole_models
from moirai_sim.policies.decompose import decompose, near_cut_bound_ns
from moirai_sim.policies.loads import device_loads_ns, fits, memory_binds, period_ns
from moirai_sim.policies.modules import cut_vertices, modules_of
from moirai_sim.policies.period_search import improve_period
from moirai_sim.policies.reductions import chains, contract
from moirai_sim.policies.registry import load_policy, policy_names
from moirai_sim.policies.repeated import repeated
from moirai_sim.policies.repeated_bound import repeated_bound_ns
from moirai_sim.policies.search import Improvement, improve
from moirai_sim.policies.starts import CHEAP, Start, cycle_from, find_starts, start_from, too_large, too_wide
from moirai_sim.simulation.replay import replay

if TYPE_CHECKING:
    from moirai_sim.placement import Status
    from moirai_sim.policies.base import Policy, Request
    from moirai_sim.problem import Network, PlacementProblem

EXACT_OPERATORS = 40
"""Modules (and whole problems) of up to this size are tried exactly."""
BOUND_OPERATORS = 1_500
"""Up to this size a bound by near-cuts is sought."""
BOUND = 0.3
"""Share of the time left that the linear programme of the first bound gets; it needs so much for large graphs only."""
SURROGATES: tuple[Network, ...] = ("one-port", "none")
"""Networks under which ``fair`` problems are answered."""
PERIOD_ROUNDS, PERIOD = 5, 0.25
"""Rounds of the search of the period before the pipelines, and the share of the time left that they may take."""
PIPELINES = {"diviml": 0.5, "pipeline-dp": 0.5, "milp-throughput": 0.9}
"""Policies for throughput, and the share of the time left that each gets: coarse pieces first, whatever the graph."""
WHOLE_MODEL = 10_000
"""Operators times devices up to which the exact model of a stream is tried: building a larger one breaks the limit."""
SIMULATED_OPERATORS = 20_000
"""Above this size a simulation of each candidate may break the limit: of a million operators it takes half a minute."""
FIRST_ROUNDS = 2
"""Rounds of search, the short looks at its starts, that come first: exact methods need a good horizon."""
COARSE = 0.5
"""Share of the time that is spent on chains as single operators."""
MOSTLY_COARSE = 0.95
"""The same for large problems, where too few steps are left for more."""
WORTH_A_BOUND_S = 10.0
"""Seconds from which a good part is kept for the bound; with less, near-cuts seldom prove much."""
FEWER = 0.9
"""Chains are searched as a whole where that leaves at most this share of the operators."""
FEW_DEVICES = 16
"""Decomposition looks at every pair of devices for every module; with more devices it is left out."""


class Auto:
    """Every cheap policy, then an exact method by the problem's structure, or search and a bound.

    Small modules in series: exact by decomposition. Repeated blocks over many devices or under memory: one block
    of each kind exactly, laid out by a dynamic programme. A small problem: exact by CP-SAT. Otherwise the search of
    policy ``search``, first with chains as single operators, and a proven bound from the series structure that remains
    when little work is left out. The answer is never worse than that of any policy it starts from. Under ``fair``,
    which is not linear, the candidates are found under ``one-port`` and ``none`` and the simulator picks.
    """

    name: ClassVar[str] = "auto"

    def place(self, problem: PlacementProblem, request: Request) -> Placement:
        """Return the best answer found within the time limit, with the best bound."""
        if request.objective == "throughput":
            return _throughput(problem, request)
        if problem.network == "fair":
            return _fair(self, problem, request)
        return _latency(problem, request) if request.max_period_ns is None else _within(problem, request)


def _latency(problem: PlacementProblem, request: Request) -> Placement:
    request = replace(request, max_latency_ns=None)  # from what breaks the limit, search may come to what keeps it
    clock = _Clock(request)
    starts = find_starts(problem, clock.request(0.3), CHEAP)
    best = starts[0] if starts else None
    bound = lower_bound_ns(problem, time_limit_s=clock.left(BOUND))
    steps = [f"{start.policy} {start.value_ns}" for start in starts]

    def left_to_prove() -> bool:
        return bound < FAR if best is None else best.value_ns > bound

    series = _series(problem)
    blocks = None if series or not left_to_prove() else repeated(problem, clock.request(0.3))
    if blocks is not None:
        best = _better(best, start_from(problem, blocks.place(), request, "repeated blocks"))
        bound = max(bound, repeated_bound_ns(blocks, clock.left(0.2), request.seed))
        steps.append(f"repeated blocks {len(blocks.example)} kinds, {blocks.solves} solves, bound {bound}")
    line = Improvement(problem, [start.placement for start in starts], request.seed) if starts else None

    def search(share: float | None, rounds: int | None = None) -> Start | None:
        """Go on with one line of search, the same as that of ``search``."""
        if line is None or best is None or not left_to_prove():
            return best
        line.offer(best.placement)
        limit = None if share is None else clock.left(share)
        answer = line.run(time_limit_s=limit, rounds=rounds, target_ns=bound)
        return _better(best, start_from(problem, answer, request, "search"))

    if problem.n_operators <= BOUND_OPERATORS:
        best = search(None, FIRST_ROUNDS)
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
            coarse = COARSE if problem.n_operators <= BOUND_OPERATORS else MOSTLY_COARSE
            best = _better(best, _search_chains(problem, clock.request(coarse), bound))
        best = search(0.6 if small or clock.left(1.0) > WORTH_A_BOUND_S else 0.9)
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
    if problem.network == "fair":
        return _fair_throughput(problem, request)
    clock = _Clock(request)
    starts = find_starts(problem, clock.request(0.3), CHEAP)
    if not starts and request.max_latency_ns is not None:  # what is searched for latency may keep the limit
        alone = replace(clock.request(0.3), objective="latency", max_period_ns=None, replicas=1)
        start = start_from(problem, _latency(problem, alone), request, "least latency")
        starts = [] if start is None else [start]
    steps = [f"{start.policy} {start.value_ns}" for start in starts]
    best = starts[0] if starts else None
    bound = lower_bound_ns(problem, "throughput", replicas=request.replicas, time_limit_s=clock.left(BOUND))
    impossible = False

    def search(share: float, rounds: int | None = None) -> None:
        nonlocal best
        one = min((s for s in starts if not s.placement.replicas), key=lambda s: s.value_ns, default=None)
        if one is None or best is None or best.value_ns <= bound:
            return
        answer = improve_period(
            problem, one.placement, time_limit_s=clock.left(share), rounds=rounds, seed=request.seed, target_ns=bound
        )
        start = start_from(problem, answer, request, "search")
        best = _better(best, start)
        starts.extend([] if start is None else [start])

    search(PERIOD, PERIOD_ROUNDS)
    for name, share in PIPELINES.items():
        large = request.max_latency_ns is not None and problem.n_operators > EXACT_OPERATORS
        if name not in policy_names() or (best is not None and best.value_ns <= bound):
            continue
        if name == "milp-throughput" and (large or problem.n_operators * problem.n_devices > WHOLE_MODEL):
            continue  # with a latency it orders operators pairwise; `diviml` coarsens first
        answer = load_policy(name).place(problem, clock.request(share))
        bound = max(bound, answer.lower_bound_ns)
        impossible |= answer.status == "infeasible"
        start = start_from(problem, answer, request, name)
        best = _better(best, start)
        starts += [] if start is None else [start]
    search(0.9)
    if request.replicas > 1:
        pool = [one for start in starts for one in start.placement.cycle]
        best = _better(best, cycle_from(problem, pool, request))
    impossible |= bound > (request.max_period_ns or bound)
    return _answer(best, FAR if impossible and best is None else bound, steps)


def _fair_throughput(problem: PlacementProblem, request: Request) -> Placement:
    """Answer for the linear networks, and choose by the loads of the real links."""
    from moirai_sim.simulation.engine import simulate

    @functools.cache
    def latency_ns(one: Placement) -> int:
        if len(np.unique(one.devices)) == 1:  # nothing is sent, so there is nothing to simulate
            return int(device_loads_ns(problem, one.device).max())
        return simulate(problem, one, engine="simpy").latency_ns

    def in_time(one: Placement) -> bool:
        return request.max_latency_ns is None or latency_ns(one) <= request.max_latency_ns

    clock = _Clock(request)
    candidates: list[Placement] = []
    for network, share in zip(SURROGATES, (0.5, 0.9), strict=True):
        answer = _throughput(problem.with_network(network), clock.request(share))
        candidates += [_greedy(answer), answer] if len(answer.device) else []
    bound = answer.lower_bound_ns  # of the last, under which nothing waits: no link makes a load or a latency less
    if request.replicas > 1:
        pool = [one for answer in candidates for one in answer.cycle] + whole_models(problem)
        candidates += filter(None, [best_cycle(problem, [one for one in pool if in_time(one)], request.replicas)])
    candidates = sorted(filter(in_time, candidates), key=lambda one: period_ns(problem, one.devices))
    if not candidates:
        status: Status = "infeasible" if answer.status == "infeasible" else "limit"
        return Placement(device=np.zeros(0, dtype=np.int64), status=status)
    value = period_ns(problem, candidates[0].devices)
    status = "optimal" if bound >= value else "feasible"
    return replace(candidates[0], lower_bound_ns=min(bound, value), status=status)


def _greedy(answer: Placement) -> Placement:
    """Return a placement, or a cycle of them, without its orders."""
    first, *others = (replace(one, order=None, transfer_order=None) for one in answer.cycle)
    return replace(first, replicas=tuple(others))


def _within(problem: PlacementProblem, request: Request) -> Placement:
    """Return the least latency under a limit on the period: by latency, by throughput, by the model of streams."""
    clock = _Clock(request)
    alone = _latency(problem, clock.request(0.3))
    stream = _throughput(problem, replace(clock.request(0.4), objective="throughput", max_period_ns=None))
    name = "milp" if problem.n_operators <= EXACT_OPERATORS else "diviml"
    turns = load_policy(name).place(problem, clock.request(0.9))
    answers = {"latency alone": alone, "throughput": stream, name: turns}
    found = [start_from(problem, answer, request, by) for by, answer in answers.items()]
    best = min((start for start in found if start is not None), key=lambda start: start.value_ns, default=None)
    missed = stream.lower_bound_ns > (request.max_period_ns or FAR)
    missed |= alone.lower_bound_ns > (request.max_latency_ns or FAR)
    if missed or "infeasible" in {answer.status for answer in answers.values()}:
        bound = FAR
    else:
        bound = max(alone.lower_bound_ns, turns.lower_bound_ns)
    return _answer(best, bound, [f"{name} {turns.status}"])


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
        elif network == "none":
            status = answer.status
    for name in CHEAP:
        if name in policy_names() and (not candidates or (clock.left(1.0) > 0 and not too_large(problem, name))):
            answer = load_policy(name).place(problem, clock.request(0.5))
            if len(answer.device) == problem.n_operators and fits(problem, answer.device):
                candidates.append(answer)
    longest = request.max_period_ns
    if longest is not None:
        candidates = [one for one in candidates if period_ns(problem, one.devices) <= longest]
    found: list[tuple[int, Placement]] = []
    for one in candidates:
        if found and problem.n_operators > SIMULATED_OPERATORS and not clock.left(1.0):
            break
        found.append((simulate(problem, one, engine="simpy").latency_ns, one))
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

    if too_wide(problem):
        return best, bound
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


def _search_chains(problem: PlacementProblem, request: Request, bound: int) -> Start | None:
    """Search with every chain as one operator: far fewer choices, and most good answers keep chains together."""
    coarse = contract(problem, chains(problem))
    if coarse.problem.n_operators > FEWER * problem.n_operators:
        return None
    clock = _Clock(request)
    starts = find_starts(coarse.problem, clock.request(0.3), CHEAP)
    if not starts:
        return None
    known = [starts[0].placement]
    answer = improve(coarse.problem, known, time_limit_s=clock.left(0.9), seed=request.seed, target_ns=bound)
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
