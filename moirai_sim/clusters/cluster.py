"""Cluster: where operators can run. Devices, switches, directed use of links, and routes between devices."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import networkx as nx

from moirai_sim.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class DeviceType:
    """A data sheet. Figures are peaks; what a device really reaches is the cost model's business."""

    name: str
    kind: Literal["cpu", "gpu", "npu", "fpga"]
    memory_bytes: int
    memory_bandwidth_bytes_per_s: float
    peak_flops: Mapping[str, float]
    """FLOP/s by data type, multiply-add counted as two."""
    compute_units: int | None = None
    """Streaming multiprocessors of a GPU, cores of a CPU."""
    clock_hz: float | None = None
    l2_cache_bytes: int | None = None
    idle_watts: float | None = None
    peak_watts: float | None = None
    price_eur: float | None = None
    source: str = ""


@dataclass(frozen=True)
class Device:
    """One place where an operator can run."""

    name: str
    type: DeviceType
    cost_model: str | None = None
    """Catalog name or folder of the cost model that prices operators here; None prices by roofline."""
    backend: str = "onnxruntime"
    """What runs operators here when a placement is measured."""
    address: str = "cpu:0"
    """Where the backend finds it: ``cpu:FIRST[-LAST]`` (cores to pin), ``netns:FIRST[-LAST]`` (the same, as if in
    another machine: see `moirai_sim.execution.namespaces`) or ``cuda:INDEX``."""
    threads: int = 1
    server: str = ""
    """Devices of one server share its host memory; empty where the cluster has one server."""
    memory_bytes: int | None = None
    """Memory a user grants, where it is less than the data sheet's."""


@dataclass(frozen=True)
class Link:
    """A cable or bus between two nodes (devices or switches)."""

    name: str
    ends: tuple[str, str]
    bandwidth_bytes_per_s: float
    """In each direction for ``full`` duplex; shared by both directions for ``half``."""
    latency_ns: int = 0
    duplex: Literal["full", "half"] = "full"
    price_eur: float | None = None


@dataclass(frozen=True)
class Route:
    """The way of a tensor from one device to another."""

    nodes: tuple[str, ...]
    links: tuple[str, ...]
    """Names of the links used, in order."""
    latency_ns: int
    """Sum of the latencies of the links."""
    bandwidth_bytes_per_s: float
    """The narrowest link: cut-through forwarding, so that a tensor is not stored at each hop."""

    def transfer_ns(self, size: int) -> int:
        """Return the time of ``size`` bytes over this route alone on the network, ns, rounded up."""
        return self.latency_ns + -int(-size * 1e9 // self.bandwidth_bytes_per_s)


@dataclass(frozen=True)
class Cluster:
    """Devices, switches and links; see ``moirai_sim.clusters.reader`` for the YAML form."""

    name: str
    devices: tuple[Device, ...]
    links: tuple[Link, ...] = ()
    switches: tuple[str, ...] = ()
    link_model: str | None = None
    """Catalog name or folder of a calibrated link model; None takes the data sheet of the links."""
    source: str = ""
    provenance: Mapping[str, object] = field(default_factory=dict)
    routes: dict[str, dict[str, tuple[int, int, tuple[str, ...]]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Paths found so far between what `core` holds, by source and target; see ``moirai_sim.clusters.routes``."""

    def _repr_html_(self) -> str:
        from moirai_sim.display import cluster_html

        return cluster_html(self)

    @cached_property
    def device(self) -> dict[str, Device]:
        """Devices by name."""
        return {device.name: device for device in self.devices}

    @cached_property
    def link(self) -> dict[str, Link]:
        """Links by name."""
        return {link.name: link for link in self.links}

    @cached_property
    def graph(self) -> nx.Graph:
        """Nodes are devices and switches, edges the links.

        Raises
        ------
        InputError
            If two links join the same ends: routes would use one of them and never the other.
        """
        graph = nx.Graph()
        graph.add_nodes_from(device.name for device in self.devices)
        graph.add_nodes_from(self.switches)
        for link in self.links:
            if graph.has_edge(*link.ends):
                raise InputError(
                    f"cluster '{self.name}': '{graph.edges[link.ends]['link']}' and '{link.name}' both join "
                    f"'{link.ends[0]}' and '{link.ends[1]}', and a tensor takes one of them; leave out the slower, or "
                    "write one link with the sum of their bandwidths"
                )
            graph.add_edge(*link.ends, link=link.name)
        return graph

    @cached_property
    def core(self) -> dict[str, list[tuple[str, int]]]:
        """(Neighbour, latency of the link in ns) of every node but those with one link, which no route passes.

        Both ends of a link that joins nothing else stay.
        """
        kept = dict.fromkeys(node for node in self.graph if self.anchor(node) == node)
        return {
            node: [
                (other, self.link[edge["link"]].latency_ns) for other, edge in self.graph[node].items() if other in kept
            ]
            for node in kept
        }

    def anchor(self, node: str) -> str:
        """Return the node at the other end of a node's only link, or the node itself where routes may pass it."""
        near = list(self.graph[node])
        return near[0] if len(near) == 1 and len(self.graph[near[0]]) > 1 else node
