"""The profile file: one row a measured kernel, in Parquet, the same for our profilers and for published data sets."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from moirai_sim.clusters.cluster import DeviceType
from moirai_sim.errors import InputError
from moirai_sim.files import write_whole
from moirai_sim.graphs.operator import Operator, Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import pandas as pd
    import pyarrow as pa

FORMAT = "moirai-sim/profile@1"
KIND_KEY, METADATA_KEY = b"format", b"moirai_sim"

OPERATOR_COLUMNS: dict[str, str] = {
    "name": "string",  # operator (or fused kernel) in the model where it was met first
    "op_type": "string",  # ONNX operator type; of the main part for a fused kernel
    "family": "string",  # group that one estimator serves
    "dtype": "string",  # data type of the arithmetic, spelt as in a device's peak_flops
    "input_shapes": "string",  # JSON, list of shapes
    "output_shapes": "string",  # JSON, list of shapes
    "attributes": "string",  # JSON object, ONNX attribute names
    "parts": "string",  # JSON list: the operators of a fused kernel, in the form of an operators file
    "flops": "int64",
    "read_bytes": "int64",
    "write_bytes": "int64",
    "weight_bytes": "int64",
    "device": "string",  # name of the device type
    "device_type": "string",  # JSON, the data sheet
    "backend": "string",  # library that ran it
    "stack": "string",  # versions of that library and of what lies below it
    "kernel": "string",  # the kernel that it launched, where known; "*3" after it: 3 blocks share a tile of the result
    "model": "string",  # where the operator was met; empty for a sweep
    "count": "int64",  # timed repeats behind the statistics
    "min_s": "double",
    "p10_s": "double",
    "median_s": "double",
    "mean_s": "double",
    "p90_s": "double",
    "energy_j": "double",  # energy of one run; null where no counter was read
    "source": "string",  # citation of the data set, or "measured"
}
"""Columns of an operator profile and their Arrow types. Times are seconds of one execution."""

LINK_COLUMNS: dict[str, str] = {
    "source_device": "string",
    "target_device": "string",
    "device": "string",  # device type of the participants; empty: those of the machine that was profiled
    "stack": "string",  # library and version; empty: our own channel
    "collective": "string",  # "send" for point to point, else "all-reduce", ...
    "participants": "int64",  # devices that take part; 2 for "send"
    "nodes": "int64",  # machines that they lie in
    "latency_ns": "int64",  # of the route between them, by the cluster file; 0 where that is not what was crossed
    "bandwidth_bytes_per_s": "double",  # likewise
    "bytes": "int64",
    "count": "int64",
    "min_s": "double",
    "p10_s": "double",
    "median_s": "double",
    "mean_s": "double",
    "p90_s": "double",
    "source": "string",
}
"""Columns of a link profile and their Arrow types."""

NULLABLE = frozenset({"energy_j"})
OPERATOR_DEFAULTS: dict[str, Any] = {"kernel": ""}
"""Columns that a profile of operators may leave out."""
LINK_DEFAULTS: dict[str, Any] = {
    "nodes": 1, "device": "", "stack": "", "latency_ns": 0, "bandwidth_bytes_per_s": 0.0,
}  # fmt: skip
"""Columns that a profile of links may leave out."""
_COLUMNS = {"operators": OPERATOR_COLUMNS, "links": LINK_COLUMNS}
_DEFAULTS = {"operators": OPERATOR_DEFAULTS, "links": LINK_DEFAULTS}


def statistics(samples: Any) -> dict[str, float]:  # noqa: ANN401
    """Return the columns ``count``, ``min_s`` ... ``p90_s`` of repeated timings (seconds, one dimension)."""
    import numpy as np

    times = np.asarray(samples, dtype=np.float64)
    low, middle, high = np.percentile(times, [10, 50, 90])
    return {
        "count": len(times),
        "min_s": float(times.min()),
        "p10_s": float(low),
        "median_s": float(middle),
        "mean_s": float(times.mean()),
        "p90_s": float(high),
    }


def operator_row(operator: Operator) -> dict[str, Any]:
    """Return the columns of a profile that say which operator it is: ``name`` to ``weight_bytes``."""
    from moirai_sim.costs.families import family

    return {
        "name": operator.name,
        "op_type": operator.op_type,
        "family": family(operator.op_type, [tensor.shape for tensor in operator.inputs], operator.attributes),
        "dtype": operator.dtype,
        "input_shapes": _json([tensor.shape for tensor in operator.inputs]),
        "output_shapes": _json([tensor.shape for tensor in operator.outputs]),
        "attributes": _json(dict(operator.attributes)),
        "parts": _json([_document(part) for part in operator.parts]),
        "flops": operator.flops,
        "read_bytes": operator.read_bytes,
        "write_bytes": operator.write_bytes,
        "weight_bytes": operator.weight_bytes,
    }


def row_operator(row: Mapping[str, Any]) -> Operator:
    """Return the operator that a row of a profile describes: the inverse of `operator_row`, tensor names aside."""
    parts = [_from_document(part) for part in json.loads(row["parts"])]
    return replace(
        _from_document({key: row[key] for key in ("name", "op_type", "dtype")}
                       | {key: json.loads(row[key]) for key in ("input_shapes", "output_shapes", "attributes")}),
        flops=int(row["flops"]),
        read_bytes=int(row["read_bytes"]),
        write_bytes=int(row["write_bytes"]),
        weight_bytes=int(row["weight_bytes"]),
        parts=tuple(parts),
    )  # fmt: skip


def operator_key(operator: Operator) -> str:
    """Return a text that is equal for operators that are the same work: all but their names."""
    parts = ",".join(["{" + _work(part) + "}" for part in operator.parts])
    return "{" + _work(operator) + f',"parts":[{parts}]' + "}"


def _work(operator: Operator) -> str:
    """Return the members of `_document` but the name, as `_json` has them: by hand, since every price asks for them."""
    attributes = _json(dict(operator.attributes)) if operator.attributes else "{}"
    return (
        f'"attributes":{attributes},"dtype":{_text(operator.dtype)},"input_shapes":{_shapes(operator.inputs)},'
        f'"op_type":{_text(operator.op_type)},"output_shapes":{_shapes(operator.outputs)}'
    )


def _shapes(tensors: Sequence[Tensor]) -> str:
    return "[" + ",".join([_form(len(tensor.shape)) % tensor.shape for tensor in tensors]) + "]"


@cache
def _form(rank: int) -> str:
    return "[" + ",".join(["%d"] * rank) + "]"


@cache
def _text(word: str) -> str:
    return json.dumps(word)


def _document(operator: Operator) -> dict[str, Any]:
    return {
        "name": operator.name,
        "op_type": operator.op_type,
        "dtype": operator.dtype,
        "input_shapes": [tensor.shape for tensor in operator.inputs],
        "output_shapes": [tensor.shape for tensor in operator.outputs],
        "attributes": dict(operator.attributes),
    }


def _from_document(document: Mapping[str, Any]) -> Operator:
    dtype = document["dtype"]
    return Operator(
        document["name"],
        document["op_type"],
        tuple(Tensor(f"in{i}", tuple(shape), dtype) for i, shape in enumerate(document["input_shapes"])),
        tuple(Tensor(f"out{i}", tuple(shape), dtype) for i, shape in enumerate(document["output_shapes"])),
        document["attributes"],
        dtype,
    )


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain)


def _plain(value: Any) -> Any:  # noqa: ANN401
    """Return an attribute's value in types that JSON has: arrays and numpy scalars as lists and numbers."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.tolist() if hasattr(value, "tolist") else list(value)


def device_type_json(device: DeviceType) -> str:
    """Return a data sheet as the JSON object of the ``device_type`` column."""
    return _json({key: value for key, value in asdict(device).items() if value is not None})


def device_type_from_json(text: str) -> DeviceType:
    """Return the data sheet of a ``device_type`` cell."""
    return DeviceType(**json.loads(text))


def _sizes(value: list[list[int]]) -> None:
    for shape in value:
        tuple(map(int, shape))


def _parts(value: object) -> None:
    if not isinstance(value, list):
        raise TypeError("must be a list")
    for part in value:
        operator_key(_from_document(part))


def _mapping(value: object) -> None:
    if not isinstance(value, dict):
        raise TypeError("must be an object")


def _sheet(value: Any) -> None:  # noqa: ANN401
    DeviceType(**value)


_CELLS: dict[str, Callable[[Any], None]] = {
    "input_shapes": _sizes, "output_shapes": _sizes, "attributes": _mapping, "parts": _parts, "device_type": _sheet,
}  # fmt: skip
"""Columns of operators that hold JSON, and what raises a TypeError where it is not what belongs there."""


def _unreadable(text: object, read: Callable[[Any], None]) -> str:
    """Return why a cell cannot be read; nothing where it can."""
    try:
        read(json.loads(str(text)))
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
        return f"cannot be read ({error})"
    return ""


def check_profile(frame: pd.DataFrame, kind: str = "operators", place: str = "profile") -> None:
    """Refuse a profile with missing columns or with times that no clock gives.

    Raises
    ------
    InputError
        With every problem: missing columns, empty cells, times that are not positive or not in order; of each column of
        JSON the first cell that cannot be read.
    """
    columns = _COLUMNS[kind]
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise InputError(f"{place}: not a profile of {kind}; it misses the columns {', '.join(missing)}")
    problems = [
        f"{place}: column {column} is empty in row {int(empty.to_numpy().argmax())}; every row needs it"
        for column in columns
        if column not in NULLABLE and (empty := frame[column].isna()).any()
    ]
    if not problems:
        steps = ["min_s", "p10_s", "median_s", "p90_s"]
        wrong = (frame[steps].diff(axis=1).iloc[:, 1:] < 0).any(axis=1) | ~(frame["min_s"] > 0)
        wrong |= ~(frame["p90_s"] < math.inf)
        if wrong.any():
            row = int(wrong.to_numpy().argmax())
            times = ", ".join(f"{step}={frame[step].iloc[row]:.3g}" for step in steps)
            problems.append(f"{place}: row {row}: times must be positive, finite and in order, read {times}")
        if (frame["count"] < 1).any():
            problems.append(f"{place}: a row has no repeats (count < 1)")
        if kind == "links" and (frame["bytes"] < 1).any():
            problems.append(f"{place}: a row moves nothing (bytes < 1)")
    if not problems and kind == "operators":
        for column, read in _CELLS.items():
            broken = next(
                ((text, reason) for text in frame[column].unique() if (reason := _unreadable(text, read))), None
            )
            if broken is not None:
                row = int((frame[column] == broken[0]).to_numpy().argmax())
                problems.append(f"{place}: column {column}, row {row}: {broken[1]}")
    if problems:
        raise InputError(problems)


def write_profile(frame: pd.DataFrame, path: Path, *, kind: str = "operators", metadata: Mapping[str, Any]) -> None:
    """Write a profile, whole or not at all.

    Parameters
    ----------
    frame
        The columns of the kind; further columns are dropped.
    kind
        ``operators`` or ``links``.
    metadata
        Telemetry, hardware, versions, reconciliation with whole models: anything that JSON holds.

    Raises
    ------
    InputError
        If the frame is no valid profile or the file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    frame = _completed(frame, kind)
    check_profile(frame, kind)
    schema = pa.schema(
        [pa.field(column, pa.type_for_alias(type_)) for column, type_ in _COLUMNS[kind].items()],
        metadata={KIND_KEY: f"{FORMAT}#{kind}".encode(), METADATA_KEY: json.dumps(metadata, sort_keys=True).encode()},
    )
    table = pa.Table.from_pandas(frame[list(_COLUMNS[kind])], schema=schema, preserve_index=False)
    table = table.replace_schema_metadata(schema.metadata)  # without pandas' own block
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_whole(path, sink.getvalue().to_pybytes())


def profile_kind(path: Path) -> str:
    """Return "operators" or "links": what a profile is of.

    Raises
    ------
    InputError
        If the file is no Parquet or no profile.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{path}: cannot be read as Parquet ({error}); write it with 'profile'") from error
    found = metadata.get(KIND_KEY, b"none").decode(errors="replace")
    kind = str(found.partition("#")[2])
    if found != f"{FORMAT}#{kind}" or kind not in _COLUMNS:
        raise InputError(
            f"{path}: format is '{found}', not '{FORMAT}'; write it with 'profile operators' or 'profile links'"
        )
    return kind


def read_profile(path: Path, *, kind: str = "operators") -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return a profile and its metadata.

    Raises
    ------
    InputError
        If the file is no Parquet, no profile of that kind, or holds impossible rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table: pa.Table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{path}: cannot be read as Parquet ({error}); write it with 'profile {kind}'") from error
    metadata = table.schema.metadata or {}
    found = metadata.get(KIND_KEY, b"none").decode(errors="replace")
    if found != f"{FORMAT}#{kind}":
        raise InputError(f"{path}: format is '{found}', not '{FORMAT}#{kind}'; write it with 'profile {kind}'")
    types = {column: pa.type_for_alias(name) for column, name in _COLUMNS[kind].items()}
    fields = [pa.field(field.name, types.get(field.name, field.type)) for field in table.schema]
    try:
        table = table.cast(pa.schema(fields))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"{path}: a column is not of its type ({error}); write it with 'profile {kind}'") from error
    try:
        facts = json.loads(metadata.get(METADATA_KEY, b"{}"))
        for part in facts.get("profiles", [facts]):
            _check_facts(part)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: its metadata is broken ({error!r}); write it with 'profile {kind}'") from error
    frame = _completed(table.to_pandas(), kind)
    check_profile(frame, kind, str(path))
    return frame, facts


def _check_facts(facts: Mapping[str, Any]) -> None:
    """Raise what reading raises where the metadata of one run of a profiler lacks what is read of it."""
    str(facts["hardware"]["cpu"] if "hardware" in facts else "")
    ratios = [float(whole["ratio"]) for whole in facts.get("models", {}).values()]
    if not all(0 < ratio < math.inf for ratio in ratios):
        raise ValueError("a ratio is not positive and finite")


def _completed(frame: pd.DataFrame, kind: str) -> pd.DataFrame:
    return frame.assign(**{key: value for key, value in _DEFAULTS[kind].items() if key not in frame})
