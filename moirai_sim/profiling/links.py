"""Times what a tensor costs that crosses between the workers of this machine, on the workers that run placements."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moirai_sim.errors import InputError
from moirai_sim.profiling.schema import LINK_COLUMNS, LINK_DEFAULTS, statistics

if TYPE_CHECKING:
    import pandas as pd

    from moirai_sim.clusters.cluster import Cluster

SIZES = tuple(2**k for k in (10, 13, 15, 16, 17, 18, 19, 20, 21, 22, 24))
"""Tensor sizes to time: 1 KiB to 16 MiB, dense where activations are."""
_MAX_PAIRS = 4
"""Pairs of neighbours to time; those of one machine are taken to be equal."""


def profile_links(cluster: Cluster, *, sizes: Sequence[int] = SIZES, repeats: int = 9) -> pd.DataFrame:
    """Time crossings between neighbours of a cluster that lies on this machine; see `moirai_sim.execution.hops`.

    Parameters
    ----------
    cluster
        Its devices' addresses say which cores to use.
    sizes
        Bytes of the tensors.
    repeats
        Of a size, at most.

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
    import pandas as pd

    from moirai_sim.execution.hops import time_hops
    from moirai_sim.execution.workers import Workers
    from moirai_sim.profiling import telemetry
    from moirai_sim.progress import progress

    pairs = list(itertools.pairwise(device.name for device in cluster.devices))[:_MAX_PAIRS]
    if not pairs:
        raise InputError(f"cluster '{cluster.name}': links are profiled between two CPU devices at least")
    before = telemetry.snapshot()
    rows: list[dict[str, Any]] = []
    with Workers(cluster) as workers, progress("links", len(pairs) * len(sizes)) as step:
        for source, target in pairs:
            for hop in time_hops(workers, source, target, sizes=sizes, repeats=repeats):
                pair = {"source_device": source, "target_device": target, "bytes": hop.bytes, "source": "measured"}
                rows.append(pair | {"collective": "send", "participants": 2} | statistics(hop.times_s))
                step()
    frame = pd.DataFrame(rows).assign(**LINK_DEFAULTS)[list(LINK_COLUMNS)]
    frame.attrs["metadata"] = {
        "hardware": telemetry.hardware(),
        "versions": telemetry.versions(),
        "telemetry": {"before": before, "after": telemetry.snapshot()},
        "channel": "shared memory" if not workers.emulated else "TCP",
    }
    return frame
