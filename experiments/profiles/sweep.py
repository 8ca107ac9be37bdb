"""Measure a device with PyTorch in one command: operators where they say most, links, whole models, energy.

    python experiments/profiles/sweep.py --device cuda:0 --minutes 20 -o my-gpu

writes ``operators.parquet`` and ``links.parquet`` (versioned profiles) and ``facts.json`` (whole models eager and
compiled, energy, noise floor, telemetry). ``moirai-sim calibrate my-gpu/*.parquet -o my-model`` does the rest.
Of the time, two thirds of the operators go to a space-filling design, one third to where a first fit is least certain.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moirai_sim.files import write_whole
from moirai_sim.graphs.operator import Operator
from moirai_sim.graphs.work import make_operator
from moirai_sim.profiling import telemetry
from moirai_sim.profiling.backends.torch import TorchDevice, finish, profile_graph_operators, stack
from moirai_sim.profiling.schema import statistics, write_profile

if TYPE_CHECKING:
    import pandas as pd

    from moirai_sim.clusters.cluster import DeviceType

AWKWARD = (1, 2, 3, 7, 17, 31, 33, 63, 65, 127, 129, 251, 255, 257, 509, 1021, 1025, 2047, 4093, 8191)
"""Primes, and sizes off by one from tiles."""
CUDA_DTYPES = ("float32", "tf32", "float16", "bfloat16")


def log_uniform(u: float, low: int, high: int) -> int:
    """Map a number in [0, 1) to a size between ``low`` and ``high``; a quarter of them are awkward."""
    value = round(low * (high / low) ** u)
    if int(u * 1e4) % 4 == 0:
        near = [size for size in AWKWARD if low <= size <= high]
        value = min(near, key=lambda size: abs(math.log(size / value))) if near else value
    return value


def matmul(u: np.ndarray, dtype: str, side: int) -> Operator:
    m, n, k = (log_uniform(x, 1, side) for x in u[:3])
    return make_operator("matmul", "MatMul", [(m, k), (k, n)], [(m, n)], dtype=dtype)


def batched(u: np.ndarray, dtype: str, side: int) -> Operator:
    b, m, n, k = log_uniform(u[3], 2, 512), *(log_uniform(x, 1, max(side // 4, 8)) for x in u[:3])
    return make_operator("bmm", "MatMul", [(b, m, k), (b, k, n)], [(b, m, n)], dtype=dtype)


def convolution(u: np.ndarray, dtype: str, side: int) -> Operator:
    batch, size = log_uniform(u[0], 1, 64 if side > 4096 else 2), log_uniform(u[1], 7, 224)
    kernel, stride = (1, 3, 3, 5, 7)[int(u[2] * 5)], 1 + int(u[3] > 0.75)
    into, out = 8 * log_uniform(u[4], 1, 128), 8 * log_uniform(u[5], 1, 128)
    group = (1, 1, 1, 8, into)[int(u[6] * 5)]
    out = into if group == into else out
    side_out = (size + 2 * (kernel // 2) - kernel) // stride + 1
    return make_operator(
        "conv", "Conv", [(batch, into, size, size), (out, into // group, kernel, kernel)],
        [(batch, out, side_out, side_out)],
        {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [kernel // 2] * 4, "group": group}, dtype,
    )  # fmt: skip


def streaming(u: np.ndarray, dtype: str, side: int) -> Operator:
    """Draw one of the families that are bound by memory, from 1 KiB up to 1 GiB (64 MiB on a CPU)."""
    width = log_uniform(u[1], 8, 16384)
    rows = max(1, log_uniform(u[0], 1 << 8, 1 << (28 if side > 4096 else 22)) // width)
    shape = (rows, width)
    kind = ("Add", "Mul", "Relu", "Gelu", "Tanh", "LayerNormalization", "Softmax", "ReduceMean", "Transpose", "Concat",
            "Gather", "MaxPool")[int(u[2] * 12)]  # fmt: skip
    if kind in ("Add", "Mul"):
        return make_operator(kind, kind, [shape, shape], [shape], dtype=dtype)
    if kind == "LayerNormalization":
        return make_operator(kind, kind, [shape, (width,), (width,)], [shape], {"axis": -1}, dtype)
    if kind == "Softmax":
        return make_operator(kind, kind, [shape], [shape], {"axis": -1}, dtype)
    if kind == "ReduceMean":
        return make_operator(kind, kind, [shape], [(rows, 1)], {"axes": [1]}, dtype)
    if kind == "Transpose":
        return make_operator(kind, kind, [shape], [shape[::-1]], {"perm": [1, 0]}, dtype)
    if kind == "Concat":
        return make_operator(kind, kind, [shape, shape], [(2 * rows, width)], {"axis": 0}, dtype)
    if kind == "Gather":
        return make_operator(kind, kind, [shape, (rows,)], [shape], {"axis": 0}, dtype)
    if kind == "MaxPool":
        edge = max(4, int(math.sqrt(rows * width / 64)))
        attributes = {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [0] * 4}
        return make_operator(kind, kind, [(1, 64, edge, edge)], [(1, 64, edge // 2, edge // 2)], attributes, dtype)
    return make_operator(kind, kind, [shape], [shape], dtype=dtype)


def attention(u: np.ndarray, dtype: str, side: int) -> Operator:
    """Draw prefill (as many queries as keys) or decode (one query)."""
    top = 8192 if side > 4096 else 512
    batch, heads, keys = log_uniform(u[0], 1, 32), log_uniform(u[1], 1, 64), log_uniform(u[2], 16, top)
    depth, queries = (64, 128)[int(u[3] * 2)], 1 if u[4] < 0.5 else keys
    q, kv = (batch, heads, queries, depth), (batch, heads, keys, depth)
    return make_operator("attention", "Attention", [q, kv, kv], [q], {}, dtype)


FAMILIES: tuple[tuple[Callable[[np.ndarray, str, int], Operator], float], ...] = (
    (matmul, 0.25), (batched, 0.15), (convolution, 0.2), (streaming, 0.3), (attention, 0.1),
)  # fmt: skip


def design(count: int, seed: int, device: TorchDevice, memory: int) -> list[Operator]:
    """Return a space-filling (scrambled Sobol) design over families, data types and sizes that fit the device."""
    from scipy.stats import qmc

    side = 16384 if device.kind == "cuda" else 1024
    dtypes = CUDA_DTYPES if device.kind == "cuda" else ("float32",)
    points = qmc.Sobol(8, seed=seed).random_base2(math.ceil(math.log2(max(count, 2))))[:count]
    shares = np.cumsum([share for _, share in FAMILIES])
    limit = 2e13 if device.kind == "cuda" else 2e9
    chosen = []
    for index, point in enumerate(points):
        draw = FAMILIES[int(np.searchsorted(shares, point[7], side="right").clip(0, len(FAMILIES) - 1))][0]
        operator = draw(point[:7], dtypes[index % len(dtypes)], side)
        if operator.flops < limit and 3 * (operator.read_bytes + operator.write_bytes) < memory:
            chosen.append(operator)
    return chosen


def least_certain(
    frame: pd.DataFrame, candidates: Sequence[Operator], count: int, sheet: DeviceType, versions: str
) -> list[Operator]:
    """Return the candidates whose predicted 90 % interval is widest, after a fit to what was measured so far."""
    import pandas as pd

    from moirai_sim.costs.calibrate import make_estimator
    from moirai_sim.profiling.schema import operator_row

    fitted = make_estimator(frame, intervals=True).fit(frame)
    rows = finish(pd.DataFrame([operator_row(operator) for operator in candidates]), sheet, versions)
    rows["median_s"] = 1.0
    _, low, high, outside = fitted.predict_interval(rows)
    order = np.argsort(-(np.log(high / low) + outside), kind="stable")
    return [candidates[i] for i in order[:count]]


def links(device: TorchDevice, budget_s: float) -> pd.DataFrame:
    """Time copies of 1 KiB to 1 GiB: host to device, device to host (pinned and pageable), within the device."""
    import pandas as pd

    torch, rows = device.torch, []
    sizes = [1 << e for e in range(10, 31 if device.kind == "cuda" else 25)]
    pins = (True, False) if device.kind == "cuda" else (False,)
    for pinned in pins:
        for size in sizes:
            host = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
            here = torch.empty(size, dtype=torch.uint8, device=device.device)
            other = torch.empty_like(here)
            label = "pinned" if pinned else "pageable"
            copies = [("host", "device", here, host), ("device", "host", host, here)]
            copies += [("device", "device", other, here)] if pinned == pins[0] else []
            for source, target, into, out in copies:
                samples = device.time(
                    lambda a=into, b=out: a.copy_(b, non_blocking=True), budget_s / (5 * len(sizes))
                )  # fmt: skip
                rows.append(
                    {"source_device": source, "target_device": target, "collective": f"copy {source}-{target} {label}",
                     "participants": 2, "bytes": size, "source": "measured", **statistics(samples)}
                )  # fmt: skip
    return pd.DataFrame(rows)


def whole_models(device: TorchDevice) -> list[dict[str, Any]]:
    """Time an encoder block and a residual block whole: eager, compiled, and on a GPU as a CUDA graph."""
    torch = device.torch
    nn = torch.nn
    hidden = 1024 if device.kind == "cuda" else 256
    models = {
        "encoder": (nn.TransformerEncoderLayer(hidden, hidden // 64, 4 * hidden, batch_first=True), (128, hidden)),
        "convolutions": (
            nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)), (64, 56, 56),
        ),
    }  # fmt: skip
    rows = []
    for name, (model, shape) in models.items():
        module = model.eval().to(device.device)
        for batch in (1, 8, 32) if device.kind == "cuda" else (1,):
            x = torch.randn(batch, *shape, device=device.device)
            modes = {"eager": module}
            if device.kind == "cuda":
                modes |= {
                    "compiled": torch.compile(module),
                    "cuda-graph": torch.compile(module, mode="reduce-overhead"),
                }
            for mode, run in modes.items():
                with torch.no_grad():
                    samples = device.time(lambda f=run, a=x: f(a), 1.0)
                rows.append({"model": name, "batch": batch, "mode": mode, **statistics(samples)})
    return rows


def energy(device: TorchDevice, operators: Sequence[Operator], seconds: float) -> list[dict[str, Any]]:
    """Return joules of one run by the board's counter over a long repeat; empty where there is no counter."""
    rows: list[dict[str, Any]] = []
    gpus = telemetry.gpu_snapshot()
    if device.kind != "cuda" or not gpus or gpus[0]["energy_j"] is None:
        return rows
    for operator in operators:
        before, count, end = telemetry.gpu_snapshot()[0]["energy_j"], 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            count += len(device.time_operator(operator, 0.2))
        used = telemetry.gpu_snapshot()[0]["energy_j"] - before
        rows.append(
            {"operator": operator.op_type, "dtype": operator.dtype, "flops": operator.flops, "joules": used / count}
        )
    return rows


def sweep(device_name: str, minutes: float, out: Path, seed: int) -> dict[str, Any]:
    """Run all parts and write their files; return the facts."""
    import pandas as pd

    device = TorchDevice(device_name)
    before = telemetry.snapshot()
    sheet, versions = device.device_type(), stack(device.torch)
    budget = minutes * 60
    count = int(np.clip(budget * (8 if device.kind == "cuda" else 2), 40, 10_000))
    filling = design(count * 2 // 3, seed, device, sheet.memory_bytes)
    first, skipped = profile_graph_operators(device, filling, budget * 0.5)
    first = finish(first, sheet, versions)
    candidates = design(count * 2, seed + 1, device, sheet.memory_bytes)
    second, more = profile_graph_operators(
        device, least_certain(first, candidates, count // 3, sheet, versions), budget * 0.25
    )
    again = filling[: min(200, len(filling))]
    repeat, _ = profile_graph_operators(device, again, budget * 0.1)
    frame = pd.concat([first, finish(second, sheet, versions)], ignore_index=True)
    both = first.drop_duplicates("input_shapes").merge(
        repeat, on=["op_type", "dtype", "input_shapes", "attributes"], suffixes=("", "_again")
    )  # fmt: skip
    noise = float(np.median(np.abs(both["median_s_again"] / both["median_s"] - 1)))
    facts = {
        "hardware": telemetry.hardware(), "versions": telemetry.versions(), "skipped": skipped | more,
        "noise_median_ape": noise, "whole_models": whole_models(device),
        "energy": energy(device, again[:20], budget * 0.002),
        "telemetry": {"before": before, "after": telemetry.snapshot()}, "minutes": minutes, "seed": seed,
    }  # fmt: skip
    write_profile(frame, out / "operators.parquet", metadata=facts)
    write_profile(links(device, budget * 0.1), out / "links.parquet", kind="links", metadata=facts)
    write_whole(out / "facts.json", json.dumps(facts, indent=1) + "\n")
    return facts | {"operators": len(frame)}


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path, required=True)
    given = parser.parse_args()
    facts = sweep(given.device, given.minutes, given.out, given.seed)
    print(f"{facts['operators']} operators, noise floor {facts['noise_median_ape']:.1%}, written to {given.out}")


if __name__ == "__main__":
    main()
