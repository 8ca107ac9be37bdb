"""How workers of one machine hand tensors to each other: shared memory for the bytes, a pipe to wake the reader.

A tensor that crosses devices lives in a shared segment. The producer's kernel writes it there, the consumer's kernel
reads it there, and a transfer is a *token* of 16 bytes in the inbox of the consumer: no copy, no central step. A reader
whose core is its own polls its inbox for a short while before it sleeps, since waking a sleeping core takes longer than
many kernels.
"""

from __future__ import annotations

import itertools
import mmap
import os
import select
import struct
import tempfile
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.execution.split import TensorSpec

ALIGNMENT = 4096
"""Tensors begin on pages of their own, so that no two cores write one cache line."""
SPIN_NS = 100_000_000
"""How long a reader polls before it sleeps, where no other worker needs its core."""
LOST = -3
"""Token of a connection that broke, beside those of `moirai_sim.execution.worker`."""
_TOKEN = struct.Struct("=iiq")


class Token(NamedTuple):
    """Says that a tensor is there."""

    tensor: int
    """Index of the tensor in the plan; negative for signals of the workers."""
    request: int
    sent_ns: int
    """When it was sent, by the monotonic clock that all processes of a machine share."""


def post(inbox: int, tensor: int, request: int) -> int:
    """Put a token into an inbox (a pipe's write end) and return when. Writes this short are never mixed up."""
    now = time.monotonic_ns()
    os.write(inbox, _TOKEN.pack(tensor, request, now))
    return now


class Inbox:
    """The read end of a worker's pipe.

    Parameters
    ----------
    handle
        File descriptor of the read end.
    spin_ns
        How long to poll before sleeping; 0 where other work needs the core.
    """

    def __init__(self, handle: int, spin_ns: int) -> None:
        self.handle = handle
        self.spin_ns = spin_ns
        self._poll = select.poll()
        self._poll.register(handle, select.POLLIN)
        self._rest = b""

    def drain(self) -> list[Token]:
        """Return the tokens that are there, without waiting."""
        return self._read() if self._poll.poll(0) else []

    def wait(self) -> list[Token]:
        """Return at least one token, waiting for it.

        Raises
        ------
        EOFError
            If all writers are gone.
        """
        give_up = time.monotonic_ns() + self.spin_ns
        while time.monotonic_ns() < give_up:
            if self._poll.poll(0):
                break
        return self._read()

    def _read(self) -> list[Token]:
        data = os.read(self.handle, 1 << 16)
        if not data:
            raise EOFError
        data = self._rest + data
        whole = len(data) - len(data) % _TOKEN.size
        self._rest = data[whole:]
        return [Token(*fields) for fields in _TOKEN.iter_unpack(data[:whole])]


class Segment:
    """Memory that processes share, cut into places for tensors.

    The memory is an unnamed file, so nothing is left behind however its users end.

    Parameters
    ----------
    places
        Bytes of each place.
    handle
        From `create_segment`.
    slots
        Requests in flight; each has all places to itself.
    """

    def __init__(self, places: Sequence[int], handle: int, *, slots: int = 1) -> None:
        self._offsets, size = _layout(places, slots)
        self._memory = mmap.mmap(handle, size)

    @property
    def memory(self) -> NDArray[np.uint8]:
        """All of it, as bytes."""
        return np.frombuffer(self._memory, dtype=np.uint8)

    def array(self, spec: TensorSpec, place: int, slot: int = 0) -> NDArray[Any]:
        """Return the array of a tensor in a place; all processes see the same bytes."""
        count = int(np.prod(spec.shape, dtype=np.int64))
        array = np.frombuffer(self._memory, dtype=spec.dtype, count=count, offset=self._offsets[slot][place])
        return array.reshape(spec.shape)


def create_segment(places: Sequence[int], *, slots: int = 1) -> int:
    """Return the file descriptor of new memory for tensors; hand it to the processes, then close it.

    Raises
    ------
    OSError
        If there is not so much memory.
    """
    _, size = _layout(places, slots)
    handle = _memory_file()
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)  # says at once that memory is short; truncate would fail later
        else:
            os.truncate(handle, size)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _memory_file() -> int:
    """Return the descriptor of an empty file in memory without a name.

    That of Linux is bounded by the memory alone; a folder in memory may be small, such as the 64 MiB of a container.
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create("moirai-sim", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _layout(places: Sequence[int], slots: int) -> tuple[list[list[int]], int]:
    pages = [-(-max(size, 1) // ALIGNMENT) * ALIGNMENT for size in places]
    starts = [0, *itertools.accumulate(pages * slots)]
    return [starts[slot * len(pages) : (slot + 1) * len(pages)] for slot in range(slots)], max(starts[-1], ALIGNMENT)


def close_all(handles: Iterable[int]) -> None:
    """Close file descriptors."""
    for handle in handles:
        os.close(handle)
