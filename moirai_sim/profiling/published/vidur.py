"""Vidur (MIT licence): point-to-point and all-reduce times of NCCL on A100 and A40 servers.

``NAME/send_recv.csv``, ``NAME/all_reduce.csv``: ``time_stats.COLLECTIVE.*`` in ms, ``size`` in bytes, one row a rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moirai_sim.errors import InputError
from moirai_sim.profiling.published import Report
from moirai_sim.profiling.published.table import read_csv, require, usable, without
from moirai_sim.profiling.schema import LINK_COLUMNS, LINK_DEFAULTS

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

SOURCE = "Vidur, MLSys 2024 (MIT)"
DEVICES = {
    "a100_dgx": "nvidia-a100-sxm-80gb", "a100_pairwise_nvlink": "nvidia-a100-pcie-80gb",
    "a40_pairwise_nvlink": "nvidia-a40", "h100_dgx": "nvidia-h100-sxm", "h100_pairwise_nvlink": "nvidia-h100-pcie",
}  # fmt: skip
"""Catalog name of the devices of each kind of server; other servers keep the name of their folder."""
_COLLECTIVES = {"send_recv": "send", "all_reduce": "all-reduce"}


def read(path: Path) -> tuple[pd.DataFrame, Report]:
    """Read a file, or all below a folder, into a profile of links; devices by the folder they lie in.

    Quantiles that the data set does not give are filled with the nearest it has: ``p10`` with the minimum, ``p90`` with
    the maximum.

    Raises
    ------
    InputError
        If a file misses columns.
    """
    import pandas as pd

    report = Report(SOURCE)
    parts = []
    for file in sorted(path.rglob("*.csv")) if path.is_dir() else [path]:
        kind = file.stem
        if kind not in _COLLECTIVES:
            if not path.is_dir():
                raise InputError(f"{file}: no reader for '{kind}'; known: {', '.join(_COLLECTIVES)}")
            report.other_files[f"table {kind}"] = report.other_files.get(f"table {kind}", 0) + 1
            continue
        frame = read_csv(file)
        times = {short: f"time_stats.{kind}.{short}" for short in ("min", "max", "mean", "median")}
        sizes = ("size", "num_workers", "devices_per_node")
        require(file, frame, (*times.values(), *sizes))
        report.count(frame)
        good = usable(frame, report, times=times.values(), sizes=sizes)
        low, middle, high = (good[times[short]] for short in ("min", "median", "max"))
        good = without(good, (low > middle) | (middle > high), "min, median and max are not in order", report)
        columns = {
            "source_device": file.parent.name,
            "target_device": file.parent.name,
            "device": DEVICES.get(file.parent.name, file.parent.name),
            "stack": "NCCL through PyTorch",
            "nodes": -(-good["num_workers"] // good["devices_per_node"]),
            "collective": _COLLECTIVES[kind],
            "participants": good["num_workers"],
            "bytes": good["size"],
            "count": 1,
            "min_s": good[times["min"]] * 1e-3,
            "p10_s": good[times["min"]] * 1e-3,
            "median_s": good[times["median"]] * 1e-3,
            "mean_s": good[times["mean"]] * 1e-3,
            "p90_s": good[times["max"]] * 1e-3,
            "source": SOURCE,
        }
        parts.append(pd.DataFrame(LINK_DEFAULTS | columns, index=good.index)[list(LINK_COLUMNS)])
    return (pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()), report
