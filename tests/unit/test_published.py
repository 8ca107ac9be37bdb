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


def test_neusight_keeps_the_kernel_and_how_many_blocks_share_a_tile(tmp_path: Path):
    head = "OPName,Latency,Device,B,M,N,K,Kernel Name,Grid z\n"
    rows = ["linear,2,Tesla T4,1,64,128,32,volta_sgemm_128x64_tn,3", "linear,2,Tesla T4,1,64,128,33,a_sgemm_32x32_tn,1",
            "linear,2,Tesla T4,1,64,128,34,,2"]  # fmt: skip
    (tmp_path / "linear.csv").write_text(head + "\n".join(rows))
    # The batch lies along z as well.
    batched = ["bmm,2,Tesla T4,4,8,8,8,volta_sgemm_64x64_nn,4", "bmm,2,Tesla T4,4,8,8,9,volta_sgemm_64x64_nn,8"]
    (tmp_path / "bmm.csv").write_text(head + "\n".join(batched))
    frame, _ = import_published("neusight", tmp_path)
    kernels = frame.sort_values(["name", "output_shapes"])["kernel"].tolist()
    assert kernels == [
        "volta_sgemm_64x64_nn", "volta_sgemm_64x64_nn*2", "volta_sgemm_128x64_tn*3", "a_sgemm_32x32_tn", "",
    ]  # fmt: skip


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


def where(report) -> dict[str, str]:
    """Return for each reason how many rows were refused and the place of the first."""
    return {why: f"{rows} from {report.examples[why]}" for why, rows in report.refused.items()}


def test_neusight_counts_every_row_that_it_cannot_use_at_its_line_in_the_file(tmp_path: Path):
    (tmp_path / "a.csv").write_text("""OPName,Latency,Device,B,H
add,1,Tesla T4,4,8
ln,1,Tesla T4,4.0,wide
,1,Tesla T4,4,8

add,slow,Tesla T4,4,8
add,1,,4,8
ln,2,Tesla T4,4.0,16
ln,1,Tesla T4,4.5,8
ln,inf,Tesla T4,4,8
""")
    frame, report = import_published("neusight", tmp_path)
    check_profile(frame)
    assert sorted(frame["output_shapes"]) == ["[[4, 16]]", "[[4, 8]]"]
    assert where(report) == {
        "OPName is empty": "2 from a.csv:4",
        "Device is empty": "1 from a.csv:7",
        "Latency is not a positive number": "2 from a.csv:6",
        "H is not a whole number of at least 1": "1 from a.csv:3",
        "B is not a whole number of at least 1": "1 from a.csv:9",
    }
    assert (report.files, report.read, report.kept) == (1, 9, 2)


def test_neusight_refuses_windows_beyond_the_padded_input(tmp_path: Path):
    (
        tmp_path / "conv.csv"
    ).write_text("""OPName,Latency,Device,B,Input_Channel,Output_Channel,Kernel_Szie,Input_Size,Stride,Padding
conv,1,Tesla T4,1,8,8,3,1,1,1
conv,1,Tesla T4,1,8,8,7,4,1,0
conv,1,Tesla T4,1,8,8,7,4,1,-1
""")
    frame, report = import_published("neusight", tmp_path)
    assert frame["output_shapes"].tolist() == ["[[1, 8, 1, 1]]"]
    assert where(report) == {
        "Padding is not a whole number of at least 0": "1 from conv.csv:4",
        "the window is larger than the padded input": "1 from conv.csv:3",
    }


def test_neusight_says_which_row_repeats_another(tmp_path: Path):
    (tmp_path / "a.csv").write_text("OPName,Latency,Device,B,H\nadd,1,Tesla T4,4,8\n")
    (tmp_path / "b.csv").write_text("OPName,Latency,Device,B,H\nln,1,Tesla T4,4,8\nadd,1,Tesla T4,4,8\n")
    _, report = import_published("neusight", tmp_path)
    assert where(report) == {"the same measurement stands in a second file": "1 from b.csv:3"}
    assert report.files == 2


def test_vidur_counts_every_row_that_it_cannot_use(tmp_path: Path):
    names = ("min", "max", "mean", "median")
    head = ",".join(f"time_stats.send_recv.{name}" for name in names)
    (tmp_path / "send_recv.csv").write_text(f"""{head},size,num_workers,devices_per_node
0.01,0.04,0.03,0.02,2048,2,1
low,0.04,0.03,0.02,2048,2,1
0.01,,0.03,0.02,2048,2,1
0.01,0.04,0,0.02,2048,2,1
0.01,0.04,0.03,middle,2048,2,1
0.01,0.04,0.03,0.05,2048,2,1
0.01,0.04,0.03,0.02,2048,2,none
""")
    frame, report = import_published("vidur", tmp_path)
    check_profile(frame, "links")
    assert where(report) == {
        **{
            f"time_stats.send_recv.{name} is not a positive number": f"1 from send_recv.csv:{line}"
            for name, line in zip(names, (3, 4, 5, 6), strict=True)
        },
        "devices_per_node is not a whole number of at least 1": "1 from send_recv.csv:8",
        "min, median and max are not in order": "1 from send_recv.csv:7",
    }
    assert (report.read, report.kept) == (7, 1)


ATTENTION = {
    "framework": "TRTLLM", "version": "1", "device": "NVIDIA A100-SXM4-80GB", "attn_dtype": "bfloat16",
    "kv_cache_dtype": "bfloat16", "batch_size": 2, "isl": 1, "step": 99, "num_heads": 8, "num_key_value_heads": 4,
    "head_dim": 64, "latency": 0.5, "window_size": 0,
}  # fmt: skip
EXPERTS = {
    "framework": "VLLM", "version": 0.1, "device": "NVIDIA H100 80GB HBM3", "moe_dtype": "fp8", "num_tokens": 16,
    "hidden_size": 32, "inter_size": 64, "topk": 2, "num_experts": 8, "moe_tp_size": 1, "moe_ep_size": 1,
    "distribution": "uniform", "latency": 0.5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("table", "row", "bad"),
    [
        (
            "generation_attention_perf",
            ATTENTION,
            {
                "framework is empty": {"framework": None},
                "version is empty": {"version": None},
                "device is empty": {"device": None},
                "attn_dtype is empty": {"attn_dtype": None},
                "kv_cache_dtype is empty": {"kv_cache_dtype": None},
                "isl is not a whole number of at least 1": {"isl": None},
                "step is not a whole number of at least 0": {"step": None},
                "attn_dtype is none that is priced": {"attn_dtype": "q2"},
                "attention within a sliding window is not priced": {"window_size": 128},
            },
        ),
        (
            "moe_perf",
            EXPERTS,
            {
                "distribution is empty": {"distribution": None},
                "experts cannot be shared evenly among the devices": {"moe_ep_size": 3},
            },
        ),
    ],
)
def test_aiconfigurator_counts_every_row_that_it_cannot_use(tmp_path: Path, table: str, row: dict, bad: dict):
    pd.DataFrame([row, *({**row, **change} for change in bad.values())]).to_parquet(tmp_path / f"{table}.parquet")
    frame, report = import_published("aiconfigurator", tmp_path)
    check_profile(frame)
    assert where(report) == {why: f"1 from {table}.parquet:{place}" for place, why in enumerate(bad, start=2)}
    assert (report.files, report.read, report.kept) == (1, len(bad) + 1, 1)


@pytest.mark.parametrize(
    ("table", "row", "column"),
    [("context_attention_perf", ATTENTION, "kv_cache_dtype"), ("moe_perf", EXPERTS, "distribution")],
)
def test_aiconfigurator_names_the_column_of_text_that_a_table_misses(
    tmp_path: Path, table: str, row: dict, column: str
):
    pd.DataFrame([row]).drop(columns=column).to_parquet(tmp_path / f"{table}.parquet")
    with pytest.raises(InputError, match=f"{table}.parquet: misses the columns {column}; "):
        import_published("aiconfigurator", tmp_path)


def test_collectives_count_every_row_that_they_cannot_use(tmp_path: Path):
    row = {
        "device": "NVIDIA H100 80GB HBM3", "version": "2", "op_name": "all_reduce", "kernel_source": "NCCL",
        "nccl_dtype": "half", "num_gpus": 2, "message_size": 1024, "latency": 0.5,
    }  # fmt: skip
    bad = {
        "kernel_source is empty": {"kernel_source": None},
        "device is empty": {"device": None},
        "nccl_dtype is none that is known": {"nccl_dtype": "q2"},
        "op_name is none that is priced": {"op_name": "gossip"},
        "one device alone exchanges nothing": {"num_gpus": 1},
        "the same measurement stands in a second file": {},
    }
    pd.DataFrame([row, *({**row, **change} for change in bad.values())]).to_parquet(tmp_path / "nccl_perf.parquet")
    frame, report = import_published("aiconfigurator", tmp_path)
    check_profile(frame, "links")
    assert where(report) == {why: f"1 from nccl_perf.parquet:{place}" for place, why in enumerate(bad, start=2)}
