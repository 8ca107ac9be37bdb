"""No bound exceeds the optimum of a tiny problem, found by trying everything; and each bound is worth having."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moirai_sim.policies.bounds import (
    critical_path_ns,
    heads_and_tails,
    load_ns,
    lower_bound_ns,
    path_and_load_ns,
)
from moirai_sim.problem import PlacementProblem
from moirai_sim.testing.brute_force import optimal_makespan_ns, optimal_period_ns
from moirai_sim.testing.problems import small_problem

BOUNDS = [critical_path_ns, load_ns, path_and_load_ns, lower_bound_ns]


@pytest.mark.parametrize("seed", range(24))
def test_no_bound_exceeds_the_optimum(seed: int) -> None:
    problem = small_problem(
        seed,
        operators=4,
        devices=2 + seed % 2,
        network=("none", "one-port", "half-duplex")[seed % 3],
        memory=0.6 if seed % 2 else None,
        shared_tensors=seed % 4 == 0,
        unsupported=seed % 5 == 0,
    )
    optimum = optimal_makespan_ns(problem)
    assert optimum is not None, "memory admits a placement"
    for bound in BOUNDS:
        assert bound(problem) <= optimum, bound.__name__


@pytest.mark.parametrize("seed", range(12))
def test_period_bound_is_valid(seed: int) -> None:
    problem = small_problem(seed, operators=6, devices=2, memory=0.7 if seed % 2 else None)
    optimum = optimal_period_ns(problem)
    if optimum is not None:
        assert lower_bound_ns(problem, "throughput") <= optimum


def test_bounds_hold_where_too_many_kinds_of_device_count_all_ways_over_as_the_cheapest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for seed in range(12):
        problem = small_problem(seed, operators=4, devices=3, unsupported=seed % 3 == 0)
        one_way = replace(problem, transfer_ns=np.full_like(problem.transfer_ns, 7))
        exact, exact_one_way = critical_path_ns(problem), critical_path_ns(one_way)
        with monkeypatch.context() as context:
            context.setattr("moirai_sim.policies.bounds.MANY_KINDS", 1)
            assert 0 < critical_path_ns(problem) <= exact
            assert critical_path_ns(replace(one_way)) == exact_one_way


def _independent(times: list[list[int]]) -> PlacementProblem:
    base = small_problem(0, operators=len(times), devices=len(times[0]), density=0.0)
    return replace(base, operator_ns=np.array(times, dtype=np.int64))


def test_the_tempting_harmonic_bound_is_not_used() -> None:
    # sum_i 1 / sum_k 1 / t_ik says 1.82 for these; each on its own best device takes 1
    problem = _independent([[1_000, 10_000], [10_000, 1_000]])
    assert lower_bound_ns(problem) == optimal_makespan_ns(problem) == 1_000


def test_load_bound_is_the_fractional_optimum() -> None:
    problem = _independent([[3_000, 3_000]] * 4)
    assert load_ns(problem) == 6_000


def test_critical_path_pays_for_the_cheapest_way_over() -> None:
    # n0 runs on d0 only, n1 on d1 only: the transfer cannot be avoided
    problem = PlacementProblem(
        name="forced",
        operators=("a", "b"),
        operator_ns=np.array([[5, -1], [-1, 7]]),
        weight_bytes=np.zeros(2, dtype=np.int64),
        devices=("d0", "d1"),
        device_type=np.arange(2),
        memory_bytes=np.full(2, 10),
        edges=np.array([[0, 1]]),
        edge_tensor=np.array([0]),
        tensor_bytes=np.array([-1]),
        route_class=np.array([[-1, 0], [1, -1]]),
        transfer_ns=np.array([[4, 9]]),
    )
    assert critical_path_ns(problem) == 16
    head, tail = heads_and_tails(problem)
    assert head[1, 1] == 9
    assert tail[0, 0] == 11


def test_memory_tightens_the_load_bound() -> None:
    # two operators, each 1000 on d0 and 9000 on d1; d0 holds only one of them
    problem = _independent([[1_000, 9_000], [1_000, 9_000]])
    tight = replace(problem, weight_bytes=np.array([10, 10]), memory_bytes=np.array([10, 20]))
    assert load_ns(problem) < load_ns(tight) <= 9_000


def test_bounds_of_many_equal_devices_use_their_type() -> None:
    # 20 devices of one type: kinds collapse, and a transfer can always be avoided
    base = small_problem(3, operators=4, devices=20)
    same = replace(base, device_type=np.zeros(20, dtype=np.int64), operator_ns=base.operator_ns[:, :1].copy())
    small = replace(
        same,
        devices=same.devices[:2],
        device_type=np.zeros(2, dtype=np.int64),
        memory_bytes=same.memory_bytes[:2].copy(),
        route_class=same.route_class[:2, :2].copy(),
    )
    assert critical_path_ns(same) <= critical_path_ns(small)


def test_a_bound_without_time_for_its_programme_weighs_all_devices_alike() -> None:
    problem = _independent([[2_000, 4_000]] * 6)
    assert load_ns(problem) == 8_000  # four on the first, two on the second
    assert load_ns(problem, time_limit_s=0.0) == 6_000  # the fastest times, over two devices
