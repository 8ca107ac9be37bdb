"""Repeated blocks over alike servers: the same optimum as without symmetry, valid bounds, and memory respected."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moirai_sim.policies.base import Request
from moirai_sim.policies.decompose import decompose
from moirai_sim.policies.loads import fits
from moirai_sim.policies.repeated import Repeated, repeated
from moirai_sim.policies.repeated_bound import repeated_bound_ns
from moirai_sim.policies.run import place
from moirai_sim.policies.symmetry import servers_of
from moirai_sim.problem import UNLIMITED, Network, PlacementProblem
from moirai_sim.simulation.replay import replay
from moirai_sim.testing.brute_force import optimal_makespan_ns


def _layers(
    seed: int, layers: int, servers: tuple[tuple[int, int], ...], network: Network = "one-port", memory: int = UNLIMITED
) -> PlacementProblem:
    """Return equal diamonds in series on ``servers`` of (type, devices); type 1 is slower; operators weigh 10 bytes."""
    rng = np.random.default_rng(seed)
    diamond = [(0, 1), (0, 2), (1, 3), (2, 3)]
    edges = np.array([(3 * d + a, 3 * d + b) for d in range(layers) for a, b in diamond])
    n = 3 * layers + 1
    of_block = rng.integers(4, 20, size=(3, 1)) * np.array([2, 3])
    duration = np.vstack([of_block[:1], np.tile(of_block, (layers, 1))])
    device_type = np.array([kind for kind, count in servers for _ in range(count)])
    server = np.repeat(np.arange(len(servers)), [count for _, count in servers])
    k = len(server)
    route = np.where(server[:, None] == server, device_type[:, None], 2)  # within a server of a type; between servers
    np.fill_diagonal(route, -1)
    transfer = np.tile(rng.integers(1, 6, size=(4, 1)) * np.array([1, 2, 3]), (layers, 1))
    return PlacementProblem(
        name="layers",
        operators=tuple(f"o{i}" for i in range(n)),
        operator_ns=duration.astype(np.int64),
        weight_bytes=np.full(n, 10),
        devices=tuple(f"d{i}" for i in range(k)),
        device_type=device_type,
        memory_bytes=np.full(k, memory),
        edges=edges,
        edge_tensor=np.arange(len(edges)),
        tensor_bytes=np.full(len(edges), -1),
        route_class=route,
        transfer_ns=transfer.astype(np.int64),
        network=network,
    )


def _blocks(problem: PlacementProblem) -> Repeated:
    blocks = repeated(problem, Request(time_limit_s=60))
    assert blocks is not None
    return blocks


def test_servers_are_told_apart_by_what_they_cost() -> None:
    problem = _layers(0, 3, ((0, 2), (1, 2), (0, 2), (0, 1)))
    assert [(server.devices, server.kind) for server in servers_of(problem)] == [
        ((0, 1), 0), ((2, 3), 1), ((4, 5), 0), ((6,), 2),
    ]  # fmt: skip
    smaller = replace(problem, memory_bytes=np.array([9, 9, 9, 9, 8, 8, 9]))
    assert [server.kind for server in servers_of(smaller)] == [0, 1, 2, 3]
    route = problem.route_class.copy()
    route[0:2, 2:4] = route[2:4, 0:2] = 0  # the first server is nearer to the second than the third is
    assert [server.kind for server in servers_of(replace(problem, route_class=route))] == [0, 1, 2, 3]


@pytest.mark.parametrize("network", ["none", "one-port", "half-duplex"])
@pytest.mark.parametrize("seed", range(4))
def test_same_optimum_as_without_symmetry(seed: int, network: Network) -> None:
    problem = _layers(seed, 6, ((0, 3), (1, 3)), network)
    exact = decompose(problem, upper_ns=10**6, time_limit_s=60)
    assert exact.placement is not None
    blocks = _blocks(problem)
    value = replay(problem, blocks.place()).makespan_ns
    bound = repeated_bound_ns(blocks, 60)
    assert bound <= exact.value_ns <= value
    assert value == exact.value_ns  # one server is best here, and its devices can be swapped
    assert len(blocks.example) == 2  # the first operator, and the layers


@pytest.mark.parametrize("seed", range(6))
def test_bound_holds_under_brute_force(seed: int) -> None:
    servers = ((0, 1), (1, 1)) if seed % 2 else ((0, 2),)
    problem = _layers(seed, 2, servers, ("none", "one-port", "half-duplex")[seed % 3])
    blocks = _blocks(problem)
    optimum = optimal_makespan_ns(problem)
    assert optimum is not None
    assert 0 < repeated_bound_ns(blocks, 60) <= optimum <= replay(problem, blocks.place()).makespan_ns


@pytest.mark.parametrize("memory", [35, 45, 60])
@pytest.mark.parametrize("seed", range(2))
def test_layers_are_shared_out_under_memory(seed: int, memory: int) -> None:
    problem = _layers(seed, 12, ((0, 4), (1, 4), (0, 4), (1, 4)), memory=memory)
    answer = _blocks(problem).place()
    assert len(answer.device) == problem.n_operators
    assert fits(problem, answer.device)


@pytest.mark.parametrize("memory", [35, 60])
def test_auto_is_no_worse_than_the_layers_shared_out(memory: int) -> None:
    problem = _layers(0, 12, ((0, 4), (1, 4), (0, 4), (1, 4)), memory=memory)
    answer = _blocks(problem).place()
    timeline = place(problem, "auto", Request(time_limit_s=1.5))
    assert timeline.lower_bound_ns <= timeline.makespan_ns <= replay(problem, answer).makespan_ns


def test_no_room_is_said() -> None:
    problem = _layers(0, 12, ((0, 2), (1, 2)), memory=60)  # 370 bytes, room for 240
    assert len(_blocks(problem).place().device) == 0


def test_what_does_not_repeat_is_left_alone() -> None:
    problem = _layers(0, 4, ((0, 2),))
    duration = problem.operator_ns + np.arange(problem.n_operators)[:, None]
    assert repeated(replace(problem, operator_ns=duration), Request()) is None
    assert repeated(replace(problem, network="fair"), Request()) is None
