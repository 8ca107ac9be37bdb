"""Physical limit and features of operators on a CPU.

Libraries for CPUs keep image tensors in blocks of as many channels as a vector register holds (oneDNN, and NCHWc of
ONNX Runtime's MLAS: 16 with AVX-512), compute several such blocks of filters at a time, and choose another kernel for
a few input channels, for windows of one value, and for depthwise convolutions. What a tensor costs to read goes with
the level of cache that it lies in, and element-wise kernels with how many values in a row meet the same operand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from moirai_sim.clusters.cluster import DeviceType

    Array = NDArray[np.float64]

_BLOCK = 16
"""Channels in a block: values of single precision in a vector of 512 bits."""
_FILTERS = 4
"""Blocks of filters that a kernel computes at a time."""
_L1_BYTES = 32e3
_SHARE_OF_L3 = 16


def cpu_design(
    family: str, columns: Mapping[str, Array], peak: float, device: DeviceType
) -> tuple[Array, dict[str, Array]]:
    """Return the limit of each operator, seconds, [n], and its features by name, [n] each.

    Parameters
    ----------
    family
        One of `families.FAMILIES`.
    columns
        `families.COLUMNS` by name, [n] each.
    peak
        FLOP/s in the operators' data type.
    """
    size = np.maximum(columns["read_bytes"] + columns["write_bytes"], 1.0)
    flops = np.maximum(columns["flops"], 1.0)
    compute, memory = flops / peak, size / device.memory_bandwidth_bytes_per_s
    cache = float(device.l2_cache_bytes or 1e6)
    found = {
        "balance": np.clip(_log(compute / memory), -6, 6),
        "size": np.clip(_log(size), 4, 19),
        "work": np.clip(_log(flops), 4, 24),
        "in_l1": np.clip(_log(size / _L1_BYTES), -6, 3),
        "in_l2": np.clip(_log(size / cache), -6, 3),
        "in_l3": np.clip(_log(size / (cache * _SHARE_OF_L3)), -8, 3),
        "read_share": columns["read_bytes"] / size,
        "weights": np.clip(_log((columns["weight_bytes"] + 1.0) / cache), -10, 5),
        "parts": columns["parts"],
        "threads": np.full(len(size), float(device.compute_units or 1)),
    }
    if family == "conv":
        found |= _convolution(columns)
    elif family in ("gemm", "batched-matmul", "attention"):
        found |= _product(columns)
    else:
        found |= _stream(columns)
    return np.maximum(compute, memory), found


def _convolution(c: Mapping[str, Array]) -> dict[str, Array]:
    groups, pixels, out, window = (np.maximum(c[name], 1.0) for name in ("batch", "m", "n", "width"))
    into = np.maximum(c["k"] / window, 1.0)
    blocks = np.ceil(out / _BLOCK)
    side = np.sqrt(pixels)
    return {
        "pixels": _log(pixels), "into": _log(into), "out": _log(out), "groups": _log(groups),
        "window": window, "stride": c["extra"],
        "depthwise": ((into == 1) & (groups > 1)).astype(np.float64),
        "into_fill": _log(np.ceil(into / _BLOCK) * _BLOCK / into),
        "out_fill": _log(blocks * _BLOCK / out),
        "filters_fill": _log(np.ceil(blocks / _FILTERS) * _FILTERS / blocks),
        "row": side, "row_tail": side % 14, "channels": _log(into * groups),
        "sums": _log(into * window),
    }  # fmt: skip


def _product(c: Mapping[str, Array]) -> dict[str, Array]:
    batch, m, n, k = (np.maximum(c[name], 1.0) for name in ("batch", "m", "n", "k"))
    return {
        "batch": _log(batch), "m": _log(m), "n": _log(n), "k": _log(k),
        "n_fill": _log(np.ceil(n / _BLOCK) * _BLOCK / n), "rows_left": np.minimum(m, 64) % 12,
        "right": np.clip(_log(k * n * 4 / _L1_BYTES), -6, 8), "left": np.clip(_log(m * k * 4 / _L1_BYTES), -6, 8),
        "vector": (np.minimum(m, n) == 1).astype(np.float64),
    }  # fmt: skip


def _stream(c: Mapping[str, Array]) -> dict[str, Array]:
    results, window, run = (np.maximum(c[name], 1.0) for name in ("m", "k", "width"))
    return {
        "results": _log(results), "window": _log(window), "run": np.clip(_log(run), 0, 16),
        "runs": np.clip(_log(results / run), -10, 16), "run_fill": _log(np.ceil(run / _BLOCK) * _BLOCK / run),
        "extra": c["extra"], "operands": np.clip(c["n"], 0, 4096), "channels_fill": c["n"] % _BLOCK,
        "visits": _log(results * window),
    }  # fmt: skip


def _log(value: Array) -> Array:
    return np.log(np.maximum(value, 1e-12))
