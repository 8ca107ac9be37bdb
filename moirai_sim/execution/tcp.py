"""How workers hand tensors to each other over a network: one TCP connection for each direction of each pair.

A thread for each target sends, one for each source receives into the buffer from which the kernel reads, and puts a
token into the worker's own inbox: from there on everything is as in `moirai_sim.execution.channel`.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import NamedTuple

from moirai_sim.execution.channel import post

_HEADER = struct.Struct("=iiiq")
"""Key of the placement, tensor, request, bytes that follow."""
_Message = tuple[int, int, int, memoryview]


class Address(NamedTuple):
    """Where a worker listens."""

    host: str
    port: int


class TcpLinks:
    """The connections of one worker.

    Parameters
    ----------
    own
        Where to listen.
    peers
        Where the other workers listen. Connections are made at the first send.
    inbox
        Write end of the worker's own inbox.
    buffer
        Returns the memory for (key of the placement, tensor, request).

    Raises
    ------
    OSError
        If the port is in use.
    """

    def __init__(
        self, own: Address, peers: Mapping[str, Address], inbox: int, buffer: Callable[[int, int, int], memoryview]
    ) -> None:
        self._peers = peers
        self._inbox = inbox
        self._buffer = buffer
        self._queues: dict[str, SimpleQueue[_Message]] = {}
        self._listener = socket.create_server(own)
        self._thread(self._accept)

    def send(self, target: str, key: int, tensor: int, request: int, payload: memoryview) -> None:
        """Queue a tensor (or a signal without bytes) for a target; returns at once."""
        if target not in self._queues:
            self._queues[target] = SimpleQueue()
            self._thread(self._send_all, target, self._queues[target])
        self._queues[target].put((key, tensor, request, payload))

    def _thread(self, work: Callable[..., None], *arguments: object) -> None:
        threading.Thread(target=work, args=arguments, daemon=True).start()

    def _send_all(self, target: str, queue: SimpleQueue[_Message]) -> None:
        with socket.create_connection(self._peers[target], timeout=None) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while True:
                key, tensor, request, payload = queue.get()
                connection.sendall(_HEADER.pack(key, tensor, request, payload.nbytes))
                if payload.nbytes:
                    connection.sendall(payload)

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            self._thread(self._receive_all, connection)

    def _receive_all(self, connection: socket.socket) -> None:
        header = bytearray(_HEADER.size)
        while _receive(connection, memoryview(header)):
            key, tensor, request, size = _HEADER.unpack(header)
            if size and not _receive(connection, self._buffer(key, tensor, request)):
                return
            post(self._inbox, tensor, request)


def _receive(connection: socket.socket, memory: memoryview) -> bool:
    """Fill memory from a connection; False where the other end is gone."""
    while memory.nbytes:
        count = connection.recv_into(memory)
        if not count:
            return False
        memory = memory[count:]
    return True
