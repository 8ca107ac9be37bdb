"""Every rival on random problems: right by the independent check, above every bound, the same twice."""

from __future__ import annotations

import pytest

from moirai_sim.policies.base import Policy, Request
from moirai_sim.policies.cpop import Cpop
from moirai_sim.policies.getf import Getf
from moirai_sim.policies.heft import Heft, HeftBlind
from moirai_sim.policies.loads import fits
from moirai_sim.policies.m_etf import MEtf
from moirai_sim.policies.m_sct import MSct
from moirai_sim.policies.m_topo import MTopo
from moirai_sim.policies.met import Met
from moirai_sim.policies.pipeline_dp import PipelineDp
from moirai_sim.policies.random import Random
from moirai_sim.policies.run import place_reduced, time_placement
from moirai_sim.policies.search import improve
from moirai_sim.policies.single import Single
from moirai_sim.problem import PlacementProblem
from moirai_sim.simulation.replay import replay
from moirai_sim.testing.problems import small_problem

RIVALS: list[type[Policy]] = [Cpop, Getf, Heft, HeftBlind, MEtf, MSct, MTopo, Met, PipelineDp, Random, Single]


def _problem(seed: int) -> PlacementProblem:
    return small_problem(
        seed,
        operators=1 + seed % 14,
        devices=1 + seed % 4,
        density=0.35,
        network=("none", "one-port", "half-duplex")[seed % 3],
        memory=0.7 if seed % 2 else None,
        shared_tensors=seed % 5 < 2,
        colocated=seed % 7 == 0 and seed % 14 > 1,
        unsupported=seed % 6 == 1 and seed % 4 > 0,
    )


@pytest.mark.parametrize("policy", RIVALS)
def test_rivals_answer_right_and_the_same_twice(policy: type[Policy]) -> None:
    answered = 0
    for seed in range(80):
        problem = _problem(seed)
        answer = place_reduced(problem, policy().place, Request(seed=seed))
        if answer.status == "limit":
            assert problem.memory_bytes.min() < problem.weight_bytes.sum() or policy is Single, seed
            continue
        answered += 1
        timeline = time_placement(problem, answer, Request())  # verified, or an InternalError
        assert timeline.makespan_ns >= timeline.lower_bound_ns
        again = place_reduced(problem, policy().place, Request(seed=seed))
        assert time_placement(problem, again, Request()).to_json() == timeline.to_json(), seed
    assert answered >= 30


@pytest.mark.parametrize("seed", range(12))
def test_search_improves_within_memory_and_repeats(seed: int) -> None:
    problem = _problem(seed + 100)
    start = Random().place(problem, Request(seed=seed))
    assert start.status != "limit", "the random start finds room"
    before = replay(problem, start).makespan_ns
    one, same = (improve(problem, [start], rounds=5, seed=seed) for _ in range(2))
    assert one.device.tolist() == same.device.tolist()
    assert replay(problem, one).makespan_ns == replay(problem, same).makespan_ns <= before
    assert fits(problem, one.device)


def test_search_finds_the_optimum_of_small_problems() -> None:
    from moirai_sim.testing.brute_force import optimal_makespan_ns

    found = 0
    for seed in range(8):
        problem = small_problem(seed, operators=4, density=0.5, memory=0.7, shared_tensors=bool(seed % 2))
        start = Random().place(problem, Request(seed=seed))
        best = optimal_makespan_ns(problem)
        if start.status == "limit" or best is None:
            continue
        value = replay(problem, improve(problem, [start], rounds=5)).makespan_ns
        assert value >= best
        found += value == best
    assert found >= 5
