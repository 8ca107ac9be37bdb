"""Random placement problems: randomly wired networks, and layered graphs on unrelated devices.

Randomly wired networks follow Xie et al., "Exploring Randomly Wired Neural Networks for Image Recognition", ICCV 2019:
an undirected random graph whose edges are directed from the smaller to the larger node.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import networkx as nx
import numpy as np

from moirai_sim.errors import InputError
from moirai_sim.problem import UNLIMITED, PlacementProblem

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.problem import Network

Wiring = Literal["erdos-renyi", "watts-strogatz", "barabasi-albert"]


def random_wiring(kind: Wiring, nodes: int, *, seed: int = 0) -> NDArray[np.int64]:
    """Return the edges, [m, 2], of a randomly wired network, sorted; every edge leads from a smaller to a larger node.

    The parameters are those of Xie et al.: ER with p = 0.2, WS with k = 4 and p = 0.75, BA with m = 5, each reduced
    where there are too few nodes.

    Raises
    ------
    InputError
        If there is no node or the kind is unknown.
    """
    if nodes < 1:
        raise InputError(f"random network: it needs at least one node, read {nodes}")
    if kind == "erdos-renyi":
        graph = nx.gnp_random_graph(nodes, 0.2, seed=seed)
    elif kind == "watts-strogatz":
        graph = nx.watts_strogatz_graph(nodes, min(4, nodes), 0.75, seed=seed)
    elif kind == "barabasi-albert":
        graph = nx.barabasi_albert_graph(nodes, min(5, nodes - 1), seed=seed) if nodes > 1 else nx.empty_graph(1)
    else:
        raise InputError(f"random network: unknown wiring '{kind}'; known: {', '.join(Wiring.__args__)}")
    edges = sorted((min(edge), max(edge)) for edge in graph.edges)
    return np.array(edges, dtype=np.int64).reshape(-1, 2)


def layered_edges(nodes: int, *, width: int = 16, degree: float = 2.0, seed: int = 0) -> NDArray[np.int64]:
    """Return the edges, [m, 2], of a layered graph: each node reads about ``degree`` nodes of the layer before its own.

    Nodes are numbered layer by layer, ``width`` a layer; every node but those of the first layer has a producer.
    """
    rng = np.random.default_rng(seed)
    consumer = np.arange(width, nodes)
    extra = rng.poisson(max(0.0, degree - 1), len(consumer))
    consumer = np.repeat(consumer, 1 + extra)
    producer = (consumer // width - 1) * width + rng.integers(0, width, len(consumer))
    return np.unique(np.stack([producer, consumer], axis=1), axis=0).astype(np.int64).reshape(-1, 2)


def random_problem(
    edges: NDArray[np.int64],
    nodes: int,
    devices: int,
    *,
    communication: float = 0.5,
    memory_scale: float | None = None,
    network: Network = "one-port",
    seed: int = 0,
    name: str = "random",
) -> PlacementProblem:
    """Return a problem over ``edges`` [m, 2] with unrelated devices of as many types.

    Parameters
    ----------
    communication
        Mean transfer time over mean operator time (the CCR of the scheduling literature).
    memory_scale
        Capacity of each device as a share of the model; None for no limit.

    Notes
    -----
    Operator times are uniform in 1 us to 100 us, times a factor in 0.5 to 2 that each device draws anew; routes
    differ in bandwidth by up to a factor of 4; each producer has one tensor for all its consumers.
    """
    rng = np.random.default_rng(seed)
    work = rng.uniform(1e3, 1e5, nodes)
    duration = np.rint(work[:, None] * rng.uniform(0.5, 2.0, (nodes, devices))).astype(np.int64)
    weight = rng.integers(1, 1_000_000, nodes)
    producers, tensor = np.unique(edges[:, 0], return_inverse=True)
    share = rng.uniform(0.0, 2.0, len(producers))
    slowness = np.where(~np.eye(devices, dtype=bool), rng.uniform(0.4, 1.6, (devices, devices)), 0.0)
    route = np.arange(devices * devices).reshape(devices, devices)
    if devices > 16:  # few classes of routes, so that tables stay small
        classes = rng.integers(0, 16, (devices, devices))
        slowness, route = rng.uniform(0.4, 1.6, 16), classes
    route = route.copy()
    np.fill_diagonal(route, -1)
    mean_transfer = communication * float(duration.mean() if nodes else 0.0)
    transfer = np.rint(mean_transfer * share[:, None] * slowness.reshape(1, -1)).astype(np.int64)
    capacity = UNLIMITED if memory_scale is None else int(memory_scale * int(weight.sum()))
    return PlacementProblem(
        name=name,
        operators=tuple(f"n{i}" for i in range(nodes)),
        operator_ns=duration,
        weight_bytes=weight.astype(np.int64),
        devices=tuple(f"d{k}" for k in range(devices)),
        device_type=np.arange(devices, dtype=np.int64),
        memory_bytes=np.full(devices, capacity, dtype=np.int64),
        edges=edges,
        edge_tensor=tensor.astype(np.int64).reshape(-1),
        tensor_bytes=np.full(len(producers), -1, dtype=np.int64),
        route_class=route.astype(np.int64),
        transfer_ns=transfer,
        network=network,
        provenance={"generator": "moirai_sim.instances.random_graphs", "seed": seed},
    )


def wired_problem(
    kind: Wiring, nodes: int, devices: int, *, memory_scale: float | None = None, seed: int = 0
) -> PlacementProblem:
    """Return a randomly wired network as a problem; see `random_wiring` and `random_problem`."""
    edges = random_wiring(kind, nodes, seed=seed)
    return random_problem(
        edges, nodes, devices, memory_scale=memory_scale, seed=seed, name=f"{kind}-{nodes}-{devices}-{seed}"
    )


def layered_problem(
    nodes: int, devices: int, *, width: int = 16, memory_scale: float | None = None, seed: int = 0
) -> PlacementProblem:
    """Return a layered graph as a problem; see `layered_edges` and `random_problem`."""
    edges = layered_edges(nodes, width=width, seed=seed)
    return random_problem(
        edges, nodes, devices, memory_scale=memory_scale, seed=seed, name=f"layered-{nodes}-{devices}-{seed}"
    )
