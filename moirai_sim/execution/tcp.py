"""How workers hand tensors to each other over a network: one TCP connection for each direction of each pair.

A thread for each target sends, one for each source receives into the buffer from which the kernel reads, and puts a
token into the worker's own inbox: from there on everything is as in `moirai_sim.execution.channel`. Where links are
emulated whose latency the kernel cannot add, the token is held back for so long after the last byte.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from types import MappingProxyType
from typing import NamedTuple

from moirai_sim.execution.channel import LOST, post

_HEADER = struct.Struct("=iiiqqq")
"""Key of the placement, tensor, request, when it was sent, bytes that follow, ns to hold back the token."""
_Message = tuple[int, int, int, int, memoryview]


class Address(NamedTuple):
    """Where a worker listens."""

    host: str
    port: int


class TcpLinks:
    """The connections of one worker.

    What breaks one of them is kept in ``failure``, and a token `LOST` in the worker's inbox wakes it: no tensor will
    come over a connection that broke.

    Parameters
    ----------
    listener
        Where other workers connect to this one.
    peers
        Where the other workers listen. Connections are made at the first send.
    inbox
        Write end of the worker's own inbox.
    buffer
        Returns the memory for (key of the placement, tensor, request).
    latency_ns
        By target: how long a tensor is still under way after its last byte, besides what the network takes.
    """

    def __init__(
        self,
        listener: socket.socket,
        peers: Mapping[str, Address],
        inbox: int,
        buffer: Callable[[int, int, int], memoryview],
        latency_ns: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self._latency_ns = latency_ns
        self.sent_ns: dict[tuple[int, int], int] = {}
        """When the last tensor of a number was sent for a request, by the sender's clock."""
        self.failure = ""
        self._peers = peers
        self._inbox = inbox
        self._buffer = buffer
        self._queues: dict[str, SimpleQueue[_Message]] = {}
        self._listener = listener
        self._thread("connections from other workers", self._accept)

    def send(self, target: str, key: int, tensor: int, request: int, payload: memoryview) -> None:
        """Queue a tensor (or a signal without bytes) for a target; returns at once."""
        if target not in self._queues:
            self._queues[target] = SimpleQueue()
            self._thread(f"connection to '{target}'", self._send_all, target, self._queues[target])
        self._queues[target].put((key, tensor, request, time.monotonic_ns(), payload))

    def _thread(self, what: str, work: Callable[..., None], *arguments: object) -> None:
        def run() -> None:
            try:
                work(*arguments)
            except Exception as error:  # noqa: BLE001 - whatever it is, the worker must hear of it
                self.failure = self.failure or f"{what}: {type(error).__name__}: {error}"
                post(self._inbox, LOST, 0)

        threading.Thread(target=run, daemon=True).start()

    def _send_all(self, target: str, queue: SimpleQueue[_Message]) -> None:
        latency_ns = self._latency_ns.get(target, 0)
        with socket.create_connection(self._peers[target], timeout=None) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while True:
                key, tensor, request, sent_ns, payload = queue.get()
                held_ns = latency_ns if payload.nbytes else 0  # signals belong to the measurement, not to the model
                connection.sendall(_HEADER.pack(key, tensor, request, sent_ns, payload.nbytes, held_ns))
                if payload.nbytes:
                    connection.sendall(payload)

    def _accept(self) -> None:
        while True:
            connection, (host, *_) = self._listener.accept()
            self._thread(f"connection from {host}", self._receive_all, connection)

    def _receive_all(self, connection: socket.socket) -> None:
        header = bytearray(_HEADER.size)
        held: SimpleQueue[tuple[int, int, int]] = SimpleQueue()
        holds = False
        while True:
            _receive(connection, memoryview(header))
            key, tensor, request, sent_ns, size, latency_ns = _HEADER.unpack(header)
            self.sent_ns[tensor, request] = sent_ns
            if size:
                _receive(connection, self._buffer(key, tensor, request))
            if not latency_ns:
                post(self._inbox, tensor, request)
                continue
            if not holds:
                self._thread("tensors held back", self._post_later, held)
                holds = True
            held.put((time.monotonic_ns() + latency_ns, tensor, request))

    def _post_later(self, held: SimpleQueue[tuple[int, int, int]]) -> None:
        while True:
            due, tensor, request = held.get()
            time.sleep(max(0, due - time.monotonic_ns()) / 1e9)
            post(self._inbox, tensor, request)


def _receive(connection: socket.socket, memory: memoryview) -> None:
    """Fill memory from a connection.

    Raises
    ------
    ConnectionError
        If the other end is gone.
    """
    while memory.nbytes:
        count = connection.recv_into(memory)
        if not count:
            raise ConnectionError("the other worker has ended")
        memory = memory[count:]
