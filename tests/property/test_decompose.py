"""Series decomposition loses nothing; what it leaves out makes a bound, never an answer; auto is never beaten."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moirai_sim.policies.base import Request
from moirai_sim.policies.cp import Cp
from moirai_sim.policies.decompose import decompose, near_cut_bound_ns
from moirai_sim.policies.modules import ancestors, cut_vertices, modules_of, restrict
from moirai_sim.policies.run import place
from moirai_sim.problem import PlacementProblem
from moirai_sim.simulation.replay import replay
from moirai_sim.testing.brute_force import optimal_makespan_ns
from moirai_sim.testing.problems import small_problem


def _diamonds(seed: int, count: int = 2, *, twin: bool = False) -> PlacementProblem:
    """Fork-joins in series: 0 -> {1, 2} -> 3 -> {4, 5} -> 6 ...; ``twin`` makes them all equal."""
    rng = np.random.default_rng(seed)
    edges = [e for d in range(count) for a in [3 * d] for e in [(a, a + 1), (a, a + 2), (a + 1, a + 3), (a + 2, a + 3)]]
    edges.sort()
    n = 3 * count + 1
    duration, transfer = rng.integers(1, 9, size=(n, 2)), rng.integers(0, 6, size=(len(edges), 4))
    if twin:
        duration[3:] = duration[np.arange(3, n) % 3]
        transfer[4:] = transfer[np.arange(4, len(edges)) % 4]
    base = small_problem(seed, operators=n, density=0.0, network=("none", "one-port", "half-duplex")[seed % 3])
    return replace(
        base,
        operator_ns=duration.astype(np.int64),
        edges=np.array(edges),
        edge_tensor=np.arange(len(edges)),
        tensor_bytes=np.full(len(edges), -1),
        transfer_ns=transfer.astype(np.int64),
    )


def test_cut_vertices_are_those_that_all_work_passes() -> None:
    assert cut_vertices(_diamonds(0)).tolist() == [0, 3, 6]
    passed_by = replace(
        _diamonds(0),
        edges=np.array(sorted([*_diamonds(0).edges.tolist(), [1, 4]])),
        edge_tensor=np.full(9, -1),
    )
    assert cut_vertices(passed_by).tolist() == [0, 6]
    lonely = small_problem(0, operators=4, density=0.0)
    assert cut_vertices(lonely).tolist() == []


@pytest.mark.parametrize("seed", range(9))
def test_series_optimum_is_the_optimum(seed: int) -> None:
    problem = _diamonds(seed)
    expected = optimal_makespan_ns(problem)
    outcome = decompose(problem, upper_ns=10**6, time_limit_s=60)
    assert outcome.bound_ns == outcome.value_ns == expected
    assert outcome.placement is not None
    assert replay(problem, outcome.placement).makespan_ns == expected
    known = decompose(problem, upper_ns=expected, time_limit_s=60)
    assert known.placement is None
    assert known.bound_ns == expected


def test_many_modules_agree_with_the_whole_model_and_equal_ones_are_solved_once() -> None:
    twins = _diamonds(4, count=5, twin=True)
    keys = {module.key() for module in modules_of(twins, cut_vertices(twins))}
    assert len(keys) < 6
    outcome = decompose(twins, upper_ns=10**6, time_limit_s=60)
    whole = Cp().place(twins, Request(time_limit_s=60))
    assert whole.status == "optimal"
    assert outcome.value_ns == whole.lower_bound_ns


@pytest.mark.parametrize("seed", range(8))
def test_near_cut_bound_is_valid(seed: int) -> None:
    # a side branch from 0 to 6 keeps 3 from being a cut vertex
    base = _diamonds(seed)
    edges = np.array(sorted([*base.edges.tolist(), [0, 7], [7, 6]]))
    problem = replace(
        base,
        operators=(*base.operators, "side"),
        operator_ns=np.vstack([base.operator_ns, [[2, 3]]]),
        weight_bytes=np.zeros(8, dtype=np.int64),
        edges=edges,
        edge_tensor=np.arange(10),
        tensor_bytes=np.full(10, -1),
        transfer_ns=np.vstack([base.transfer_ns, base.transfer_ns[:2]]),
    )
    expected = optimal_makespan_ns(problem)
    assert expected is not None
    assert near_cut_bound_ns(problem, upper_ns=10**6, time_limit_s=30) <= expected


def test_restriction_keeps_the_order_through_what_is_left_out() -> None:
    problem = _diamonds(0)
    keep = np.ones(7, dtype=bool)
    keep[[3]] = False
    smaller, kept = restrict(problem, keep)
    assert (ancestors(problem)[np.ix_(kept, kept)] == ancestors(smaller)).all()


@pytest.mark.parametrize("seed", range(6))
def test_no_rival_beats_auto(seed: int) -> None:
    problem = small_problem(
        seed,
        operators=12,
        devices=3,
        density=0.25,
        network=("none", "one-port", "half-duplex")[seed % 3],
        memory=0.5 if seed % 2 else None,
        shared_tensors=seed % 3 == 0,
    )
    request = Request(time_limit_s=2)
    ours = place(problem, "auto", request)
    for rival in ("single", "heft", "cpop", "met", "m-topo", "m-etf", "m-sct", "getf", "random", "moirai"):
        theirs = place(problem, rival, request)
        if theirs.spans:
            assert ours.makespan_ns <= theirs.makespan_ns, rival
