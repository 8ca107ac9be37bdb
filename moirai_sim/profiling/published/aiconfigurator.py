"""aiconfigurator (NVIDIA, Apache-2.0): kernels of LLM serving stacks, timed on NVIDIA GPUs.

One Parquet file a table, below ``SYSTEM/GROUP/FRAMEWORK/VERSION/``; ``latency`` in ms. Several frameworks and versions
are mixed, so each becomes a software stack of its own. Read are matrix products, attention and mixtures of experts; and
collectives, a profile of links, where a folder (``comm``) or file holds nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moirai_sim.errors import InputError, did_you_mean
from moirai_sim.graphs.operator import DTYPE_BITS
from moirai_sim.profiling.published import Report
from moirai_sim.profiling.published.collectives import COLLECTIVES, read_collectives
from moirai_sim.profiling.published.systems import SOURCE, device_name
from moirai_sim.profiling.published.table import device_json, profile, read_parquet, require, usable, without

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import pandas as pd

_ARITHMETIC = {
    "bfloat16": "bfloat16", "float16": "float16", "fp8": "float8", "fp8_block": "float8", "sq": "int8",
    "nvfp4": "float4",
    "int8_wo": "bfloat16", "int4_wo": "bfloat16", "float32": "float32",
}  # fmt: skip
_WEIGHT_BITS = {"int8_wo": 8, "int4_wo": 4}


def read(path: Path) -> tuple[pd.DataFrame, Report]:
    """Read a table, or all tables below a folder; see `moirai_sim.profiling.published.import_published`.

    Raises
    ------
    InputError
        If a table misses columns or names a device that is not known.
    """
    import pandas as pd

    report = Report(SOURCE)
    parts = []
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not any(file.stem in _TABLES for file in files) and any(file.stem in COLLECTIVES for file in files):
        return read_collectives(files, report), report
    for file in files:
        kind = file.stem
        if kind not in _TABLES:
            if kind in COLLECTIVES:
                what = f"table {kind}: links are a profile of their own, import their folder by itself"
                report.other_files[what] = report.other_files.get(what, 0) + 1
                continue
            if not path.is_dir():
                raise InputError(f"{file}: no reader for the table '{kind}'; {did_you_mean(kind, sorted(_TABLES))}")
            report.other_files[f"table {kind}"] = report.other_files.get(f"table {kind}", 0) + 1
            continue
        frame = read_parquet(file)
        (dtype_column, *more), sizes, build = _TABLES[kind]
        words = ("framework", "version", "device", dtype_column, *more)
        require(file, frame, ("latency", *words, *sizes))
        report.count(frame)
        zero = [s for s in sizes if s == "step"]
        good = usable(
            frame, report, words=words, times=("latency",), sizes=[s for s in sizes if s not in zero], zero=zero
        )
        good = without(good, ~good[dtype_column].isin(_ARITHMETIC), f"{dtype_column} is none that is priced", report)
        if "window_size" in good:
            window = pd.to_numeric(good["window_size"].fillna(0), errors="coerce")
            good = without(good, ~(window <= 0), "attention within a sliding window is not priced", report)
        for (device, dtype), rows in good.groupby(["device", dtype_column], sort=True):
            parts.append(_profile(file, str(device), str(dtype), rows, sizes, build, report))
    return (pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()), report


def _profile(
    file: Path,
    device: str,
    dtype: str,
    rows: pd.DataFrame,
    sizes: tuple[str, ...],
    build: Callable[..., Any],
    report: Report,
) -> pd.DataFrame:
    from moirai_sim.clusters.reader import read_device_type

    sheet = read_device_type(device_name(file, device))
    columns, keep, variant = build({s: rows[s].to_numpy() for s in sizes}, dtype, rows)
    rows = without(rows, ~keep, "experts cannot be shared evenly among the devices", report)
    stack = rows["framework"].str.lower() + " " + rows["version"] + variant
    return profile(
        {
            **columns, "name": file.stem.removesuffix("_perf"), "dtype": _ARITHMETIC[dtype], "device": sheet.name,
            "device_type": device_json(sheet), "backend": rows["framework"].str.lower().to_numpy(),
            "stack": stack.to_numpy(), "source": SOURCE, "time_s": rows["latency"].to_numpy() * 1e-3,
        },
        len(rows),
    )  # fmt: skip


def _rows(*columns: Any) -> Iterator[tuple[int, ...]]:  # noqa: ANN401
    return zip(*(column.tolist() for column in columns), strict=True)  # Python's integers format ten times faster


def _gemm(s: dict[str, Any], dtype: str, rows: pd.DataFrame) -> tuple[dict[str, Any], Any, str]:
    m, n, k = s["m"], s["n"], s["k"]
    bits = DTYPE_BITS[_ARITHMETIC[dtype]]
    weights = n * k * _WEIGHT_BITS.get(dtype, bits) // 8
    packed = dtype in _WEIGHT_BITS
    columns = {
        "op_type": "MatMulNBits" if packed else "MatMul",
        "family": "gemm",
        "attributes": [f'{{"K": {z}, "N": {y}, "bits": {_WEIGHT_BITS[dtype]}}}' for y, z in _rows(n, k)]
        if packed
        else "{}",
        "input_shapes": [f"[[{x}, {z}], [{z}, {y}]]" for x, y, z in _rows(m, n, k)],
        "output_shapes": [f"[[{x}, {y}]]" for x, y in _rows(m, n)],
        "flops": 2 * m * n * k,
        "read_bytes": m * k * bits // 8 + weights,
        "write_bytes": m * n * bits // 8,
        "weight_bytes": weights,
    }
    return columns, np.ones(len(m), dtype=bool), "" if dtype in ("bfloat16", "fp8") else f" {dtype}"


def _attention(s: dict[str, Any], dtype: str, rows: pd.DataFrame) -> tuple[dict[str, Any], Any, Any]:
    b, heads, kv, depth = s["batch_size"], s["num_heads"], s["num_key_value_heads"], s["head_dim"]
    queries = s["isl"]
    keys = queries + s["step"]  # ``step`` tokens lie in the cache already
    bits = DTYPE_BITS[_ARITHMETIC[dtype]]
    cache = rows["kv_cache_dtype"].map({"fp8": 8, "float8": 8, "int8": 8}).fillna(16).to_numpy(dtype="int64")
    columns = {
        "op_type": "Attention",
        "family": "attention",
        "attributes": '{"is_causal": 1}',
        "input_shapes": [
            f"[[{w}, {h}, {q}, {d}], [{w}, {g}, {t}, {d}], [{w}, {g}, {t}, {d}]]"
            for w, h, g, q, t, d in _rows(b, heads, kv, queries, keys, depth)
        ],
        "output_shapes": [f"[[{w}, {h}, {q}, {d}]]" for w, h, q, d in _rows(b, heads, queries, depth)],
        "flops": b * heads * queries * keys * (4 * depth + 7),
        "read_bytes": b * depth * (heads * queries * bits + 2 * kv * keys * cache) // 8,
        "write_bytes": b * heads * queries * depth * bits // 8,
    }
    other = np.where(cache != bits, " cache-fp8", "")
    return columns, np.ones(len(b), dtype=bool), other


def _experts(s: dict[str, Any], dtype: str, rows: pd.DataFrame) -> tuple[dict[str, Any], Any, Any]:
    keep = (s["num_experts"] % s["moe_ep_size"] == 0) & (s["inter_size"] % s["moe_tp_size"] == 0)
    s = {name: values[keep] for name, values in s.items()}
    tokens, hidden, experts, top = s["num_tokens"], s["hidden_size"], s["num_experts"], s["topk"]
    local, inner = experts // s["moe_ep_size"], s["inter_size"] // s["moe_tp_size"]
    bits = DTYPE_BITS[_ARITHMETIC[dtype]]
    pairs = np.maximum(tokens * top // s["moe_ep_size"], 1)
    weights = 3 * hidden * inner * _WEIGHT_BITS.get(dtype, bits) // 8
    columns = {
        "op_type": "MoE",
        "family": "moe",
        "attributes": [f'{{"k": {k}, "local_share": {1 / ep}}}' for k, ep in _rows(top, s["moe_ep_size"])],
        "input_shapes": [
            f"[[{t}, {h}], [{t}, {e}], [{l}, {i}, {h}], [0], [{l}, {h}, {i}], [0], [{l}, {i}, {h}]]"
            for t, h, e, l, i in _rows(tokens, hidden, experts, local, inner)  # noqa: E741
        ],
        "output_shapes": [f"[[{t}, {h}]]" for t, h in _rows(tokens, hidden)],
        "flops": pairs * (6 * hidden * inner + hidden),
        "read_bytes": tokens * (hidden + experts) * bits // 8 + weights * np.minimum(local, pairs),
        "write_bytes": tokens * hidden * bits // 8,
        "weight_bytes": weights * local,
    }
    variant = " " + rows["distribution"][keep]
    return columns, keep, variant if dtype in ("bfloat16", "fp8") else variant + f" {dtype}"


_HEADS = ("batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim", "step")
_TABLES: dict[str, tuple[tuple[str, ...], tuple[str, ...], Callable[..., Any]]] = {
    "gemm_perf": (("gemm_dtype",), ("m", "n", "k"), _gemm),
    "context_attention_perf": (("attn_dtype", "kv_cache_dtype"), _HEADS, _attention),
    "generation_attention_perf": (("attn_dtype", "kv_cache_dtype"), _HEADS, _attention),
    "moe_perf": (
        ("moe_dtype", "distribution"),
        ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size"),
        _experts,
    ),
}
"""By table the columns of text that it needs (the data type first), those of sizes, and the builder."""
