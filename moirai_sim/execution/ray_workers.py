"""The same workers on the machines of a Ray cluster: one actor a device, tensors over TCP between them.

Ray starts the processes and carries commands; no tensor and no token of a run passes through it. The clocks of the
machines differ, so each actor's offset to the master's clock is estimated from round trips, and times are told by the
master's clock; an offset is as wrong as half of the shortest round trip, which `RayWorkers.clock_error_ns` tells.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from moirai_sim.errors import ExecutionError, InputError
from moirai_sim.execution.backends import device_backends
from moirai_sim.execution.channel import Inbox
from moirai_sim.execution.tcp import Address, TcpLinks
from moirai_sim.execution.worker import Assignment, Record, Worker
from moirai_sim.execution.workers import device_cores

if TYPE_CHECKING:
    from moirai_sim.clusters.cluster import Cluster, Device

_PINGS = 20


class _Actor:
    """A worker inside of a Ray actor."""

    def __init__(self, device: Device, backend: str) -> None:
        self.device = device
        self.backend = backend

    def clock(self) -> int:
        return time.monotonic_ns()

    def start(self) -> Address:
        """Start the worker on the device's cores; return an address of this machine with a free port.

        Raises
        ------
        InputError
            If this machine, which need not be the master's, lacks a core.
        """
        import ray

        cores = device_cores(self.device)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)
        read, self.write = os.pipe()
        self.worker = Worker(None, Inbox(read, 0), {}, self.backend)
        self.worker.one_clock = False
        host = ray.util.get_node_ip_address()
        with socket.create_server((host, 0)) as probe:
            return Address(host, probe.getsockname()[1])

    def connect(self, addresses: dict[str, Address]) -> None:
        own = addresses[self.device.name]
        peers = {name: address for name, address in addresses.items() if name != self.device.name}
        self.worker.network = TcpLinks(own, peers, self.write, self.worker.receive_buffer)

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
        If Ray is not installed, no cluster answers, it lacks a resource, or a device's address is none of its machine.
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
        self.names = self.apart = [device.name for device in cluster.devices]
        self.threads = {device.name: device.threads for device in cluster.devices}
        self.backends = device_backends(cluster)
        self._keys = 0
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
                f"cluster '{cluster.name}': no Ray node has the resource '{missing[0]}'; start one with it"
            )
        actor = ray.remote(num_cpus=0)(_Actor)
        for device in cluster.devices:
            options = actor.options(resources={device.server: 1} if device.server else None)
            self._actors[device.name] = options.remote(device, self.backends[device.name])
        addresses = self._each({name: actor.start.remote() for name, actor in self._actors.items()}, limit_s)
        self._each({name: actor.connect.remote(addresses) for name, actor in self._actors.items()}, limit_s)
        clocks = {name: self._offset(name) for name in self.names}
        self._offset_ns = {name: offset for name, (offset, _) in clocks.items()}
        self.clock_error_ns = max(error for _, error in clocks.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def processes(self) -> dict[str, int]:
        """A number by device, as long as the actors live."""
        return {name: i for i, name in enumerate(self._actors)}

    def load(self, assignments: Mapping[str, Assignment], *, limit_s: float = 120.0) -> int:
        """Give the workers what to run; return the key under which they hold it."""
        self._keys += 1
        calls = {
            name: self._actors[name].call.remote("load", self._keys, replace(assignment, shared=False))
            for name, assignment in assignments.items()
        }
        self._each(calls, limit_s)
        return self._keys

    def call(self, names: Sequence[str], command: str, *arguments: Any, limit_s: float = 60.0) -> dict[str, Any]:  # noqa: ANN401
        """Send one command to workers and return their answers; times are by the master's clock."""
        if command != "run":
            others = self._each({name: self._actors[name].call.remote(command, *arguments) for name in names}, limit_s)
            if command == "hot":
                return {n: [_shifted(one, -self._offset_ns[n]) for one in records] for n, records in others.items()}
            return others
        key, arrivals = arguments
        later = [at + 20_000_000 for at in arrivals]  # commands take longer through Ray than through a pipe
        calls = {
            name: self._actors[name].call.remote("run", key, [at + self._offset_ns[name] for at in later])
            for name in names
        }
        answers = self._each(calls, limit_s)
        return {name: _shifted(record, -self._offset_ns[name] - 20_000_000) for name, record in answers.items()}

    def close(self) -> None:
        """End the actors, and Ray where it was started here."""
        import ray

        for actor in self._actors.values():
            ray.kill(actor)
        self._actors.clear()
        if self._ours:
            ray.shutdown()
            self._ours = False

    def _offset(self, name: str) -> tuple[int, int]:
        """Return the actor's clock less ours, and how wrong that may be, ns (Cristian 1989)."""
        import ray

        best = (0, 1 << 62)
        for _ in range(_PINGS):
            sent = time.monotonic_ns()
            there = ray.get(self._actors[name].clock.remote())
            back = time.monotonic_ns()
            if (back - sent) // 2 < best[1]:
                best = (there - (sent + back) // 2, (back - sent) // 2)
        return best

    def _each(self, calls: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
        import ray

        answers = {}
        for name, call in calls.items():
            try:
                answers[name] = ray.get(call, timeout=limit_s)
            except ray.exceptions.RayError as error:
                self.close()
                cause = getattr(error, "cause", None)
                if isinstance(cause, InputError):
                    raise InputError(cause.problems) from error
                raise ExecutionError(f"worker '{name}' on Ray failed: {str(error).splitlines()[-1]}") from error
        return answers


def _connect(address: str | None) -> None:
    import ray

    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError, SystemExit) as error:  # Ray exits where no port answers
        where = f"at address '{address}'" if address else "here"
        raise InputError(f"Ray: no cluster answers {where} ({error}); start one with: ray start --head") from error


def _shifted(record: Record, by_ns: int) -> Record:
    """Return a record with all its instants moved to another clock."""
    return Record(
        record.begun + by_ns,
        [(request, job, ready + by_ns, start + by_ns, end + by_ns) for request, job, ready, start, end in record.runs],
        [(request, tensor, sent + by_ns, arrived + by_ns) for request, tensor, sent, arrived in record.arrivals],
        record.delayed_ns,
        record.slowed,
    )
