"""Lower bounds of makespan and period, each proven: no placement of the problem can be faster.

Floating point solvers only *suggest* multipliers here; the bound is recomputed from the multipliers by weak duality
(Lagrange), so that a solver's tolerance cannot make it wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from moirai_sim.compiled import kernel
from moirai_sim.policies.loads import memory_binds
from moirai_sim.problem import UNLIMITED

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.policies.base import Objective, Request
    from moirai_sim.problem import PlacementProblem

FAR = 2**60
"""Stands for an impossible time; sums of a few still fit 64 bits."""
LP_OPERATORS = 3_000
"""Problems above this size get the bounds that need no linear programme of the whole graph."""
MANY_KINDS = 32
"""Above so many kinds of device every way over counts as the cheapest one: each pair for itself takes their square."""
LP_S = 20.0
"""Time that a linear programme gets where nobody says how much there is."""


_known: WeakKeyDictionary[PlacementProblem, dict[str, int]] = WeakKeyDictionary()
"""Bounds already computed: problems do not change, and several layers ask for the bound of the same one."""


def lower_bound_ns(
    problem: PlacementProblem, objective: Objective = "latency", *, replicas: int = 1, time_limit_s: float = LP_S
) -> int:
    """Return the best bound that is cheap for the size of the problem, ns.

    A linear programme that is not solved within ``time_limit_s`` gives way to equal weights of all devices.

    Several ``replicas`` lower the period, not the latency of a request: their loads are a convex combination, which is
    what the linear programme of `load_ns` allows; but no single operator must be a device's work any more.
    """
    if not problem.n_operators:
        return 0
    known = _known.setdefault(problem, {})
    what = "shared" if objective == "throughput" and replicas > 1 else objective
    if what not in known:
        if what == "shared":
            known[what] = _dual(problem, with_paths=False, time_limit_s=time_limit_s)
        else:
            known[what] = _best_bound_ns(problem, objective, time_limit_s)
    return known[what]


def bound_in_time_ns(problem: PlacementProblem, request: Request, objective: Objective | None = None) -> int:
    """Return `lower_bound_ns` for a request, of its objective if none is given, within half of its time, ns."""
    limit = min(LP_S, request.time_limit_s / 2)
    return lower_bound_ns(problem, objective or request.objective, replicas=request.replicas, time_limit_s=limit)


def _best_bound_ns(problem: PlacementProblem, objective: Objective, time_limit_s: float) -> int:
    bounds = [load_ns(problem, time_limit_s)]
    if objective == "latency":
        bounds.append(critical_path_ns(problem))
        if problem.n_operators <= LP_OPERATORS:
            bounds.append(path_and_load_ns(problem, time_limit_s))
    return max(bounds)


# --- critical path ---------------------------------------------------------------------------------------------------


def device_kinds(problem: PlacementProblem, most: int = 16) -> NDArray[np.int64]:
    """Return a kind for each device, [k]: the device itself while there are few, else its type."""
    if problem.n_devices <= most:
        return np.arange(problem.n_devices)
    return problem.device_type


def heads_and_tails(problem: PlacementProblem) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the earliest start of each operator on each kind of device, and the least time after its end, [n, s] ns.

    Every placement with i on a device of kind s has ``start_i >= head[i, s]`` and ``makespan >= end_i + tail[i, s]``:
    along each path every operator takes its own best device and pays its transfers, and no resource is ever busy.
    FAR where no device of a kind can run the operator or its predecessors.
    """
    kinds = device_kinds(problem)
    duration = _durations(problem, kinds)
    many = duration.shape[1] > MANY_KINDS
    longest, hop = (_longest_alike, _cheapest_hop(problem)) if many else (_longest, _hops(problem, kinds))
    indptr, edge_ids = problem.predecessors
    tensor = np.append(problem.edge_tensor, -1)
    order = np.array(problem.topological_order)
    head, tail = np.zeros_like(duration), np.zeros_like(duration)
    longest(order, indptr, edge_ids, _column(problem, 0), tensor, duration, hop, head)  # type: ignore[no-untyped-call]
    indptr, edge_ids = problem.successors
    back = hop if many else np.ascontiguousarray(hop.transpose(0, 2, 1))
    longest(order[::-1].copy(), indptr, edge_ids, _column(problem, 1), tensor, duration, back, tail)  # type: ignore[no-untyped-call]
    return head, tail


def critical_path_ns(problem: PlacementProblem) -> int:
    """Return the longest path with every operator on its best device, transfers included, ns."""
    head, tail = heads_and_tails(problem)
    through = np.minimum(head + _durations(problem, device_kinds(problem)) + tail, FAR)
    return int(through.min(axis=1).max())


def _durations(problem: PlacementProblem, kinds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the duration of each operator on each kind, [n, s] ns; FAR where it cannot run."""
    _, first = np.unique(kinds, return_index=True)
    duration = problem.operator_ns[:, problem.device_type[first]]
    return np.where(duration < 0, FAR, duration)


def _hops(problem: PlacementProblem, kinds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the least time of each tensor from a kind to a kind, [q + 1, s, s] ns; the last row, index -1, is 0.

    A kind of several devices reaches itself for nothing: producer and consumer may share a device.
    """
    names, index = np.unique(kinds, return_inverse=True)
    s, q = len(names), len(problem.tensor_bytes)
    hop = np.full((q + 1, s, s), FAR, dtype=np.int64)
    classes = problem.transfer_ns.shape[1]
    joined = np.zeros((s, s, classes + 1), dtype=np.bool_)  # -1, a device and itself, is the last one
    joined[index[:, None], index, problem.route_class] = True
    for source, target, route in np.argwhere(joined[:, :, :classes]).tolist():
        if source != target:
            hop[:q, source, target] = np.minimum(hop[:q, source, target], problem.transfer_ns[:, route])
    hop[:, np.arange(s), np.arange(s)] = 0
    hop[q] = 0
    return hop


def _cheapest_hop(problem: PlacementProblem) -> NDArray[np.int64]:
    """Return the least time of each tensor between any two devices, [q + 1] ns; the last one, index -1, is 0."""
    used = np.flatnonzero(np.bincount(problem.route_class.ravel() + 1)[1:])
    least = problem.transfer_ns[:, used].min(axis=1, initial=FAR)
    return np.append(least, 0)


def _column(problem: PlacementProblem, side: int) -> NDArray[np.int64]:
    return problem.edges[:, side].copy() if len(problem.edges) else np.zeros(0, dtype=np.int64)


@kernel
def _longest(order, indptr, edge_ids, other, tensor, duration, hop, reach):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Fill ``reach`` [n, s], which starts at 0, with the longest of the cheapest ways to each operator."""
    for j in order:
        for position in range(indptr[j], indptr[j + 1]):
            e = edge_ids[position]
            i = other[e]
            for target in range(duration.shape[1]):
                best = np.int64(2**60)
                for source in range(duration.shape[1]):
                    best = min(best, reach[i, source] + duration[i, source] + hop[tensor[e], source, target])
                reach[j, target] = max(reach[j, target], best)


@kernel
def _longest_alike(order, indptr, edge_ids, other, tensor, duration, hop, reach):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Do what `_longest` does where a tensor takes ``hop`` [q + 1] from any kind to any other."""
    for j in order:
        for position in range(indptr[j], indptr[j + 1]):
            e = edge_ids[position]
            i = other[e]
            over = min(np.min(reach[i] + duration[i]) + hop[tensor[e]], np.int64(2**60))
            for target in range(duration.shape[1]):
                reach[j, target] = max(reach[j, target], min(reach[i, target] + duration[i, target], over))


# --- loads -----------------------------------------------------------------------------------------------------------


def load_ns(problem: PlacementProblem, time_limit_s: float = LP_S) -> int:
    """Return a bound from work alone: some device is busy at least this long, memory respected, ns.

    The linear relaxation of R||Cmax by device type: ``min T`` with ``sum_i p[i, t] x[i, t] <= count[t] T``,
    ``sum_t x[i, t] = 1`` and, where memory binds, ``sum_i m[i] x[i, t] <= memory of the devices of type t``.
    """
    longest = int(np.where(problem.operator_ns < 0, FAR, problem.operator_ns).min(axis=1).max(initial=0))
    return max(longest, _dual(problem, with_paths=False, time_limit_s=time_limit_s))


def path_and_load_ns(problem: PlacementProblem, time_limit_s: float = LP_S) -> int:
    """Return the bound of critical path and loads in one linear programme, ns.

    As `load_ns`, with starts ``S_j >= S_i + sum_t p[i, t] x[i, t]`` on every edge and ``T >= S_i + sum_t p x``.
    """
    return _dual(problem, with_paths=True, time_limit_s=time_limit_s)


def _dual(problem: PlacementProblem, *, with_paths: bool, time_limit_s: float = LP_S) -> int:
    """Solve the linear programme, read multipliers off its dual, and evaluate them exactly enough to be proven."""
    from scipy.optimize import linprog
    from scipy.sparse import coo_array, csr_array

    n, t = problem.operator_ns.shape
    count = np.bincount(problem.device_type, minlength=t)
    usable = (problem.operator_ns >= 0) & (count > 0)
    cost = np.where(usable, problem.operator_ns, 0).astype(np.float64)
    scale = max(1.0, float(cost.max()))
    cost /= scale
    room = _room(problem)
    # columns: x[i, t] at i * t + type, then T, then starts S_i
    operator, kind = np.divmod(np.arange(n * t), t)
    width = n * t + 1 + (n if with_paths else 0)
    flat = cost.reshape(-1)
    rows, columns, values = [kind, np.arange(t)], [np.arange(n * t), np.full(t, n * t)], [flat, -count.astype(float)]
    height, right = t, [np.zeros(t)]
    limited = np.flatnonzero(np.isfinite(room)) if memory_binds(problem) else np.zeros(0, dtype=np.int64)
    unit = max(1.0, float(problem.weight_bytes.sum()))
    for position, which in enumerate(limited.tolist()):
        rows.append(np.full(n, height + position))
        columns.append(np.arange(n) * t + which)
        values.append(problem.weight_bytes / unit)
    right.append(room[limited] / unit)
    height += len(limited)
    if with_paths:
        edges = np.unique(problem.edges, axis=0) if len(problem.edges) else np.zeros((0, 2), dtype=np.int64)
        ends = np.concatenate([edges, np.column_stack([np.arange(n), np.full(n, -1)])])
        row = height + np.arange(len(ends))
        later = np.where(ends[:, 1] < 0, n * t, n * t + 1 + ends[:, 1])  # an operator's end bounds T
        rows += [row, row, np.repeat(row, t)]
        columns += [n * t + 1 + ends[:, 0], later, (ends[:, :1] * t + np.arange(t)).reshape(-1)]
        values += [np.ones(len(ends)), -np.ones(len(ends)), cost[ends[:, 0]].reshape(-1)]
        right.append(np.zeros(len(ends)))
        height += len(ends)
    matrix = coo_array(
        (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape=(height, width)
    ).tocsr()
    assign = csr_array((np.ones(n * t), (operator, np.arange(n * t))), shape=(n, width))
    goal = np.zeros(width)
    goal[n * t] = 1.0
    high = np.full(width, np.inf)
    high[: n * t] = np.where(usable.reshape(-1), 1.0, 0.0)
    answer = linprog(
        goal, A_ub=matrix, b_ub=np.concatenate(right), A_eq=assign, b_eq=np.ones(n),
        bounds=np.column_stack([np.zeros(width), high]), method="highs", options={"time_limit": time_limit_s},
    )  # fmt: skip
    if answer.status == 1:  # the limit: any multipliers are valid, and equal ones need no programme
        multipliers = np.append(np.ones(t), np.zeros(height - t))
    elif answer.status != 0:  # infeasible for want of memory, or the solver broke down: nothing is claimed
        return 0
    else:
        multipliers = np.maximum(-answer.ineqlin.marginals, 0.0)
    work = multipliers[:t]
    pressure = np.zeros(t)
    pressure[limited] = multipliers[t : t + len(limited)]
    flow = np.zeros(n)
    total = 0.0
    if with_paths:
        flow, total = _conserved(problem, edges, multipliers[t + len(limited) :], n)
    return _weak_duality(cost, usable, count, work, flow, total, pressure, problem, room, unit, scale)


def _conserved(
    problem: PlacementProblem, edges: NDArray[np.int64], dual: NDArray[np.float64], n: int
) -> tuple[NDArray[np.float64], float]:
    """Turn edge multipliers into a true flow through the operators: in = out at every operator, to the last bit used.

    The split of what reaches an operator over its out-edges follows the multipliers; what has no way on ends there.
    """
    out = np.zeros(n)
    np.add.at(out, edges[:, 0], dual[: len(edges)])
    final = dual[len(edges) :]
    leaving = out + final
    leaves = np.where(leaving > 0, leaving, 1.0)[edges[:, 0]]
    share = dual[: len(edges)] / leaves
    entering = np.zeros(n)
    np.add.at(entering, edges[:, 1], dual[: len(edges)])
    flow = np.maximum(leaving - entering, 0.0)  # what starts here
    total = float(flow.sum())
    indptr = np.zeros(n + 1, dtype=np.int64)
    np.cumsum(np.bincount(edges[:, 0], minlength=n), out=indptr[1:])
    for i in problem.topological_order.tolist():
        span = slice(indptr[i], indptr[i + 1])
        flow[edges[span, 1]] += flow[i] * share[span]
    return flow, total


def _weak_duality(
    cost: NDArray[np.float64], usable: NDArray[np.bool_], count: NDArray[np.int64], work: NDArray[np.float64],
    flow: NDArray[np.float64], total: float, pressure: NDArray[np.float64], problem: PlacementProblem,
    room: NDArray[np.float64], unit: float, scale: float,
) -> int:  # fmt: skip
    """Return ``sum_i min_t ((work[t] + flow[i]) p[i, t] + pressure[t] m[i]) - sum_t pressure[t] room[t]``, ns.

    T is at least each load over its devices and at least each path, hence at least any weighted mean of them; the
    weights are normalised here, so that any multipliers, good or bad, give a valid bound.
    """
    weight = float(work @ count) + total
    if weight <= 0:
        return 0
    each = (work[None, :] + flow[:, None]) * cost + pressure[None, :] * (problem.weight_bytes[:, None] / unit)
    least = np.where(usable, each, np.inf).min(axis=1).sum()
    held = float((pressure[pressure > 0] * room[pressure > 0] / unit).sum())
    value = (least - held) / weight * scale
    return max(0, int(np.ceil(value * (1 - 1e-9) - 1e-6)))


def _room(problem: PlacementProblem) -> NDArray[np.float64]:
    """Return the memory of all devices of each type, [t] bytes; infinite where one of them has no limit."""
    room = np.zeros(problem.operator_ns.shape[1])
    np.add.at(room, problem.device_type, problem.memory_bytes.astype(np.float64))
    unlimited = problem.device_type[problem.memory_bytes == UNLIMITED]
    room[unlimited] = np.inf
    return room
