"""The same workers on the machines of a Ray cluster: one actor a device, tensors over TCP between them.

Ray starts the processes and carries commands; no tensor and no token of a run passes through it. The clocks of the
machines differ and drift, so each actor's offset to the master's clock is estimated from round trips before and after
each burst of runs, and times are told by the master's clock; an offset is as wrong as half of the shortest round trip,
which `RayWorkers.clock_error_ns` tells.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Self

from moirai_sim.errors import ExecutionError, InputError
from moirai_sim.execution.backends import device_backends, on_gpu, place
from moirai_sim.execution.channel import Inbox
from moirai_sim.execution.tcp import Address, TcpLinks
from moirai_sim.execution.worker import Assignment, Record, Worker
from moirai_sim.execution.workers import device_cores, is_emulated

if TYPE_CHECKING:
    from moirai_sim.clusters.cluster import Cluster, Device

_PINGS = 10
_POLL_S, _DEATH_S = 0.25, 3.0
"""How long Ray may take to tell that an actor has died, once another one has lost its connection."""
_LIMIT_S = 600.0
"""Ray does not tell whether a worker that owes an answer is at work."""
_AHEAD_NS = 20_000_000
"""Commands take longer through Ray than through a pipe."""


class Reading(NamedTuple):
    """A look at the clock of an actor."""

    theirs: int
    """Its clock, ns."""
    ours: int
    """The master's clock at the same time, ns."""
    error: int
    """How far the two instants may be apart, ns."""


class _Actor:
    """A worker inside of a Ray actor."""

    def __init__(self, device: Device, backend: str) -> None:
        self.device = device
        self.backend = backend

    def clock(self) -> int:
        return time.monotonic_ns()

    def start(self) -> Address:
        """Start the worker on the device's cores; return where it listens.

        Raises
        ------
        InputError
            If this machine, which need not be the master's, lacks a core or the GPU.
        """
        import ray

        cores = device_cores(self.device)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)
        if on_gpu(self.device) and not os.environ.get("CUDA_VISIBLE_DEVICES"):
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # empty where an actor asks Ray for no GPU of its choice
        read, self.write = os.pipe()
        try:
            self.worker = Worker(None, Inbox(read, 0), {}, self.backend, place(self.device))
        except InputError as error:
            raise InputError(f"device '{self.device.name}': {error}") from error
        self.listener = socket.create_server((ray.util.get_node_ip_address(), 0))
        return Address(*self.listener.getsockname()[:2])

    def connect(self, addresses: dict[str, Address]) -> None:
        peers = {name: address for name, address in addresses.items() if name != self.device.name}
        self.worker.network = TcpLinks(self.listener, peers, self.write, self.worker.receive_buffer)

    def call(self, command: str, *arguments: object) -> Any:  # noqa: ANN401
        return self.worker.answer(command, *arguments)


class RayWorkers:
    """One actor a device of a cluster, with the interface of `moirai_sim.execution.workers.Workers`.

    Parameters
    ----------
    cluster
        A device's ``server`` names the Ray resource of the machine it is on (start Ray there with
        ``ray start --resources '{"NAME": 1000}'``); devices without a server go anywhere.
    address
        Of a running Ray cluster, "auto" for one that runs here; None starts one on this machine.

    Raises
    ------
    InputError
        If Ray is not installed, no cluster answers, it lacks a resource, or a device's address is none of its machine
        or an emulated one.
    ExecutionError
        If an actor does not start.
    """

    emulated = True
    shares_cores = False

    def __init__(self, cluster: Cluster, address: str | None = None, *, limit_s: float = 60.0) -> None:
        try:
            import ray
        except ImportError as error:
            raise InputError("Ray is not installed; install it with: pip install 'moirai-sim[ray]'") from error
        emulated = [
            f"device '{device.name}': address '{device.address}' is an emulated machine, and those of Ray are real; "
            "write cpu:FIRST[-LAST] or cuda:INDEX"
            for device in cluster.devices
            if is_emulated(device)
        ]
        if emulated:
            raise InputError(emulated)
        self.names = self.apart = [device.name for device in cluster.devices]
        self.threads = {device.name: device.threads for device in cluster.devices}
        self.backends = device_backends(cluster)
        self._keys = 0
        self._senders: dict[int, dict[int, str]] = {}
        """By placement: which device sends each tensor."""
        self.clock_error_ns = 0
        self._actors: dict[str, Any] = {}
        self._ours = not ray.is_initialized()
        try:
            if self._ours:
                _connect(address)
            self._start(cluster, limit_s)
        except BaseException:
            self.close()
            raise

    def _start(self, cluster: Cluster, limit_s: float) -> None:
        import ray

        have = ray.cluster_resources()
        missing = sorted({d.server for d in cluster.devices if d.server and d.server not in have})
        if missing:
            raise InputError(
                f"cluster '{cluster.name}': no Ray node has the resource '{name}'; start one with it"
                for name in missing
            )
        actor = ray.remote(num_cpus=0)(_Actor)
        for device in cluster.devices:
            options = actor.options(resources={device.server: 1} if device.server else None)
            self._actors[device.name] = options.remote(device, self.backends[device.name])
        addresses = self._each({name: actor.start.remote() for name, actor in self._actors.items()}, limit_s)
        self._each({name: actor.connect.remote(addresses) for name, actor in self._actors.items()}, limit_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def processes(self) -> dict[str, int]:
        """A number by device, as long as the actors live."""
        return {name: i for i, name in enumerate(self._actors)}

    def load(self, assignments: Mapping[str, Assignment]) -> int:
        """Give the workers what to run; return the key under which they hold it."""
        self._keys += 1
        self._senders[self._keys] = {
            tensor: name for name, one in assignments.items() for job in one.jobs for tensor, _ in job.sends
        }
        calls = {
            name: self._actor(name).call.remote("load", self._keys, replace(assignment, shared=False))
            for name, assignment in assignments.items()
        }
        self._each(calls)
        return self._keys

    def call(self, names: Sequence[str], command: str, *arguments: Any) -> dict[str, Any]:  # noqa: ANN401
        """Send one command to workers and return their answers; times are by the master's clock."""
        if command not in ("run", "hot"):
            if command == "unload":
                self._senders.pop(arguments[0], None)
            return self._each({name: self._actor(name).call.remote(command, *arguments) for name in names})
        key, given = arguments[0], arguments[1:]
        before = {name: self._read_clock(name) for name in names}
        late = max(0, time.monotonic_ns() - given[0][0]) + _AHEAD_NS if command == "run" else 0
        calls = {}
        for name in names:
            if command == "run":
                given = ([at + late + before[name].theirs - before[name].ours for at in arguments[1]],)
            calls[name] = self._actor(name).call.remote(command, key, *given)
        answers = self._each(calls)
        after = {name: self._read_clock(name) for name in names}
        errors = (reading.error for reading in (*before.values(), *after.values()))
        self.clock_error_ns = max(self.clock_error_ns, *errors)
        clocks = {name: clock_between(before[name], after[name], late) for name in names}
        senders = {tensor: clocks[name] for tensor, name in self._senders[key].items()}
        if command == "run":
            return {name: told_by(record, clocks[name], senders) for name, record in answers.items()}
        return {name: [told_by(one, clocks[name], senders) for one in own] for name, own in answers.items()}

    def close(self) -> None:
        """End the actors, and Ray where it was started here."""
        import ray

        for actor in self._actors.values():
            ray.kill(actor)
        self._actors.clear()
        if self._ours:
            ray.shutdown()
            self._ours = False

    def _actor(self, name: str) -> Any:  # noqa: ANN401
        if name not in self._actors:
            raise ExecutionError(f"worker '{name}' has ended; start new workers")
        return self._actors[name]

    def _read_clock(self, name: str) -> Reading:
        """Return the best of several readings of an actor's clock (Cristian 1989)."""
        import ray

        readings = []
        for _ in range(_PINGS):
            sent = time.monotonic_ns()
            try:
                there = ray.get(self._actor(name).clock.remote(), timeout=_LIMIT_S)
            except ray.exceptions.RayError as error:
                self._fail(name, error)
            back = time.monotonic_ns()
            readings.append(Reading(there, (sent + back) // 2, (back - sent) // 2))
        return min(readings, key=lambda reading: reading.error)

    def _each(self, calls: Mapping[str, Any], limit_s: float = _LIMIT_S) -> dict[str, Any]:
        """Return the answers to calls; the first failure ends all.

        A worker whose connection broke says so at once. If another one has died, Ray tells soon after, and that is
        what happened.
        """
        import ray

        answers: dict[str, Any] = {}
        owing = {call: name for name, call in calls.items()}
        lost: tuple[str, Exception] | None = None
        end = time.monotonic() + limit_s
        while owing:
            ready, _ = ray.wait(list(owing), timeout=_POLL_S)
            for call in ready:
                name = owing.pop(call)
                try:
                    answers[name] = ray.get(call)
                except ray.exceptions.RayError as error:
                    if not isinstance(getattr(error, "cause", None), ConnectionError):
                        self._fail(name, error)
                    if lost is None:
                        lost, end = (name, error), time.monotonic() + _DEATH_S
            if lost is not None and (not owing or time.monotonic() > end):
                self._fail(*lost)
            if owing and time.monotonic() > end:
                late = ", ".join(f"'{name}'" for name in owing.values())
                self.close()
                raise ExecutionError(f"worker {late} on Ray: no answer within {limit_s:g} s; all workers were ended")
        return answers

    def _fail(self, name: str, error: Exception) -> NoReturn:
        self.close()
        cause = getattr(error, "cause", None)
        if isinstance(cause, InputError):
            raise InputError(cause.problems) from error
        what = f"{type(cause).__name__}: {cause}" if cause is not None else str(error).strip().splitlines()[0]
        raise ExecutionError(f"worker '{name}' on Ray failed: {what}; all workers were ended") from error


def _connect(address: str | None) -> None:
    import ray

    try:
        ray.init(address=address or "local", include_dashboard=False, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError, SystemExit) as error:  # Ray exits where no port answers
        where = f"at address '{address}'" if address else "here"
        raise InputError(f"Ray: no cluster answers {where} ({error}); start one with: ray start --head") from error


def clock_between(before: Reading, after: Reading, late_ns: int = 0) -> Callable[[int], int]:
    """Return what turns instants of an actor's clock into the master's, less ``late_ns``.

    Between two readings a clock drifts evenly.
    """
    first, last = (reading.theirs - reading.ours for reading in (before, after))
    lasted = max(after.theirs - before.theirs, 1)

    def ours(theirs: int) -> int:
        since = min(max(theirs - before.theirs, 0), lasted)
        return theirs - first - (last - first) * since // lasted - late_ns

    return ours


def told_by(record: Record, clock: Callable[[int], int], senders: Mapping[int, Callable[[int], int]]) -> Record:
    """Return a record by the master's clock; ``senders`` are the clocks by which tensors were sent."""
    return Record(
        clock(record.begun),
        [(request, job, clock(ready), clock(start), clock(end)) for request, job, ready, start, end in record.runs],
        [  # clocks are not known well enough to tell which came first where a tensor is very quick
            (request, tensor, min(senders[tensor](sent), clock(arrived)), clock(arrived))
            for request, tensor, sent, arrived in record.arrivals
        ],
        record.delayed_ns,
        record.slowed,
    )
