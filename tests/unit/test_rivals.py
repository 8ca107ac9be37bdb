"""The rivals on examples small enough to work by hand, or published with their answers."""

from __future__ import annotations

import numpy as np
import pytest

from moirai_sim.policies.base import Request
from moirai_sim.policies.cpop import Cpop
from moirai_sim.policies.getf import Getf, device_speeds, speed_groups
from moirai_sim.policies.heft import Heft, HeftBlind
from moirai_sim.policies.m_etf import MEtf
from moirai_sim.policies.m_sct import MSct, favourite_children
from moirai_sim.policies.m_topo import MTopo
from moirai_sim.policies.met import Met
from moirai_sim.policies.pipeline_dp import PipelineDp
from moirai_sim.policies.random import Random
from moirai_sim.policies.ranks import mean_operator_ns, mean_transfer_ns, upward_ranks
from moirai_sim.policies.single import Single
from moirai_sim.problem import UNLIMITED, Network, PlacementProblem
from moirai_sim.simulation.replay import replay

REQUEST = Request()


def build(
    times: list[list[int]],
    edges: dict[tuple[int, int], int],
    *,
    weights: list[int] | None = None,
    memory: int = UNLIMITED,
    network: Network = "none",
    colocation: list[int] | None = None,
) -> PlacementProblem:
    """Operators with a time a device, and edges that take the same time between any two devices."""
    n, k = len(times), len(times[0])
    pairs = sorted(edges)
    route = np.zeros((k, k), dtype=np.int64)
    np.fill_diagonal(route, -1)
    return PlacementProblem(
        name="by hand",
        operators=tuple(f"n{i}" for i in range(n)),
        operator_ns=np.array(times, dtype=np.int64),
        weight_bytes=np.array(weights or [0] * n, dtype=np.int64),
        devices=tuple(f"d{d}" for d in range(k)),
        device_type=np.arange(k, dtype=np.int64),
        memory_bytes=np.full(k, memory, dtype=np.int64),
        edges=np.array(pairs, dtype=np.int64).reshape(-1, 2),
        edge_tensor=np.arange(len(pairs), dtype=np.int64),
        tensor_bytes=np.full(len(pairs), -1, dtype=np.int64),
        route_class=route,
        transfer_ns=np.array([[edges[pair]] for pair in pairs], dtype=np.int64).reshape(-1, 1),
        network=network,
        colocation=None if colocation is None else np.array(colocation, dtype=np.int64),
    )


def topcuoglu() -> PlacementProblem:
    """Figure 2 and table 1 of Topcuoglu et al., TPDS 2002: HEFT ends at 80, CPOP at 86."""
    times = [
        [14, 16, 9], [13, 19, 18], [11, 13, 19], [13, 8, 17], [12, 13, 10],
        [13, 16, 9], [7, 15, 11], [5, 11, 14], [18, 12, 20], [21, 7, 16],
    ]  # fmt: skip
    edges = {
        (1, 2): 18, (1, 3): 12, (1, 4): 9, (1, 5): 11, (1, 6): 14, (2, 8): 19, (2, 9): 16, (3, 7): 23, (4, 8): 27,
        (4, 9): 23, (5, 9): 13, (6, 8): 15, (7, 10): 17, (8, 10): 11, (9, 10): 13,
    }  # fmt: skip
    return build(times, {(i - 1, j - 1): cost for (i, j), cost in edges.items()})


def test_ranks_of_the_published_example() -> None:
    problem = topcuoglu()
    rank = upward_ranks(problem, mean_operator_ns(problem), mean_transfer_ns(problem))
    published = [108.000, 77.000, 80.000, 80.000, 69.000, 63.333, 42.667, 35.667, 44.333, 14.667]
    np.testing.assert_allclose(rank, published, atol=5e-4)


@pytest.mark.parametrize(("policy", "makespan"), [(Heft, 80), (HeftBlind, 80), (Cpop, 86)])
def test_makespans_of_the_published_example(policy: type[Heft], makespan: int) -> None:
    problem = topcuoglu()
    assert replay(problem, policy().place(problem, REQUEST)).makespan_ns == makespan


def test_heft_with_ports_sees_the_queue_that_blind_heft_does_not() -> None:
    # A source feeds three operators of 10; each tensor takes 6 to travel. Blind: two leave, ready at 1 + 6 each, so the
    # second waits for the port until 13 and ends at 23. With ports: one leaves, and the others follow the source.
    problem = build([[1, 1, 1]] + [[10] * 3] * 3, {(0, 1): 6, (0, 2): 6, (0, 3): 6}, network="one-port")
    blind, aware = (policy().place(problem, REQUEST) for policy in (HeftBlind, Heft))
    assert replay(problem, blind).makespan_ns == 23
    assert replay(problem, aware).makespan_ns == 21


def test_heft_fills_a_gap() -> None:
    # Long chain 0 -> 1 leaves d0 idle while its tensor is away; 2 has the least rank and fits before nothing else ends.
    problem = build([[2, 9], [2, 9], [3, 9], [9, 4], [4, 9]], {(0, 3): 1, (3, 1): 1}, network="none")
    placement = Heft().place(problem, REQUEST)
    assert placement.device.tolist()[:4] == [0, 0, 0, 1]
    schedule = replay(problem, placement)
    assert schedule.operator_start_ns[2] < schedule.operator_start_ns[1]


def test_met_takes_the_fastest_device_that_has_memory() -> None:
    problem = build([[3, 5], [3, 5], [9, 5]], {}, weights=[2, 2, 1], memory=3)
    assert Met().place(problem, REQUEST).device.tolist() == [0, 1, 1]


def test_single_takes_the_fastest_device_that_holds_all() -> None:
    assert Single().place(build([[3, 2], [3, 5]], {}), REQUEST).device.tolist() == [0, 0]
    too_small = Single().place(build([[3, 2], [3, 5]], {}, weights=[2, 2], memory=3), REQUEST)
    assert (too_small.status, len(too_small.device)) == ("limit", 0)


def test_m_topo_fills_devices_to_a_balanced_share() -> None:
    # Six operators of weight 2 on three devices: the share is 12 / 3 + 2 = 6, so three go to each of the first two.
    chain = {(i, i + 1): 1 for i in range(5)}
    problem = build([[1, 1, 1]] * 6, chain, weights=[2] * 6)
    assert MTopo().place(problem, REQUEST).device.tolist() == [0, 0, 0, 1, 1, 1]


def test_m_etf_takes_the_earliest_start_whatever_the_time() -> None:
    # Both are ready at 0; the first starts at 0 on d0, so the second starts earliest on the slow d1.
    problem = build([[5, 50], [4, 40]], {})
    assert MEtf().place(problem, REQUEST).device.tolist() == [0, 1]


def test_m_etf_waits_for_tensors_and_ports() -> None:
    # 0 on d0 until 2. Its consumers are ready at 2 on d0 and at 2 + 3 on d1: the second would start at 6 on d0, so it
    # goes to d1 at 5.
    problem = build([[2, 2], [4, 4], [4, 4]], {(0, 1): 3, (0, 2): 3}, network="half-duplex")
    placement = MEtf().place(problem, REQUEST)
    assert sorted(placement.device.tolist()[1:]) == [0, 1]
    assert replay(problem, placement).makespan_ns == 9


def test_m_sct_finds_the_favourite_child() -> None:
    # 0 feeds a long chain and a short leaf: only one child can follow without the tensor's 4, and it must be the chain.
    problem = build([[2, 2], [9, 9], [1, 1], [9, 9]], {(0, 1): 4, (0, 2): 4, (1, 3): 4})
    favourite = favourite_children(problem, 10)
    assert favourite is not None
    assert favourite.tolist() == [1, 3, -1, -1]


def test_m_sct_keeps_a_device_for_the_favourite_child() -> None:
    # 0 runs on d0 until 3, 1 on d1 until 5. ETF gives d0 at 3 to 4, until 9, and 2 runs from 9 to 17. SCT keeps d0 for
    # the favourite 2, whose other input arrives at 6; 4 goes to d1 at 6, and 2 ends at 14. 3 takes one more.
    problem = build([[3, 3], [5, 5], [8, 8], [1, 1], [6, 6]], {(0, 2): 9, (1, 2): 1, (0, 4): 3, (2, 3): 9})
    etf, sct = MEtf().place(problem, REQUEST), MSct().place(problem, REQUEST)
    assert etf.device.tolist() == [0, 1, 0, 0, 0]
    assert replay(problem, etf).makespan_ns == 18
    assert sct.device.tolist() == [0, 1, 0, 0, 1]
    assert replay(problem, sct).makespan_ns == 15


def test_getf_speeds_and_groups() -> None:
    problem = build([[2, 4, 4, 64], [2, 4, 4, 64]], {})
    np.testing.assert_allclose(device_speeds(problem), [1, 0.5, 0.5, 1 / 32])
    assert speed_groups(np.array([1, 0.5, 0.5, 1 / 32])).tolist() == [0, 0, 0, -1]  # gamma = log 4 / log log 4 = 4.2
    assert speed_groups(np.array([1.0, 0.4])).tolist() == [0, -1]  # slower than half of the fastest


def test_getf_keeps_off_a_device_that_is_too_slow() -> None:
    problem = build([[2, 4, 4, 64]] * 8, {})
    assert 3 not in Getf().place(problem, REQUEST).device


def test_getf_keeps_operators_to_the_group_of_the_programme() -> None:
    # Speeds 1/2 and 1, so each device is a group. 1 takes 4 at least, so T = 4 needs all of it on d1 and all of 0 on
    # d0; ETF alone gives the first device to 1, which has the higher rank.
    problem = build([[2, 2], [10, 4]], {})
    np.testing.assert_allclose(device_speeds(problem), [0.5, 1])
    assert Getf().place(problem, REQUEST).device.tolist() == [0, 1]
    assert MEtf().place(problem, REQUEST).device.tolist() == [1, 0]


def test_pipeline_dp_cuts_a_chain_where_the_largest_load_is_least() -> None:
    # Cut after 0: 3 | 7 and a transfer of 1; after 1: 4 | 6 and 9; after 2: 6 | 4 and 5; nowhere: 10.
    problem = build([[3, 3], [1, 1], [2, 2], [4, 4]], {(0, 1): 1, (1, 2): 9, (2, 3): 5})
    answer = PipelineDp().place(problem, Request(objective="throughput"))
    assert answer.provenance["largest_load_ns"] == 6
    assert answer.device.tolist() in ([0, 0, 0, 1], [1, 1, 1, 0])


def test_placeto_learns_to_part_two_operators() -> None:
    # Together they take 10, apart 5; a walk at random ends at 10 or 5, so at 0.75 of the start on average.
    pytest.importorskip("torch")
    from moirai_sim.policies.placeto_agent import Agent, Family, train

    family = Family([build([[5, 5], [5, 5]], {})], [np.array([0, 0])])
    curve = train(Agent(2, seed=0), family, iterations=60, seed=0)
    assert family.best_ns[0] == 5
    assert sorted(family.best_device[0].tolist()) == [0, 1]
    assert np.mean(curve[-10:]) < 0.6


def test_colocated_operators_stay_together_in_every_rival() -> None:
    problem = build([[4, 5]] * 5, {(0, 1): 1, (1, 2): 1, (0, 3): 1, (3, 4): 1}, colocation=[-1, 7, -1, 7, 7])
    for policy in (Cpop, Getf, Heft, HeftBlind, MEtf, MSct, MTopo, Met, Random, Single):
        device = policy().place(problem, REQUEST).device
        assert len({int(device[i]) for i in (1, 3, 4)}) == 1, policy.name


def test_random_is_repeatable_and_depends_on_the_seed() -> None:
    problem = build([[1, 1]] * 40, {})
    one, same, other = (Random().place(problem, Request(seed=seed)).device for seed in (1, 1, 2))
    assert one.tolist() == same.tolist() != other.tolist()


@pytest.mark.parametrize(("network", "home"), [("one-port", 0), ("half-duplex", 1)])
def test_heft_sends_while_it_receives_where_ports_do(network: Network, home: int) -> None:
    """The tensor for n3 can come to d0 while that of n0 leaves it (1 to 11), unless both need the same port."""
    problem = build([[1, 100], [100, 1], [100, 1], [1, 8]], {(0, 2): 10, (1, 3): 4}, network=network)
    answer = Heft().place(problem, REQUEST)
    assert answer.device.tolist() == [0, 1, 1, home]
