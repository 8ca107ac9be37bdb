"""Where PyTorch keeps tensors and computes: the host, or a GPU with memory of its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from moirai_sim.errors import InputError
from moirai_sim.execution.backends import bytes_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class TorchPlace:
    """A device of PyTorch.

    Parameters
    ----------
    name
        ``cpu`` or ``cuda:INDEX``.
    apart
        Whether tensors are copied from and to the host, as if its memory were another; None where it really is.

    Raises
    ------
    InputError
        If PyTorch sees no such GPU.
    """

    def __init__(self, name: str = "cpu", *, apart: bool | None = None) -> None:
        import torch

        self._torch = torch
        self.device = torch.device(name)
        self.gpu = self.device.type == "cuda"
        self.apart = self.gpu if apart is None else apart
        if not self.gpu:
            return
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if self.device.index >= count:
            which = f"CUDA devices 0 to {count - 1}" if count else "no CUDA device"
            raise InputError(
                f"address '{name}': PyTorch {torch.__version__} sees {which} here; "
                "see 'moirai-sim doctor', or place the operators on other devices"
            )
        torch.cuda.set_device(self.device)
        torch.backends.cuda.matmul.allow_tf32 = False  # its 10 bits would look like wrong outputs
        torch.backends.cudnn.allow_tf32 = False

    def new(self, size: int) -> Any:  # noqa: ANN401
        """Return so many bytes here."""
        return self._torch.zeros(max(size, 1), dtype=self._torch.uint8, device=self.device)

    def tensor(self, memory: Any, dtype: str, shape: tuple[int, ...]) -> Any:  # noqa: ANN401
        """Return the tensor at the beginning of such memory; ``dtype`` is NumPy's name."""
        return memory[: bytes_of(dtype, shape)].view(getattr(self._torch, dtype)).view(shape)

    def pin(self, memory: NDArray[np.uint8]) -> Callable[[], None]:
        """Lock memory of the host, so that the GPU copies it itself; return what unlocks it.

        Copies are right without it, only slower, so a system that refuses is let have its way.
        """
        if not self.gpu:
            return lambda: None
        runtime, address = self._torch.cuda.cudart(), memory.ctypes.data
        if int(runtime.cudaHostRegister(address, memory.nbytes, 0)):
            with suppress(RuntimeError):  # CUDA keeps the error, and PyTorch would raise it at the next kernel
                self._torch.zeros(1, device=self.device)
            return lambda: None

        def unpin() -> None:
            runtime.cudaHostUnregister(address)

        return unpin

    def finish(self) -> None:
        """Wait until all that was asked for is done: calls of a GPU return before."""
        if self.gpu:
            self._torch.cuda.synchronize(self.device)
