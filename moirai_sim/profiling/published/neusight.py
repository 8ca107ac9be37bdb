"""NeuSight (ASPLOS 2025, MIT licence): fp32 kernels timed one by one with PyTorch 2.1 on NVIDIA GPUs.

A file is one operator on one or several devices: ``OPName``, ``Latency`` (ms), ``Device``, the sizes, and the kernels
that ran. The contraction of a matrix product is **N**: (B, M, N) by (B, N, K).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moirai_sim.errors import InputError
from moirai_sim.profiling.published import Report
from moirai_sim.profiling.published.table import device_json, profile, read_csv, require, usable, without

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import pandas as pd

SOURCE = "NeuSight, ASPLOS 2025 (MIT)"

DEVICES = {
    "Tesla T4": "nvidia-t4", "Tesla P4": "nvidia-p4", "Tesla P100-PCIE-16GB": "nvidia-p100-pcie-16gb",
    "Tesla V100-PCIE-32GB": "nvidia-v100-pcie-32gb", "NVIDIA A100-PCIE-40GB": "nvidia-a100-pcie-40gb",
    "NVIDIA A100 80GB PCIe": "nvidia-a100-pcie-80gb", "NVIDIA A100-SXM4-40GB": "nvidia-a100-sxm-40gb",
    "NVIDIA H100 80GB HBM3": "nvidia-h100-sxm", "NVIDIA L4": "nvidia-l4", "AMD Instinct MI100": "amd-instinct-mi100",
    "AMD Instinct MI210": "amd-instinct-mi210", "AMD Instinct MI250": "amd-instinct-mi250-gcd",
}  # fmt: skip
"""Catalog name of each device of the data set."""

_BINARY = {"add": "Add", "div": "Div", "mul": "Mul", "pow": "Pow"}
_UNARY = {"relu": "Relu", "gelu": "Gelu", "tanh": "Tanh", "softmax": "Softmax"}
_CONV = ("B", "Input_Channel", "Output_Channel", "Kernel_Szie", "Input_Size", "Stride", "Padding")
_KERNEL = ("Kernel Name", "Grid z")
_READ = ("OPName", "Latency", "Device", "M", "N", "K", "H", *_CONV, *_KERNEL)


def read(path: Path) -> tuple[pd.DataFrame, Report]:
    """Read a file, or all operator sweeps below a folder; see `moirai_sim.profiling.published.import_published`.

    Raises
    ------
    InputError
        If a sweep misses columns or names a device or operator that is not known.
    """
    import pandas as pd

    report = Report(SOURCE)
    raw = []
    for file in sorted(path.rglob("*.csv")) if path.is_dir() else [path]:
        frame = read_csv(file, _READ)
        if "OPName" not in frame.columns and path.is_dir():
            what = "no operator sweep (no column OPName)"
            report.other_files[what] = report.other_files.get(what, 0) + 1
            continue
        require(file, frame, ("OPName", "Latency", "Device"))
        report.count(frame)
        frame = usable(frame, report, words=("OPName", "Device"))
        for op, rows in frame.groupby("OPName", sort=True):
            if op not in _READERS:
                raise InputError(f"{file}: unknown operator '{op}'; known: {', '.join(sorted(_READERS))}")
            sizes = _sizes(str(op))
            require(file, rows, sizes)
            zero = ("Padding",) if op == "conv" else ()
            good = usable(rows, report, times=("Latency",), sizes=[s for s in sizes if s not in zero], zero=zero)
            if op == "conv":
                beyond = good["Kernel_Szie"] > good["Input_Size"] + 2 * good["Padding"]
                good = without(good, beyond, "the window is larger than the padded input", report)
            raw.append(good[["OPName", "Device", "Latency", *sizes]].assign(kernel=_kernels(str(op), good)))
    if not any(map(len, raw)):
        return pd.DataFrame(), report
    table = pd.concat(raw)
    # The release holds most sweeps twice, once for each device and once for all of them, with other last digits.
    again = table.drop(columns="kernel").assign(Latency=table["Latency"].round(9)).duplicated()
    table = without(table, again, "the same measurement stands in a second file", report)
    unknown = sorted(set(table["Device"]) - set(DEVICES))
    if unknown:
        raise InputError(f"{path}: unknown devices {', '.join(unknown)}; known: {', '.join(DEVICES)}")
    parts = [_profile(str(op), str(device), rows) for (op, device), rows in table.groupby(["OPName", "Device"])]
    return pd.concat(parts, ignore_index=True), report


def _rows(*columns: Any) -> Iterator[tuple[int, ...]]:  # noqa: ANN401
    return zip(*(column.tolist() for column in columns), strict=True)  # Python's integers format ten times faster


def _sizes(op: str) -> tuple[str, ...]:
    if op == "conv":
        return _CONV
    return ("B", "M", "N", "K") if op in ("linear", "bmm") else ("B", "H")


def _kernels(op: str, rows: pd.DataFrame) -> Any:  # noqa: ANN401
    """Return the column ``kernel``: names, and how many blocks share a tile of a matrix product; else empty."""
    import pandas as pd

    if "Kernel Name" not in rows:
        return ""
    names = rows["Kernel Name"].fillna("").astype(str)
    if op not in ("linear", "bmm") or "Grid z" not in rows:
        return names
    blocks = pd.to_numeric(rows["Grid z"], errors="coerce") / (rows["B"] if op == "bmm" else 1)
    shared = (blocks > 1) & (blocks % 1 == 0)
    return names.where(~shared | (names == ""), names + "*" + blocks.where(shared, 1).astype("int64").astype(str))


def _profile(op: str, device: str, rows: pd.DataFrame) -> pd.DataFrame:
    from moirai_sim.clusters.reader import read_device_type
    from moirai_sim.costs.families import family

    sizes = {name: rows[name].to_numpy(dtype="int64") for name in _sizes(op)}
    columns = _READERS[op](op, sizes)
    first = [] if op != "bmm" else [[2, 2, 2], [2, 2, 2]]
    sheet = read_device_type(DEVICES[device])
    # PyTorch 2.1 computes fp32 convolutions in TF32 where the device can, and matrix products never.
    dtype = "tf32" if op == "conv" and "tf32" in sheet.peak_flops else "float32"
    return profile(
        {
            **columns, "name": op, "family": family(str(columns["op_type"]), first), "dtype": dtype,
            "device": sheet.name, "device_type": device_json(sheet), "backend": "torch",
            "stack": "PyTorch 2.1 CUDA 12.1", "kernel": rows["kernel"].to_numpy(),
            "source": SOURCE, "time_s": rows["Latency"].to_numpy() * 1e-3,
        },
        len(rows),
    )  # fmt: skip


def _linear(_op: str, s: dict[str, Any]) -> dict[str, Any]:
    m, n, k = s["M"] * s["B"], s["N"], s["K"]
    return {
        "op_type": "Gemm",
        "attributes": '{"transB": 1}',
        "input_shapes": [f"[[{a}, {b}], [{c}, {b}], [{c}]]" for a, b, c in _rows(m, n, k)],
        "output_shapes": [f"[[{a}, {c}]]" for a, c in _rows(m, k)],
        "flops": 2 * m * n * k + m * k,
        "read_bytes": 4 * (m * n + n * k + k),
        "write_bytes": 4 * m * k,
        "weight_bytes": 4 * (n * k + k),
    }


def _bmm(_op: str, s: dict[str, Any]) -> dict[str, Any]:
    b, m, n, k = s["B"], s["M"], s["N"], s["K"]
    return {
        "op_type": "MatMul",
        "input_shapes": [f"[[{w}, {x}, {y}], [{w}, {y}, {z}]]" for w, x, y, z in _rows(b, m, n, k)],
        "output_shapes": [f"[[{w}, {x}, {z}]]" for w, x, z in _rows(b, m, k)],
        "flops": 2 * b * m * n * k,
        "read_bytes": 4 * b * (m * n + n * k),
        "write_bytes": 4 * b * m * k,
    }


def _conv(_op: str, s: dict[str, Any]) -> dict[str, Any]:
    b, cin, cout, window, size, stride, padding = (s[c] for c in _CONV)
    out = (size + 2 * padding - window) // stride + 1
    return {
        "op_type": "Conv",
        "attributes": [
            f'{{"group": 1, "kernel_shape": [{w}, {w}], "pads": [{p}, {p}, {p}, {p}], "strides": [{t}, {t}]}}'
            for w, p, t in _rows(window, padding, stride)
        ],
        "input_shapes": [
            f"[[{n}, {i}, {x}, {x}], [{o}, {i}, {w}, {w}]]" for n, i, o, w, x in _rows(b, cin, cout, window, size)
        ],
        "output_shapes": [f"[[{n}, {o}, {y}, {y}]]" for n, o, y in _rows(b, cout, out)],
        "flops": 2 * b * cout * out * out * cin * window * window,
        "read_bytes": 4 * (b * cin * size * size + cout * cin * window * window),
        "write_bytes": 4 * b * cout * out * out,
        "weight_bytes": 4 * cout * cin * window * window,
    }


def _rowwise(op: str, s: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of operators on (B, H); a name that ends in ``u`` takes a scalar as its second operand."""
    b, h = s["B"], s["H"]
    one = [f"[{x}, {y}]" for x, y in _rows(b, h)]
    scalar = op.endswith("u") and op[:-1] in _BINARY
    common = {"output_shapes": [f"[{x}]" for x in one], "write_bytes": 4 * b * h}
    if op == "ln":
        return common | {
            "op_type": "LayerNormalization", "attributes": '{"axis": -1}',
            "input_shapes": [f"[{x}, [{y}], [{y}]]" for x, y in zip(one, h.tolist(), strict=True)], "flops": 7 * b * h,
            "read_bytes": 4 * (b * h + 2 * h), "weight_bytes": 8 * h,
        }  # fmt: skip
    if op in _UNARY:
        return common | {
            "op_type": _UNARY[op], "attributes": '{"axis": -1}' if op == "softmax" else "{}",
            "input_shapes": [f"[{x}]" for x in one], "flops": (5 if op in ("softmax", "gelu") else 1) * b * h,
            "read_bytes": 4 * b * h,
        }  # fmt: skip
    return common | {
        "op_type": _BINARY[op[:-1] if scalar else op],
        "input_shapes": [f"[{x}, []]" if scalar else f"[{x}, {x}]" for x in one],
        "flops": b * h,
        "read_bytes": 4 * b * h + 4 if scalar else 8 * b * h,
    }


_READERS: dict[str, Callable[[str, dict[str, Any]], dict[str, Any]]] = {
    "linear": _linear, "bmm": _bmm, "conv": _conv, "ln": _rowwise, **dict.fromkeys(_UNARY, _rowwise),
    **dict.fromkeys(_BINARY, _rowwise), **{f"{op}u": _rowwise for op in _BINARY},
}  # fmt: skip
