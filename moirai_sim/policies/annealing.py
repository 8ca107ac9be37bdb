"""Simulated annealing over the compiled replay, with moves that follow the graph.

A move takes a connected cluster of operators that share a device, from one operator to a quarter of the model, to
another device; most moves start at an edge that crosses devices and shift the boundary there. Where the target lacks
memory, clusters go back in exchange, so every placement on the way fits. Compiled code draws from numba's own
generator, which each kernel seeds for itself.
"""
# ruff: noqa: NPY002

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moirai_sim.compiled import kernel
from moirai_sim.simulation.list_scheduling import NEVER, greedy, makespan

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.policies.groups import Groups
    from moirai_sim.simulation.list_scheduling import Arrays, Workspace

    Ints = NDArray[np.int64]


@kernel
def anneal(
    a: Arrays,
    w: Workspace,
    groups: Groups,
    member_ptr: Ints,
    member: Ints,
    in_ptr: Ints,
    in_arc: Ints,
    memory: Ints,
    ranked: bool,
    turn: Ints,
    device: Ints,
    best_device: Ints,
    seed: int,
    steps: int,
    hot: float,
    cold: float,
) -> int:
    """Improve ``device`` [n] for a number of steps; return the least makespan seen, that of ``best_device``.

    Parameters
    ----------
    groups, member_ptr, member
        What moves as one, and the members of each group (CSR).
    in_ptr, in_arc
        CSR: the arcs (positions in ``a.edges``) into each operator.
    memory
        [k] bytes.
    ranked, turn
        Whether the upward rank decides who goes first, or ``turn`` [n], lowest first.
    hot, cold
        Temperatures at the first and last step, as shares of the makespan at the start; they fall geometrically.
    """
    np.random.seed(seed)
    n, k, m, n_groups = len(device), len(memory), len(a.edges), len(groups.weight)
    used = np.zeros(k, np.int64)
    for i in range(n):
        if member[member_ptr[groups.of[i]]] == i:
            used[device[i]] += groups.weight[groups.of[i]]
    stamp = np.full(n_groups, -1)
    cluster, moved, origin = np.empty(n_groups, np.int64), np.empty(n_groups, np.int64), np.empty(n_groups, np.int64)
    current = makespan(a, w, device, NEVER) if ranked else greedy(a, w, device, turn)
    best = current
    best_device[:] = device
    if k < 2 or n == 0:
        return best
    largest = max(1.0, n_groups / 4)
    scale = float(max(current, 1))
    for step in range(steps):
        temperature = scale * hot * (cold / hot) ** (step / steps)
        start: np.int64 = np.int64(np.random.randint(n))
        target = np.int64(np.random.randint(k))
        if m > 0 and np.random.random() < 0.6:  # a boundary: one end of a crossing edge joins the other
            for _ in range(30):
                arc = np.random.randint(m)
                producer, consumer = np.int64(a.edges[arc].producer), np.int64(a.edges[arc].consumer)
                if device[producer] != device[consumer]:
                    start, target = producer, np.int64(device[consumer])
                    if np.random.random() < 0.5:
                        start, target = consumer, np.int64(device[producer])
                    break
        home = device[start]
        if home == target:
            continue
        wanted = 1
        if np.random.random() < 0.7:
            wanted = int(np.exp(np.random.random() * np.log(largest + 1)))
        n_moved, overflow = 0, True
        for exchange in range(12):
            if exchange > 0:  # something of the crowded device goes where the cluster came from
                start = np.int64(-1)
                for _ in range(40):
                    other = np.int64(np.random.randint(n))
                    if (
                        device[other] == target
                        and stamp[groups.of[other]] != step
                        and groups.weight[groups.of[other]] > 0
                    ):
                        start = other
                        break
                if start < 0:
                    break
                wanted = 1 + np.random.randint(max(1, min(wanted, 8)))
            source, sink = (home, target) if exchange == 0 else (target, home)
            cluster[0] = groups.of[start]
            stamp[cluster[0]] = step
            size, tries = 1, 0
            while size < wanted and tries < 4 * wanted + 8:
                tries += 1
                g = cluster[np.random.randint(size)] if np.random.random() < 0.5 else cluster[size - 1]
                i = member[member_ptr[g] + np.random.randint(member_ptr[g + 1] - member_ptr[g])]
                out = np.int64(w.operators[i].out)
                n_out, n_in = np.int64(w.operators[i].out_end) - out, in_ptr[i + 1] - in_ptr[i]
                if n_out + n_in == 0:
                    continue
                pick = np.random.randint(n_out + n_in)
                j = (
                    np.int64(a.edges[out + pick].consumer)
                    if pick < n_out
                    else np.int64(a.edges[in_arc[in_ptr[i] + pick - n_out]].producer)
                )
                if device[j] == source and stamp[groups.of[j]] != step:
                    stamp[groups.of[j]] = step
                    cluster[size] = groups.of[j]
                    size += 1
            for position in range(size):
                g = cluster[position]
                if not groups.can_run[g, a.device_type[sink]]:
                    continue
                moved[n_moved], origin[n_moved] = g, source
                n_moved += 1
                used[source] -= groups.weight[g]
                used[sink] += groups.weight[g]
                for p in range(member_ptr[g], member_ptr[g + 1]):
                    device[member[p]] = sink
            overflow = used[target] > memory[target] or used[home] > memory[home]
            if used[target] <= memory[target]:
                break
        if n_moved == 0:
            continue
        value = current + 1
        accepted = False
        if not overflow:
            limit = int(current - temperature * np.log(1.0 - np.random.random()))
            value = makespan(a, w, device, limit) if ranked else greedy(a, w, device, turn)
            accepted = bool(value <= limit)
        if accepted:
            current = value
            if value < best:
                best = value
                best_device[:] = device
        else:
            for position in range(n_moved - 1, -1, -1):
                g = moved[position]
                where = device[member[member_ptr[g]]]
                used[where] -= groups.weight[g]
                used[origin[position]] += groups.weight[g]
                for p in range(member_ptr[g], member_ptr[g + 1]):
                    device[member[p]] = origin[position]
    return best


@kernel
def anneal_order(
    a: Arrays, w: Workspace, device: Ints, turn: Ints, best_turn: Ints, seed: int, steps: int, hot: float, cold: float
) -> int:
    """Improve who goes first on fixed devices, [n] lowest first; return the least makespan, of ``best_turn``.

    A move lets one operator go just before or after another, or shifts it by a random share of the makespan.
    """
    np.random.seed(seed)
    n = len(turn)
    current = greedy(a, w, device, turn)
    best = current
    best_turn[:] = turn
    scale = float(max(current, 1))
    for step in range(steps):
        temperature = scale * hot * (cold / hot) ** (step / steps)
        i, j = np.random.randint(n), np.random.randint(n)
        kept = turn[i]
        if device[i] == device[j] and i != j:
            turn[i] = turn[j] + (1 if np.random.random() < 0.5 else -1)
        else:
            turn[i] += int(scale * 0.2 * (np.random.random() - 0.5))
        value = greedy(a, w, device, turn)
        if value <= current - temperature * np.log(1.0 - np.random.random()):
            current = value
            if value < best:
                best = value
                best_turn[:] = turn
        else:
            turn[i] = kept
    return best
