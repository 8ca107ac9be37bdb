"""The compiled replay: equal to the SimPy engine to the nanosecond, right by the independent check."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moirai_sim.errors import InputError
from moirai_sim.placement import Placement
from moirai_sim.problem import Network, PlacementProblem
from moirai_sim.simulation.engine import simulate_schedule
from moirai_sim.simulation.list_scheduling import Evaluator, makespan
from moirai_sim.simulation.replay import replay
from moirai_sim.simulation.schedule import Schedule, placement_from_schedule, timeline_from_schedule
from moirai_sim.testing.problems import small_problem
from moirai_sim.verify import verify

FIELDS = tuple(Schedule.__dataclass_fields__)


def _placed(seed: int, network: Network, shared: bool, operators: int) -> tuple[PlacementProblem, Placement]:
    problem = small_problem(
        seed, operators=operators, devices=1 + seed % 5, density=0.25, network=network, shared_tensors=shared
    )
    device = np.random.default_rng(seed).integers(0, problem.n_devices, operators)
    return problem, Placement(device=device)


def _same(one: Schedule, other: Schedule) -> None:
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


cases = given(
    seed=st.integers(0, 2**32 - 1),
    network=st.sampled_from(["none", "one-port", "half-duplex"]),
    shared=st.booleans(),
    operators=st.integers(1, 30),
)


@settings(max_examples=300, deadline=None)
@cases
def test_replay_equals_the_simpy_engine(seed: int, network: Network, shared: bool, operators: int) -> None:
    problem, placement = _placed(seed, network, shared, operators)
    greedy = replay(problem, placement)
    _same(greedy, simulate_schedule(problem, placement))
    ordered = placement_from_schedule(problem, placement, greedy)
    _same(replay(problem, ordered), simulate_schedule(problem, ordered))
    positions = Placement(device=placement.device, order=ordered.order)  # transfers by their producers
    _same(replay(problem, positions), simulate_schedule(problem, positions))


@settings(max_examples=150, deadline=None)
@cases
def test_what_the_replay_says_is_right(seed: int, network: Network, shared: bool, operators: int) -> None:
    problem, placement = _placed(seed, network, shared, operators)
    schedule = replay(problem, placement)
    assert verify(problem.without_memory(), timeline_from_schedule(problem, placement, schedule)) == []
    evaluator = Evaluator(problem)
    assert evaluator.makespan_ns(placement.device) == schedule.makespan_ns
    assert evaluator.makespans_ns(np.stack([placement.device] * 2)).tolist() == [schedule.makespan_ns] * 2
    again = replay(problem, placement_from_schedule(problem, placement, schedule))
    assert (again.operator_start_ns <= schedule.operator_start_ns).all()


@settings(max_examples=100, deadline=None)
@cases
def test_a_run_that_gives_up_says_a_bound_above_the_limit(
    seed: int, network: Network, shared: bool, operators: int
) -> None:
    problem, placement = _placed(seed, network, shared, operators)
    evaluator = Evaluator(problem)
    true = evaluator.makespan_ns(placement.device)
    for limit in range(true + 2):
        value = makespan(evaluator.arrays, evaluator.workspace, placement.device, limit)
        assert value == true if limit >= true else limit < value <= true


def test_a_priority_decides_who_goes_first() -> None:
    problem = small_problem(3, operators=2, devices=1, density=0.0)
    evaluator, device = Evaluator(problem), np.zeros(2, dtype=np.int64)
    total = int(problem.operator_ns.sum())
    for first in (0, 1):
        priority = np.array([1, 0]) if first == 0 else np.array([0, 1])
        assert evaluator.makespan_ns(device, priority) == total
        assert evaluator.workspace.operators["start"][first] == 0
        assert evaluator.workspace.operators["start"][1 - first] == problem.operator_ns[first, 0]


def test_many_devices_and_ties_in_a_wide_graph() -> None:
    problem = small_problem(11, operators=300, devices=40, density=0.03, shared_tensors=True)
    device = np.random.default_rng(1).integers(0, 40, 300)
    _same(replay(problem, Placement(device=device)), simulate_schedule(problem, Placement(device=device)))


def test_orders_that_contradict_the_edges_are_refused() -> None:
    problem = small_problem(0, operators=4, density=1.0)
    with pytest.raises(InputError, match="contradict"):
        replay(problem, Placement(device=np.zeros(4, dtype=np.int64), order=np.array([3, 2, 1, 0])))


def test_a_fair_network_is_refused() -> None:
    problem = small_problem(0, operators=4).with_network("fair")
    with pytest.raises(InputError, match="simpy"):
        replay(problem, Placement(device=np.zeros(4, dtype=np.int64)))


def test_a_device_that_cannot_run_an_operator_is_named() -> None:
    problem = small_problem(0, operators=4, unsupported=True)
    with pytest.raises(InputError, match="cannot run it"):
        replay(problem, Placement(device=np.zeros(4, dtype=np.int64)))
