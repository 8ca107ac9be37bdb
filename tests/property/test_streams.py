"""Exact cycles of placements against brute force and a second solver: replicas, limits on latency and on the period."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moirai_sim.policies.auto import Auto
from moirai_sim.policies.base import Policy, Request
from moirai_sim.policies.bounds import lower_bound_ns
from moirai_sim.policies.cycles import best_cycle, whole_models
from moirai_sim.policies.diviml import DiviML
from moirai_sim.policies.loads import fits, period_ns
from moirai_sim.policies.milp import Milp, longest_ns
from moirai_sim.policies.milp_lp import lp_text
from moirai_sim.policies.milp_throughput import MilpThroughput
from moirai_sim.policies.run import place_reduced, time_placement
from moirai_sim.policies.stream_model import StreamModel
from moirai_sim.problem import PlacementProblem
from moirai_sim.testing.brute_force import optimal_latency_ns, optimal_makespan_ns, optimal_period_ns
from moirai_sim.testing.problems import small_problem


def _problem(seed: int) -> PlacementProblem:
    return small_problem(
        seed,
        operators=4 - (seed % 4 == 1),
        devices=2 + (seed % 4 == 1),
        density=0.6,
        network=("none", "one-port", "half-duplex")[seed % 3],
        memory=0.7 if seed % 2 else None,
        shared_tensors=seed % 5 < 2,
        colocated=seed % 7 == 0,
        unsupported=seed % 6 == 0,
    )


def _answer(policy: Policy, problem: PlacementProblem, request: Request, expected: int | None, value: str) -> None:
    answer = policy.place(problem, request)
    if expected is None:
        assert answer.status == "infeasible"
        return
    timeline = time_placement(problem, answer, request)
    assert timeline.status == "optimal", (timeline.provenance, expected)
    assert getattr(timeline, value) == expected
    assert timeline.lower_bound_ns == expected


@pytest.mark.parametrize("seed", range(12))
def test_period_of_replicas_is_what_brute_force_finds(seed: int) -> None:
    problem = _problem(seed)
    replicas = 2 + (seed % 3 == 0 and problem.n_devices == 2)
    expected = optimal_period_ns(problem, replicas=replicas)
    request = Request(objective="throughput", time_limit_s=60, replicas=replicas)
    _answer(MilpThroughput(), problem, request, expected, "period_ns")
    bound = lower_bound_ns(problem, "throughput", replicas=replicas)
    assert expected is None or bound <= expected


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("seed", range(8))
def test_period_under_a_latency_is_what_brute_force_finds(seed: int, replicas: int) -> None:
    problem = _problem(seed)
    fastest = optimal_makespan_ns(problem)
    if not fastest:
        return
    for limit in (fastest - 1, fastest, fastest + 3):
        if not limit:
            continue
        request = Request(objective="throughput", time_limit_s=60, replicas=replicas, max_latency_ns=limit)
        expected = optimal_period_ns(problem, replicas=replicas, max_latency_ns=limit)
        _answer(MilpThroughput(), problem, request, expected, "period_ns")


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("seed", range(8))
def test_latency_under_a_period_is_what_brute_force_finds(seed: int, replicas: int) -> None:
    problem = _problem(seed)
    least = optimal_period_ns(problem, replicas=replicas)
    if not least:
        return
    for limit in (least - 1, least, least + 3):
        if not limit:
            continue
        request = Request(time_limit_s=60, replicas=replicas, max_period_ns=limit)
        expected = optimal_latency_ns(problem, replicas=replicas, max_period_ns=limit)
        _answer(Milp(), problem, request, expected, "latency_ns")


@pytest.mark.parametrize("seed", range(3))
def test_a_second_solver_agrees_on_the_model(seed: int, tmp_path: Path) -> None:
    scip = pytest.importorskip("pyscipopt")
    problem = small_problem(seed, operators=4, devices=2, density=0.6, memory=0.8)
    longest = longest_ns(problem)
    limit = (optimal_makespan_ns(problem) or 0) + 2
    model = StreamModel(problem, 2, "throughput", limit, 2 * longest)
    path = tmp_path / "model.lp"
    path.write_text(lp_text(model))
    second = scip.Model()
    second.hideOutput()
    second.readProblem(str(path))
    second.optimize()
    pairs = optimal_period_ns(problem, replicas=2, max_latency_ns=limit)
    assert second.getStatus() == ("infeasible" if pairs is None else "optimal")
    if pairs is not None:
        alone = optimal_period_ns(problem, max_latency_ns=limit)
        total = round(second.getObjVal() * model.unit_ns)
        assert min(alone or total, -(-total // 2)) == pairs


@pytest.mark.parametrize("policy", [Auto, DiviML])
@pytest.mark.parametrize("seed", range(6))
def test_policies_use_replicas_and_are_never_beyond_a_bound(policy: type[Policy], seed: int) -> None:
    problem = _problem(seed)
    best, alone = optimal_period_ns(problem, replicas=2), optimal_period_ns(problem)
    request = Request(objective="throughput", time_limit_s=20, replicas=2)
    answer = place_reduced(problem, policy().place, request)
    if best is None or alone is None:
        assert answer.status in ("infeasible", "limit")
        return
    timeline = time_placement(problem, answer, request)
    assert timeline.lower_bound_ns <= best <= timeline.objective_ns
    assert policy is not Auto or timeline.objective_ns == best


def test_a_cycle_of_whole_models_shares_by_speed() -> None:
    base = small_problem(0, operators=1, devices=3, density=0.0)
    problem = replace(base, operator_ns=np.array([[10, 20, 40]]))
    cycle = best_cycle(problem, whole_models(problem), 7)
    assert cycle is not None
    assert np.bincount(cycle.devices[:, 0]).tolist() == [4, 2, 1]
    assert period_ns(problem, cycle.devices) == 6  # 40 ns of work on each in seven requests
    tight = replace(problem, weight_bytes=np.array([8]), memory_bytes=np.array([8, 4, 8]))
    held = best_cycle(tight, whole_models(tight), 5)
    assert held is not None
    assert fits(tight, held.devices)
    assert np.bincount(held.devices[:, 0]).tolist() == [4, 0, 1]


@pytest.mark.parametrize("policy", [Auto, DiviML])
@pytest.mark.parametrize("seed", range(4))
def test_policies_keep_limits(policy: type[Policy], seed: int) -> None:
    problem = _problem(seed)
    fastest, least = optimal_makespan_ns(problem), optimal_period_ns(problem, replicas=2)
    if not fastest or not least:
        return
    requests = (
        Request(objective="throughput", time_limit_s=20, replicas=2, max_latency_ns=fastest),
        Request(time_limit_s=20, replicas=2, max_period_ns=least),
    )
    optima = (
        optimal_period_ns(problem, replicas=2, max_latency_ns=fastest),
        optimal_latency_ns(problem, replicas=2, max_period_ns=least),
    )
    for request, best in zip(requests, optima, strict=True):
        timeline = time_placement(problem, policy().place(problem, request), request)
        assert timeline.status in ("optimal", "feasible", *(["limit"] if policy is DiviML else [])), timeline.provenance
        if timeline.spans:
            assert timeline.lower_bound_ns <= (best or 0) <= timeline.objective_ns
        assert policy is not Auto or timeline.objective_ns == best
