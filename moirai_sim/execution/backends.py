"""What runs the parts of a model on a device: ONNX Runtime on a CPU, PyTorch on a CPU or a GPU, behind one face.

A session is called with what `Backend.bind` returned: `run_with_iobinding` reads and writes the bound memory in place.
What devices hand to each other lies in memory of the host; what only one device touches, in memory of that device.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from moirai_sim.errors import InputError, did_you_mean
from moirai_sim.execution.channel import ALIGNMENT

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.clusters.cluster import Cluster, Device

ONNXRUNTIME, TORCH = "onnxruntime", "torch"
HOST = "cpu"
"""Where a backend runs that is on no GPU."""
_GPU = re.compile(r"cuda:\d+")
Copies = Sequence[tuple[Any, "NDArray[Any]"]]
"""Pairs of a tensor in a device's own memory and its array in the host's."""


class Memory(Protocol):
    """Where a device keeps its tensors."""

    apart: bool
    """Whether what other devices write or read must be copied from and to the host."""

    def new(self, size: int) -> Any:  # noqa: ANN401
        """Return so many bytes, as an array with ``nbytes``."""

    def tensor(self, memory: Any, dtype: str, shape: tuple[int, ...]) -> Any:  # noqa: ANN401
        """Return the tensor at the beginning of such memory, to be bound; ``dtype`` is NumPy's name."""

    def pin(self, memory: NDArray[np.uint8]) -> Callable[[], None]:
        """Let the device copy memory of the host at its full speed; return what ends that."""


class Backend(Protocol):
    """Makes sessions. Making one itself loads the library, so that the first placement does not wait for it."""

    memory: Memory

    def part(self, model: bytes, threads: int, optimized: bool) -> Any:  # noqa: ANN401
        """Return a session of a part; ``optimized`` parts run as they stand."""

    def whole(self, model: bytes, threads: int) -> Any:  # noqa: ANN401
        """Return a plain session of an unsplit model."""

    def bind(
        self,
        session: Any,  # noqa: ANN401
        inputs: Mapping[str, Any],
        outputs: Mapping[str, Any],
        fetched: Copies,
        returned: Copies,
    ) -> Any:  # noqa: ANN401
        """Return the memory that a session reads and writes, as its ``run_with_iobinding`` takes it.

        ``fetched`` is copied from the host before the session runs, ``returned`` to the host after it; both are empty
        where the memory is not apart.
        """


class HostMemory:
    """The memory of the host, which all processes may share."""

    apart = False

    def new(self, size: int) -> NDArray[np.uint8]:
        """Return so many bytes that begin on a page of their own."""
        memory = np.zeros(size + ALIGNMENT, dtype=np.uint8)  # touched now, so that no run faults pages
        start = -memory.ctypes.data % ALIGNMENT
        return memory[start : start + max(size, 1)]

    def tensor(self, memory: NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """Return the array at the beginning of memory."""
        return memory[: bytes_of(dtype, shape)].view(dtype).reshape(shape)

    def pin(self, memory: NDArray[np.uint8]) -> Callable[[], None]:
        """Do nothing: devices work in it."""
        return lambda: None


def bytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the size of a tensor."""
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


class _OnnxRuntime:
    def __init__(self, _place: str) -> None:
        from moirai_sim.profiling.backends import onnxruntime

        self.memory: Memory = HostMemory()
        self._make = onnxruntime.make_session

    def part(self, model: bytes, threads: int, optimized: bool) -> Any:  # noqa: ANN401
        return self._make(model, threads, optimize=not optimized, shared=True)

    def whole(self, model: bytes, threads: int) -> Any:  # noqa: ANN401
        return self._make(model, threads)

    def bind(
        self,
        session: Any,  # noqa: ANN401
        inputs: Mapping[str, Any],
        outputs: Mapping[str, Any],
        fetched: Copies,
        returned: Copies,
    ) -> Any:  # noqa: ANN401
        binding = session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        return binding


class _Torch:
    def __init__(self, place: str) -> None:
        from moirai_sim.execution.torch_place import TorchPlace
        from moirai_sim.execution.torch_session import TorchSession
        from moirai_sim.profiling.backends.onnxruntime import portable_model

        self._place = TorchPlace(place)
        self.memory: Memory = self._place if self._place.apart else HostMemory()
        self._make, self._portable = TorchSession, portable_model

    def part(self, model: bytes, threads: int, optimized: bool) -> Any:  # noqa: ANN401
        return self._make(model, threads, self._place)

    def whole(self, model: bytes, threads: int) -> Any:  # noqa: ANN401
        return self._make(self._portable(model), threads, self._place)

    def bind(
        self,
        session: Any,  # noqa: ANN401
        inputs: Mapping[str, Any],
        outputs: Mapping[str, Any],
        fetched: Copies,
        returned: Copies,
    ) -> Any:  # noqa: ANN401
        return session.bind(inputs, outputs, fetched, returned)


BACKENDS: Mapping[str, Callable[[str], Backend]] = MappingProxyType({ONNXRUNTIME: _OnnxRuntime, TORCH: _Torch})
"""Makers by name; each takes what `place` returns."""


def on_gpu(device: Device) -> bool:
    """Tell whether a device's address is that of a GPU, ``cuda:INDEX``."""
    return _GPU.fullmatch(device.address) is not None


def place(device: Device) -> str:
    """Return where a device's backend runs: `HOST`, or the address of a GPU."""
    return device.address if on_gpu(device) else HOST


def device_backends(cluster: Cluster) -> dict[str, str]:
    """Return the backend of every device.

    Raises
    ------
    InputError
        With every one that is unknown, not installed, or does not run on its device.
    """
    found = {device.name: device.backend for device in cluster.devices}
    problems = []
    for device in cluster.devices:
        if device.backend not in BACKENDS:
            hint = did_you_mean(device.backend, list(BACKENDS))
            problems.append(f"device '{device.name}': no backend '{device.backend}'; {hint}")
        elif on_gpu(device) and device.backend != TORCH:
            problems.append(
                f"device '{device.name}': address '{device.address}' is for PyTorch, and its backend is "
                f"'{device.backend}'; write backend: torch"
            )
    if TORCH in found.values() and importlib.util.find_spec(TORCH) is None:
        name = next(name for name, backend in found.items() if backend == TORCH)
        problems.append(f"device '{name}': backend 'torch' needs PyTorch; pip install 'moirai-sim[torch]'")
    if problems:
        raise InputError(problems)
    return found
