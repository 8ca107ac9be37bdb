"""Small random placement problems for tests of policies: every feature of the problem, few operators."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moirai_sim.clusters.cluster import Cluster, Device, DeviceType, Link
from moirai_sim.problem import UNLIMITED, UNSUPPORTED, PlacementProblem

if TYPE_CHECKING:
    from moirai_sim.problem import Network


def small_problem(
    seed: int,
    *,
    operators: int = 5,
    devices: int = 2,
    density: float = 0.5,
    network: Network = "one-port",
    memory: float | None = None,
    shared_tensors: bool = False,
    colocated: bool = False,
    unsupported: bool = False,
) -> PlacementProblem:
    """Return a random problem; equal arguments give equal problems.

    Parameters
    ----------
    density
        Probability of an edge between two operators; one in six only orders.
    memory
        Capacity of each device as a share of the model; None for no limit.
    shared_tensors
        Whether a producer sends one tensor to all its consumers, instead of one an edge.
    colocated
        Whether the first two operators must share a device.
    unsupported
        Whether one operator cannot run on device 0.

    Notes
    -----
    Durations are 0 to 9 ns, with ties and work without length: what breaks schedulers. Under ``fair`` the devices hang
    on a switch by links of a byte a nanosecond, and a tensor takes as long over every route.
    """
    rng = np.random.default_rng(seed)
    edges = [(i, j) for j in range(operators) for i in range(j) if rng.random() < density]
    edges.sort()
    tensors = np.where(rng.random(len(edges)) < 1 / 6, -1, 0)
    if shared_tensors:
        producers = [i for i, _ in edges]
        tensors = np.where(tensors < 0, -1, producers)
        n_tensors = operators
    else:
        tensors = np.where(tensors < 0, -1, np.arange(len(edges)))
        n_tensors = len(edges)
    route = np.arange(devices * devices).reshape(devices, devices)
    np.fill_diagonal(route, -1)
    duration = rng.integers(0, 10, size=(operators, devices))
    if unsupported:
        duration[rng.integers(operators), 0] = UNSUPPORTED
    weight = rng.integers(0, 8, size=operators)
    capacity = UNLIMITED if memory is None else max(int(weight.max(initial=0)), int(memory * weight.sum()))
    group = np.full(operators, -1)
    group[:2] = 0
    problem = PlacementProblem(
        name=f"small-{seed}",
        operators=tuple(f"n{i}" for i in range(operators)),
        operator_ns=duration.astype(np.int64),
        weight_bytes=weight.astype(np.int64),
        devices=tuple(f"d{k}" for k in range(devices)),
        device_type=np.arange(devices, dtype=np.int64),
        memory_bytes=np.full(devices, capacity, dtype=np.int64),
        edges=np.array(edges, dtype=np.int64).reshape(-1, 2),
        edge_tensor=tensors.astype(np.int64),
        tensor_bytes=np.full(n_tensors, -1, dtype=np.int64),
        route_class=route.astype(np.int64),
        transfer_ns=rng.integers(0, 7, size=(n_tensors, devices * devices)).astype(np.int64),
        network=network,
        colocation=group.astype(np.int64) if colocated else None,
    )
    return _behind_a_switch(problem) if network == "fair" else problem


def _behind_a_switch(problem: PlacementProblem) -> PlacementProblem:
    kind = DeviceType("chip", "gpu", 10**9, 1e9, {"float32": 1e9})
    devices = tuple(Device(name, kind) for name in problem.devices)
    cables = tuple(Link(f"cable-{name}", (name, "switch"), 1e9) for name in problem.devices)
    size = problem.transfer_ns.max(axis=1, initial=0)
    return replace(
        problem,
        cluster=Cluster("star", devices, cables, ("switch",)),
        tensor_bytes=size,
        transfer_ns=np.repeat(size[:, None], problem.transfer_ns.shape[1], axis=1),
    )


def layered_problem(seed: int, *, operators: int, devices: int, width: int = 8) -> PlacementProblem:
    """Return a random network in layers of ``width`` operators, each fed by one to three of the layer before.

    Durations are 10 to 1,000 us by operator and 1 to 4 times that by device, transfers 5 to 500 us.
    """
    rng = np.random.default_rng(seed)
    edges = []
    for j in range(width, operators):
        layer = (j // width - 1) * width
        sources = rng.choice(width, size=rng.integers(1, 4), replace=False) + layer
        edges += [(int(i), j) for i in sources]
    edges.sort()
    base = small_problem(seed, operators=operators, devices=devices, density=0.0)
    work = rng.integers(10_000, 1_000_000, size=(operators, 1))
    return replace(
        base,
        name=f"layered-{operators}-{seed}",
        operator_ns=(work * rng.uniform(1, 4, size=(operators, devices))).astype(np.int64),
        edges=np.array(edges, dtype=np.int64).reshape(-1, 2),
        edge_tensor=np.arange(len(edges), dtype=np.int64),
        tensor_bytes=np.full(len(edges), -1, dtype=np.int64),
        transfer_ns=rng.integers(5_000, 500_000, size=(len(edges), devices * devices)).astype(np.int64),
    )
