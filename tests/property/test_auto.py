"""``auto`` in the corners: throughput, fair networks, nothing fits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moirai_sim.clusters.cluster import Cluster, Device, DeviceType, Link
from moirai_sim.policies.base import Request
from moirai_sim.policies.bounds import lower_bound_ns
from moirai_sim.policies.run import place
from moirai_sim.problem import PlacementProblem
from moirai_sim.testing.brute_force import optimal_period_ns
from moirai_sim.testing.problems import small_problem


def _fair(problem: PlacementProblem) -> PlacementProblem:
    """Return the problem on two devices joined by one link of 1 GB/s: a byte takes a nanosecond."""
    kind = DeviceType("chip", "gpu", 10**9, 1e9, {"float32": 1e9})
    devices = tuple(Device(name, kind) for name in problem.devices)
    cluster = Cluster("pair", devices, (Link("cable", problem.devices[:2], 1e9),))
    size = problem.transfer_ns.max(axis=1)
    return replace(
        problem,
        network="fair",
        cluster=cluster,
        tensor_bytes=size,
        transfer_ns=np.repeat(size[:, None], problem.transfer_ns.shape[1], axis=1),
    )


@pytest.mark.parametrize("seed", range(4))
def test_no_rival_beats_auto_on_fair_networks(seed: int) -> None:
    problem = _fair(small_problem(seed, operators=8, devices=2))
    request = Request(time_limit_s=4)
    ours = place(problem, "auto", request)
    assert 0 < ours.lower_bound_ns <= ours.makespan_ns
    for rival in ("single", "heft", "m-etf", "random"):
        assert ours.makespan_ns <= place(problem, rival, request).makespan_ns, rival


@pytest.mark.parametrize("network", ["none", "one-port", "fair"])
def test_auto_finds_the_best_period(network: str) -> None:
    problem = small_problem(3, operators=6, devices=2)
    problem = _fair(problem) if network == "fair" else replace(problem, network=network)
    timeline = place(problem, "auto", Request(objective="throughput", time_limit_s=20))
    assert timeline.status == "optimal"
    assert timeline.period_ns == optimal_period_ns(problem)


def test_auto_proves_that_nothing_fits() -> None:
    problem = replace(small_problem(2, operators=5), memory_bytes=np.array([3, 3]), weight_bytes=np.full(5, 2))
    assert place(problem, "auto", Request(time_limit_s=10)).status == "infeasible"


def test_the_same_request_gives_the_same_bytes() -> None:
    problem = small_problem(9, operators=14, devices=3, density=0.25)
    first, second = (place(problem, "auto", Request(time_limit_s=20)) for _ in range(2))
    assert first.status == "optimal"
    assert first.spans == second.spans


@pytest.mark.parametrize("policy", ["auto", "diviml"])
def test_a_latency_that_nobody_finds_ends_without_an_answer(policy: str) -> None:
    problem = replace(small_problem(3, operators=80, devices=3), network="one-port")  # coarsened, so nothing is proven
    longest = lower_bound_ns(problem) + 1  # hardly to be reached, and not proven to be out of reach
    timeline = place(problem, policy, Request("throughput", time_limit_s=1.0, max_latency_ns=longest))
    assert timeline.status == "limit"
    assert not timeline.spans
