"""The SimPy engine against the compiled replay and against ``verify``, over random problems."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moirai_sim.clusters.cluster import Cluster, Device, DeviceType, Link
from moirai_sim.clusters.routes import route_classes
from moirai_sim.errors import InputError
from moirai_sim.placement import Placement
from moirai_sim.problem import UNLIMITED, PlacementProblem
from moirai_sim.simulation.engine import simulate, simulate_schedule
from moirai_sim.simulation.explain import critical_path
from moirai_sim.simulation.options import SimulationOptions
from moirai_sim.simulation.schedule import placement_from_schedule
from moirai_sim.verify import verify


def random_problem(seed: int, network: str, *, shared: bool, longest_ns: int) -> PlacementProblem:
    """Return a problem of up to 40 operators on 1 to 5 devices in a star; short times make many ties."""
    rng = np.random.default_rng(seed)
    n, k = int(rng.integers(1, 40)), int(rng.integers(1, 6))
    pairs = rng.integers(0, n, (int(rng.integers(0, 3 * n)), 2))
    edges = np.unique(np.sort(pairs[pairs[:, 0] != pairs[:, 1]], axis=1), axis=0).reshape(-1, 2)
    tensor = edges[:, 0].copy() if shared else np.arange(len(edges))
    tensor[rng.random(len(edges)) < 0.1] = -1
    q = n if shared else len(edges)
    size = rng.integers(0, longest_ns + 1, q)
    kind = DeviceType("unit", "gpu", 1, 1.0, {"float32": 1.0})
    duplex = "half" if rng.random() < 0.5 else "full"
    cluster = Cluster(
        "star",
        tuple(Device(f"d{i}", kind) for i in range(k)),
        tuple(Link(f"l{i}", (f"d{i}", "hub"), float(rng.integers(1, 4)) * 1e9, int(rng.integers(0, 3)), duplex)
              for i in range(k)),
        ("hub",),
    )  # fmt: skip
    route_class, classes, _ = route_classes(cluster)
    times = [latency + np.ceil(size * 1e9 / bandwidth).astype(np.int64) for latency, bandwidth in classes]
    return PlacementProblem(
        name=f"random {seed}",
        operators=tuple(f"o{i}" for i in range(n)),
        operator_ns=rng.integers(0, longest_ns + 1, (n, 2)),
        weight_bytes=np.ones(n, dtype=np.int64),
        devices=tuple(device.name for device in cluster.devices),
        device_type=rng.integers(0, 2, k),
        memory_bytes=np.full(k, UNLIMITED),
        edges=edges,
        edge_tensor=tensor,
        tensor_bytes=size,
        route_class=route_class,
        transfer_ns=np.stack(times, axis=1) if times else np.zeros((q, 1), dtype=np.int64),
        network=network,  # type: ignore[arg-type]
        cluster=cluster,
    )


def random_placement(problem: PlacementProblem, seed: int) -> Placement:
    return Placement(np.random.default_rng(seed).integers(0, problem.n_devices, problem.n_operators))


CASES = {
    "seed": st.integers(0, 10**6),
    "shared": st.booleans(),
    "longest_ns": st.sampled_from([1, 5, 1000, 10**6]),
}


@settings(max_examples=120, deadline=None)
@given(network=st.sampled_from(["none", "one-port", "half-duplex"]), **CASES)
def test_engines_agree_to_the_nanosecond(network: str, seed: int, shared: bool, longest_ns: int) -> None:
    problem = random_problem(seed, network, shared=shared, longest_ns=longest_ns)
    greedy = random_placement(problem, seed)
    compiled = simulate_schedule(problem, greedy, engine="replay")
    ordered = placement_from_schedule(problem, greedy, compiled)
    for placement in (greedy, ordered):
        one = simulate_schedule(problem, placement, engine="simpy")
        other = simulate_schedule(problem, placement, engine="replay")
        for field in fields(one):
            assert np.array_equal(getattr(one, field.name), getattr(other, field.name)), (field.name, placement.order)


@settings(max_examples=120, deadline=None)
@given(network=st.sampled_from(["none", "one-port", "half-duplex", "fair"]), **CASES)
def test_every_timeline_verifies(network: str, seed: int, shared: bool, longest_ns: int) -> None:
    problem = random_problem(seed, network, shared=shared, longest_ns=longest_ns)
    assert verify(problem, simulate(problem, random_placement(problem, seed))) == []


@settings(max_examples=60, deadline=None)
@given(**CASES)
def test_knobs_at_their_neutral_values_change_nothing(seed: int, shared: bool, longest_ns: int) -> None:
    problem = random_problem(seed, "one-port", shared=shared, longest_ns=longest_ns)
    placement = random_placement(problem, seed)
    plain = simulate(problem, placement)
    assert simulate(problem, placement, options=SimulationOptions(copy_engines=2)) == plain
    assert simulate(problem, placement, options=SimulationOptions(asynchronous_launch=False)) == plain
    half = simulate(problem.with_network("half-duplex"), placement)
    assert simulate(problem, placement, options=SimulationOptions(copy_engines=1)).spans == half.spans


@settings(max_examples=60, deadline=None)
@given(network=st.sampled_from(["none", "one-port", "half-duplex", "fair"]), **CASES)
def test_critical_paths_have_no_gaps(network: str, seed: int, shared: bool, longest_ns: int) -> None:
    problem = random_problem(seed, network, shared=shared, longest_ns=longest_ns)
    timeline = simulate(problem, random_placement(problem, seed))
    steps = critical_path(timeline)
    assert steps[0].start_ns == 0
    assert all(one.end_ns == other.start_ns for one, other in pairwise(steps))
    assert steps[-1].end_ns == timeline.makespan_ns


def test_contradicting_orders_are_an_error() -> None:
    problem = random_problem(3, "none", shared=False, longest_ns=5)
    assert len(problem.edges)
    backwards = np.empty(problem.n_operators, dtype=np.int64)
    backwards[problem.topological_order[::-1]] = np.arange(problem.n_operators)
    placement = Placement(np.zeros(problem.n_operators, dtype=np.int64), order=backwards)
    for engine in ("simpy", "replay"):
        with pytest.raises(InputError, match="contradict"):
            simulate(problem, placement, engine=engine)  # type: ignore[arg-type]
