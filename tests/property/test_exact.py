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
from moirai_sim.policies.run import time_placement
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
