"""What the hardware was and how it fared while something was timed: recorded beside every measurement."""

from __future__ import annotations

import functools
import operator
import os
import platform
import statistics
import threading
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Self

_RUNTIMES = ("moirai-sim", "onnxruntime", "onnx", "numpy", "torch")
"""What runs or times operators."""
ENGINES = ("moirai-sim", "numpy", "highspy", "cvxpy", "ortools", "simpy", "numba", "torch")
"""What places and simulates."""


def versions(libraries: Sequence[str] = _RUNTIMES) -> dict[str, str]:
    """Return versions of Python and of some libraries; absent ones are left out."""
    known = ((library, _version(library)) for library in libraries)
    return {"python": platform.python_version()} | {library: version for library, version in known if version}


@functools.cache
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


def cpu_clock() -> Any:  # noqa: ANN401 - psutil has no types
    """Return the clocks of the CPU, MHz: ``current`` and ``max``; None where the system hides them."""
    import psutil

    if not hasattr(psutil, "cpu_freq"):  # not on every platform
        return None
    try:
        return psutil.cpu_freq()
    except (OSError, NotImplementedError):  # containers and some virtual machines hide it
        return None


def snapshot() -> dict[str, Any]:
    """Return the state of the machine now: load, clocks and memory of the CPU, and every GPU that NVML sees."""
    try:
        import psutil
    except ImportError:  # a bare machine with nothing but PyTorch
        return {"load": list(os.getloadavg()), "gpus": gpu_snapshot()}
    clock = cpu_clock()
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
    """Return the state of every GPU that NVML sees (`Board.state`), in its order; empty without pynvml or NVML.

    Of a board that does not answer only index and driver are known.
    """
    nvml = _nvml()
    if nvml is None:
        return []
    found = range(_ask(nvml, "nvmlDeviceGetCount") or 0)
    return [{"index": index, **Board(nvml, _ask(nvml, "nvmlDeviceGetHandleByIndex", index)).state()} for index in found]


def board(uuid: str | None) -> Board | None:
    """Return the GPU with a UUID as CUDA gives it, with or without "GPU-"; numbers of CUDA and NVML need not agree.

    Where there is no UUID or NVML does not know it (that of a slice of a GPU), it is the only GPU that NVML sees. None
    where that does not say which, or pynvml or NVML is missing.
    """
    nvml = _nvml()
    if nvml is None:
        return None
    handle = None
    if uuid:
        name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        handle = _ask(nvml, "nvmlDeviceGetHandleByUUID", name.encode())  # text does not do in old versions
    if handle is None and _ask(nvml, "nvmlDeviceGetCount") == 1:
        handle = _ask(nvml, "nvmlDeviceGetHandleByIndex", 0)
    return None if handle is None else Board(nvml, handle)


def _nvml() -> Any:  # noqa: ANN401  # the module, which has no type
    """Return pynvml, ready until the process ends; None without it or without a driver."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def _ask(nvml: Any, function: str, *arguments: Any) -> Any:  # noqa: ANN401  # as above
    """Return the answer of a function of NVML, None where it refuses or does not exist."""
    try:
        value = getattr(nvml, function)(*arguments)
    except (nvml.NVMLError, AttributeError):
        return None
    return value.decode() if isinstance(value, bytes) else value


class Board:
    """One GPU as NVML sees it; a figure that it does not report is None, all of them without a handle."""

    def __init__(self, nvml: Any, handle: Any) -> None:  # noqa: ANN401
        self._nvml, self._handle = nvml, handle

    def _ask(self, function: str, *arguments: Any) -> Any:  # noqa: ANN401
        return None if self._handle is None else _ask(self._nvml, function, self._handle, *arguments)

    def energy_j(self) -> float | None:
        """Return the energy since the driver was loaded, joules."""
        millijoules = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1e3

    def max_clock_hz(self) -> float | None:
        """Return the highest clock of the compute units, Hz."""
        megahertz = self._ask("nvmlDeviceGetMaxClockInfo", getattr(self._nvml, "NVML_CLOCK_SM", None))
        return None if megahertz is None else megahertz * 1e6

    def now(self) -> dict[str, Any]:
        """Return what changes from moment to moment: clocks, temperature, power, throttle reasons, PCIe link."""
        milliwatts = self._ask("nvmlDeviceGetPowerUsage")
        return {
            "sm_clock_mhz": self._ask("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": self._ask("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_MEM),
            "temperature_c": self._ask("nvmlDeviceGetTemperature", self._nvml.NVML_TEMPERATURE_GPU),
            "power_w": None if milliwatts is None else milliwatts / 1e3,
            "throttle_reasons": self._ask("nvmlDeviceGetCurrentClocksThrottleReasons"),
            "pcie_generation": self._ask("nvmlDeviceGetCurrPcieLinkGeneration"),
            "pcie_width": self._ask("nvmlDeviceGetCurrPcieLinkWidth"),
        }

    def state(self) -> dict[str, Any]:
        """Return model, driver, the fastest PCIe link, what `now` says, and the energy so far."""
        return {
            "model": self._ask("nvmlDeviceGetName"),
            "driver": _ask(self._nvml, "nvmlSystemGetDriverVersion"),
            "pcie_generation_max": self._ask("nvmlDeviceGetMaxPcieLinkGeneration"),
            "pcie_width_max": self._ask("nvmlDeviceGetMaxPcieLinkWidth"),
            **self.now(),
            "energy_j": self.energy_j(),
        }


class Watch:
    """Samples a GPU from a thread while a block runs; an idle GPU before and after it says nothing of the block.

    Without a GPU there is nothing to sample, and the summary is empty.
    """

    def __init__(self, watched: Board | None, every_s: float = 0.2) -> None:
        self._board, self._every_s = watched, every_s
        self._samples: list[dict[str, Any]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        if self._board is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._board is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            self._samples.append(self._board.now())  # type: ignore[union-attr]  # there is no thread without one
            if self._stop.wait(self._every_s):
                return

    def summary(self) -> dict[str, Any]:
        """Return the number of samples, minimum, median and maximum of each figure, and every throttle reason met."""
        if not self._samples:
            return {}
        found: dict[str, Any] = {"samples": len(self._samples)}
        for key in self._samples[0]:
            values = [sample[key] for sample in self._samples if sample[key] is not None]
            if key == "throttle_reasons":
                found[key] = functools.reduce(operator.or_, values) if values else None
            else:
                found[key] = [min(values), statistics.median(values), max(values)] if values else None
        return found
