"""What runs the parts of a model on a device: ONNX Runtime or PyTorch, behind one face.

A session is called with what `Backend.bind` returned: `run_with_iobinding` reads and writes the bound memory in place.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from moirai_sim.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.clusters.cluster import Cluster

ONNXRUNTIME, TORCH = "onnxruntime", "torch"


class Backend(Protocol):
    """Makes sessions. Making one itself loads the library, so that the first placement does not wait for it."""

    def part(self, model: bytes, threads: int, optimized: bool) -> Any:  # noqa: ANN401
        """Return a session of a part; ``optimized`` parts run as they stand."""

    def whole(self, model: bytes, threads: int) -> Any:  # noqa: ANN401
        """Return a plain session of an unsplit model."""

    def bind(
        self,
        session: Any,  # noqa: ANN401
        inputs: Mapping[str, NDArray[Any]],
        outputs: Mapping[str, NDArray[Any]],
    ) -> Any:  # noqa: ANN401
        """Return the memory that a session reads and writes, as its ``run_with_iobinding`` takes it."""


class _OnnxRuntime:
    def __init__(self) -> None:
        from moirai_sim.profiling.backends import onnxruntime

        self._make = onnxruntime.make_session

    def part(self, model: bytes, threads: int, optimized: bool) -> Any:  # noqa: ANN401
        return self._make(model, threads, optimize=not optimized, shared=True)

    def whole(self, model: bytes, threads: int) -> Any:  # noqa: ANN401
        return self._make(model, threads)

    def bind(
        self,
        session: Any,  # noqa: ANN401
        inputs: Mapping[str, NDArray[Any]],
        outputs: Mapping[str, NDArray[Any]],
    ) -> Any:  # noqa: ANN401
        binding = session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        return binding


class _Torch:
    def __init__(self) -> None:
        import torch  # noqa: F401

        from moirai_sim.execution.torch_session import TorchSession
        from moirai_sim.profiling.backends.onnxruntime import portable_model

        self._make, self._portable = TorchSession, portable_model

    def part(self, model: bytes, threads: int, optimized: bool) -> Any:  # noqa: ANN401
        return self._make(model, threads)

    def whole(self, model: bytes, threads: int) -> Any:  # noqa: ANN401
        return self._make(self._portable(model), threads)

    def bind(
        self,
        session: Any,  # noqa: ANN401
        inputs: Mapping[str, NDArray[Any]],
        outputs: Mapping[str, NDArray[Any]],
    ) -> Any:  # noqa: ANN401
        return session.bind(inputs, outputs)


BACKENDS: Mapping[str, Callable[[], Backend]] = MappingProxyType({ONNXRUNTIME: _OnnxRuntime, TORCH: _Torch})


def device_backends(cluster: Cluster) -> dict[str, str]:
    """Return the backend of every device.

    Raises
    ------
    InputError
        If one is unknown, or not installed.
    """
    found = {device.name: device.backend for device in cluster.devices}
    for name, backend in found.items():
        if backend not in BACKENDS:
            raise InputError(f"device '{name}': no backend '{backend}'; {did_you_mean(backend, list(BACKENDS))}")
    if TORCH in found.values() and importlib.util.find_spec(TORCH) is None:
        name = next(name for name, backend in found.items() if backend == TORCH)
        raise InputError(f"device '{name}': backend 'torch' needs PyTorch; pip install 'moirai-sim[torch]'")
    return found
