"""Readers of published measurements: units, sizes, and every refused row counted."""

from pathlib import Path

import pandas as pd
import pytest

from moirai_sim.errors import InputError
from moirai_sim.profiling.published import import_published
from moirai_sim.profiling.schema import check_profile

LINEAR = """OPName,Latency,Device,B,M,N,K
linear,2.0,Tesla T4,1,64,128,32
linear,nan,Tesla T4,1,8,8,8
linear,1,Tesla T4,1,0,8,8
"""


def test_neusight_reads_the_contraction_from_n_and_milliseconds(tmp_path: Path):
    (tmp_path / "linear.csv").write_text(LINEAR)
    frame, report = import_published("neusight", tmp_path)
    check_profile(frame)
    row = frame.iloc[0]
    assert (row["input_shapes"], row["output_shapes"]) == ("[[64, 128], [32, 128], [32]]", "[[64, 32]]")
    assert row["median_s"] == pytest.approx(2e-3)
    assert row["flops"] == 2 * 64 * 128 * 32 + 64 * 32
    assert row["device"] == "nvidia-t4"
    assert (report.read, report.kept, sum(report.refused.values())) == (3, 1, 2)
    assert set(report.examples.values()) == {"linear.csv:3", "linear.csv:4"}


def test_neusight_counts_a_measurement_once_though_two_files_hold_it(tmp_path: Path):
    text = "OPName,Latency,Device,B,H\nadd,0.5000000000001,Tesla P4,4,8\n"
    (tmp_path / "a.csv").write_text(text)
    (tmp_path / "b.csv").write_text(text.replace("0000001", ""))
    frame, report = import_published("neusight", tmp_path)
    assert len(frame) == 1
    assert sum(report.refused.values()) == 1


def test_neusight_scalar_operand_reads_less(tmp_path: Path):
    (tmp_path / "a.csv").write_text("OPName,Latency,Device,B,H\nadd,1,Tesla T4,4,8\naddu,1,Tesla T4,4,8\n")
    frame, _ = import_published("neusight", tmp_path)
    reads = dict(zip(frame["name"], frame["read_bytes"], strict=True))
    assert reads == {"add": 2 * 4 * 8 * 4, "addu": 4 * 8 * 4 + 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("OPName,Latency\nadd,1\n", "misses the columns"),
        ("OPName,Latency,Device,B,H\nadd,1,Tesla X9,4,8\n", "unknown devices Tesla X9"),
        ("OPName,Latency,Device,B,H\nfrobnicate,1,Tesla T4,4,8\n", "unknown operator 'frobnicate'"),
        ("OPName,Latency,Device,B,H\nadd,-1,Tesla T4,4,8\n", "no usable row"),
    ],
)
def test_neusight_refuses_what_it_cannot_read(tmp_path: Path, text: str, message: str):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        import_published("neusight", tmp_path)


def gemm_table(folder: Path, **changes) -> Path:
    row = {
        "framework": "VLLM", "version": "0.1", "device": "NVIDIA H100 80GB HBM3", "gemm_dtype": "fp8", "m": 16, "n": 32,
        "k": 64, "latency": 0.01,
    } | changes  # fmt: skip
    path = folder / "gemm_perf.parquet"
    pd.DataFrame([row, row | {"m": 0}, row | {"gemm_dtype": "q2"}]).to_parquet(path)
    return path


def test_aiconfigurator_reads_sizes_and_counts_empty_products(tmp_path: Path):
    frame, report = import_published("aiconfigurator", gemm_table(tmp_path))
    check_profile(frame)
    row = frame.iloc[0]
    assert (len(frame), row["dtype"], row["stack"]) == (1, "float8", "vllm 0.1")
    assert row["read_bytes"] == 16 * 64 + 64 * 32
    assert row["median_s"] == pytest.approx(1e-5)
    assert sum(report.refused.values()) == 2


def test_aiconfigurator_decoding_attends_to_the_cache(tmp_path: Path):
    row = {
        "framework": "TRTLLM", "version": "1", "device": "NVIDIA A100-SXM4-80GB", "attn_dtype": "bfloat16",
        "kv_cache_dtype": "bfloat16", "batch_size": 2, "isl": 1, "step": 99, "num_heads": 8, "num_key_value_heads": 4,
        "head_dim": 64, "latency": 0.5,
    }  # fmt: skip
    pd.DataFrame([row]).to_parquet(tmp_path / "generation_attention_perf.parquet")
    frame, _ = import_published("aiconfigurator", tmp_path)
    assert frame.iloc[0]["input_shapes"] == "[[2, 8, 1, 64], [2, 4, 100, 64], [2, 4, 100, 64]]"


def test_vidur_is_a_profile_of_links(tmp_path: Path):
    head = ",".join(f"time_stats.send_recv.{s}" for s in ("min", "max", "mean", "median"))
    text = f"{head},size,num_workers,devices_per_node\n0.01,0.04,0.03,0.02,2048,2,1\n0.01,0.04,0.03,0,2048,2,1\n"
    (tmp_path / "send_recv.csv").write_text(text)
    frame, report = import_published("vidur", tmp_path)
    check_profile(frame, "links")
    assert frame.iloc[0]["median_s"] == pytest.approx(2e-5)
    assert (len(frame), sum(report.refused.values())) == (1, 1)


def test_a_truncated_table_is_an_input_error(tmp_path: Path):
    path = gemm_table(tmp_path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        import_published("aiconfigurator", tmp_path)
