"""Policy ``milp``: Moirai's mixed-integer programme for latency, solved by HiGHS through cvxpy."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from scipy.sparse import vstack

from moirai_sim.errors import InputError
from moirai_sim.placement import Placement, transfer_edges
from moirai_sim.policies.bounds import bound_in_time_ns
from moirai_sim.policies.loads import fits, period_ns
from moirai_sim.policies.milp_model import MilpModel
from moirai_sim.policies.run import require_latency
from moirai_sim.policies.starts import improved_start, too_wide
from moirai_sim.simulation.replay import replay
from moirai_sim.simulation.schedule import Schedule, placement_from_schedule

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.placement import Status
    from moirai_sim.policies.base import Request
    from moirai_sim.policies.starts import Start
    from moirai_sim.policies.stream_model import StreamModel
    from moirai_sim.problem import PlacementProblem

FAILED = ("solver_error", "unbounded", "unknown")
"""Statuses of a solver that broke down: its answer and its bound are worth nothing."""
TOO_WIDE = "too large to build an exact model within the time limit; search and auto answer for as many"
MOST_ORDERED = 500
"""Operators above which no model is built that orders each two of them."""
TOO_MANY = f"no exact model is built of more than {MOST_ORDERED} operators: this is the best of the quick heuristics"
TOLERANCE = 1e-9
"""Feasibility tolerance asked of the solver; times are scaled to at most 10^4."""


@dataclass(frozen=True)
class MilpAnswer:
    """What the solver says of a `MilpModel`."""

    status: str
    """cvxpy's: ``optimal``, ``infeasible``, ``user_limit``, ..., and those of `FAILED`."""
    columns: NDArray[np.float64] | None
    bound: float
    """Proven lower bound of T, in units of the model; 0 where there is none."""
    nodes: int


class Milp:
    """Exact placement and order for latency (Moirai, arXiv 2312.04025, by its released script).

    Extensions: half-duplex ports, tensors shared by several consumers, co-location, operators that some devices cannot
    run; windows and horizon from the best of the quick heuristics, which is also the solver's first solution. The order
    that the solver finds is what counts: its times are made again by the replay, in whole nanoseconds. Under a
    limit on the period the model is that of a stream (`stream`), of up to ``replicas`` placements that take turns.
    """

    name: ClassVar[str] = "milp"

    def place(self, problem: PlacementProblem, request: Request) -> Placement:
        """Return an optimum, or the best answer within the time limit with the solver's bound."""
        require_latency(request, self.name)
        if problem.network == "fair":
            raise InputError(f"{self.name}: transfers under 'fair' are not linear; use --network one-port, or auto")
        if request.max_period_ns is not None:
            from moirai_sim.policies.stream import stream

            return stream(problem, request)
        started = time.perf_counter()
        start = improved_start(problem, request)
        known_bound = bound_in_time_ns(problem, request)
        reason = TOO_MANY if problem.n_operators > MOST_ORDERED else TOO_WIDE if too_wide(problem) else None
        if reason is not None:
            return answer_of(start, known_bound, {"solver": None, "reason": reason})
        model = MilpModel(problem, start.value_ns if start else longest_ns(problem))
        model.lower[model.at["T"]] = min(known_bound / model.unit_ns, model.horizon)
        built = time.perf_counter() - started
        first = columns_of(model, start.placement) if start else None
        answer = solve(model, request, first, max(0.1, request.time_limit_s - built))
        facts: dict[str, object] = {
            "solver": "HiGHS", "columns": model.n_columns, "binaries": model.n_binary,
            "rows": sum(len(rows.right) for rows in model.families.values()), "nodes": answer.nodes,
            "start": start.policy if start else None, "solver_status": answer.status,
        }  # fmt: skip
        if answer.status.startswith("infeasible") and start is None:
            return Placement(device=np.zeros(0, dtype=np.int64), status="infeasible", provenance=facts)
        placement = start.placement if start else None
        value = start.value_ns if start else np.iinfo(np.int64).max
        if answer.columns is not None:
            found = read_placement(model, answer.columns)
            if fits(problem, found.device) and (makespan := replay(problem, found).makespan_ns) <= value:
                placement, value = found, makespan
        if placement is None:
            status: Status = "error" if answer.status in FAILED else "limit"
            return Placement(device=np.zeros(0, dtype=np.int64), status=status, provenance=facts)
        bound = max(min(proven_ns(model, answer.bound), value), known_bound)
        return Placement(
            device=placement.device,
            order=placement.order,
            transfer_order=placement.transfer_order,
            status="optimal" if bound >= value else "feasible",
            lower_bound_ns=bound,
            provenance=facts,
        )


def answer_of(start: Start | None, bound: int, facts: dict[str, object]) -> Placement:
    """Return a known answer where no model is built; ``limit`` where there is none."""
    if start is None:
        return Placement(device=np.zeros(0, dtype=np.int64), status="limit", provenance=facts)
    status: Status = "optimal" if bound >= start.value_ns else "feasible"
    facts = {**facts, "start": start.policy}
    return replace(start.placement, status=status, lower_bound_ns=min(bound, start.value_ns), provenance=facts)


def longest_ns(problem: PlacementProblem) -> int:
    """Return a time by which some optimum surely ends: everything one after another, each at its slowest, ns."""
    sends = (
        np.unique(np.column_stack([problem.edge_tensor, problem.edges[:, 1]]), axis=0)[:, 0]
        if len(problem.edges)
        else np.zeros(0, dtype=np.int64)
    )
    slowest = problem.transfer_ns.max(axis=1, initial=0)
    return int(problem.operator_ns.max(axis=1).sum() + slowest[sends[sends >= 0]].sum())


def proven_ns(model: MilpModel | StreamModel, bound: float) -> int:
    """Return the solver's bound in ns, less its tolerance, rounded up to the next possible makespan."""
    steps = (bound - _margin(model)) * model.unit_ns / model.step_ns
    return max(0, ceil(steps)) * model.step_ns


def _margin(model: MilpModel | StreamModel) -> float:
    """Return how far the solver's bound may be off, in units of the model."""
    return 1e-6 * max(1.0, model.horizon)


def canonical(model: MilpModel | StreamModel) -> tuple[dict[str, Any], Any]:
    """Return the model as cvxpy hands it to HiGHS: its data, and the chain of reductions that ends in the solver.

    Two large constraints over one variable, and SciPy's backend, take cvxpy half the time of a constraint a family.
    """
    import cvxpy

    columns = cvxpy.Variable(model.n_columns, boolean=(np.arange(model.n_binary),), bounds=[model.lower, model.upper])
    constraints = []
    for equal in (False, True):
        families = [rows for rows in model.families.values() if rows.equal == equal]
        if families:
            left = vstack([rows.matrix for rows in families], format="csr") @ columns
            right = np.concatenate([rows.right for rows in families])
            constraints.append(left == right if equal else left <= right)
    problem = cvxpy.Problem(cvxpy.Minimize(columns[model.n_columns - 1]), constraints)
    data, chain, _ = problem.get_problem_data(cvxpy.HIGHS, canon_backend=cvxpy.SCIPY_CANON_BACKEND)
    return data, chain


def solve(
    model: MilpModel | StreamModel, request: Request, known: NDArray[np.float64] | None, time_limit_s: float
) -> MilpAnswer:
    """Solve a model with HiGHS through cvxpy, from the columns of a known answer if there is one."""
    import highspy

    started = time.perf_counter()
    data, chain = canonical(model)
    cache: dict[str, Any] = {}
    if known is not None:
        first = highspy.HighsSolution()
        first.col_value = known.tolist()
        cache["HIGHS"] = (None, None, {"model_status": "kOptimal", "solution": first})  # as after an earlier solve
    time_limit_s = max(0.1, time_limit_s - (time.perf_counter() - started))
    # A bound less than a step below the answer is proof enough: `proven_ns` rounds it up.
    close = max(1e-9, model.step_ns / model.unit_ns - 2 * _margin(model))
    options = {
        "time_limit": time_limit_s, "threads": request.workers, "random_seed": request.seed % 2**31, "mip_rel_gap": 0.0,
        "mip_abs_gap": close, "mip_feasibility_tolerance": TOLERANCE, "primal_feasibility_tolerance": TOLERANCE,
    }  # fmt: skip
    highspy.Highs.resetGlobalScheduler(True)  # else it keeps the first solve's threads, and refuses any other number
    result = chain.solver.solve_via_data(data, known is not None, False, options, cache)
    info, solution = result["info"], result["solution"]
    status = chain.solver.STATUS_MAP.get(result["model_status"], "unknown")
    found = np.array(solution.col_value) if solution.value_valid and status not in FAILED else None
    bound = 0.0 if status in FAILED else float(info.mip_dual_bound)
    return MilpAnswer(
        status=status,
        columns=found if found is not None and len(found) == model.n_columns else None,
        bound=bound if np.isfinite(bound) else 0.0,
        nodes=int(info.mip_node_count),
    )


def columns_of(model: MilpModel, placement: Placement) -> NDArray[np.float64]:
    """Return the columns that describe a known answer: the solver's first solution.

    For throughput times are left at their lower bounds, for no row reads them, and the goal is the period.
    """
    p = model.problem
    schedule = replay(p, placement)
    n, k = p.n_operators, p.n_devices
    values = np.zeros(model.n_columns)
    values[np.arange(n) * k + placement.device] = 1.0
    start, end = schedule.operator_start_ns / model.unit_ns, schedule.operator_end_ns / model.unit_ns
    values[model.at["S"] + np.arange(n)], values[model.at["C"] + np.arange(n)] = start, end
    values[model.at["T"]] = schedule.makespan_ns / model.unit_ns
    leg_start, leg_end = end[model.leg_producer].copy(), end[model.leg_producer].copy()
    leader = transfer_edges(p, placement.device)
    for leg, edges in enumerate(model.leg_edges):
        crossing = [e for e in edges if leader[e] >= 0]
        if model.leg_target[leg] >= 0:
            crossing = [e for e in crossing if placement.device[p.edges[e, 1]] == model.leg_target[leg]]
        if crossing:
            edge = leader[crossing[0]]
            leg_start[leg] = schedule.transfer_start_ns[edge] / model.unit_ns
            leg_end[leg] = schedule.transfer_end_ns[edge] / model.unit_ns
            source, target = placement.device[p.edges[edge]]
            values[model.at["u"] + _route(model, leg, source, target)] = 1.0
    legs = np.arange(len(model.leg_edges))
    values[model.at["s"] + legs], values[model.at["c"] + legs] = leg_start, leg_end
    position = model.at["d"]
    for pairs, starts, ends in (
        (model.operator_pairs, start, end),
        (model.leg_pairs, leg_start, leg_end),
    ):
        a, b = pairs.T
        values[position + 2 * np.arange(len(a))] = ends[a] <= starts[b]
        values[position + 2 * np.arange(len(a)) + 1] = ends[b] <= starts[a]
        position += 2 * len(a)
    if model.objective == "throughput":
        timed = slice(model.at["S"], model.at["T"])
        values[timed] = model.lower[timed]
        values[model.at["T"]] = period_ns(p, placement.device) / model.unit_ns
    return values


def _route(model: MilpModel, leg: int, source: int, target: int) -> int:
    same = (model.route_leg == leg) & (model.route_source == source) & (model.route_target == target)
    return int(np.flatnonzero(same)[0])


def read_placement(model: MilpModel, columns: NDArray[np.float64]) -> Placement:
    """Return devices and orders of a solution; times are left to the replay."""
    p = model.problem
    n, k = p.n_operators, p.n_devices
    device = columns[: n * k].reshape(n, k).argmax(axis=1).astype(np.int64)
    leader = transfer_edges(p, device)
    carrying = np.full(len(p.edges), -1, dtype=np.int64)
    for leg, edges in enumerate(model.leg_edges):
        for e in edges:
            if leader[e] >= 0 and model.leg_target[leg] in (-1, device[p.edges[e, 1]]):
                carrying[leader[e]] = leg
    led = np.flatnonzero(carrying >= 0)
    times = {
        name: np.round(columns[model.at[name] + np.arange(size)] * 1e4).astype(np.int64)
        for name, size in (("S", n), ("C", n), ("s", len(model.leg_edges)), ("c", len(model.leg_edges)))
    }
    transfer_start, transfer_end = np.full(len(p.edges), -1), np.full(len(p.edges), -1)
    transfer_start[led], transfer_end[led] = times["s"][carrying[led]], times["c"][carrying[led]]
    rough = Schedule(
        operator_ready_ns=times["S"], operator_start_ns=times["S"], operator_end_ns=times["C"],
        transfer_ready_ns=transfer_start, transfer_start_ns=transfer_start, transfer_end_ns=transfer_end,
    )  # fmt: skip
    return placement_from_schedule(p, Placement(device=device), rough)
