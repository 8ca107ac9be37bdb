"""GETF: generalised earliest task first, on devices grouped by speed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moirai_sim.policies.earliest_start import earliest_start_schedule
from moirai_sim.policies.groups import groups_of, no_room

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.placement import Placement
    from moirai_sim.policies.base import Request
    from moirai_sim.problem import PlacementProblem


class Getf:
    """A linear programme assigns operators to groups of devices of similar speed; earliest task first does the rest.

    Su, Ren, Vardi, Wierman, "Communication-Aware Scheduling of Precedence-Constrained Tasks on Related Machines", 2020.
    Speeds are divided by the largest, devices slower than 1/k are dropped, the rest are grouped by powers of gamma =
    log k / log log k. The programme (without communication, as in the paper) minimises T over x[i, group] under

    - sum_g x_ig = 1; C_i >= C_j + sum_g p_ig x_ig for every edge j -> i; C_i <= T,
    - sum_i w_i x_ig / speed of the group <= T: no group is overloaded;

    an operator is kept to the fastest group that, with all faster ones, holds half of its mass.

    Extensions to unrelated devices and memory: the speed of a device is the total of the fastest times of all operators
    divided by their total on this device (operators that it cannot run count as k times slower); p_ig is the mean time
    over the group's devices that can run i; a device whose group is dropped or whose memory is full is out of the
    choice, and if a whole group is full any device with memory will do; the largest group weight must fit the group's
    memory: sum_i bytes_i x_ig <= bytes of the group; the rest as `m-etf`.
    """

    name: ClassVar[str] = "getf"

    def place(self, problem: PlacementProblem, request: Request) -> Placement:
        """Return the placement and the order in which pairs were taken; ``limit`` if the programme takes too long."""
        group = speed_groups(device_speeds(problem))
        chosen = _assign(problem, group, request.time_limit_s)
        if chosen is None:
            return no_room("the linear programme of device groups has no answer, or none within the time limit")
        return earliest_start_schedule(problem, may_run=chosen[:, None] == group[None, :])


def device_speeds(problem: PlacementProblem) -> NDArray[np.float64]:
    """Return the speed of each device, [k]: the fastest total time of all operators divided by the device's own."""
    able = np.where(problem.operator_ns >= 0, problem.operator_ns, np.iinfo(np.int64).max)
    fastest = able.min(axis=1).astype(np.float64)
    own = np.where(problem.operator_ns >= 0, problem.operator_ns, problem.n_devices * fastest[:, None]).sum(axis=0)
    speed = np.where(own > 0, fastest.sum() / np.maximum(own, 1e-300), 1.0)
    return np.asarray(speed[problem.device_type])


def speed_groups(speed: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the group of each device, [k]: 0 is the fastest, -1 is dropped."""
    k = len(speed)
    relative = speed / speed.max() if speed.max() > 0 else np.ones(k)
    gamma = math.log(k) / math.log(math.log(k)) if k > 3 else 2.0  # log log k is not positive below e
    group: NDArray[np.int64] = np.floor(-np.log(np.maximum(relative, 1 / k)) / math.log(gamma) + 1e-9).astype(np.int64)
    group[relative < 1 / k] = -1
    kept = group >= 0
    group[kept] = np.unique(group[kept], return_inverse=True)[1]
    return group


def _assign(problem: PlacementProblem, group: NDArray[np.int64], time_limit_s: float) -> NDArray[np.int64] | None:
    """Return the group that each operator is kept to, [n]."""
    from scipy.optimize import linprog
    from scipy.sparse import coo_array

    n, m, count = problem.n_operators, len(problem.edges), int(group.max()) + 1
    member = np.stack([group == g for g in range(count)]).astype(np.float64)
    types = member @ np.eye(problem.operator_ns.shape[1])[problem.device_type]  # [count, t] devices by type
    can_run = groups_of(problem).can_run[groups_of(problem).of].astype(np.float64)
    able = can_run @ types.T
    time = np.where(able > 0, (np.maximum(problem.operator_ns, 0) * can_run) @ types.T / np.maximum(able, 1), 0.0)
    scale = max(1.0, float(time.max(initial=0)))
    time = time / scale
    # Columns: x [n, count], C [n], T.
    cells = np.arange(n * count)
    operator, of_group = cells // count, cells % count
    producer, consumer = problem.edges.reshape(-1, 2).T
    into = (consumer[:, None] * count + np.arange(count)).ravel()
    node, edge = np.arange(n), np.arange(m)
    completion, makespan = n * count + node, n * count + n
    size = member.sum(axis=1)
    rows = [
        np.repeat(edge, count), edge, edge,
        m + operator, m + node,
        m + n + node, m + n + node,
        m + 2 * n + of_group, m + 2 * n + np.arange(count),
    ]  # fmt: skip
    columns = [
        into, completion[producer], completion[consumer],
        cells, completion,
        completion, np.full(n, makespan),
        cells, np.full(count, makespan),
    ]  # fmt: skip
    values = [
        time.ravel()[into], np.ones(m), -np.ones(m),
        time.ravel(), -np.ones(n),
        np.ones(n), -np.ones(n),
        time.ravel(), -size,
    ]  # fmt: skip
    limits = [np.zeros(m + 2 * n + count)]
    capacity = np.array([problem.memory_bytes[group == g].astype(np.float64).sum() for g in range(count)])
    total = max(1.0, float(problem.weight_bytes.sum()))
    rows.append(m + 2 * n + count + of_group)
    columns.append(cells)
    values.append(problem.weight_bytes[operator] / total)
    limits.append(np.minimum(capacity / total, 1.0))
    shape = (m + 2 * n + 2 * count, n * count + n + 1)
    matrix = coo_array((np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape=shape)
    once = coo_array((np.ones(n * count), (operator, cells)), shape=(n, shape[1]))
    cost = np.zeros(shape[1])
    cost[-1] = 1
    bounds = np.zeros((shape[1], 2))
    bounds[:, 1] = np.inf
    bounds[: n * count, 1] = (able > 0).ravel()
    solved = linprog(
        cost,
        A_ub=matrix.tocsr(),
        b_ub=np.concatenate(limits),
        A_eq=once.tocsr(),
        b_eq=np.ones(n),
        bounds=bounds,
        method="highs-ds",
        options={"time_limit": time_limit_s},
    )
    if solved.x is None or solved.status != 0:
        return None
    mass = np.cumsum(np.round(solved.x[: n * count], 9).reshape(n, count), axis=1)
    return np.asarray(np.argmax(mass >= 0.5 - 1e-9, axis=1))
