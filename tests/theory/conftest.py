"""Small problems whose answers are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from moirai_sim.clusters.cluster import Cluster, Device, DeviceType, Link
from moirai_sim.problem import UNLIMITED, PlacementProblem

Build = Callable[..., PlacementProblem]


@pytest.fixture
def build() -> Build:
    """Return a function that makes a problem: operator times, edges (producer, consumer, bytes; 1 byte lasts 1 ns)."""

    def make(
        times: Sequence[int],
        edges: Sequence[tuple[int, int, int]] = (),
        devices: int = 1,
        network: str = "one-port",
        weights: Sequence[int] | None = None,
        memory: int = UNLIMITED,
        links: Sequence[Link] | None = None,
        latency: int = 0,
    ) -> PlacementProblem:
        """Without ``links`` all devices hang on one switch by links that carry 1 byte a ns and never limit more."""
        edges = sorted(edges)
        size = np.array([e[2] for e in edges], dtype=np.int64)
        names = [f"d{k}" for k in range(devices)]
        kind = DeviceType("unit", "gpu", 2**40, 1e9, {"float32": 1e9}, idle_watts=10.0, peak_watts=110.0)
        cables = links if links is not None else [Link(f"l{k}", (name, "hub"), 1e9) for k, name in enumerate(names)]
        cluster = Cluster("test", tuple(Device(name, kind) for name in names), tuple(cables), ("hub",))
        return PlacementProblem(
            name="theory",
            operators=tuple(f"o{i}" for i in range(len(times))),
            operator_ns=np.array(times, dtype=np.int64).reshape(-1, 1),
            weight_bytes=np.array(weights if weights is not None else [0] * len(times), dtype=np.int64),
            devices=tuple(names),
            device_type=np.zeros(devices, dtype=np.int64),
            memory_bytes=np.full(devices, memory),
            edges=np.array([e[:2] for e in edges], dtype=np.int64).reshape(-1, 2),
            edge_tensor=np.arange(len(edges)),
            tensor_bytes=size,
            route_class=np.where(np.eye(devices, dtype=bool), -1, 0),
            transfer_ns=(size + latency).reshape(-1, 1),
            network=network,  # type: ignore[arg-type]
            cluster=cluster,
        )

    return make
