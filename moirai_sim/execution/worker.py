"""One worker process a device: loads its parts, runs them in order, hands tensors on, and says what happened when.

Started with the file descriptors of its control socket and its inbox. It ends when the control socket is closed at the
other end, whatever it is doing, so that no worker outlives its master.
"""

from __future__ import annotations

import gc
import os
import re
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moirai_sim.errors import InputError
from moirai_sim.execution.backends import BACKENDS, HOST, Backend, HostMemory, bytes_of
from moirai_sim.execution.channel import LOST, Inbox, Segment, Token, post
from moirai_sim.execution.pace import Pace
from moirai_sim.execution.tcp import TcpLinks

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.execution.backends import Memory
    from moirai_sim.execution.split import TensorSpec

DONE, READY = -1, -2
"""Tokens of a worker that has finished its parts of a request, and of one that waits for the others to begin."""
SLOW = 0.35
"""A core whose interpreter is slower by more than this is disturbed. After kernels it is up to 0.25 slower, since its
code is cold, and beside a busy sibling 0.6 or more."""
NO_MEMORY = 12
"""Exit code of a worker that had no memory for what it was sent: the number of the error on Linux."""
_SHORT = re.compile(r"bad_alloc|out of memory|(failed to|unable to|can't) allocate", re.IGNORECASE)
_SCHEDSTAT = Path("/proc/thread-self/schedstat")
_EARLY_NS = 1_000_000
"""A worker that waits for a start time stops sleeping so much earlier, since sleep is late."""


@dataclass(frozen=True)
class Job:
    """One part, as its worker sees it. Tensors are numbered as in `Assignment.tensors`."""

    model: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    awaits: tuple[int, ...]
    sends: tuple[tuple[int, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Assignment:
    """All that one worker needs to run its share of a placement."""

    jobs: tuple[Job, ...]
    tensors: Mapping[str, TensorSpec]
    """Every tensor that crosses parts, in an order all workers share."""
    place: Mapping[str, int]
    """Where those lie that cross devices: tensors that never live at the same time share a place."""
    place_bytes: tuple[int, ...]
    """Size of each place."""
    shared: bool
    """Whether places lie in a segment of shared memory, whose descriptor follows."""
    feeds: Mapping[str, NDArray[Any]]
    results: tuple[str, ...]
    """Outputs of the model that this worker writes."""
    peers: tuple[str, ...]
    """The other workers that take part."""
    slots: int = 1
    """Requests in flight; each has buffers of its own."""
    threads: int = 1
    optimized: bool = True
    """Whether the parts are to run as they stand."""


@dataclass
class Record:
    """What a worker did: times by the monotonic clock, ns."""

    begun: int
    """When the first request arrived."""
    runs: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    """(request, job, ready, start, end)"""
    arrivals: list[tuple[int, int, int, int]] = field(default_factory=list)
    """(request, tensor, sent, arrived); the sender's clock says when it was sent over a network."""
    delayed_ns: int = 0
    """Time in which the worker wanted to run and something else had its core; 0 where the system does not tell."""
    slowed: float = 0.0
    """How much slower than usual the core was before or after, as a share: see `Pace`. 0 where nobody looked."""


class _Pool:
    """Memory of tensors that stay on the device, used again once their last reader has run: warm, and little."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._free: list[Any] = []
        self._taken: dict[str, Any] = {}

    def take(self, name: str, dtype: str, shape: tuple[int, ...]) -> Any:  # noqa: ANN401
        """Return a tensor, in the memory freed last of that which is large enough."""
        size = bytes_of(dtype, shape)
        fitting = [i for i, memory in enumerate(self._free) if memory.nbytes >= size]
        memory = self._free.pop(fitting[-1]) if fitting else self._memory.new(size)
        self._taken[name] = memory
        return self._memory.tensor(memory, dtype, shape)

    def give_back(self, name: str) -> None:
        """Free the memory of a tensor, if it came from here."""
        if name in self._taken:
            self._free.append(self._taken.pop(name))


class _Loaded:
    """An assignment made ready to run: sessions, buffers, bindings."""

    def __init__(self, assignment: Assignment, handle: int, backend: Backend) -> None:
        self.assignment = assignment
        self.names = list(assignment.tensors)
        segment = Segment(assignment.place_bytes, handle, slots=assignment.slots) if assignment.shared else None
        self.backend = backend
        self._unpin = [] if segment is None else [backend.memory.pin(segment.memory)]
        self.sessions = [backend.part(job.model, assignment.threads, assignment.optimized) for job in assignment.jobs]
        self.slots = [self._host_buffers(segment, slot) for slot in range(assignment.slots)]
        bound = [self._bind(hosts) for hosts in self.slots]
        self._tensors = [tensors for tensors, _ in bound]  # bindings of ONNX Runtime know addresses only
        posts = [
            tuple((target, tensor) for tensor, targets in job.sends for target in targets) for job in assignment.jobs
        ]
        runs = [session.run_with_iobinding for session in self.sessions]
        self.steps = [list(zip(runs, bindings, posts, strict=True)) for _, bindings in bound]
        """By slot and job: what to call, with what, and (target, tensor) to send then."""

    def close(self) -> None:
        """Let go of memory that the device had locked."""
        for unpin in self._unpin:
            unpin()

    def _host_buffers(self, segment: Segment | None, slot: int) -> dict[str, NDArray[Any]]:
        """Return what other devices or the master write or read in one slot."""
        assignment, host = self.assignment, HostMemory()
        buffers: dict[str, NDArray[Any]] = dict(assignment.feeds)
        own: dict[int, NDArray[np.uint8]] = {}  # places where no memory is shared
        for name in dict.fromkeys(name for job in assignment.jobs for name in (*job.inputs, *job.outputs)):
            if name in buffers:
                continue
            spec, place = assignment.tensors[name], assignment.place.get(name)
            if place is not None and segment is not None:
                buffers[name] = segment.array(spec, place, slot)
            elif place is not None or name in assignment.results:
                key, size = (-1 - len(own), spec.bytes) if place is None else (place, assignment.place_bytes[place])
                if key not in own:
                    own[key] = host.new(size)
                    self._unpin.append(self.backend.memory.pin(own[key]))
                buffers[name] = host.tensor(own[key], spec.dtype, spec.shape)
        return buffers

    def _bind(self, hosts: dict[str, NDArray[Any]]) -> tuple[dict[str, Any], list[Any]]:
        """Return the tensors of one slot and one binding a session: kernels read and write memory in place.

        A device with memory apart has tensors of its own beside the host's. It fetches those of others where its first
        part reads them, and returns its own as soon as they are there; in between they stay on it.
        """
        jobs, memory = self.assignment.jobs, self.backend.memory
        tensors: dict[str, Any] = {} if memory.apart else dict(hosts)
        pool = _Pool(memory)
        last_use = {name: i for i, job in enumerate(jobs) for name in (*job.inputs, *job.outputs)}
        bindings = []
        for i, (job, session) in enumerate(zip(jobs, self.sessions, strict=True)):
            used = dict.fromkeys((*job.inputs, *job.outputs))
            new = [name for name in used if name not in tensors]
            for name in new:
                like = hosts[name] if name in hosts else self.assignment.tensors[name]
                tensors[name] = pool.take(name, str(like.dtype), like.shape)
            inputs, outputs = ({name: tensors[name] for name in names} for names in (job.inputs, job.outputs))
            fetched = [(tensors[name], hosts[name]) for name in new if name in inputs and name in hosts]
            returned = [(tensors[name], hosts[name]) for name in outputs if name in hosts] if memory.apart else []
            bindings.append(self.backend.bind(session, inputs, outputs, fetched, returned))
            for name in used:
                if last_use[name] == i:
                    pool.give_back(name)
        return tensors, bindings

    def memory(self, tensor: int, request: int) -> memoryview:
        """Return the bytes of a tensor in the slot of a request."""
        buffers = self.slots[request % len(self.slots)]
        return buffers[self.names[tensor]].reshape(-1).view(np.uint8).data

    def results(self, request: int) -> dict[str, NDArray[Any]]:
        buffers = self.slots[request % len(self.slots)]
        return {name: buffers[name].copy() for name in self.assignment.results}


class Worker:
    """Serves the commands of the master; see `main`."""

    def __init__(
        self,
        control: Connection | None,
        inbox: Inbox,
        peers: Mapping[str, int],
        backend: str = "onnxruntime",
        place: str = HOST,
    ) -> None:
        self.backend = BACKENDS[backend](place)
        self.control = control
        self.inbox = inbox
        self.peers = peers
        self.network: TcpLinks | None = None
        self.loaded: dict[int, _Loaded] = {}
        self.plain: Callable[[], Any] | None = None
        self.pace = Pace()
        self._ready = 0  # workers that wait for this one
        self._early: list[Token] = []  # of the next run, from workers that began it already

    def serve(self) -> None:
        """Answer commands until the master leaves."""
        if self.control is None:
            raise LookupError("a worker without a control socket is called directly")
        while True:
            command, *arguments = self.control.recv()
            try:
                reply = self.answer(command, *arguments)
            except EOFError:
                raise
            except ConnectionError as error:  # another worker has most likely ended: the master looks which
                self.control.send(("lost", str(error)))
            except Exception as error:  # noqa: BLE001 - whatever it is, the master must hear of it
                if isinstance(error, InputError) and not _memory_is_short(error):
                    self.control.send(("refused", "; ".join(error.problems)))
                else:
                    self.control.send(("error", _why(error)))
            else:
                self.control.send(("ok", reply))

    def answer(self, command: str, *arguments: object) -> Any:  # noqa: ANN401
        """Carry out one command: load, unload, load_plain, plain, run, hot or results."""
        return getattr(self, f"_{command}")(*arguments)

    def _load(self, key: int, assignment: Assignment) -> None:
        handle = recv_handle(self.control) if assignment.shared and self.control is not None else -1
        try:
            self.loaded[key] = _Loaded(assignment, handle, self.backend)
        finally:
            if handle >= 0:
                os.close(handle)
        gc.collect()
        gc.freeze()
        gc.disable()  # a collection in the middle of a run would be measured

    def _unload(self, key: int) -> None:
        loaded = self.loaded.pop(key, None)
        if loaded is not None:
            loaded.close()
        gc.collect()

    def _results(self, key: int, request: int) -> dict[str, NDArray[Any]]:
        return self.loaded[key].results(request)

    def _load_plain(
        self, model: bytes, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str], threads: int
    ) -> list[NDArray[Any]]:
        """Hold the unsplit model in a plain session, in place of the last one; return its outputs."""
        self.plain = None
        session = self.backend.whole(model, threads)
        known = {value.name for value in session.get_inputs()}
        arguments = list(outputs), {name: array for name, array in feeds.items() if name in known}
        self.plain = lambda: session.run(*arguments)
        results: list[NDArray[Any]] = self.plain()
        return results

    def _plain(self, runs: int) -> list[tuple[int, float]]:
        """Run the plain session once to warm it, then so often; return (ns, how much slower the core was) of each."""
        if self.plain is None:
            raise LookupError("no plain session was loaded")
        times = []
        before = 0.0
        for _ in range(runs + 1):
            start = time.monotonic_ns()
            self.plain()
            took = time.monotonic_ns() - start
            after = self.pace.slowed()
            times.append((took, max(before, after)))
            before = after
        return times[1:]

    def _run(self, key: int, arrivals_ns: Sequence[int]) -> Record:
        """Run requests that arrive at the given instants of the monotonic clock, at most ``slots`` at a time."""
        delayed = _run_queue_ns()
        record = self._requests(key, arrivals_ns)
        record.delayed_ns = _run_queue_ns() - delayed
        return record

    def _hot(self, key: int, count: int, wait_ns: int, rest_ns: int) -> list[Record]:
        """Run a request that does not count and then ``count`` ones, one after the other without a pause.

        Each begins when all workers have ended the one before it and every core keeps its own pace; in all, nobody
        waits longer than ``wait_ns`` for that. Then all rest for ``rest_ns``, as one that waits for tensors does.
        """
        records = []
        give_up = time.monotonic_ns() + wait_ns
        for _ in range(count + 1):
            slowed = self.pace.slowed()
            while slowed > SLOW and time.monotonic_ns() < give_up:
                slowed = self.pace.slowed()
            rested = time.monotonic_ns() + rest_ns
            while time.monotonic_ns() < rested:
                pass
            delayed = _run_queue_ns()
            self._meet(key)
            record = self._requests(key, [time.monotonic_ns()])
            record.delayed_ns = _run_queue_ns() - delayed
            record.slowed = max(slowed, self.pace.slowed())
            records.append(record)
        return records[1:]

    def _requests(self, key: int, arrivals_ns: Sequence[int]) -> Record:
        """Run requests; of the parts that could start, that of the earliest request goes first."""
        loaded, clock = self.loaded[key], time.monotonic_ns
        jobs, slots, count = loaded.assignment.jobs, loaded.assignment.slots, len(arrivals_ns)
        record = Record(arrivals_ns[0])
        here: list[dict[int, int]] = [{} for _ in arrivals_ns]  # by request: tensor -> arrival
        unfinished = [len(loaded.assignment.peers) + 1] * count  # workers that still work on the request
        active: list[list[int]] = []  # [request, next job, end of the one before], oldest first
        admitted = finished = 0
        self._take(self._early, here, unfinished, record)
        self._early.clear()
        while finished < count:
            while admitted < count and (admitted < slots or not unfinished[admitted - slots]):
                arrival = arrivals_ns[admitted]
                if clock() < arrival - _EARLY_NS:
                    break
                while clock() < arrival:
                    pass
                active.append([admitted, 0, arrival if admitted < slots else max(arrival, clock())])
                admitted += 1
            for state in active:
                request, index, ready = state
                got, awaits = here[request], jobs[index].awaits
                if all(tensor in got for tensor in awaits):
                    break
            else:
                waiting = admitted < count and (admitted < slots or not unfinished[admitted - slots])
                self._listen(here, unfinished, record, until_ns=arrivals_ns[admitted] - _EARLY_NS if waiting else None)
                continue
            run, binding, posts = loaded.steps[request % slots][index]
            start = clock()
            run(binding)
            end = clock()
            for target, tensor in posts:
                self._send(target, key, tensor, request)
            if awaits:
                ready = max(got[tensor] for tensor in awaits)
            record.runs.append((request, index, min(ready, start), start, end))
            state[1], state[2] = index + 1, end
            if index + 1 == len(jobs):
                active.remove(state)
                finished += 1
                unfinished[request] -= 1
                for peer in loaded.assignment.peers:
                    self._send(peer, key, DONE, request)
            self._take(self.inbox.drain(), here, unfinished, record)
        while any(unfinished):
            self._listen(here, unfinished, record)
        if self.network is not None:
            sent_ns = self.network.sent_ns
            record.arrivals = [(r, tensor, sent_ns.get((tensor, r), s), at) for r, tensor, s, at in record.arrivals]
        return record

    def _meet(self, key: int) -> None:
        """Wait until all workers of a placement are here. Tensors of one that has gone on already are kept."""
        peers = self.loaded[key].assignment.peers
        for peer in peers:
            self._send(peer, key, READY, 0)
        while self._ready < len(peers):
            for token in self.inbox.wait():
                if token.tensor == READY:
                    self._ready += 1
                elif token.tensor == LOST:
                    raise self._lost()
                else:
                    self._early.append(token)
        self._ready -= len(peers)

    def receive_buffer(self, key: int, tensor: int, request: int) -> memoryview:
        """Return the memory of a tensor that arrives over the network."""
        return self.loaded[key].memory(tensor, request)

    def _send(self, target: str, key: int, tensor: int, request: int) -> None:
        if self.network is None:
            post(self.peers[target], tensor, request)
        else:
            payload = memoryview(b"") if tensor < 0 else self.loaded[key].memory(tensor, request)
            self.network.send(target, key, tensor, request, payload)

    def _listen(
        self,
        here: Sequence[dict[int, int]],
        unfinished: list[int],
        record: Record,
        until_ns: int | None = None,
    ) -> None:
        """Wait for tokens, or until an instant."""
        if until_ns is not None:
            patience_ms = max(0.0, (until_ns - time.monotonic_ns()) / 1e6)
            if not select.select([self.inbox.handle], [], [], patience_ms / 1e3)[0]:
                return
        tokens = self.inbox.wait()
        self._take(tokens, here, unfinished, record, now=time.monotonic_ns())

    def _lost(self) -> ConnectionError:
        return ConnectionError(self.network.failure if self.network is not None else "")

    def _take(
        self,
        tokens: Sequence[Token],
        here: Sequence[dict[int, int]],
        unfinished: list[int],
        record: Record,
        now: int | None = None,
    ) -> None:
        """Book tokens. One that was not waited for was there when it was sent."""
        for tensor, request, sent in tokens:
            if tensor == DONE:
                unfinished[request] -= 1
            elif tensor == READY:
                self._ready += 1
            elif tensor == LOST:
                raise self._lost()
            else:
                here[request][tensor] = arrived = sent if now is None else now
                record.arrivals.append((request, tensor, sent, arrived))


def _why(error: Exception) -> str:
    """Return what to tell of an error."""
    said = f"{type(error).__name__}: {error}"
    return f"it ran out of memory ({said}); place less on the device" if _memory_is_short(error) else said


def _memory_is_short(error: Exception) -> bool:
    """Tell whether an error is for want of memory, which backends say in many ways."""
    return isinstance(error, MemoryError) or _SHORT.search(f"{type(error).__name__}: {error}") is not None


def _run_queue_ns() -> int:
    """Return how long this thread has waited for its core since it began (Linux's scheduler statistics), ns."""
    try:
        return int(_SCHEDSTAT.read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def _leave_with_master(control: Connection) -> None:
    """End this process as soon as the other end of the control socket is closed."""
    poll = select.poll()
    poll.register(control.fileno(), getattr(select, "POLLRDHUP", 0))
    poll.poll()
    os._exit(1)


def main(arguments: Sequence[str]) -> None:
    """Connect, pin, and serve. Arguments: descriptors of the control socket and of the inbox."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the master's: without it this process ends anyway
    control = Connection(int(arguments[0]))
    threading.Thread(target=_leave_with_master, args=(control,), daemon=True).start()
    settings = control.recv()
    if settings["cores"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, settings["cores"])
    inbox = Inbox(int(arguments[1]), settings["spin_ns"])
    try:
        worker = Worker(control, inbox, settings["peers"], settings["backend"], settings["place"])
    except InputError as error:
        control.send(("refused", str(error)))
        return
    if settings["addresses"]:
        own = settings["addresses"].pop(settings["name"])
        try:
            listener = socket.create_server(own)
        except OSError as error:
            control.send(("error", f"{own.host}, port {own.port}: {os.strerror(error.errno or 0)}"))
            return
        write = settings["peers"][settings["name"]]
        worker.network = TcpLinks(listener, settings["addresses"], write, worker.receive_buffer, settings["latency_ns"])
    control.send(("ok", os.getpid()))
    try:
        worker.serve()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)
    except MemoryError:  # for a command or an answer
        os._exit(NO_MEMORY)
