"""What the readers of published measurements share: checks of raw rows, and the assembly of a profile from columns."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from moirai_sim.errors import InputError
from moirai_sim.profiling.schema import OPERATOR_COLUMNS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from moirai_sim.clusters.cluster import DeviceType
    from moirai_sim.profiling.published import Report


def device_json(device: DeviceType) -> str:
    """Return a data sheet as one line of JSON, as profiles carry it."""
    return json.dumps(dataclasses.asdict(device), sort_keys=True)


def require(path: Path, frame: pd.DataFrame, columns: Iterable[str]) -> None:
    """Refuse a file that misses columns.

    Raises
    ------
    InputError
        Naming all missing columns and those that were found.
    """
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise InputError(
            f"{path}: misses the columns {', '.join(missing)}; found {', '.join(map(str, frame.columns))}; "
            "is it a file of this data set?"
        )


def usable(
    path: Path, frame: pd.DataFrame, sizes: Iterable[str], report: Report, *, latency: str, zero: Iterable[str] = ()
) -> pd.DataFrame:
    """Return the rows with a positive finite latency and sizes of at least 1 (``zero``: at least 0); count the rest."""
    import numpy as np
    import pandas as pd

    report.files += 1
    report.read += len(frame)
    good = np.ones(len(frame), dtype=bool)
    for column, least in [(latency, None), *((c, 1) for c in sizes), *((c, 0) for c in zero)]:
        values = pd.to_numeric(frame[column], errors="coerce")
        if least is None:
            bad, why = ~(np.isfinite(values) & (values > 0)), f"{column} is not a positive number"
        else:
            bad, why = ~(np.isfinite(values) & (values >= least)), f"{column} is not a number of at least {least}"
        bad &= good
        if bad.any():
            report.refuse(why, int(bad.sum()), f"{path.name}:{int(bad.to_numpy().argmax()) + 2}")
            good &= ~bad
    return frame[good]


def profile(columns: Mapping[str, Any], size: int) -> pd.DataFrame:
    """Return a profile of ``size`` rows; ``time_s`` stands for all statistics, which data sets do not give apart."""
    import pandas as pd

    time: NDArray[np.float64] = columns["time_s"]
    given = {
        "attributes": "{}", "parts": "[]", "weight_bytes": 0, "model": "", "count": 1, "energy_j": None,
        **dict.fromkeys(("min_s", "p10_s", "median_s", "mean_s", "p90_s"), time), **columns,
    }  # fmt: skip
    frame = pd.DataFrame({name: given[name] for name in OPERATOR_COLUMNS}, index=range(size))
    frame["energy_j"] = frame["energy_j"].astype("float64")
    return frame
