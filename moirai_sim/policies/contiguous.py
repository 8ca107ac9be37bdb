"""Latency of dnn-partitioning instances by their own published rules, and good placements under these rules.

Tarnawski et al., "Efficient Algorithms for Device Placement of DNN Graph Operators" (NeurIPS 2020), latency objective.
The rules are those of the released code (github.com/msr-fiddle/dnn-partitioning: the evaluator of
``latency-greedy/greedy.cpp`` and the programme of ``latency-ip/lip.py`` with one piece an accelerator), read there:

- An accelerator runs one *piece*, the operators placed on it, as one call. The pieces and the single CPU operators wait
  for each other without a cycle, which is what contiguity comes to.
- A piece starts when every operator outside that it reads from has ended, and an operator in a piece ends with the
  piece. Its length is the sum of what it reads (each outside producer's cost, once, also from a CPU), its operators'
  times, and what it writes (the cost of each operator that anything outside reads, once, also for a CPU). Nothing of
  this overlaps. Transfers go through host memory, which serves any number of them at a time.
- A CPU operator starts when its producers have ended, and pays nothing for data. CPUs are without limit in number
  (``maxCPUs`` is not used) and in memory.
- The sizes on an accelerator stay within its memory (the evaluator only warns; the programme and this module insist).
  Unsupported operators run on CPUs; operators of one colour share an accelerator, or are all on CPUs.
- Several pieces an accelerator, one after another (``MAX_SUBGRAPHS_PER_FPGA`` above 1), are an option there, not here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moirai_sim.policies.bounds import critical_path_ns
from moirai_sim.policies.reductions import contract_colocated

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.instances.dnn_partitioning import DnnPartitioningInstance
    from moirai_sim.problem import PlacementProblem

CPU = -1
"""Piece number of operators that run on CPUs."""


def latency_ns(instance: DnnPartitioningInstance, piece: NDArray[np.int64]) -> int | None:
    """Return the latency of a placement by the published rules, ns; None where it breaks one.

    Parameters
    ----------
    instance
        Costs as published.
    piece
        [n] accelerator of each operator, or `CPU`.
    """
    n = len(instance.operators)
    if not _allowed(instance, piece):
        return None
    node = np.where(piece == CPU, instance.accelerators + np.arange(n), piece)  # a piece runs as one
    producer, consumer = instance.edges[:, 0], instance.edges[:, 1]
    crosses = node[producer] != node[consumer]
    read = np.unique(np.column_stack([producer, node[consumer]])[crosses], axis=0)
    written = np.unique(producer[crosses])
    length = np.zeros(instance.accelerators + n, dtype=np.int64)
    on_cpu = piece == CPU
    np.add.at(length, node, np.where(on_cpu, instance.cpu_ns, instance.accelerator_ns))
    into = read[read[:, 1] < instance.accelerators]
    np.add.at(length, into[:, 1], instance.producer_cost_ns[into[:, 0]])
    out = written[piece[written] != CPU]
    np.add.at(length, piece[out], instance.producer_cost_ns[out])
    arcs = np.unique(np.column_stack([node[producer], node[consumer]])[crosses], axis=0)
    return _longest_path(length, arcs)


def split(instance: DnnPartitioningInstance, *, orders: int = 50, seed: int = 0) -> tuple[NDArray[np.int64], int]:
    """Return a placement [n] and its latency, ns: the best contiguous split of several orders.

    The orders are level by level, then depth first with ties at random, co-location classes merged. For each, a dynamic
    programme finds the pieces, intervals of the order, and the operators between them on CPUs, that minimise the sum of
    their times. The latency by the rules is at most that sum, because pieces may overlap.
    """
    problem = instance.problem()
    merged = contract_colocated(problem)
    coarse, label = (problem, np.arange(problem.n_operators)) if merged is None else (merged.problem, merged.label)
    rng = np.random.default_rng(seed)
    best: tuple[int, NDArray[np.int64]] | None = None
    for attempt in range(orders):
        order = _depth_first(coarse, rng) if attempt else coarse.topological_order.tolist()
        piece = _split_order(instance, coarse, label, order)[label]
        value = latency_ns(instance, piece)
        if value is not None and (best is None or value < best[0]):
            best = value, piece
    if best is None:
        best = int(latency_ns(instance, np.full(problem.n_operators, CPU)) or 0), np.full(problem.n_operators, CPU)
    return best[1], best[0]


def bound_ns(instance: DnnPartitioningInstance) -> int:
    """Return a proven bound of the latency, ns: the longest path with every operator at its fastest, data for free.

    The CPUs count whatever number of them the instance grants to the other objective, for here they are many.
    """
    problem = replace(instance, cpus=max(1, instance.cpus)).problem()
    return critical_path_ns(replace(problem, transfer_ns=np.zeros_like(problem.transfer_ns)))


def _allowed(instance: DnnPartitioningInstance, piece: NDArray[np.int64]) -> bool:
    placed = piece != CPU
    if (instance.accelerator_ns[placed] < 0).any() or (instance.cpu_ns[~placed] < 0).any():
        return False
    held = np.zeros(instance.accelerators, dtype=np.int64)
    np.add.at(held, piece[placed], instance.weight_bytes[placed])
    if (held > instance.accelerator_memory_bytes).any():
        return False
    tied = np.flatnonzero(instance.colocation >= 0)
    pairs = np.unique(np.column_stack([instance.colocation[tied], piece[tied]]), axis=0)
    return len(np.unique(pairs[:, 0])) == len(pairs)


def _longest_path(length: NDArray[np.int64], arcs: NDArray[np.int64]) -> int | None:
    """Return the longest path through the pieces; None where they wait for each other (not contiguous)."""
    waiting = np.bincount(arcs[:, 1], minlength=len(length))
    first = np.searchsorted(arcs[:, 0], np.arange(len(length) + 1))
    end = length.copy()
    ready = np.flatnonzero(waiting == 0).tolist()
    done = 0
    while ready:
        i = ready.pop()
        done += 1
        for j in arcs[first[i] : first[i + 1], 1].tolist():
            end[j] = max(end[j], end[i] + length[j])
            waiting[j] -= 1
            if waiting[j] == 0:
                ready.append(j)
    return int(end.max(initial=0)) if done == len(length) else None


def _depth_first(problem: PlacementProblem, rng: np.random.Generator) -> list[int]:
    """Return a topological order in which operators come right before what first needs them; ties at random."""
    n = problem.n_operators
    indptr, ids = problem.predecessors
    rank = rng.permutation(n)
    sinks = sorted(np.flatnonzero(np.diff(problem.successors[0]) == 0).tolist(), key=lambda i: rank[i])
    order: list[int] = []
    seen = np.zeros(n, dtype=bool)
    stack = [(i, False) for i in reversed(sinks)]
    while stack:
        i, leaving = stack.pop()
        if leaving:
            order.append(i)
        elif not seen[i]:
            seen[i] = True
            stack.append((i, True))
            before = problem.edges[ids[indptr[i] : indptr[i + 1]], 0].tolist()
            stack += [(j, False) for j in sorted(set(before), key=lambda j: rank[j]) if not seen[j]]
    return order


def _split_order(
    instance: DnnPartitioningInstance, coarse: PlacementProblem, label: NDArray[np.int64], order: list[int]
) -> NDArray[np.int64]:
    """Return the piece of each coarse operator that the dynamic programme finds for one order, [coarse n]."""
    n, far = len(order), np.int64(2**60)
    position = np.empty(n, dtype=np.int64)
    position[order] = np.arange(n)
    cost, cpu = _interval_costs(instance, coarse, position[label], order)
    value = np.full((n + 1, instance.accelerators + 1), far)
    value[0, 0] = 0
    choice = np.full((n + 1, instance.accelerators + 1), -1, dtype=np.int64)  # where the piece begins; -1: on a CPU
    for j in range(1, n + 1):
        value[j] = np.minimum(value[j - 1] + cpu[j - 1], far)
        for c in range(1, instance.accelerators + 1):
            through = value[:j, c - 1] + cost[:j, j]
            i = int(through.argmin())
            if through[i] < value[j, c]:
                value[j, c], choice[j, c] = through[i], i
    piece = np.full(n, CPU)
    j, c = n, int(value[n].argmin())
    while j:
        i = int(choice[j, c])
        if i < 0:
            j -= 1
        else:
            c -= 1
            piece[order[i:j]] = c
            j = i
    return piece


def _interval_costs(
    instance: DnnPartitioningInstance, coarse: PlacementProblem, where: NDArray[np.int64], order: list[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the time of the piece order[i:j], [n + 1, n + 1] ns (far beyond where too large), and CPU times [n] ns."""
    n, far = len(order), np.int64(2**60)
    fast, slow = coarse.operator_ns[order, 0], coarse.operator_ns[order, 1]
    work = np.concatenate([[0], np.cumsum(np.where(fast < 0, 0, fast))])
    stuck = np.concatenate([[0], np.cumsum(fast < 0)])
    held = np.concatenate([[0], np.cumsum(coarse.weight_bytes[order])])
    total = work[None, :] - work[:, None]
    i, j = np.arange(n + 1)[:, None], np.arange(n + 1)[None, :]
    for v in np.unique(instance.edges[:, 0]).tolist():
        readers = np.unique(where[instance.edges[instance.edges[:, 0] == v, 1]])
        at, price = where[v], instance.producer_cost_ns[v]
        inside = (i <= at) & (at < j)
        total += np.where(inside & (readers.max() >= j), price, 0)  # written: some reader comes after the piece
        following = np.append(readers, n + 1)[np.searchsorted(readers, np.arange(n + 1))]
        total += np.where((at < i) & (following[:, None] < j), price, 0)  # read: a reader lies in the piece
    far_off = (held[None, :] - held[:, None] > instance.accelerator_memory_bytes) | (stuck[None, :] > stuck[:, None])
    return np.where(far_off | (j < i), far, total), np.where(slow < 0, far, slow)
