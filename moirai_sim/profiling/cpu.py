"""What this machine's CPU can reach: the data sheet of a device whose maker prints none."""

from __future__ import annotations

import re
import time

import numpy as np
import onnx

from moirai_sim.clusters.cluster import DeviceType
from moirai_sim.profiling import telemetry
from moirai_sim.profiling.backends.onnxruntime import make_session

_COPY_BYTES = 256 << 20
_GEMM = 1536
_REPEATS = 7


def device_type_name(threads: int = 1) -> str:
    """Return a name for this CPU and number of threads, e.g. ``intel-xeon-amx-1t``."""
    model = re.sub(r"\((?:r|tm)\)|cpu|processor|@.*", " ", telemetry.cpu_model().lower())
    flags = telemetry.cpu_flags()
    simd = next((name for flag, name in _SIMD if flag in flags), "")
    words = [*re.findall(r"[a-z0-9.-]+", model), simd, f"{threads}t"]
    return "-".join(dict.fromkeys(word for word in words if word))


_SIMD = (("amx_tile", "amx"), ("avx512f", "avx512"), ("avx2", "avx2"), ("asimd", "neon"))


def measure_device_type(threads: int = 1) -> DeviceType:
    """Return the data sheet of this CPU: memory bandwidth by a large copy, FLOP/s by a large matrix product.

    Takes about a second and runs where the caller is pinned. Both figures are the best of several repeats, so they are
    limits and not averages.
    """
    import psutil

    source = np.ones(_COPY_BYTES // 8)
    target = np.empty_like(source)
    copy_s = min(_timed(lambda: np.copyto(target, source)) for _ in range(_REPEATS))
    tensor = onnx.helper.make_tensor_value_info
    shape = [_GEMM, _GEMM]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["a", "b"], ["c"])],
        "gemm",
        [tensor("a", onnx.TensorProto.FLOAT, shape), tensor("b", onnx.TensorProto.FLOAT, shape)],
        [tensor("c", onnx.TensorProto.FLOAT, shape)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=10)
    session = make_session(model.SerializeToString(), threads)
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal(shape, dtype=np.float32) for name in "ab"}
    gemm_s = min(_timed(lambda: session.run(None, feeds)) for _ in range(_REPEATS))
    clock = telemetry.cpu_clock()
    return DeviceType(
        name=device_type_name(threads),
        kind="cpu",
        memory_bytes=psutil.virtual_memory().total,
        memory_bandwidth_bytes_per_s=round(2 * _COPY_BYTES / copy_s, -7),
        peak_flops={"float32": round(2 * _GEMM**3 / gemm_s, -8)},
        compute_units=threads,
        clock_hz=clock.max * 1e6 if clock and clock.max else None,
        l2_cache_bytes=l2_cache_bytes(),
        source="measured: copy of 256 MiB (read and write counted), 1536 x 1536 x 1536 matrix product",
    )


def l2_cache_bytes() -> int | None:
    """Return the size of one core's level 2 cache; None where the system does not tell."""
    from pathlib import Path

    entry = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
    if not entry.exists():
        return None
    match = re.fullmatch(r"(\d+)K", entry.read_text(encoding="ascii").strip())
    return int(match[1]) << 10 if match else None


def _timed(run: object) -> float:
    start = time.perf_counter()
    run()  # type: ignore[operator]
    return time.perf_counter() - start
