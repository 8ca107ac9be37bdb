"""What the readers of published measurements share: rows that know their place, checks of them, and whole profiles."""

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


def read_csv(file: Path, columns: Iterable[str] | None = None) -> pd.DataFrame:
    """Return a CSV file, of ``columns`` those that it has; its index says where each row stands.

    Raises
    ------
    InputError
        If it cannot be read.
    """
    import pandas as pd

    wanted = None if columns is None else set(columns).__contains__
    try:
        # Blank lines stay, for the lines below them to keep their numbers; they are refused as rows without a value.
        frame = pd.read_csv(file, usecols=wanted, skip_blank_lines=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as CSV ({error}); is it complete?") from error
    return _placed(file, frame, first=2)  # below the line of the header


def read_parquet(file: Path) -> pd.DataFrame:
    """Return a Parquet file; its index says where each row stands, the first in line 1.

    Raises
    ------
    InputError
        If it cannot be read.
    """
    import pandas as pd
    import pyarrow as pa

    try:
        frame = pd.read_parquet(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{file}: cannot be read as Parquet ({error}); is it complete?") from error
    return _placed(file, frame, first=1)


def _placed(file: Path, frame: pd.DataFrame, *, first: int) -> pd.DataFrame:
    import pandas as pd

    # In the index a row's place outlives filters, groups and tables put together from several files.
    return frame.set_axis(pd.MultiIndex.from_product([[file.name], range(first, first + len(frame))]))


def without(frame: pd.DataFrame, bad: Any, why: str, report: Report) -> pd.DataFrame:  # noqa: ANN401
    """Return a table of `read_csv` or `read_parquet` without the rows where ``bad``, and count those."""
    import numpy as np

    bad = np.asarray(bad, dtype=bool)
    if not bad.any():
        return frame
    name, line = frame.index[int(bad.argmax())]
    report.refuse(why, int(bad.sum()), f"{name}:{line}")
    good: pd.DataFrame = frame.loc[~bad]
    return good


def usable(
    frame: pd.DataFrame,
    report: Report,
    *,
    words: Iterable[str] = (),
    times: Iterable[str] = (),
    sizes: Iterable[str] = (),
    zero: Iterable[str] = (),
) -> pd.DataFrame:
    """Return the rows whose columns can all be used, in the types that the readers count on; count the rest.

    ``words`` are not empty and become text, ``times`` are positive and finite, ``sizes`` are whole numbers of at least
    1 and ``zero`` of at least 0. One text among numbers makes pandas read a whole column as text, hence the conversion.
    """
    import numpy as np
    import pandas as pd

    for column in words:
        frame = without(frame, frame[column].isna(), f"{column} is empty", report)
        frame = frame.assign(**{column: frame[column].astype(str)})
    for column in times:
        values = pd.to_numeric(frame[column], errors="coerce").astype("float64")
        positive = (values > 0) & (values < np.inf)
        frame = without(frame.assign(**{column: values}), ~positive, f"{column} is not a positive number", report)
    for column, least in [*((c, 1) for c in sizes), *((c, 0) for c in zero)]:
        values = pd.to_numeric(frame[column], errors="coerce").astype("float64")
        whole = (values >= least) & (values < 2**63) & (values % 1 == 0)
        why = f"{column} is not a whole number of at least {least}"
        frame = without(frame.assign(**{column: values}), ~whole, why, report)
        frame = frame.assign(**{column: frame[column].astype("int64")})
    return frame


def profile(columns: Mapping[str, Any], size: int) -> pd.DataFrame:
    """Return a profile of ``size`` rows; ``time_s`` stands for all statistics, which data sets do not give apart."""
    import pandas as pd

    time: NDArray[np.float64] = columns["time_s"]
    given = {
        "attributes": "{}", "parts": "[]", "weight_bytes": 0, "model": "", "kernel": "", "count": 1, "energy_j": None,
        **dict.fromkeys(("min_s", "p10_s", "median_s", "mean_s", "p90_s"), time), **columns,
    }  # fmt: skip
    frame = pd.DataFrame({name: given[name] for name in OPERATOR_COLUMNS}, index=range(size))
    frame["energy_j"] = frame["energy_j"].astype("float64")
    return frame
