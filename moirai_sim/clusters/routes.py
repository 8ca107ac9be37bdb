"""Routes between devices, and the classes of device pairs that are equally far apart."""

from __future__ import annotations

import heapq
import itertools
import math
from typing import TYPE_CHECKING

import numpy as np

from moirai_sim.clusters.cluster import Cluster, Route
from moirai_sim.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

RouteClass = tuple[int, float]
"""Latency in ns and bandwidth in bytes per second of every route of a class."""


def route(cluster: Cluster, source: str, target: str) -> Route:
    """Return the route of a tensor: least latency, then fewest links, then first by the names of the nodes passed.

    Only routes between anchors are searched, all from one of them together, and kept with the cluster: thousands of
    devices hang on far fewer switches.

    Raises
    ------
    InputError
        If a name is unknown or no links join the two.
    """
    unknown = [name for name in (source, target) if name not in cluster.graph]
    if unknown:
        raise InputError(f"cluster '{cluster.name}': there is no device or switch '{unknown[0]}'")
    if source == target:
        return _as_route(cluster, (source,))
    one, other = cluster.anchor(source), cluster.anchor(target)
    if one not in cluster.routes:
        cluster.routes[one] = _shortest(cluster.core, one)
    found = cluster.routes[one].get(other)
    if found is None:
        raise InputError(f"cluster '{cluster.name}': no links join '{source}' and '{target}'; add one")
    nodes = found[2]
    return _as_route(cluster, (source,) * (source != one) + nodes + (target,) * (target != other))


class Links:
    """The directed capacities of a cluster's links, numbered by name so that the order of a file does not matter."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.capacity: list[float] = []
        """Bytes per ns."""
        self.names: list[str] = []
        self.directions: dict[str, list[int]] = {}
        """Link name to its numbers: forwards and backwards, which are one for a half-duplex link."""
        for link in sorted(cluster.links, key=lambda link: link.name):
            self.directions[link.name] = []
            for _ in range(2 if link.duplex == "full" else 1):
                self.directions[link.name].append(len(self.capacity))
                self.names.append(link.name)
                self.capacity.append(link.bandwidth_bytes_per_s / 1e9)

    def between(self, source: str, target: str) -> tuple[list[int], int]:
        """Return the numbers of the directed links from one device to another, and the latency in ns."""
        way = route(self._cluster, source, target)
        numbers = [
            self.directions[name][0 if self._cluster.link[name].ends[0] == a else -1]
            for name, (a, _) in zip(way.links, itertools.pairwise(way.nodes), strict=True)
        ]
        return numbers, way.latency_ns


def route_classes(cluster: Cluster) -> tuple[NDArray[np.int64], list[RouteClass], list[tuple[int, int]]]:
    """Group the ordered pairs of devices by latency and bandwidth of their routes.

    Devices behind the same kind of link to the same switch are alike, so routes are searched between such groups only:
    a thousand servers of eight devices need a thousand searches, not the square of eight thousand.

    Returns
    -------
    route_class
        [k, k] class of (source, target), in the order of ``cluster.devices``; -1 on the diagonal.
    classes
        (latency, bandwidth) of each class, in ascending order.
    examples
        The first pair of device indices of each class, to look at one of its routes.

    Raises
    ------
    InputError
        If two devices are not joined.
    """
    access = _access(cluster)
    group_of: dict[tuple[str, int, float], int] = {}
    group = np.array([group_of.setdefault(access[d.name], len(group_of)) for d in cluster.devices], dtype=np.int64)
    anchors = list(dict.fromkeys(anchor for anchor, _, _ in group_of))
    position = {anchor: i for i, anchor in enumerate(anchors)}
    latency = np.zeros((len(anchors), len(anchors)), dtype=np.int64)
    bandwidth = np.full((len(anchors), len(anchors)), math.inf)
    for i, anchor in enumerate(anchors):
        paths = _shortest(cluster.core, anchor)
        for other, j in position.items():
            if i != j:
                if other not in paths:
                    raise InputError(f"cluster '{cluster.name}': no links join '{anchor}' and '{other}'; add one")
                latency[i, j] = paths[other][0]
                bandwidth[i, j] = _as_route(cluster, paths[other][2]).bandwidth_bytes_per_s

    at = np.array([position[anchor] for anchor, _, _ in group_of], dtype=np.int64)
    own_latency = np.array([ns for _, ns, _ in group_of], dtype=np.int64)
    own_bandwidth = np.array([rate for _, _, rate in group_of])
    total = own_latency[:, None] + latency[at[:, None], at] + own_latency
    narrowest = np.minimum(np.minimum(own_bandwidth[:, None], bandwidth[at[:, None], at]), own_bandwidth)
    total_values, total_code = np.unique(total, return_inverse=True)
    narrow_values, narrow_code = np.unique(narrowest, return_inverse=True)
    code = total_code.reshape(total.shape) * len(narrow_values) + narrow_code.reshape(total.shape)
    alone = np.flatnonzero(np.bincount(group, minlength=len(group_of)) == 1)
    code[alone, alone] = -1  # a group of one device has no pair within
    codes, first = np.unique(code, return_index=True)
    codes, first = codes[codes >= 0], first[codes >= 0]
    route_class = np.searchsorted(codes, code)[group[:, None], group].astype(np.int64)
    np.fill_diagonal(route_class, -1)
    classes = [
        (int(total_values[c // len(narrow_values)]), float(narrow_values[c % len(narrow_values)])) for c in codes
    ]
    members = np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1])
    examples = [
        (int(members[a][0]), int(members[b][int(a == b)])) for a, b in (divmod(int(f), len(members)) for f in first)
    ]
    return route_class, classes, examples


def _access(cluster: Cluster) -> dict[str, tuple[str, int, float]]:
    """Return where each device meets the network: (node, latency, bandwidth) of its only link, or itself at no cost."""
    access = {}
    for device in cluster.devices:
        anchor = cluster.anchor(device.name)
        if anchor != device.name:
            link = cluster.link[cluster.graph.edges[device.name, anchor]["link"]]
            access[device.name] = (anchor, link.latency_ns, link.bandwidth_bytes_per_s)
        else:
            access[device.name] = (device.name, 0, math.inf)
    return access


Path = tuple[int, int, tuple[str, ...]]
"""Latency, number of links, nodes: compared in this order, so that the shortest path is unique."""


def _shortest(adjacency: dict[str, list[tuple[str, int]]], source: str) -> dict[str, Path]:
    """Return the shortest path to every node (Dijkstra's algorithm)."""
    settled: dict[str, Path] = {}
    heap: list[Path] = [(0, 0, (source,))]
    while heap:
        path = heapq.heappop(heap)
        latency, hops, nodes = path
        if nodes[-1] in settled:
            continue
        settled[nodes[-1]] = path
        for neighbour, ns in adjacency[nodes[-1]]:
            if neighbour not in settled:
                heapq.heappush(heap, (latency + ns, hops + 1, (*nodes, neighbour)))
    return settled


def _as_route(cluster: Cluster, nodes: tuple[str, ...]) -> Route:
    links = tuple(cluster.graph.edges[a, b]["link"] for a, b in itertools.pairwise(nodes))
    narrowest = min((cluster.link[name].bandwidth_bytes_per_s for name in links), default=math.inf)
    latency = sum(cluster.link[name].latency_ns for name in links)
    return Route(nodes=nodes, links=links, latency_ns=latency, bandwidth_bytes_per_s=narrowest)
