"""Latency by the rules of dnn-partitioning: a hand-worked example, brute force, and what the rules forbid."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moirai_sim.instances.dnn_partitioning import DnnPartitioningInstance
from moirai_sim.policies.contiguous import CPU, bound_ns, latency_ns, split


def _instance(
    fast: list[int], slow: list[int], edges: list[tuple[int, int]], cost: list[int], memory: int = 10
) -> DnnPartitioningInstance:
    n = len(fast)
    return DnnPartitioningInstance(
        name="hand",
        operators=tuple(f"n{i}" for i in range(n)),
        accelerator_ns=np.array(fast),
        cpu_ns=np.array(slow),
        weight_bytes=np.full(n, 5),
        colocation=np.full(n, -1),
        edges=np.array(edges, dtype=np.int64).reshape(-1, 2),
        producer_cost_ns=np.array(cost),
        producer_bytes=np.full(n, 1),
        accelerators=2,
        cpus=2,
        accelerator_memory_bytes=memory,
        provenance={},
    )


def test_hand_worked_fork_join() -> None:
    # 0 -> {1, 2} -> 3; each output costs 3 to write and 3 to read
    instance = _instance([4, 6, 5, 2], [40, 60, 50, 20], [(0, 1), (0, 2), (1, 3), (2, 3)], [3, 3, 3, 3])
    # piece 0 = {0, 1}: computes 4 + 6, writes 0 and 1: 16; piece 1 = {2, 3}: reads 0 and 1, computes 5 + 2: 13 more
    assert latency_ns(instance, np.array([0, 0, 1, 1])) == 29
    # the whole on one accelerator does not fit; the join on a CPU: 0 and 1 as before (16), 2 alone: 3 + 5 + 3; then 20
    assert latency_ns(instance, np.array([0, 0, 1, CPU])) == 16 + 11 + 20
    assert latency_ns(instance, np.array([CPU] * 4)) == 40 + 60 + 20


def _walked(instance: DnnPartitioningInstance, piece: tuple[int, ...]) -> int | None:
    """Return the latency by walking from call to call with sets alone: shares nothing with `latency_ns`."""
    n, edges = len(piece), instance.edges.tolist()
    calls = [{i for i in range(n) if piece[i] == k} for k in range(instance.accelerators)] + [
        {i} for i in range(n) if piece[i] == CPU
    ]
    calls = [call for call in calls if call]
    for call in calls[: sum(piece[min(call)] != CPU for call in calls)]:
        if sum(int(instance.weight_bytes[i]) for i in call) > instance.accelerator_memory_bytes:
            return None
    ended: dict[int, int] = {}
    while calls:
        for call in calls:
            read = {i for i, j in edges if j in call and i not in call}
            if read <= ended.keys():
                break
        else:
            return None  # every call waits for another
        calls.remove(call)
        at = max((ended[i] for i in read), default=0)
        if piece[min(call)] == CPU:
            at += sum(int(instance.cpu_ns[i]) for i in call)
        else:
            written = {i for i, j in edges if i in call and j not in call}
            at += sum(int(instance.accelerator_ns[i]) for i in call)
            at += sum(int(instance.producer_cost_ns[i]) for i in [*read, *written])
        ended |= dict.fromkeys(call, at)
    return max(ended.values())


def test_data_between_an_accelerator_and_a_cpu_is_paid_by_the_accelerator() -> None:
    instance = _instance([4, 6, 5], [40, 60, 50], [(0, 1), (1, 2)], [3, 7, 2])
    # 0 on a CPU ends at 40; the piece {1} reads 0 for 3, computes 6, writes 1 for 7: 56; 2 on a CPU reads it for free
    assert latency_ns(instance, np.array([CPU, 0, CPU])) == 40 + 3 + 6 + 7 + 50


def test_what_the_rules_forbid() -> None:
    instance = _instance([1, 1, 1], [1, 1, 1], [(0, 1), (1, 2)], [0, 0, 0])
    assert latency_ns(instance, np.array([0, 1, 0])) is None  # not contiguous: the piece waits for itself
    assert latency_ns(instance, np.array([0, 0, 0])) is None  # memory
    stuck = _instance([1, -1, 1], [1, 1, 1], [], [0, 0, 0])
    assert latency_ns(stuck, np.array([CPU, 0, CPU])) is None


@pytest.mark.parametrize("seed", range(12))
def test_split_is_between_the_optimum_and_the_bound(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 6
    edges = [(i, j) for j in range(n) for i in range(j) if rng.random() < 0.4]
    fast = rng.integers(1, 9, size=n)
    instance = _instance(fast.tolist(), (10 * fast).tolist(), sorted(edges), rng.integers(0, 4, size=n).tolist(), 15)
    pieces = list(itertools.product((CPU, 0, 1), repeat=n))
    values = [latency_ns(instance, np.array(piece)) for piece in pieces]
    assert values == [_walked(instance, piece) for piece in pieces]
    optimum = min(value for value in values if value is not None)
    piece, value = split(instance, orders=10)
    assert latency_ns(instance, piece) == value
    assert bound_ns(instance) <= optimum <= value
    assert value <= 1.5 * optimum


def test_split_of_a_chain_is_the_optimum() -> None:
    instance = _instance([3, 4, 5, 6], [30, 40, 50, 60], [(0, 1), (1, 2), (2, 3)], [9, 1, 9, 0])
    piece, value = split(instance, orders=2)
    assert value == 3 + 4 + 1 + 1 + 5 + 6
    assert (piece[:2] == piece[0]).all()
    assert (piece[2:] == piece[2]).all()
