"""One request against closed forms: chains, fork-join, pipelines, shared links, collectives, anomalies, memory."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moirai_sim.clusters.cluster import Link
from moirai_sim.errors import InputError
from moirai_sim.placement import Placement
from moirai_sim.policies.loads import period_ns
from moirai_sim.simulation.corrections import COOLING_NS, carried, contended, overlap, rested, split
from moirai_sim.simulation.engine import simulate, simulate_schedule
from moirai_sim.simulation.explain import critical_path, explain, faster
from moirai_sim.simulation.faults import losses
from moirai_sim.simulation.memory import energy_joules, memory_use
from moirai_sim.simulation.options import Fault, SimulationOptions
from moirai_sim.simulation.workloads import at_once, serve
from moirai_sim.verify import verify

NETWORKS = ["none", "one-port", "half-duplex", "fair"]


def on(*devices: int) -> Placement:
    return Placement(np.array(devices, dtype=np.int64))


@pytest.mark.parametrize("network", NETWORKS)
def test_a_chain_over_devices_is_the_sum_of_its_parts(build, network) -> None:
    problem = build([10, 20, 30], [(0, 1, 5), (1, 2, 7)], 3, network)
    assert simulate(problem, on(0, 1, 2)).makespan_ns == 10 + 5 + 20 + 7 + 30
    assert simulate(problem, on(0, 0, 0)).makespan_ns == 60


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ("none", 10 + 8 + 20 + 8 + 5),  # all transfers at once
        ("one-port", 10 + 3 * 8 + 20 + 8 + 5),  # the forks leave one after the other, the joins arrive one by one
        ("half-duplex", 10 + 3 * 8 + 20 + 8 + 5),
        ("fair", 10 + 3 * 8 + 20 + 3 * 8 + 5),  # three flows at a third of the link, out and back
    ],
)
def test_fork_and_join(build, network, expected) -> None:
    edges = [(0, j, 8) for j in (1, 2, 3)] + [(j, 4, 8) for j in (1, 2, 3)]
    assert simulate(build([10, 20, 20, 20, 5], edges, 4, network), on(0, 1, 2, 3, 0)).makespan_ns == expected


@pytest.mark.parametrize("micro_batches", [1, 2, 7])
def test_a_pipeline_fills_and_drains(build, micro_batches) -> None:
    """Equal stages of t and transfers of c < t: (stages + micro-batches - 1) t + (stages - 1) c."""
    stages, t, c = 4, 50, 20
    problem = build([t] * stages, [(i, i + 1, c) for i in range(stages - 1)], stages)
    service = serve(problem, on(*range(stages)), arrivals=at_once(micro_batches), warm_up=0)
    assert service.done_ns.max() == (stages + micro_batches - 1) * t + (stages - 1) * c


@pytest.mark.parametrize(("shared", "expected"), [(1, 100), (2, 200), (5, 500)])
def test_flows_share_one_link_equally(build, shared, expected) -> None:
    """n equal flows out of one device each get 1/n of its link."""
    problem = build([0] * (shared + 1), [(0, j, 100) for j in range(1, shared + 1)], shared + 1, "fair")
    spans = [s for s in simulate(problem, on(*range(shared + 1))).spans if s.kind == "transfer"]
    assert {span.end_ns for span in spans} == {expected}


def test_a_short_flow_speeds_up_the_long_one_it_leaves_behind(build) -> None:
    """100 and 300 bytes at 1 byte a ns: half rate until 200, then the long one has 200 bytes left alone: 400."""
    problem = build([0, 0, 0], [(0, 1, 100), (0, 2, 300)], 3, "fair")
    spans = {s.target: s.end_ns for s in simulate(problem, on(0, 1, 2)).spans if s.kind == "transfer"}
    assert spans == {"d1": 200, "d2": 400}


@pytest.mark.parametrize("engines", [0, 1])
def test_what_waits_for_a_device_that_fails_is_lost(build, engines) -> None:
    """d0 sends to d1 and then to d2, one after the other, and fails during the first."""
    problem = build([1, 1, 1], [(0, 1, 10), (0, 2, 10)], 3, "none")
    options = SimulationOptions(copy_engines=engines, faults=(Fault("d0", 5),))
    assert losses(problem, on(0, 1, 2), options).lost == ("o1", "o2")


@pytest.mark.parametrize(("duplex", "expected"), [("full", 100), ("half", 200)])
def test_opposite_flows_share_a_half_duplex_link_only(build, duplex, expected) -> None:
    links = [Link("cable", ("d0", "d1"), 1e9, 0, duplex)]
    problem = build([0] * 4, [(0, 1, 100), (2, 3, 100)], 2, "fair", links=links)
    assert simulate(problem, on(0, 1, 1, 0)).makespan_ns == expected


def test_a_host_bus_is_shared_by_the_devices_on_it(build) -> None:
    """Two pairs of devices, whose flows meet only on a bus of half their rate each."""
    links = [Link(f"l{k}", (f"d{k}", "hub" if k < 2 else "far"), 1e9) for k in range(4)]
    links.append(Link("bus", ("hub", "far"), 1e9))
    problem = build([0] * 4, [(0, 2, 100), (1, 3, 100)], 4, "fair", links=links)
    problem.cluster.__dict__.pop("graph", None)
    assert simulate(problem, on(0, 1, 2, 3)).makespan_ns == 200


def test_latency_is_paid_once_and_takes_no_bandwidth(build) -> None:
    links = [Link(f"l{k}", (f"d{k}", "hub"), 1e9, 25) for k in range(2)]
    problem = build([0] * 4, [(0, 2, 100), (1, 3, 100)], 2, "fair", links=links, latency=50)
    assert simulate(problem, on(0, 0, 1, 1)).makespan_ns == 200 + 50


@pytest.mark.parametrize("more", [0, 40])
def test_tensors_of_one_connection_follow_each_other(build, more) -> None:
    """Two of 100 bytes from d0 to d1, one of 50 to d2 over the same link, 10 ns long.

    One after the other, the first and that to d2 have half of the link each until 100, and then the first has it alone
    until 150, when the second begins. What a tensor takes more delays nobody else. Shared, each has a third until 150.
    """
    problem = build([0] * 4, [(0, 1, 100), (0, 2, 100), (0, 3, 50)], 3, "fair", latency=10 + more)
    links = tuple(replace(link, latency_ns=5) for link in problem.cluster.links)
    problem = replace(problem, cluster=replace(problem.cluster, links=links))
    placement = on(0, 1, 1, 2)

    def arrivals(options: SimulationOptions) -> list[int]:
        return simulate_schedule(problem, placement, options=options).transfer_end_ns.tolist()

    assert arrivals(SimulationOptions(in_order=True)) == [160 + more, 260 + more, 110 + more]
    if not more:
        assert arrivals(SimulationOptions()) == [260, 260, 160]


@pytest.mark.parametrize("engines", [None, 2])
@pytest.mark.parametrize(("when", "lost"), [(50, ("o1", "o2")), (150, ("o2",))])
def test_a_connection_of_a_device_that_fails_delivers_nothing_more(build, engines, when, lost) -> None:
    problem = build([0] * 3, [(0, 1, 100), (0, 2, 100)], 2, "fair")
    options = SimulationOptions(in_order=True, copy_engines=engines, faults=(Fault("d0", when),))
    assert losses(problem, on(0, 1, 1), options).lost == lost


def test_what_has_no_bytes_waits_in_line_as_well(build) -> None:
    problem = build([0] * 4, [(0, 1, 100), (0, 2, 0), (0, 3, 50)], 2, "fair")
    found = simulate_schedule(problem, on(0, 1, 1, 1), options=SimulationOptions(in_order=True))
    assert found.transfer_end_ns.tolist() == [100, 100, 150]


def test_a_core_that_sends_and_receives_computes_less(build) -> None:
    """d0 sends 100 bytes during half of its second operator, to d1, whose own runs for a quarter of that time."""
    problem = build([10, 200, 35, 5], [(0, 1, 0), (0, 3, 100)], 2, "fair")
    placement = on(0, 0, 1, 1)
    spent = carried(problem, placement, (0, 1), 0.5, 0.2).operator_ns[:, 0] - problem.operator_ns[:, 0]
    assert spent.tolist() == [0, 50, 5, 0], "the second device stands still from 35 on"
    both = carried(problem, placement, (0, 0), 0.5, 0.2).operator_ns[:, 0] - problem.operator_ns[:, 0]
    assert both.tolist() == [0, 70, 18, 0], "one core for both: each pays for what either moves meanwhile"


@pytest.mark.parametrize("n", [2, 4, 8])
def test_ring_all_reduce(build, n) -> None:
    """2 (n - 1) steps, in each of which every device sends a chunk to the next (Patarasuk and Yuan 2009)."""
    chunk, steps = 60, 2 * (n - 1)
    number = np.arange((steps + 1) * n).reshape(steps + 1, n)
    edges = [(int(number[s, k]), int(number[s + 1, (k + 1) % n]), chunk) for s in range(steps) for k in range(n)]
    for network in ("none", "one-port", "fair"):
        problem = build([0] * number.size, edges, n, network)
        assert simulate(problem, Placement(np.tile(np.arange(n), steps + 1))).makespan_ns == steps * chunk


def graham(build, times: list[int], devices: int, order: list[int], edges) -> int:
    """Return the makespan of list scheduling in a given order, each operator on the device that is free first."""
    free, ends, placed = [0] * devices, {}, [0] * len(times)
    for i in order:
        ready = max((ends[a] for a, b, _ in edges if b == i), default=0)
        k = min(range(devices), key=lambda k: (max(free[k], ready), k))
        placed[i] = k
        ends[i] = free[k] = max(free[k], ready) + times[i]
    problem = build(times, edges, devices, "none")
    return simulate(problem, Placement(np.array(placed), order=np.argsort(order).astype(np.int64))).makespan_ns


def test_grahams_anomaly(build) -> None:
    """Graham 1969, figure 1: nine tasks, three machines, makespan 12; a unit shorter each, and it is 13."""
    edges = [(0, 8, 0), (3, 4, 0), (3, 5, 0), (3, 6, 0), (3, 7, 0)]
    times = [3, 2, 2, 2, 4, 4, 4, 4, 9]

    def event_driven(times: list[int]) -> list[int]:
        """List scheduling proper: whenever a machine is free it takes the first task of the list that is ready."""
        done, running, free, now, order = {}, [], 3, 0, []
        while len(order) < 9 or running:
            for i in range(9):
                ready = all(a in done for a, b, _ in edges if b == i)
                if free and i not in order and ready:
                    order.append(i)
                    running.append((now + times[i], i))
                    free -= 1
            now = min(running)[0]
            for end, i in [r for r in running if r[0] == now]:
                running.remove((end, i))
                done[i] = end
                free += 1
        return order

    assert graham(build, times, 3, event_driven(times), edges) == 12
    shorter = [t - 1 for t in times]
    assert graham(build, shorter, 3, event_driven(shorter), edges) == 13


def test_memory_of_a_u_net_is_the_sum_of_its_skips(build) -> None:
    """Encoder outputs are held until the decoder level that reads them: at the bottom all of them are there at once."""
    levels = [64, 32, 16, 8]
    n = len(levels)
    edges = [(i, i + 1, levels[i]) for i in range(n - 1)]  # down
    edges += [(n - 1 + i, n + i, levels[n - 1 - i]) for i in range(n - 1)]  # up
    skips = {(i, 2 * n - 2 - i): levels[i] for i in range(n - 1)}
    # One tensor goes down and across: give both edges the same tensor.
    problem = build([10] * (2 * n - 1), edges + [(*e, size) for e, size in skips.items()], weights=[100] * (2 * n - 1))
    tensor, size = problem.edges[:, 0].copy(), np.array([*levels, *levels[-2::-1]])
    shared = type(problem)(
        **{f: getattr(problem, f) for f in ("name", "operators", "operator_ns", "weight_bytes", "devices")},
        device_type=problem.device_type, memory_bytes=problem.memory_bytes, edges=problem.edges, edge_tensor=tensor,
        tensor_bytes=size, route_class=problem.route_class, transfer_ns=size.reshape(-1, 1),
    )  # fmt: skip
    timeline = simulate(shared, on(*[0] * (2 * n - 1)))
    use = memory_use(shared, timeline)
    # While o4 runs: every encoder output, the bottom's, its own. Then 16 of the skip and 8 go, and 32 come.
    assert dict(use.curve["d0"])[40] == 700 + 64 + 32 + 16 + 8 + 16
    assert use.peak_bytes["d0"] == 700 + 64 + 32 + 16 + 32
    assert use.out_of_memory is None
    tight = type(problem)(**{f: getattr(shared, f) for f in shared.__dataclass_fields__} | {
        "memory_bytes": np.array([843])})  # fmt: skip
    failure = memory_use(tight, timeline).out_of_memory
    assert failure is not None
    assert (failure.name, failure.at_ns, failure.needed_bytes) == ("o5", 50, 844)


def test_memory_of_a_transfer_stands_on_both_sides(build) -> None:
    problem = build([10, 10], [(0, 1, 40)], 2)
    use = memory_use(problem, simulate(problem, on(0, 1)))
    assert use.curve == {"d0": [(0, 40), (50, 0)], "d1": [(0, 0), (10, 40), (60, 0)]}


def test_a_transfer_to_a_device_that_is_not_there_is_told(build) -> None:
    problem = build([10, 10], [(0, 1, 40)], 2, "fair")
    right = simulate(problem, on(0, 1))
    assert verify(problem, right) == []
    for end in ("source", "target"):
        spans = [replace(span, **{end: "nosuch"}) if span.kind == "transfer" else span for span in right.spans]
        found = verify(problem, replace(right, spans=spans))
        assert "transfer 'o0->o1' names 'nosuch', which is no device of the cluster" in found


def test_orders_that_contradict_each_other_are_no_loss_of_a_fault(build) -> None:
    stuck = Placement(np.array([0, 0]), order=np.array([1, 0]))
    with pytest.raises(InputError, match="orders contradict"):
        losses(build([10, 10], [(0, 1, 5)]), stuck, SimulationOptions(faults=(Fault("d0", 10**6),)))


def test_energy(build) -> None:
    """10 W idle for 60 ns, and 100 W more while it computes."""
    cluster = build([10, 10], [(0, 1, 40)], 2).cluster
    assert energy_joules(cluster, {"d0": 10, "d1": 0}, 60) == {"d0": (600 + 1000) / 1e9, "d1": 600 / 1e9}
    assert energy_joules(None, {"d0": 10}, 60) == {"d0": None}


def test_two_tensors_of_one_size_are_held_for_their_own_transfers(build) -> None:
    problem = build([10, 10], [(0, 1, 100), (0, 1, 100)], 2, "one-port")
    use = memory_use(problem, simulate(problem, on(0, 1)))
    assert use.curve["d0"] == [(0, 200), (110, 100), (210, 0)]
    assert use.curve["d1"] == [(0, 0), (10, 100), (110, 200), (220, 0)]


def test_launches(build) -> None:
    """n operators of d, launches of l: waiting n (d + l); ahead l + n d where d >= l, and n l + d where d < l."""
    for d, launch in ((50, 20), (10, 20)):
        problem = build([d] * 5, [(i, i + 1, 0) for i in range(4)])
        waits = simulate(problem, on(*[0] * 5), options=SimulationOptions(launch_ns=launch, asynchronous_launch=False))
        ahead = simulate(problem, on(*[0] * 5), options=SimulationOptions(launch_ns=launch))
        assert waits.makespan_ns == 5 * (d + launch)
        assert ahead.makespan_ns == (launch + 5 * d if d >= launch else 5 * launch + d)


@pytest.mark.parametrize(("streams", "expected"), [(1, 60), (2, 30), (3, 20), (6, 10), (7, 10)])
def test_streams_run_side_by_side(build, streams, expected) -> None:
    options = SimulationOptions(streams=streams)
    assert simulate(build([10] * 6), on(*[0] * 6), options=options).makespan_ns == expected


def test_copy_engines(build) -> None:
    """Two tensors to two devices: at once without a limit, in turn with one engine; and none stops the computing."""
    problem = build([0, 30, 50, 50], [(0, 2, 10), (0, 3, 10)], 3, "none")
    placement = on(0, 0, 1, 2)
    ends = {
        engines: [s.end_ns for s in sorted(simulate(problem, placement, options=SimulationOptions(copy_engines=engines))
                  .spans, key=lambda s: s.name) if s.kind == "transfer"]
        for engines in (None, 1, 2)
    }  # fmt: skip
    assert ends == {None: [10, 10], 1: [10, 20], 2: [10, 10]}
    busy = simulate(problem, placement, options=SimulationOptions(copy_engines=0))
    assert busy.makespan_ns == 30 + 10 + 10 + 50  # the long operator started first and holds the device


def test_a_transfer_that_others_let_through_waits_for_no_event(build) -> None:
    """Of three devices each pair exchanges a tensor at 10: two engines a device carry all at once, in any order."""
    problem = build([10, 10, 30, 20, 10], [(1, 2, 10), (0, 3, 10), (0, 4, 10)], 3, "none")
    timeline = simulate(problem, on(0, 1, 2, 2, 1), options=SimulationOptions(copy_engines=2))
    assert [span.start_ns for span in timeline.spans if span.kind == "transfer"] == [10, 10, 10]


@pytest.mark.parametrize(("share", "expected"), [(0.0, 5 + 10 + 7), (0.5, 12 + 7 + 5), (1.0, 12 + 7 + 10)])
def test_a_reader_that_copies_is_busy_meanwhile(build, share, expected) -> None:
    """A tensor of 10 leaves at 5 for a device that works until 12; its reader takes 7 and copies its share itself."""
    problem = build([5, 7, 12], [(0, 1, 10)], 2, "one-port")
    options = SimulationOptions(reader_share=share)
    assert simulate(problem, on(0, 1, 1), options=options).makespan_ns == expected


def test_parts_cost_where_they_begin(build) -> None:
    """A chain of four on two devices is three parts; a transfer of 10 holds a part of 4, which moves to its reader."""
    problem = build([5, 6, 7, 8], [(0, 1, 10), (1, 2, 10), (2, 3, 10)], 2, "one-port")
    options = SimulationOptions(part_ns=4)
    assert simulate(problem, on(0, 0, 1, 0), options=options).makespan_ns == 4 + 5 + 6 + 6 + 4 + 7 + 6 + 4 + 8
    assert simulate(problem, on(0, 0, 0, 0), options=options).makespan_ns == 4 + 26
    unequal = SimulationOptions(part_ns=(6, 2))
    assert simulate(problem, on(0, 0, 1, 0), options=unequal).makespan_ns == 6 + 5 + 6 + 6 + 2 + 7 + 6 + 6 + 8
    both = build([5, 6, 7], [(0, 1, 10), (0, 2, 10)], 2, "one-port")
    shared = replace(
        both, edge_tensor=np.array([0, 0]), tensor_bytes=both.tensor_bytes[:1], transfer_ns=both.transfer_ns[:1]
    )
    assert simulate(shared, on(0, 1, 1), options=options).makespan_ns == 4 + 5 + 6 + 4 + 6 + 7, "one arrival, one part"


def test_devices_that_compute_together_slow_each_other(build) -> None:
    """Of an operator of 10 beside one of 40, all is beside the other; of the 40 a quarter is."""
    problem = build([10, 40], [], 2)
    placement = on(0, 1)
    share = overlap(problem, placement)
    assert share.tolist() == [[0.0, 1.0], [0.25, 0.0]]
    assert simulate(contended(problem, placement, share, np.full((2, 2), 1.2)), placement).makespan_ns == 42
    assert not overlap(problem, on(0, 0)).any()
    assert np.array_equal(contended(problem, placement, share, np.ones((2, 2))).operator_ns, problem.operator_ns)


@pytest.mark.parametrize("seed", range(20))
def test_overlap_is_what_counting_pairs_gives(build, seed) -> None:
    """With operators that take no time before, after and between those that begin at the same instant."""
    rng = np.random.default_rng(seed)
    times = (rng.integers(0, 30, 20) * (rng.random(20) < 0.6)).tolist()
    problem = build(times, [], 3)
    placement = Placement(rng.integers(0, 3, 20), order=rng.permutation(20))
    schedule = simulate_schedule(problem, placement)
    start, end = schedule.operator_start_ns, schedule.operator_end_ns
    expected = np.zeros((20, 3))
    for i, j in itertools.permutations(range(20), 2):
        both = max(0, min(end[i], end[j]) - max(start[i], start[j]))
        if placement.device[i] != placement.device[j] and times[i]:
            expected[i, placement.device[j]] += both / times[i]
    assert overlap(problem, placement) == pytest.approx(expected)


def test_devices_on_one_core_halve_each_other_and_leave_the_third_alone(build) -> None:
    problem = build([10, 10, 10], [], 3)
    factor = np.array([[1.0, 1.0, 2.0], [1.0, 1.0, 1.0], [2.0, 1.0, 1.0]])
    placement = on(0, 1, 2)
    found = contended(problem, placement, overlap(problem, placement), factor)
    assert found.operator_ns[np.arange(3), found.device_type].tolist() == [20, 10, 20]


def test_a_device_that_waited_starts_cold(build) -> None:
    """Of 10, 20 and 5 ms in turn the first follows the last of the request before; the others waited 15 and 20 ms."""
    problem = build([10**7, 2 * 10**7, 5 * 10**6], [(0, 1, 0), (1, 2, 0)], 2)
    placement = on(0, 1, 0)
    found = rested(problem, placement, [1000, 2000])
    more = found.operator_ns[np.arange(3), found.device_type[[0, 1, 0]]] - [10**7, 2 * 10**7, 5 * 10**6]
    waits = np.array([0, 15, 20]) * 1e6
    assert more == pytest.approx(np.array([1000, 2000, 1000]) * (1 - np.exp(-waits / COOLING_NS)), abs=1)
    alone = rested(problem, on(0, 0, 0), [1000, 2000])
    assert np.array_equal(alone.operator_ns, problem.operator_ns), "a device that never waits stays warm"


def test_one_copy_engine_is_a_half_duplex_port(build) -> None:
    rng = np.random.default_rng(5)
    pairs = sorted({tuple(sorted(map(int, rng.choice(30, 2, replace=False)))) for _ in range(60)})
    edges = [(a, b, int(rng.integers(1, 20))) for a, b in pairs]
    placement = Placement(rng.integers(0, 4, 30))
    times = rng.integers(1, 30, 30).tolist()
    half = simulate_schedule(build(times, edges, 4, "half-duplex"), placement)
    one = simulate_schedule(build(times, edges, 4, "none"), placement, options=SimulationOptions(copy_engines=1))
    assert np.array_equal(half.transfer_start_ns, one.transfer_start_ns)
    assert np.array_equal(half.operator_start_ns, one.operator_start_ns)


def test_only_devices_with_several_parts_compute_in_the_memory_of_each(build) -> None:
    """d0 runs o0, and o2 once o1 is there: two parts; d1 runs one."""
    problem = build([1000, 2000, 3000], [(0, 1, 10), (1, 2, 10)], 2)
    share = [0.08, 0.5]
    for parts, paid in ((1, 0.08), (2, 0.08), (3, 0.04), (5, 0.02)):
        found = split(problem, on(0, 1, 0), share, [parts, 9])
        assert found.operator_ns[:, 0].tolist() == [round(1000 * (1 + paid)), 2000, round(3000 * (1 + paid))]
    for placement in (on(0, 0, 1), on(0, 0, 0)):
        assert np.array_equal(split(problem, placement, share, [3, 3]).operator_ns, problem.operator_ns)


def test_a_device_that_slows_down_finishes_the_rest_at_the_new_speed(build) -> None:
    problem = build([100, 50], [(0, 1, 10)], 2)
    found = losses(problem, on(0, 1), SimulationOptions(faults=(Fault("d0", 40, 0.5),)))
    assert (found.healthy_ns, found.makespan_ns, found.delay_ns) == (160, 40 + 120 + 10 + 50, 60)


def test_a_moved_end_is_moved_once(build) -> None:
    """At half speed from 40 on, d0 ends at 160; d1 ends something at that very moment, which must not matter."""
    problem = build([100, 160], devices=2)
    found = losses(problem, on(0, 1), SimulationOptions(faults=(Fault("d0", 40, 0.5),)))
    assert found.makespan_ns == 160


def test_a_device_that_fails_as_a_flow_ends(build) -> None:
    problem = build([10, 5], [(0, 1, 100)], 2, "fair")
    found = losses(problem, on(0, 1), SimulationOptions(faults=(Fault("d1", 110),)))
    assert found.lost == ("o1",)


def test_a_device_that_fails_takes_its_work_and_all_that_reads_it(build) -> None:
    problem = build([100, 50, 30], [(0, 1, 10)], 3)
    found = losses(problem, on(0, 1, 2), SimulationOptions(faults=(Fault("d0", 40),)))
    assert found.makespan_ns is None
    assert found.lost == ("o0", "o1")
    assert found.done_share == pytest.approx(30 / 180)


@pytest.mark.parametrize(("speed", "expected"), [(0.5, 10 + 20 + 160 + 5), (2.0, 10 + 100 + 5), (0.0, None)])
def test_a_link_that_changes_its_bandwidth(build, speed, expected) -> None:
    """100 bytes from 10 on; at 30 the link changes. The data sheet's rate stays the flow's own limit."""
    problem = build([10, 5], [(0, 1, 100)], 2, "fair")
    found = losses(problem, on(0, 1), SimulationOptions(faults=(Fault("l0", 30, speed),)))
    assert found.makespan_ns == expected


def test_the_critical_path_has_no_gaps_and_names_its_causes(build) -> None:
    problem = build([10, 20, 30, 5], [(0, 2, 8), (1, 3, 9)], 2)
    steps = critical_path(simulate(problem, on(0, 0, 1, 1)))
    assert [(s.name, s.start_ns, s.end_ns) for s in steps] == [("o0", 0, 10), ("o0->o2", 10, 18), ("o2", 18, 48),
                                                               ("o3", 48, 53)]  # fmt: skip
    assert [s.reason for s in steps] == ["start", "input", "input", "device busy"]


def test_savings_are_those_of_a_faster_part(build) -> None:
    problem = build([100, 40], [(0, 1, 30)], 2)
    found = explain(problem, on(0, 1))
    assert {s.resource: s.saved_ns for s in found.savings} == {"d0": 50, "d1": 20, "l0": 0, "l1": 0}
    both = faster(faster(problem, "l0", 2.0), "l1", 2.0)
    assert simulate(both, on(0, 1)).makespan_ns == 100 + 15 + 40
    assert simulate(faster(problem, "d0->d1", 2.0), on(0, 1)).makespan_ns == 155
    assert sum(found.shares.values()) == pytest.approx(1)
    assert "d0" in found.text()


def test_the_log_of_events_does_not_depend_on_the_hash_seed() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1] / 'property')!r})\n"
        "from test_engine import random_problem, random_placement\n"
        "from moirai_sim.simulation.engine import simulate\n"
        "for net in ('one-port', 'fair'):\n"
        "    p = random_problem(7, net, shared=True, longest_ns=1000)\n"
        "    print(simulate(p, random_placement(p, 7)).to_json())\n"
    )
    hashes = {
        hashlib.sha256(
            subprocess.run(
                [sys.executable, "-c", code],
                capture_output=True,
                check=True,
                env={**os.environ, "PYTHONHASHSEED": seed},
            ).stdout
        ).hexdigest()
        for seed in ("0", "1", "12345")
    }
    assert len(hashes) == 1


@pytest.mark.parametrize("network", ["none", "fair"])
@pytest.mark.parametrize("engines", [0, 1])
def test_who_sends_to_a_device_that_fails_can_send_to_others(build, network, engines) -> None:
    """Requests go to d1 and d2 in turn; d1 fails while it receives the first one's tensor."""
    problem = build([1, 1], [(0, 1, 10)], 3, network)
    options = SimulationOptions(copy_engines=engines, faults=(Fault("d1", 5),))
    service = serve(problem, [on(0, 1), on(0, 2)], arrivals=np.zeros(6, dtype=np.int64), warm_up=0, options=options)
    assert (service.done_ns >= 0).tolist() == [False, True] * 3


@pytest.mark.parametrize(("duplex", "expected"), [("full", 100), ("half", 160)])
def test_the_period_of_a_stream_is_what_its_busiest_link_needs(build, duplex, expected) -> None:
    """A request sends 100 bytes to d1 and 60 back, and keeps d0 busy for 50: a byte takes a nanosecond."""
    link = Link("wire", ("d0", "d1"), 1e9, duplex=duplex)
    problem = build([30, 10, 20], [(0, 1, 100), (1, 2, 60)], 2, "fair", links=[link])
    placement = on(0, 1, 0)
    assert period_ns(problem, placement.device) == expected
    service = serve(problem, placement, in_flight=8, requests=400)
    assert 1e9 / service.throughput_per_s == pytest.approx(expected, rel=0.02)
