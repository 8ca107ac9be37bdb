"""Times what a tensor costs that crosses between the workers of this machine, on the workers that run placements."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moirai_sim.clusters.routes import route, route_classes
from moirai_sim.errors import InputError
from moirai_sim.profiling.schema import LINK_COLUMNS, LINK_DEFAULTS, statistics

if TYPE_CHECKING:
    import pandas as pd

    from moirai_sim.clusters.cluster import Cluster

SIZES = tuple(2**k for k in (10, 13, 15, 16, 17, 18, 19, 20, 21, 22, 24, 26))
"""Tensor sizes to time: 1 KiB to 64 MiB, dense where activations are."""
_MAX_PAIRS = 4
"""Pairs of devices to time; those that are equally far apart are taken to be equal."""
_BUDGET_S = 5.0
"""Of a size, on average."""
_VISIT_S, _VISIT = 0.5, 3
"""Time and rounds of a size before the next one has its turn: a busy spell of the machine shall not meet one alone."""
_LEAST_S = 1e-9
"""Of a crossing, even where noise hides it."""


def _pairs(cluster: Cluster) -> list[tuple[str, str]]:
    """Return pairs of devices to time: neighbours, and of emulated machines pairs that lie unlike far apart first."""
    import numpy as np

    from moirai_sim.execution.workers import is_emulated

    names = [device.name for device in cluster.devices]
    pairs = list(itertools.pairwise(names))
    if any(map(is_emulated, cluster.devices)):
        of_pair, _, examples = route_classes(cluster)
        position = {name: k for k, name in enumerate(names)}
        first: dict[int, tuple[str, str]] = {}
        for source, target in (*pairs, *((names[a], names[b]) for a, b in examples)):
            first.setdefault(int(of_pair[position[source], position[target]]), (source, target))
        unlike = [first[key] for key in sorted(first)]  # by latency, then bandwidth
        chosen = np.linspace(0, len(unlike) - 1, min(len(unlike), _MAX_PAIRS)).round().astype(int)
        pairs = [unlike[k] for k in chosen] + [pair for pair in pairs if pair not in unlike]
    return pairs[:_MAX_PAIRS]


def profile_links(cluster: Cluster, *, sizes: Sequence[int] = SIZES, repeats: int = 9) -> pd.DataFrame:
    """Time crossings between devices of a cluster that lies on this machine; see `moirai_sim.execution.hops`.

    Parameters
    ----------
    cluster
        Its devices' addresses say which cores to use.
    sizes
        Bytes of the tensors, rising.
    repeats
        Undisturbed rounds of a size; fewer where they take longer, as over slow links or where the machine is never
        left alone.

    Returns
    -------
    pandas.DataFrame
        Columns of ``schema.LINK_COLUMNS``; a crossing with all that it costs. ``attrs["metadata"]`` holds telemetry.

    Raises
    ------
    InputError
        If fewer than two devices lie on this machine.
    ExecutionError
        If a worker fails.
    """
    import numpy as np
    import pandas as pd
    from sklearn.isotonic import isotonic_regression

    from moirai_sim.execution.hops import Hop
    from moirai_sim.execution.workers import Workers
    from moirai_sim.profiling import telemetry
    from moirai_sim.progress import progress

    pairs = _pairs(cluster) if len(cluster.devices) > 1 else []
    if not pairs:
        raise InputError(f"cluster '{cluster.name}': links are profiled between two CPU devices at least")
    before = telemetry.snapshot()
    hops = [[Hop(*pair, size) for size in sizes] for pair in pairs]
    due = list(itertools.chain(*hops))
    end = time.monotonic() + _BUDGET_S * len(due)
    with Workers(cluster) as workers, progress("links", len(due)) as step:
        while due:
            for hop in tuple(due):
                hop.time(workers, enough=_VISIT, budget_s=_VISIT_S)
                if hop.known >= repeats or time.monotonic() > end:
                    due.remove(hop)
                    step()
    rows: list[dict[str, Any]] = []
    for (source, target), of_pair in zip(pairs, hops, strict=True):
        way = {}
        if workers.emulated:  # elsewhere the figures of links are nominal
            over = route(cluster, source, target)
            way = {"latency_ns": over.latency_ns, "bandwidth_bytes_per_s": over.bandwidth_bytes_per_s}
        # More data cannot cost less, though noise may say so where kernels take long.
        folds = zip(*(hop.times_s() for hop in of_pair), strict=True)
        rising = np.array([isotonic_regression(fold, y_min=_LEAST_S) for fold in folds])
        for size, times in zip(sizes, rising.T, strict=True):
            pair = {"source_device": source, "target_device": target, "bytes": size, "source": "measured"}
            rows.append(pair | way | {"collective": "send", "participants": 2} | statistics(times))
    frame = pd.DataFrame([LINK_DEFAULTS | row for row in rows])[list(LINK_COLUMNS)]
    frame.attrs["metadata"] = {
        "hardware": telemetry.hardware(),
        "versions": telemetry.versions(),
        "telemetry": {"before": before, "after": telemetry.snapshot()},
        "channel": "shared memory" if not workers.emulated else "TCP",
    }
    return frame
