"""``auto`` in the corners: throughput, fair networks, nothing fits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moirai_sim.policies.base import Request
from moirai_sim.policies.bounds import lower_bound_ns
from moirai_sim.policies.run import place
from moirai_sim.policies.starts import CHEAP
from moirai_sim.problem import Network
from moirai_sim.testing.brute_force import optimal_period_ns
from moirai_sim.testing.problems import layered_problem, small_problem


@pytest.mark.parametrize("seed", range(4))
def test_no_rival_beats_auto_on_fair_networks(seed: int) -> None:
    problem = small_problem(seed, operators=8, devices=2, network="fair")
    request = Request(time_limit_s=4)
    ours = place(problem, "auto", request)
    assert 0 < ours.lower_bound_ns <= ours.makespan_ns
    for rival in ("single", "heft", "m-etf", "random"):
        assert ours.makespan_ns <= place(problem, rival, request).makespan_ns, rival


@pytest.mark.parametrize("network", ["none", "one-port", "fair"])
def test_auto_finds_the_best_period(network: Network) -> None:
    problem = small_problem(3, operators=6, devices=2, network=network)
    timeline = place(problem, "auto", Request(objective="throughput", time_limit_s=20))
    assert timeline.period_ns == optimal_period_ns(problem)
    assert timeline.status == ("feasible" if network == "fair" else "optimal"), "loads of links are in no bound"


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


def test_auto_proves_that_no_stream_fits() -> None:
    """Three operators of 4 bytes on two devices of 5: any two would do, which no cheap bound sees."""
    problem = replace(small_problem(2, operators=3), memory_bytes=np.array([5, 5]), weight_bytes=np.full(3, 4))
    assert place(problem, "auto", Request("throughput", time_limit_s=10)).status == "infeasible"


@pytest.mark.parametrize("policy", ["auto", "search"])
def test_a_latency_that_no_simple_policy_reaches_is_searched_for(policy: str) -> None:
    problem = layered_problem(1, operators=60, devices=3)
    starts = [place(problem, name, Request()).makespan_ns for name in CHEAP if name != "random"]
    found = place(problem, policy, Request(time_limit_s=4)).makespan_ns
    assert found < min(starts)
    limit = (found + min(starts)) // 2
    timeline = place(problem, policy, Request(time_limit_s=4, max_latency_ns=limit))
    assert timeline.spans
    assert timeline.makespan_ns <= limit


def test_a_stream_within_a_latency_that_no_simple_policy_reaches_is_searched_for() -> None:
    problem = layered_problem(1, operators=60, devices=3, width=3)
    starts = [place(problem, name, Request()).makespan_ns for name in CHEAP if name != "random"]
    limit = (place(problem, "auto", Request(time_limit_s=4)).makespan_ns + min(starts)) // 2
    assert limit < min(starts)
    timeline = place(problem, "auto", Request("throughput", time_limit_s=8, max_latency_ns=limit))
    assert timeline.spans
    assert timeline.makespan_ns <= limit


def test_a_latency_that_is_proven_out_of_reach_is_infeasible() -> None:
    problem = small_problem(9, operators=8, devices=2)
    best = place(problem, "auto", Request(time_limit_s=10))
    assert best.status == "optimal"
    assert place(problem, "auto", Request(time_limit_s=10, max_latency_ns=best.makespan_ns - 1)).status == "infeasible"
