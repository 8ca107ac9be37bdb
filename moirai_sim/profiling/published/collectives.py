"""aiconfigurator's collectives: NCCL and the all-reduce kernels of serving stacks, over NVLink within one server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moirai_sim.errors import InputError
from moirai_sim.graphs.operator import DTYPE_BITS
from moirai_sim.profiling.published.systems import SOURCE, device_name
from moirai_sim.profiling.published.table import require, usable
from moirai_sim.profiling.schema import LINK_COLUMNS

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from moirai_sim.profiling.published import Report

COLLECTIVES = {"nccl_perf": "nccl_dtype", "custom_allreduce_perf": "allreduce_dtype"}
"""Column of the data type in each table."""
_NAMES = {
    "all_reduce": "all-reduce", "all_gather": "all-gather", "reduce_scatter": "reduce-scatter",
    "alltoall": "all-to-all", "p2p": "send",
}  # fmt: skip
_DTYPES = {"half": "float16", "float": "float32"}


def read_collectives(files: Sequence[Path], report: Report) -> pd.DataFrame:
    """Read tables of collectives into a profile of links.

    ``message_size`` counts elements, as the equal times of twice as many bytes of half the width show; ``latency`` is
    in ms and stands for all statistics.

    Raises
    ------
    InputError
        If a table cannot be read, misses columns or names a device that is not known.
    """
    import pandas as pd
    import pyarrow as pa

    parts = []
    for file in files:
        if file.stem not in COLLECTIVES:
            what = f"table {file.stem}"
            report.other_files[what] = report.other_files.get(what, 0) + 1
            continue
        try:
            frame = pd.read_parquet(file)
        except (OSError, pa.ArrowInvalid) as error:
            raise InputError(f"{file}: cannot be read as Parquet ({error}); is it complete?") from error
        dtype = COLLECTIVES[file.stem]
        require(file, frame, ("op_name", "kernel_source", "num_gpus", "message_size", "latency", dtype))
        good = usable(file, frame, ("num_gpus", "message_size"), report, latency="latency")
        bits = good[dtype].replace(_DTYPES).map(DTYPE_BITS)
        report.refuse(f"{dtype} is none that is known", int(bits.isna().sum()), file.name)
        known = good["op_name"].isin(_NAMES)
        report.refuse("op_name is none that is priced", int((~known & bits.notna()).sum()), file.name)
        good, bits = good[known & bits.notna()], bits[known & bits.notna()]
        alone = good["num_gpus"] < 2
        report.refuse("one device alone exchanges nothing", int(alone.sum()), file.name)
        good, bits = good[~alone], bits[~alone]
        if not len(good):
            continue
        version = good["version"] if "version" in good else pd.Series(file.parent.name, good.index)
        names = good["device"] if "device" in good else pd.Series("", good.index)
        found = {name: device_name(file, str(name)) for name in names.unique()}
        columns = {
            "source_device": names.map(found), "target_device": names.map(found), "device": names.map(found),
            "stack": good["kernel_source"].astype(str) + " " + version.astype(str),
            "collective": good["op_name"].map(_NAMES),
            "participants": good["num_gpus"].astype("int64"), "nodes": 1,
            "bytes": good["message_size"].astype("int64") * bits.astype("int64") // 8, "count": 1,
            **dict.fromkeys(("min_s", "p10_s", "median_s", "mean_s", "p90_s"), good["latency"] * 1e-3),
            "source": SOURCE,
        }  # fmt: skip
        parts.append(pd.DataFrame(columns, index=good.index)[list(LINK_COLUMNS)])
    if not parts:
        return pd.DataFrame()
    # A version that another one reuses lies in two folders, row for row.
    table = pd.concat(parts, ignore_index=True)
    again = table.duplicated()
    report.refuse("the same measurement stands in a second file", int(again.sum()), files[0].parents[1].name)
    return table[~again].reset_index(drop=True)
