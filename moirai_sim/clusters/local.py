"""The machine itself as a device type: one core, described by what the operating system says of it."""

from __future__ import annotations

import os
import platform
import re
from functools import cache
from pathlib import Path

from moirai_sim.clusters.cluster import DeviceType

LOCAL_CORE = "local-core"
"""Name of the device type that stands for one core of this machine."""
TORCH_SUFFIX = "-torch"
"""Of the names of CPUs on which PyTorch runs operators: they have another speed, so they are another device type."""

_NOMINAL_BANDWIDTH = 12.8e9
"""One channel of DDR4-1600. No operating system tells the bandwidth, and a measured one changes by the minute."""


@cache
def local_cores() -> tuple[int, ...]:
    """Return the physical cores that this process may use, each by its first logical CPU."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    first: dict[str, int] = {}
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        first.setdefault(siblings.read_text(encoding="ascii") if siblings.is_file() else str(cpu), cpu)
    return tuple(first.values())


@cache
def local_core() -> DeviceType:
    """Return the data sheet of one core: peak from clock and vector width, an even share of the memory.

    It anchors a roofline. What the core really reaches is for the cost model that ``calibrate`` fits.
    """
    import psutil

    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.is_file() else ""
    model = _field(text, "model name") or platform.processor() or platform.machine()
    flags = (_field(text, "flags") or _field(text, "Features") or "").split()
    clock = _clock_hz(model, text)
    lanes = 16 if "avx512f" in flags else 8 if "avx2" in flags else 4
    # Two vector units, and a fused multiply-add counts as two operations.
    flops = clock * lanes * 2 * (2 if {"fma", "asimd"} & {*flags} or platform.machine() in ("arm64", "aarch64") else 1)
    memory = psutil.virtual_memory().total // max(1, len(local_cores()))
    return DeviceType(
        name=LOCAL_CORE,
        kind="cpu",
        memory_bytes=memory,
        memory_bandwidth_bytes_per_s=_NOMINAL_BANDWIDTH,
        peak_flops={"float32": flops, "float64": flops / 2},
        compute_units=1,
        clock_hz=clock,
        source=f"{model}: clock and vector width from the operating system, memory bandwidth nominal",
    )


def _field(text: str, name: str) -> str:
    match = re.search(rf"^{re.escape(name)}\s*:\s*(.*)$", text, re.MULTILINE)
    return match[1].strip() if match else ""


def _clock_hz(model: str, cpuinfo: str) -> float:
    """Return a clock that does not change from call to call: the base clock where it is known."""
    base = Path("/sys/devices/system/cpu/cpu0/cpufreq/base_frequency")
    if base.is_file():
        return float(base.read_text(encoding="ascii")) * 1e3
    if match := re.search(r"@\s*([\d.]+)\s*GHz", model):
        return float(match[1]) * 1e9
    if bogomips := _field(cpuinfo, "bogomips"):  # on x86 twice the clock of the time stamp counter
        clock = float(bogomips) / 2 * 1e6
        if clock > 5e8:
            return clock
    from moirai_sim.profiling.telemetry import cpu_clock

    frequency = cpu_clock()
    return frequency.max * 1e6 if frequency and frequency.max else 2e9
