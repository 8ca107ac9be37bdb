"""Search on random problems: large neighbourhoods and the annealed period are right, never worse, and repeat."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from moirai_sim.policies import search
from moirai_sim.policies.base import Request
from moirai_sim.policies.heft import Heft
from moirai_sim.policies.loads import fits, period_ns, resource_loads_ns
from moirai_sim.policies.neighbourhoods import better_nearby
from moirai_sim.policies.period_search import anneal_period, improve_period, pipeline_of
from moirai_sim.policies.random import Random
from moirai_sim.policies.search import Search, improve
from moirai_sim.problem import PlacementProblem
from moirai_sim.simulation.replay import replay
from moirai_sim.simulation.schedule import placement_from_schedule
from moirai_sim.testing.problems import small_problem


def _problem(seed: int, operators: int) -> PlacementProblem:
    return small_problem(
        seed,
        operators=operators,
        devices=2 + seed % 2,
        density=0.3,
        network=("none", "one-port", "half-duplex")[seed % 3],
        memory=0.8 if seed % 2 else None,
        shared_tensors=seed % 4 < 2,
        colocated=seed % 5 == 0,
    )


@pytest.mark.parametrize("seed", range(5))
def test_neighbourhoods_give_faster_answers_that_keep_the_limits(seed: int) -> None:
    problem = _problem(seed, 20)
    start = Random().place(problem, Request(seed=seed))
    assert start.status != "limit", "the random start finds room"
    schedule = replay(problem, start)
    known = placement_from_schedule(problem, start, schedule)
    found, same = (better_nearby(problem, known, np.random.default_rng(seed)) for _ in range(2))
    assert found is not None, "a random placement can be improved"
    assert same is not None
    assert found.device.tolist() == same.device.tolist()
    assert fits(problem, found.device)
    assert replay(problem, found).makespan_ns < schedule.makespan_ns


def test_neighbourhoods_find_what_annealing_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    better = 0
    for seed in range(3):
        problem = _problem(seed, 20)
        start = Random().place(problem, Request(seed=seed))
        if start.status == "limit":
            continue
        values = []
        for operators in (0, 1_000):
            monkeypatch.setattr(search, "NEIGHBOURHOOD_OPERATORS", operators)
            values.append(replay(problem, improve(problem, [start], rounds=5)).makespan_ns)
        assert values[1] <= values[0]
        better += values[1] < values[0]
    assert better


@pytest.mark.parametrize("seed", range(12))
def test_loads_follow_the_moves(seed: int) -> None:
    problem = _problem(seed, 25)
    start = Random().place(problem, Request(seed=seed))
    assert start.status != "limit", "the random start finds room"
    device, found = start.device.copy(), start.device.copy()
    loads = resource_loads_ns(problem, device)
    before = period_ns(problem, device)
    value = anneal_period(
        pipeline_of(problem), problem.memory_bytes.copy(), device, found, loads, seed, 2_000, 0.05, 1e-4
    )
    assert loads.tolist() == resource_loads_ns(problem, device).tolist()
    assert fits(problem, device)
    assert fits(problem, found)
    assert value == period_ns(problem, found) <= before


def test_search_finds_the_least_period_of_small_problems_and_repeats() -> None:
    found = asked = 0
    for seed in range(12):
        problem = _problem(seed, 6)
        start = Random().place(problem, Request(seed=seed))
        if start.status == "limit":
            continue
        every = (np.array(one, dtype=np.int64) for one in product(range(problem.n_devices), repeat=6))
        least = min(period_ns(problem, one) for one in every if fits(problem, one))
        one, same = (improve_period(problem, start, rounds=2, seed=seed) for _ in range(2))
        assert one.device.tolist() == same.device.tolist()
        value = period_ns(problem, one.device)
        assert value >= least
        asked, found = asked + 1, found + (value == least)
    assert asked >= 8
    assert found >= asked - 1


def test_search_for_throughput_keeps_a_limit_on_latency() -> None:
    problem = _problem(2, 12)
    limit = replay(problem, Heft().place(problem, Request())).makespan_ns
    limited = Search().place(problem, Request("throughput", time_limit_s=0.3, max_latency_ns=limit))
    assert replay(problem, limited).makespan_ns <= limit
