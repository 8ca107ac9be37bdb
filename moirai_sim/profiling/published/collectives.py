"""aiconfigurator's collectives: NCCL and the all-reduce kernels of serving stacks, over NVLink within one server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moirai_sim.graphs.operator import DTYPE_BITS
from moirai_sim.profiling.published.systems import SOURCE, device_name
from moirai_sim.profiling.published.table import read_parquet, require, usable, without
from moirai_sim.profiling.schema import LINK_COLUMNS, LINK_DEFAULTS

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

    parts = []
    for file in files:
        if file.stem not in COLLECTIVES:
            what = f"table {file.stem}"
            report.other_files[what] = report.other_files.get(what, 0) + 1
            continue
        frame = read_parquet(file)
        dtype = COLLECTIVES[file.stem]
        words, sizes = ["op_name", "kernel_source", dtype], ("num_gpus", "message_size")
        require(file, frame, (*words, *sizes, "latency"))
        report.count(frame)
        words += [column for column in ("version", "device") if column in frame]
        good = usable(frame, report, words=words, times=("latency",), sizes=sizes)
        good = good.assign(bits=good[dtype].replace(_DTYPES).map(DTYPE_BITS))
        good = without(good, good["bits"].isna(), f"{dtype} is none that is known", report)
        good = without(good, ~good["op_name"].isin(_NAMES), "op_name is none that is priced", report)
        good = without(good, good["num_gpus"] < 2, "one device alone exchanges nothing", report)
        if not len(good):
            continue
        version = good["version"] if "version" in good else pd.Series(file.parent.name, good.index)
        names = good["device"] if "device" in good else pd.Series("", good.index)
        found = {name: device_name(file, name) for name in names.unique()}
        columns = {
            "source_device": names.map(found), "target_device": names.map(found), "device": names.map(found),
            "stack": good["kernel_source"] + " " + version,
            "collective": good["op_name"].map(_NAMES),
            "participants": good["num_gpus"], "nodes": 1,
            "bytes": good["message_size"] * good["bits"].astype("int64") // 8, "count": 1,
            **dict.fromkeys(("min_s", "p10_s", "median_s", "mean_s", "p90_s"), good["latency"] * 1e-3),
            "source": SOURCE,
        }  # fmt: skip
        parts.append(pd.DataFrame(LINK_DEFAULTS | columns, index=good.index)[list(LINK_COLUMNS)])
    if not parts:
        return pd.DataFrame()
    # A version that another one reuses lies in two folders, row for row.
    table = pd.concat(parts)
    table = without(table, table.duplicated(), "the same measurement stands in a second file", report)
    return table.reset_index(drop=True)
