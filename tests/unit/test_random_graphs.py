"""Random problems: repeatable, acyclic, and what they say they are."""

from __future__ import annotations

import numpy as np
import pytest

from moirai_sim.errors import InputError
from moirai_sim.instances.random_graphs import layered_edges, layered_problem, random_wiring, wired_problem


@pytest.mark.parametrize("kind", ["erdos-renyi", "watts-strogatz", "barabasi-albert"])
@pytest.mark.parametrize("nodes", [1, 2, 5, 32])
def test_wirings_are_acyclic_and_repeatable(kind: str, nodes: int) -> None:
    edges = random_wiring(kind, nodes, seed=3)
    assert (edges[:, 0] < edges[:, 1]).all()
    np.testing.assert_array_equal(edges, random_wiring(kind, nodes, seed=3))
    problem = wired_problem(kind, nodes, 3, seed=3)
    assert (problem.n_operators, problem.n_devices, len(problem.edges)) == (nodes, 3, len(edges))


def test_wirings_have_the_degrees_of_their_models() -> None:
    assert len(random_wiring("watts-strogatz", 32)) == 32 * 4 / 2
    assert len(random_wiring("barabasi-albert", 32)) == (32 - 5) * 5
    mean = np.mean([len(random_wiring("erdos-renyi", 32, seed=seed)) for seed in range(50)])
    expected, deviation = 0.2 * 32 * 31 / 2, np.sqrt(0.2 * 0.8 * 32 * 31 / 2)
    assert abs(mean - expected) < 4 * deviation / np.sqrt(50)


def test_unknown_wirings_are_refused() -> None:
    with pytest.raises(InputError, match="known: erdos-renyi"):
        random_wiring("small-world", 8)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least one node"):
        random_wiring("erdos-renyi", 0)


def test_layers_lead_to_the_next_and_leave_nobody_out() -> None:
    edges = layered_edges(1000, width=10, degree=2.5, seed=1)
    assert (edges[:, 1] // 10 - edges[:, 0] // 10 == 1).all()
    assert len(np.unique(edges[:, 1])) == 990
    assert 2.0 < len(edges) / 990 < 2.6  # some draws coincide


def test_problems_keep_to_the_ratio_and_the_memory_asked_for() -> None:
    problem = layered_problem(2000, 4, memory_scale=0.4, seed=2)
    assert problem.memory_bytes.tolist() == [int(0.4 * problem.weight_bytes.sum())] * 4
    pairs = problem.route_class[~np.eye(4, dtype=bool)]
    ratio = problem.transfer_ns[:, pairs].mean() / problem.operator_ns.mean()
    assert 0.4 < ratio < 0.6
    assert layered_problem(100, 40, seed=2).transfer_ns.shape[1] == 16
