"""Simulated annealing of the period of a pipeline: the largest load of a device or port, kept up to date move by move.

A move takes a connected cluster of operators to another device, or swaps two. Loads are sums, so it costs the
operators that move and their tensors, not the whole problem.
"""
# ruff: noqa: NPY002

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moirai_sim.compiled import kernel
from moirai_sim.placement import Placement
from moirai_sim.policies.groups import csr, groups_of
from moirai_sim.policies.loads import period_ns, resource_loads_ns

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.policies.groups import Groups
    from moirai_sim.problem import PlacementProblem

    Ints = NDArray[np.int64]

STEPS = 100_000
"""Moves of a round."""
MOST_ENTRIES = 300_000_000
"""Entries of a table of tensors by devices, eight bytes each, above which nothing is tried."""
HOT, COLD = 0.05, 1e-4
"""First and last temperature of a round, as shares of the period."""


class Pipeline(NamedTuple):
    """A problem as the kernels read it."""

    groups: Groups
    member_ptr: Ints
    member: Ints
    device_type: Ints
    """[k]"""
    operator_ns: Ints
    """[n, t]"""
    transfer_ns: Ints
    """[tensors, route classes]"""
    route_class: Ints
    """[k, k]"""
    producer: Ints
    """[tensors]"""
    edges: Ints
    """[m, 2]"""
    edge_tensor: Ints
    """[m], -1 where nothing is sent"""
    out_ptr: Ints
    out: Ints
    in_ptr: Ints
    into: Ints
    """CSR: the edges out of and into each operator."""
    ports: int
    """Ports of a device that count: none, one for both ways, or two."""


def improve_period(
    problem: PlacementProblem,
    start: Placement,
    *,
    time_limit_s: float | None = None,
    rounds: int | None = None,
    seed: int = 0,
    target_ns: int = 0,
) -> Placement:
    """Return a placement whose period is at most that of ``start``, without orders.

    Rounds, 10 where neither limit is given, start again from the best so far. Without a time limit, equal ``rounds``
    and ``seed`` give equal answers.

    Parameters
    ----------
    problem
        One whose table of tensors by devices would take gigabytes is left as it is.
    start
        Respects supported devices, memory and co-location; so do all on the way. Turns of several are left out.
    target_ns
        Stop as soon as this is reached.
    """
    clock = time.perf_counter
    deadline = None if time_limit_s is None else clock() + time_limit_s
    p = pipeline_of(problem)
    best = start.device.astype(np.int64)
    value, pace, done = period_ns(problem, best), 0.0, 0
    rounds = 10 if rounds is None and time_limit_s is None else rounds
    small = len(problem.transfer_ns) * problem.n_devices <= MOST_ENTRIES
    while small and (rounds is None or done < rounds) and value > target_ns and problem.n_devices > 1 and len(best):
        steps = STEPS if done else STEPS // 100  # a short look first, which also measures the pace
        if deadline is not None:
            left = deadline - clock()
            steps = min(steps, int(left / pace)) if pace else steps
            if left <= 0 or steps < 1:
                break
        began = clock()
        device, found = best.copy(), best.copy()
        loads = resource_loads_ns(problem, device)
        anneal_period(
            p, problem.memory_bytes.copy(), device, found, loads, (seed * 1_000_003 + done) % 2**32, steps, HOT, COLD
        )
        pace = (clock() - began) / steps
        after = period_ns(problem, found)
        if after < value:
            best, value = found, after
        done += 1
    return Placement(device=best, provenance={"rounds": done, "steps_a_round": STEPS, "seed": seed})


def pipeline_of(problem: PlacementProblem) -> Pipeline:
    """Return what the kernels need of a problem."""
    groups, n = groups_of(problem), problem.n_operators
    edges, tensor = problem.edges.astype(np.int64).reshape(-1, 2), problem.edge_tensor.astype(np.int64)
    producer = np.zeros(len(problem.transfer_ns), dtype=np.int64)
    producer[tensor[tensor >= 0]] = edges[tensor >= 0, 0]
    return Pipeline(
        groups, *csr(groups.of, len(groups.weight)), problem.device_type.astype(np.int64),
        np.ascontiguousarray(problem.operator_ns, dtype=np.int64),
        np.ascontiguousarray(problem.transfer_ns, dtype=np.int64),
        np.ascontiguousarray(problem.route_class, dtype=np.int64), producer, np.ascontiguousarray(edges), tensor.copy(),
        *csr(edges[:, 0], n), *csr(edges[:, 1], n), {"one-port": 2, "half-duplex": 1}.get(problem.network, 0),
    )  # fmt: skip


@kernel
def anneal_period(
    p: Pipeline,
    memory: Ints,
    device: Ints,
    best_device: Ints,
    loads: Ints,
    seed: int,
    steps: int,
    hot: float,
    cold: float,
) -> np.int64:
    """Improve ``device`` [n] for a number of steps; return the least period seen, that of ``best_device``.

    Parameters
    ----------
    memory
        [k] bytes.
    loads
        Of each device, then of its ports, as `resource_loads_ns` gives them for ``device``; kept up to date.
    hot, cold
        Temperatures at the first and last step, as shares of the period at the start; they fall geometrically.
    """
    np.random.seed(seed)
    n, k, m, n_groups = len(device), len(memory), len(p.edges), len(p.groups.weight)
    readers = np.zeros((len(p.producer), k), np.int64)
    for e in range(m):
        if p.edge_tensor[e] >= 0:
            readers[p.edge_tensor[e], device[p.edges[e, 1]]] += 1
    used = np.zeros(k, np.int64)
    for g in range(n_groups):
        used[device[p.member[p.member_ptr[g]]]] += p.groups.weight[g]
    best: np.int64 = np.max(loads)
    best_device[:] = device
    scale = max(1.0, float(best))
    current = _energy(loads, scale)
    stamp = np.full(n_groups, -1)
    moved, origin = np.empty(n_groups, np.int64), np.empty(n_groups, np.int64)
    largest = max(1.0, n_groups / 4)
    for step in range(steps):
        temperature = hot * (cold / hot) ** (step / steps)
        start, target = np.random.randint(n), np.int64(np.random.randint(k))
        if m > 0 and np.random.random() < 0.6:  # a boundary: one end of a crossing edge joins the other
            for _ in range(30):
                e = np.random.randint(m)
                a, b = p.edges[e, 0], p.edges[e, 1]
                if device[a] != device[b]:
                    start, target = (a, device[b]) if np.random.random() < 0.5 else (b, device[a])
                    break
        home = device[start]
        if home == target:
            continue
        wanted = 1
        if np.random.random() < 0.5:
            wanted = int(np.exp(np.random.random() * np.log(largest + 1)))
        count = 0
        for way in range(2):  # the cluster, and perhaps one in exchange
            source, sink = (home, target) if way == 0 else (target, home)
            if way == 1:
                if used[target] <= memory[target] and np.random.random() < 0.6:
                    break
                start = -1
                for _ in range(40):
                    other = np.random.randint(n)
                    if device[other] == target and stamp[p.groups.of[other]] != step:
                        start = other
                        break
                if start < 0:
                    break
                wanted = 1 + np.random.randint(2 * wanted)
            first = count
            moved[count], origin[count] = p.groups.of[start], source
            stamp[moved[count]] = step
            count += 1
            tries = 0
            while count - first < wanted and tries < 3 * wanted:
                tries += 1
                g = moved[first + np.random.randint(count - first)]
                i = p.member[p.member_ptr[g] + np.random.randint(p.member_ptr[g + 1] - p.member_ptr[g])]
                n_out, n_in = p.out_ptr[i + 1] - p.out_ptr[i], p.in_ptr[i + 1] - p.in_ptr[i]
                if n_out + n_in == 0:
                    continue
                pick = np.random.randint(n_out + n_in)
                if pick < n_out:
                    j = p.edges[p.out[p.out_ptr[i] + pick], 1]
                else:
                    j = p.edges[p.into[p.in_ptr[i] + pick - n_out], 0]
                g = p.groups.of[j]
                if device[j] == source and stamp[g] != step and p.groups.can_run[g, p.device_type[sink]]:
                    stamp[g] = step
                    moved[count], origin[count] = g, source
                    count += 1
            if not p.groups.can_run[moved[first], p.device_type[sink]]:
                moved[first] = moved[count - 1]
                count -= 1
            for position in range(first, count):
                _move(p, moved[position], sink, device, readers, loads, used)
        if count == 0:
            continue
        value, fit = current, used[home] <= memory[home] and used[target] <= memory[target]
        if fit:
            value = _energy(loads, scale)
        if fit and value <= current - temperature * np.log(1.0 - np.random.random()):
            current = value
            period = np.max(loads)
            if period < best:
                best = period
                best_device[:] = device
        else:
            for position in range(count - 1, -1, -1):
                _move(p, moved[position], origin[position], device, readers, loads, used)
    return best


@kernel
def _move(p: Pipeline, g: np.int64, target: np.int64, device: Ints, readers: Ints, loads: Ints, used: Ints) -> None:
    """Put a group on a device; loads, readers [tensors, k] and memory in use [k] follow."""
    home = device[p.member[p.member_ptr[g]]]
    used[home] -= p.groups.weight[g]
    used[target] += p.groups.weight[g]
    for position in range(p.member_ptr[g], p.member_ptr[g + 1]):
        i = p.member[position]
        loads[home] -= p.operator_ns[i, p.device_type[home]]
        loads[target] += p.operator_ns[i, p.device_type[target]]
        for q in range(p.in_ptr[i], p.in_ptr[i + 1]):
            t = p.edge_tensor[p.into[q]]
            if t >= 0:
                source = device[p.producer[t]]
                readers[t, home] -= 1
                if readers[t, home] == 0:
                    _send(p, t, source, home, -1, loads)
                if readers[t, target] == 0:
                    _send(p, t, source, target, 1, loads)
                readers[t, target] += 1
        device[i] = target
        last = -1
        for q in range(p.out_ptr[i], p.out_ptr[i + 1]):
            t = p.edge_tensor[p.out[q]]
            if t < 0 or t == last:
                continue
            seen = False
            for before in range(p.out_ptr[i], q):
                seen = seen or p.edge_tensor[p.out[before]] == t
            last = t
            if not seen:
                for sink in np.arange(readers.shape[1]):
                    if readers[t, sink] > 0:
                        _send(p, t, home, sink, -1, loads)
                        _send(p, t, target, sink, 1, loads)


@kernel
def _send(p: Pipeline, tensor: np.int64, source: np.int64, sink: np.int64, sign: int, loads: Ints) -> None:
    """Add a transfer to the loads of both ports, or take it away."""
    if p.ports == 0 or source == sink:
        return
    length = sign * p.transfer_ns[tensor, p.route_class[source, sink]]
    k = len(p.device_type)
    loads[k + source] += length
    loads[p.ports * k + sink] += length


@kernel
def _energy(loads: Ints, scale: float) -> float:
    """Return a smooth stand-in for the largest load, so that a move beside it counts too: the norm of order 16."""
    total = 0.0
    for load in loads:
        share = load / scale
        share *= share
        share *= share
        share *= share
        total += share * share
    return float(total ** (1 / 16))
