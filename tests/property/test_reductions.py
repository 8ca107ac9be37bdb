"""A contracted problem's answer, taken back, is an answer of the original: never slower, and it verifies."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moirai_sim.placement import Placement
from moirai_sim.policies.base import Objective, Request
from moirai_sim.policies.reductions import contract, contract_colocated
from moirai_sim.policies.run import place, time_placement
from moirai_sim.problem import UNSUPPORTED
from moirai_sim.simulation.replay import replay
from moirai_sim.simulation.schedule import placement_from_schedule
from moirai_sim.testing.brute_force import optimal_makespan_ns
from moirai_sim.testing.problems import small_problem


@pytest.mark.parametrize("seed", range(30))
def test_expanded_orders_replay_no_slower(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = small_problem(
        seed,
        operators=14,
        devices=3,
        density=0.3,
        network=("none", "one-port", "half-duplex")[seed % 3],
        shared_tensors=seed % 2 == 0,
    )
    contraction = contract(problem, rng.integers(-1, 4, size=14))
    small = contraction.problem
    greedy = Placement(device=rng.integers(0, 3, size=small.n_operators))
    schedule = replay(small, greedy)
    answer = contraction.invert(placement_from_schedule(small, greedy, schedule))
    assert (answer.device == greedy.device[contraction.label]).all()
    timeline = time_placement(problem, answer, Request())  # verifies
    assert timeline.makespan_ns <= schedule.makespan_ns


def test_orders_without_an_order_of_transfers_stay_without() -> None:
    problem = replace(small_problem(3, operators=6, density=0.6), colocation=np.array([0, 0, -1, -1, -1, -1]))
    contraction = contract_colocated(problem)
    assert contraction is not None
    small = contraction.problem
    device = np.arange(small.n_operators) % 2
    position = np.empty(small.n_operators, dtype=np.int64)
    position[small.topological_order] = np.arange(small.n_operators)
    answer = contraction.invert(Placement(device=device, order=position))
    assert answer.order is not None
    assert answer.transfer_order is None
    time_placement(problem, answer, Request())  # verifies


def test_groups_that_would_close_a_cycle_stay_apart() -> None:
    # 0 -> 1 -> 2: merging 0 and 2 would need 1 before and after the merged operator
    problem = replace(
        small_problem(0, operators=3, density=0.0),
        edges=np.array([[0, 1], [1, 2]]),
        edge_tensor=np.array([-1, -1]),
    )
    assert contract(problem, np.array([7, -1, 7])).problem.n_operators == 3
    tied = replace(problem, colocation=np.array([0, -1, 0]))
    assert contract_colocated(tied) is None
    merged = contract(problem, np.array([7, 7, -1]))
    assert merged.problem.operators == ("n1", "n2")
    assert (merged.problem.operator_ns[0] == problem.operator_ns[:2].sum(axis=0)).all()
    assert merged.problem.weight_bytes[0] == problem.weight_bytes[:2].sum()


def test_merging_whole_group_keeps_the_rest_of_it_tied() -> None:
    problem = replace(small_problem(0, operators=4, density=0.0), colocation=np.array([3, 3, 3, -1]))
    small = contract(problem, np.array([0, -1, -1, 0])).problem  # joins operator 3 to the group of operator 0
    assert small.colocation is not None
    assert small.colocation[0] == small.colocation[1] == small.colocation[2] >= 0


@pytest.mark.parametrize("seed", range(8))
def test_fused_kernels_contract_without_loss(seed: int) -> None:
    # the cost of a fused kernel sits on its last member; merging its members changes no optimum
    base = small_problem(seed, operators=5, density=0.6)
    keep = (base.edges[:, 0] != 0) | (base.edges[:, 1] == 1)
    edges, tensors = np.vstack([[0, 1], base.edges[keep]]), np.append(-1, base.edge_tensor[keep])
    rows = np.unique(np.column_stack([edges, tensors]), axis=0)
    duration = base.operator_ns.copy()
    duration[0] = 0
    fused = replace(
        base,
        edges=rows[:, :2].copy(),
        edge_tensor=rows[:, 2].copy(),
        operator_ns=duration,
        colocation=np.array([0, 0, -1, -1, -1]),
    )
    contraction = contract_colocated(fused)
    assert contraction is not None
    assert contraction.lossless
    assert optimal_makespan_ns(contraction.problem) == optimal_makespan_ns(fused)


def test_a_member_that_nobody_waits_for_does_not_make_the_others_wait() -> None:
    """A source of 100, a chain of three beside it, and what ends each: the ends are tied, but need not meet."""
    duration = np.array([100, 1, 1, 1, 0, 10])
    problem = replace(
        small_problem(0, operators=6, density=0.0),
        edges=np.array([[0, 4], [1, 2], [2, 3], [3, 5]]),
        edge_tensor=np.full(4, -1),
        operator_ns=np.column_stack([duration, duration]),
        colocation=np.array([-1, -1, -1, -1, 0, 0]),
    )
    contraction = contract_colocated(problem)
    assert contraction is not None
    assert (optimal_makespan_ns(problem), optimal_makespan_ns(contraction.problem)) == (100, 110)
    assert not contraction.lossless
    answer = place(problem, "cp", Request(time_limit_s=5))
    assert (answer.status, answer.lower_bound_ns) == ("feasible", 100)
    assert place(problem, "cp", Request(time_limit_s=5, max_latency_ns=105)).status == "limit"


def test_merging_free_operators_is_not_called_lossless() -> None:
    problem = small_problem(1, operators=4, density=1.0)
    assert not contract(problem, np.array([0, 0, -1, -1])).lossless


def test_what_no_device_runs_or_holds_as_one_stays_apart() -> None:
    chain = replace(
        small_problem(0, operators=4, density=0.0), edges=np.array([[0, 1], [2, 3]]), edge_tensor=np.array([-1, -1])
    )
    groups = np.array([0, 0, 1, 1])
    assert contract(chain, groups).problem.n_operators == 2
    times = chain.operator_ns.copy()
    times[0, 0] = times[1, 1] = UNSUPPORTED
    assert contract(replace(chain, operator_ns=times), groups).problem.n_operators == 3
    heavy = replace(chain, weight_bytes=np.array([6, 6, 1, 1]), memory_bytes=np.array([10, 10]))
    assert contract(heavy, groups).problem.n_operators == 3


@pytest.mark.parametrize("policy", ["moirai", "diviml"])
def test_merged_chains_that_do_not_fit_together_are_placed_apart(policy: str) -> None:
    ends = np.array([[0, 1], [2, 3], [4, 5]])  # each chain fits a device, but three do not fit two devices
    problem = replace(small_problem(0, operators=6, density=0.0), edges=ends, edge_tensor=np.full(3, -1))
    tight = replace(problem, weight_bytes=np.full(6, 10), memory_bytes=np.full(2, 30))
    objective: Objective = "latency" if policy == "moirai" else "throughput"
    assert place(tight, policy, Request(objective=objective, time_limit_s=5)).spans


@pytest.mark.parametrize("policy", ["milp", "moirai", "heft", "auto"])
def test_what_can_be_placed_nowhere_has_no_answer_and_nothing_is_placed_at_once(policy: str) -> None:
    problem = small_problem(1, operators=5, colocated=True)
    times = problem.operator_ns.copy()
    times[0, 0] = times[1, 1] = UNSUPPORTED  # but 0 and 1 must share a device
    answer = place(replace(problem, operator_ns=times), policy, Request(time_limit_s=5))
    assert answer.status == ("limit" if policy == "heft" else "infeasible")
    assert place(small_problem(1, operators=0), policy).status == "optimal"
