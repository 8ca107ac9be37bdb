"""What the hardware was and how it fared while something was timed: recorded beside every measurement."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

_RUNTIMES = ("moirai-sim", "onnxruntime", "onnx", "numpy", "torch")
"""What runs or times operators."""
ENGINES = ("moirai-sim", "numpy", "highspy", "cvxpy", "ortools", "simpy", "numba", "torch")
"""What places and simulates."""


def versions(libraries: Sequence[str] = _RUNTIMES) -> dict[str, str]:
    """Return versions of Python and of some libraries; absent ones are left out."""
    known = ((library, _version(library)) for library in libraries)
    return {"python": platform.python_version()} | {library: version for library, version in known if version}


@cache
def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""


def cpu_model() -> str:
    """Return the name of the CPU as its maker spells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """Return the CPU's feature flags as Linux names them; empty elsewhere."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    return frozenset()


def snapshot() -> dict[str, Any]:
    """Return the state of the machine now: load, clocks and memory of the CPU, and every GPU that NVML sees."""
    try:
        import psutil
    except ImportError:  # a bare machine with nothing but PyTorch
        return {"load": list(os.getloadavg()), "gpus": gpu_snapshot()}
    try:
        clock = psutil.cpu_freq()
    except (OSError, NotImplementedError):  # containers and some virtual machines hide it
        clock = None
    return {
        "load": list(psutil.getloadavg()),
        "cpu_percent": psutil.cpu_percent(interval=None),
        "clock_mhz": None if clock is None else clock.current,
        "memory_available_bytes": psutil.virtual_memory().available,
        "gpus": gpu_snapshot(),
    }


def hardware() -> dict[str, Any]:
    """Return what does not change while the machine is up. No host name, user or path."""
    try:
        import psutil
    except ImportError:
        cores, memory = os.cpu_count(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        cores = psutil.cpu_count(logical=False) or psutil.cpu_count()
        memory = psutil.virtual_memory().total
    return {
        "cpu": cpu_model(),
        "cores": cores,
        "threads": os.cpu_count(),
        "memory_bytes": memory,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def gpu_snapshot() -> list[dict[str, Any]]:
    """Return model, driver, clocks, temperature, power, throttle reasons and energy so far of every GPU.

    A figure that a board does not report is None; of a board that does not answer only index and driver are known.
    Without pynvml, NVML or a GPU the list is empty.
    """
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [_gpu(pynvml, index) for index in range(_ask(pynvml, "nvmlDeviceGetCount") or 0)]
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _gpu(nvml: Any, index: int) -> dict[str, Any]:  # noqa: ANN401  # the module, which has no type
    handle = _ask(nvml, "nvmlDeviceGetHandleByIndex", index)

    def ask(function: str, *arguments: Any) -> Any:  # noqa: ANN401
        return None if handle is None else _ask(nvml, function, handle, *arguments)

    milliwatts, millijoules = ask("nvmlDeviceGetPowerUsage"), ask("nvmlDeviceGetTotalEnergyConsumption")
    return {
        "index": index,
        "model": ask("nvmlDeviceGetName"),
        "driver": _ask(nvml, "nvmlSystemGetDriverVersion"),
        "sm_clock_mhz": ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
        "temperature_c": ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
        "power_w": None if milliwatts is None else milliwatts / 1e3,
        "throttle_reasons": ask("nvmlDeviceGetCurrentClocksThrottleReasons"),
        "energy_j": None if millijoules is None else millijoules / 1e3,
    }


def _ask(nvml: Any, function: str, *arguments: Any) -> Any:  # noqa: ANN401  # as above
    """Return the answer of a function of NVML, None where it refuses or does not exist."""
    try:
        value = getattr(nvml, function)(*arguments)
    except (nvml.NVMLError, AttributeError):
        return None
    return value.decode() if isinstance(value, bytes) else value
