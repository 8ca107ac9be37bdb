"""Exact policies against brute force and against a second solver, over small random problems with every feature."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moirai_sim.placement import Placement
from moirai_sim.policies.base import Request
from moirai_sim.policies.cp import Cp
from moirai_sim.policies.loads import period_ns
from moirai_sim.policies.milp import Milp, longest_ns
from moirai_sim.policies.milp_lp import lp_text
from moirai_sim.policies.milp_model import MilpModel
from moirai_sim.policies.milp_throughput import MilpThroughput
from moirai_sim.policies.run import place, time_placement
from moirai_sim.policies.symmetry import interchangeable_devices
from moirai_sim.problem import PlacementProblem
from moirai_sim.testing.brute_force import optimal_makespan_ns, optimal_period_ns
from moirai_sim.testing.problems import small_problem

EXACT = [Milp, Cp]


def _problem(seed: int, operators: int = 4) -> PlacementProblem:
    return small_problem(
        seed,
        operators=operators,
        devices=2 + (seed % 4 == 1),
        density=0.6,
        network=("none", "one-port", "half-duplex")[seed % 3],
        memory=0.6 if seed % 2 else None,
        shared_tensors=seed % 5 < 2,
        colocated=seed % 7 == 0,
        unsupported=seed % 6 == 0,
    )


def test_the_number_of_threads_may_change_within_a_process() -> None:
    problem = small_problem(0)
    best = optimal_makespan_ns(problem)
    for workers in (1, 2, 1):
        answer = Milp().place(problem, Request(workers=workers))
        assert answer.provenance["solver_status"] == "optimal"
        assert answer.lower_bound_ns == best


@pytest.mark.parametrize("policy", EXACT)
@pytest.mark.parametrize("seed", range(16))
def test_exact_policies_find_what_brute_force_finds(policy: type[Milp | Cp], seed: int) -> None:
    problem = _problem(seed)
    expected = optimal_makespan_ns(problem)
    answer = policy().place(problem, Request(time_limit_s=60))
    if expected is None:
        assert answer.status == "infeasible"
        return
    timeline = time_placement(problem, answer, Request())
    assert timeline.status == "optimal", answer.provenance
    assert timeline.makespan_ns == expected


@pytest.mark.parametrize("seed", range(4))
def test_a_second_solver_agrees_on_the_model(seed: int, tmp_path: Path) -> None:
    scip = pytest.importorskip("pyscipopt")
    problem = _problem(seed, operators=5)
    model = MilpModel(problem, longest_ns(problem))
    path = tmp_path / "model.lp"
    path.write_text(lp_text(model))
    second = scip.Model()
    second.hideOutput()
    second.readProblem(str(path))
    second.optimize()
    answer: Placement = Milp().place(problem, Request(time_limit_s=60))
    assert second.getStatus() == ("infeasible" if answer.status == "infeasible" else "optimal")
    if answer.status != "infeasible":
        assert second.getObjVal() * model.unit_ns == pytest.approx(answer.lower_bound_ns, abs=1e-3)


@pytest.mark.parametrize("seed", range(10))
def test_period_is_what_brute_force_finds(seed: int) -> None:
    problem = small_problem(
        seed,
        operators=6,
        devices=2 + seed % 2,
        network=("none", "one-port", "half-duplex")[seed % 3],
        memory=0.7 if seed % 2 else None,
        shared_tensors=seed % 4 == 0,
        colocated=seed % 5 == 0,
    )
    request = Request(objective="throughput", time_limit_s=60)
    answer = MilpThroughput().place(problem, request)
    expected = optimal_period_ns(problem)
    if expected is None:
        assert answer.status == "infeasible"
        return
    timeline = time_placement(problem, answer, request)
    assert timeline.status == "optimal"
    assert timeline.period_ns == expected


@pytest.mark.parametrize("policy", EXACT)
def test_a_byte_too_many_of_ten_billion_does_not_fit(policy: type[Milp | Cp]) -> None:
    problem = replace(
        small_problem(0, operators=2),
        weight_bytes=np.array([10**10 + 1, 10**10 - 1]),
        memory_bytes=np.array([10**10, 10**10]),
    )
    assert not len(policy().place(problem, Request(time_limit_s=5)).device)


@pytest.mark.parametrize("policy", EXACT)
def test_a_seed_may_be_larger_than_a_solver_takes(policy: type[Milp | Cp]) -> None:
    problem = small_problem(0)
    assert policy().place(problem, Request(seed=2**31)).lower_bound_ns == optimal_makespan_ns(problem)


@pytest.mark.parametrize("policy", ["milp", "cp", "milp-throughput", "diviml", "auto", "search"])
def test_many_devices_are_answered_without_a_model_of_every_way(policy: str) -> None:
    """A chain of 40 on 300 equal devices: 3.5 million ways for its tensors, which no exact model holds in time."""
    n, k = 40, 300
    problem = replace(
        small_problem(0, operators=n, density=0.0),
        edges=np.column_stack([np.arange(n - 1), np.arange(1, n)]),
        edge_tensor=np.arange(n - 1),
        tensor_bytes=np.ones(n - 1, dtype=np.int64),
        transfer_ns=np.ones((n - 1, 1), dtype=np.int64),
        operator_ns=np.full((n, 1), 5),
        devices=tuple(f"d{i}" for i in range(k)),
        device_type=np.zeros(k, dtype=np.int64),
        memory_bytes=np.full(k, 10**9),
        route_class=np.where(np.eye(k, dtype=bool), -1, 0),
    )
    request = Request(objective="throughput" if "throughput" in policy else "latency", time_limit_s=3)
    assert place(problem, policy, request).status in ("optimal", "feasible")


def test_equal_devices_are_found_and_told_apart_by_load() -> None:
    base = small_problem(5, operators=6, devices=3, density=0.0)
    same = replace(
        base,
        operator_ns=base.operator_ns[:, [0, 0, 1]].copy(),
        device_type=np.array([0, 0, 2]),
    )
    assert interchangeable_devices(same) == [[0, 1]]
    assert "interchangeable" in MilpModel(same, 100, "throughput").families
    answer = MilpThroughput().place(same, Request(objective="throughput"))
    assert period_ns(same, answer.device) == optimal_period_ns(same)
    assert interchangeable_devices(base) == []
