"""The profile file: what comes back is what went in, and what no clock gives is refused."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moirai_sim.clusters.cluster import DeviceType
from moirai_sim.errors import InputError
from moirai_sim.graphs.operator import Operator, Tensor
from moirai_sim.graphs.work import make_operator
from moirai_sim.profiling.schema import (
    check_profile,
    device_type_from_json,
    device_type_json,
    operator_key,
    operator_row,
    profile_kind,
    read_profile,
    row_operator,
    statistics,
    write_profile,
)

SHEET = DeviceType("test-cpu", "cpu", 1 << 30, 1e10, {"float32": 1e11}, compute_units=1, source="test")


def profile_of(operators, seconds):
    rows = [operator_row(op) | statistics([s, s * 1.1, s * 1.2]) for op, s in zip(operators, seconds, strict=True)]
    frame = pd.DataFrame(rows)
    frame["device"], frame["device_type"], frame["model"] = SHEET.name, device_type_json(SHEET), "m"
    frame["backend"], frame["stack"], frame["source"], frame["energy_j"] = "onnxruntime", "1", "measured", np.nan
    return frame


def fused():
    conv = make_operator("c", "Conv", [(1, 3, 8, 8), (4, 3, 3, 3)], [(1, 4, 8, 8)], {"pads": [1, 1, 1, 1]})
    relu = make_operator("r", "Relu", [(1, 4, 8, 8)], [(1, 4, 8, 8)])
    return Operator(
        "r", "Conv", conv.inputs, (Tensor("y", (1, 4, 8, 8)),), conv.attributes, flops=9, read_bytes=8, write_bytes=7,
        weight_bytes=6, parts=(conv, relu),
    )  # fmt: skip


def test_operator_survives_its_row():
    operator = fused()
    again = row_operator(operator_row(operator))
    assert operator_key(again) == operator_key(operator)
    assert (again.flops, again.read_bytes, again.write_bytes, again.weight_bytes) == (9, 8, 7, 6)
    assert [part.op_type for part in again.parts] == ["Conv", "Relu"]


def test_key_is_the_json_of_what_is_computed():
    plain = make_operator("a", "Gather", [(), (3,), (2, 5)], [(3, 5)], {"axis": 0, "text": '"\u00e9', "raw": b"x"})
    for operator in (plain, fused()):
        row = operator_row(operator)
        parts = [{key: part[key] for key in part if key != "name"} for part in json.loads(row["parts"])]
        own = {key: json.loads(row[key]) for key in ("input_shapes", "output_shapes", "attributes")}
        own |= {"op_type": operator.op_type, "dtype": operator.dtype, "parts": parts}
        assert operator_key(operator) == json.dumps(own, sort_keys=True, separators=(",", ":"))


def test_key_tells_work_apart_and_not_names():
    one = make_operator("a", "MatMul", [(4, 8), (8, 2)], [(4, 2)])
    assert operator_key(one) == operator_key(make_operator("b", "MatMul", [(4, 8), (8, 2)], [(4, 2)]))
    others = [
        make_operator("a", "MatMul", [(4, 8), (8, 3)], [(4, 3)]),
        make_operator("a", "MatMul", [(4, 8), (8, 2)], [(4, 2)], dtype="float16"),
        make_operator("a", "MatMul", [(4, 8), (8, 2)], [(4, 2)], {"transA": 0}),
        fused(),
    ]
    assert len({operator_key(op) for op in [one, *others]}) == 5


def test_file_round_trip(tmp_path):
    frame = profile_of([fused()], [1e-3])
    path = tmp_path / "p.parquet"
    write_profile(frame, path, metadata={"load": [1, 2]})
    again, metadata = read_profile(path)
    assert metadata == {"load": [1, 2]}
    assert profile_kind(path) == "operators"
    pd.testing.assert_frame_equal(again[list(frame.columns)], frame, check_dtype=False)
    assert device_type_from_json(again["device_type"][0]) == SHEET


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("median_s", -1.0, "positive, finite and in order"),
        ("median_s", 1.0, "positive, finite and in order"),
        ("min_s", 0.0, "positive"),
        ("count", 0, "no repeats"),
        ("device", None, "empty"),
        ("input_shapes", "[[1,2", "input_shapes, row 0: cannot be read"),
        ("parts", "null", "parts, row 0: .*must be a list"),
        ("parts", "[1]", "parts, row 0: cannot be read"),
        ("parts", "[{}]", "parts, row 0: cannot be read"),
        ("device_type", '{"name": "x"}', "device_type, row 0"),
    ],
)
def test_impossible_rows_are_refused(column, value, message, tmp_path):
    frame = profile_of([fused()], [1e-3])
    frame[column] = [value]
    with pytest.raises(InputError, match=message):
        write_profile(frame, tmp_path / "p.parquet", metadata={})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "content"),
    [("moirai_sim", "{"), ("moirai_sim", "[]"), ("moirai_sim", '{"models": {"m": {}}}'), ("count", "many")],
)
def test_a_damaged_file_is_refused(tmp_path, key, content):
    path = tmp_path / "p.parquet"
    write_profile(profile_of([fused()], [1e-3]), path, metadata={})
    table = pq.read_table(path)
    if key == "count":
        table = table.set_column(table.schema.get_field_index(key), key, pa.array([content]))
    else:
        table = table.replace_schema_metadata(table.schema.metadata | {key.encode(): content.encode()})
    pq.write_table(table, path)
    with pytest.raises(InputError, match=r"metadata is broken|a column is not of its type"):
        read_profile(path)


def test_missing_columns_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="median_s"):
        check_profile(profile_of([fused()], [1e-3]).drop(columns="median_s"))
    text = tmp_path / "text.parquet"
    text.write_text("no parquet")
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "plain.parquet")
    for path in (text, tmp_path / "plain.parquet", tmp_path / "absent.parquet"):
        for read in (read_profile, profile_kind):
            with pytest.raises(InputError, match="parquet"):
                read(path)


def test_statistics_are_quantiles():
    found = statistics(np.arange(1.0, 102.0))
    assert found == {"count": 101, "min_s": 1.0, "p10_s": 11.0, "median_s": 51.0, "mean_s": 51.0, "p90_s": 91.0}
