"""The worker processes of a cluster: started once, kept for many placements, ended whatever happens."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import send_handle
from typing import TYPE_CHECKING, Any, NoReturn, Self

import psutil

from moirai_sim.errors import ExecutionError, InputError
from moirai_sim.execution import namespaces
from moirai_sim.execution.backends import device_backends, on_gpu, place
from moirai_sim.execution.channel import SPIN_NS, close_all, create_segment
from moirai_sim.execution.worker import NO_MEMORY

if TYPE_CHECKING:
    from moirai_sim.clusters.cluster import Cluster, Device
    from moirai_sim.execution.worker import Assignment

PATIENCE_S = 4.0
"""A worker that owes an answer and has used no processor time for so long hangs."""
_START_S = 30.0
"""The same while it starts: the first read of a library, and a driver that wakes up, take no processor time."""
_LEAST_BYTES = 4096
"""Less than this over a link is no work: the kernel asks in a few bytes whether a worker that hangs reads again."""
_DEATH_S = 1.0
"""How long it may take until a process is seen to have ended whose connections have broken."""
EMULATED = "netns"
"""Kind of address of a device that has a network namespace of its own, as if it were another machine."""
_START = "import sys; from moirai_sim.execution.worker import main; main(sys.argv[1:])"


class Workers:
    """One process a device. Use it as a context manager.

    Parameters
    ----------
    cluster
        Its devices' addresses say which cores to use.

    Raises
    ------
    InputError
        If a device is not on this machine, or cannot be emulated here.
    ExecutionError
        If a worker does not start.
    """

    clock_error_ns = 0
    """All workers have the clock of this machine."""

    def __init__(self, cluster: Cluster) -> None:
        check_runnable(cluster)
        self.backends = device_backends(cluster)
        cores, crowded = worker_cores(cluster)
        self.emulated = any(map(is_emulated, cluster.devices))
        sharing = shared_cores(cluster)
        self.shares_cores = bool(crowded)
        """Whether workers wait for each other's work on a core, which is no disturbance then."""
        self.names = [device.name for device in cluster.devices]
        self.apart = [name for k, name in enumerate(self.names) if not any(k == i and j < k for i, j in sharing)]
        """Devices that share no core with one another."""
        self.threads = {device.name: device.threads for device in cluster.devices}
        self._controls: dict[str, Connection] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._keys = 0
        self._switches: namespaces.Switches | None = None
        pipes: dict[str, tuple[int, int]] = {}
        try:
            for name in self.names:
                pipes[name] = os.pipe()
            if self.emulated:
                self._switches = namespaces.Switches(cluster)
            for name in self.names:
                self._start(name, pipes)
            addresses = {}
            if self._switches is not None:
                addresses = namespaces.connect(cluster, self.processes | self._switches.processes)
            for name in self.names:
                alone = not self.emulated and name not in crowded
                settings = {
                    "name": name,
                    "cores": cores[name],
                    "backend": self.backends[name],
                    "place": place(cluster.device[name]),
                    "spin_ns": SPIN_NS if alone else 0,
                    "peers": {peer: write for peer, (_, write) in pipes.items()},
                    "addresses": addresses,
                    "latency_ns": namespaces.latency_to_hold(cluster, name) if self.emulated else {},
                }
                with self._control(name) as control:
                    control.send(settings)
            self._collect(self.names, patience_s=_START_S)
        except OSError as error:  # as of too many open files
            self.close()
            raise ExecutionError(f"cluster '{cluster.name}': cannot start its workers ({error})") from error
        except BaseException:
            self.close()
            raise
        finally:
            close_all(end for pipe in pipes.values() for end in pipe)

    def _start(self, name: str, pipes: Mapping[str, tuple[int, int]]) -> None:
        ours, theirs = socket.socketpair()
        inbox, writers = pipes[name][0], [write for _, write in pipes.values()]
        prefix = namespaces.PREFIX if self.emulated else ()
        command = [*prefix, sys.executable, "-c", _START, str(theirs.fileno()), str(inbox)]
        # A write that has got rid of a part ends after its limit, and the next one fails: two limits in all.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(PATIENCE_S / 2))
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(PATIENCE_S))
        with theirs:
            process = subprocess.Popen(  # noqa: S603 - our own module in our own interpreter
                command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(), inbox, *writers)
            )
        self._processes[name] = process
        self._controls[name] = Connection(ours.detach())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def processes(self) -> dict[str, int]:
        """Process ids by device."""
        return {name: process.pid for name, process in self._processes.items()}

    def load(self, assignments: Mapping[str, Assignment]) -> int:
        """Give the workers what to run; return the key under which they hold it.

        Raises
        ------
        ExecutionError
            If memory is short, or a worker fails.
        """
        self._keys += 1
        if self.emulated:
            assignments = {name: replace(assignment, shared=False) for name, assignment in assignments.items()}
        any_one = next(iter(assignments.values()))
        try:
            handle = create_segment(any_one.place_bytes, slots=any_one.slots) if any_one.shared else -1
        except OSError as error:
            size = sum(any_one.place_bytes) * any_one.slots / 2**20
            fewer = ", or run fewer requests at once" if any_one.slots > 1 else ""
            raise ExecutionError(
                f"shared memory: {error.strerror} ({size:.3g} MiB for tensors between devices); free some memory{fewer}"
            ) from error
        try:
            for name, assignment in assignments.items():
                self._send(name, "load", self._keys, assignment)
                if handle >= 0:
                    with self._control(name) as control:
                        send_handle(control, handle, self._processes[name].pid)
            self._collect(list(assignments))
        finally:
            if handle >= 0:
                os.close(handle)
        return self._keys

    def call(self, names: Sequence[str], command: str, *arguments: object) -> dict[str, Any]:
        """Send one command to workers and return their answers.

        Raises
        ------
        ExecutionError
            If a worker fails, dies or hangs. All workers are ended then.
        """
        for name in names:
            self._send(name, command, *arguments)
        return self._collect(names)

    def close(self) -> None:
        """End all workers, at once."""
        for control in self._controls.values():
            control.close()
        for process in self._processes.values():
            process.kill()
            process.wait()
        self._controls.clear()
        self._processes.clear()
        if self._switches is not None:
            self._switches.close()
            self._switches = None

    @contextmanager
    def _control(self, name: str) -> Iterator[Connection]:
        """Give a worker's control socket; an error while it is used ends all workers."""
        if name not in self._controls:
            raise ExecutionError(f"worker '{name}' has ended; start new workers")
        try:
            yield self._controls[name]
        except BlockingIOError:
            self._fail(name, within_s=0.0)  # it took or gave nothing for as long as the socket allows
        except (EOFError, OSError):
            self._fail(name, within_s=1.0)

    def _send(self, name: str, *message: object) -> None:
        with self._control(name) as control:
            control.send(message)

    def _collect(self, names: Sequence[str], *, patience_s: float = PATIENCE_S) -> dict[str, Any]:
        """Return the answers that workers owe. A worker may take as long as it likes while work is done."""
        answers: dict[str, Any] = {}
        owing = {self._controls[name]: name for name in names}
        done, active = self._work_done(owing.values()), time.monotonic()
        while owing:
            ready = wait(list(owing), timeout=0.25)
            for control in [control for control in owing if control in ready]:
                name = owing.pop(control)
                with self._control(name):
                    status, answer = control.recv()
                if status != "ok":
                    self._refuse(name, status, answer)
                answers[name] = answer
                active = time.monotonic()
            now = self._work_done(owing.values())
            if now != done:  # less, where a worker that has answered no longer counts
                done, active = now, time.monotonic()
            if owing and time.monotonic() - active > patience_s:
                silent = ", ".join(f"'{name}'" for name in owing.values())
                self.close()
                raise ExecutionError(f"worker {silent} hangs: no answer and no work done; all workers were ended")
        return answers

    def _refuse(self, name: str, status: str, answer: str) -> NoReturn:
        """End all workers and say why one did not do what it was told."""
        end = time.monotonic() + _DEATH_S
        while (
            status == "lost" and time.monotonic() < end
        ):  # it lost what another one held, which has ended or soon will
            for other, process in self._processes.items():
                if process.poll() is not None:
                    self._fail(other, within_s=0.0)
            time.sleep(0.01)
        self.close()
        if status == "refused":
            raise InputError(f"device '{name}': {answer}")
        raise ExecutionError(f"worker '{name}' failed: {answer}")

    def _work_done(self, names: Any) -> tuple[float, int]:  # noqa: ANN401
        """Return processor time in s, and what emulated links brought: slow ones need hardly any time."""
        time_s, received = 0.0, 0
        for name in list(names):
            pid = self._processes[name].pid
            try:
                times = psutil.Process(pid).cpu_times()
            except psutil.NoSuchProcess:
                continue
            time_s += times.user + times.system
            received += namespaces.received_bytes(pid) if self.emulated else 0
        return time_s, received // _LEAST_BYTES

    def _fail(self, name: str, *, within_s: float) -> NoReturn:
        """End all workers and say what became of one, which may take so long to end by itself."""
        process = self._processes[name]
        try:
            code = process.wait(timeout=within_s)
        except subprocess.TimeoutExpired:
            code = None
        self.close()
        if code is None:
            raise ExecutionError(
                f"worker '{name}' hangs: it takes no command or ends no answer; all workers were ended"
            )
        if code < 0:
            hint = "; signal 9 often means that memory ran out" if code == -9 else ""
            raise ExecutionError(f"worker '{name}' was killed by signal {-code}{hint}; all workers were ended")
        if code == NO_MEMORY:
            raise ExecutionError(f"worker '{name}' ran out of memory; place less on the device; all workers were ended")
        raise ExecutionError(f"worker '{name}' ended with exit code {code}; all workers were ended")


def _timeval(seconds: float) -> bytes:
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))


def check_runnable(cluster: Cluster) -> None:
    """Check that this machine can run all devices of a cluster.

    Raises
    ------
    InputError
        With every address, backend and link that is none of this machine.
    """
    checks: list[Callable[[], object]] = [partial(device_cores, device) for device in cluster.devices]
    checks.append(partial(device_backends, cluster))
    if any(map(is_emulated, cluster.devices)):
        checks.append(partial(namespaces.check_emulated, cluster))
    problems: list[str] = []
    for check in checks:
        try:
            check()
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)


def is_emulated(device: Device) -> bool:
    """Tell whether a device is to run as if it were another machine."""
    return device.address.partition(":")[0] == EMULATED


def shared_cores(cluster: Cluster) -> list[tuple[int, int]]:
    """Return the pairs of devices, by position, that compute on the same core. GPUs compute on none."""
    cores = [set() if on_gpu(device) else set(device_cores(device)) for device in cluster.devices]
    return [(k, j) for k in range(len(cores)) for j in range(len(cores)) if k != j and cores[k] & cores[j]]


def worker_cores(cluster: Cluster) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Return the cores of each device's worker, and the devices whose workers may have to wait for a core.

    The worker of a GPU takes cores that no other device computes on, where there are some.
    """
    cores = {device.name: device_cores(device) for device in cluster.devices}
    gpus = [device.name for device in cluster.devices if on_gpu(device)]
    crowded = {cluster.devices[k].name for k, _ in shared_cores(cluster)}
    computing = {core for name, own in cores.items() if name not in gpus for core in own}
    for name in gpus:
        free = tuple(core for core in cores[name] if core not in computing)
        cores[name] = free or cores[name]
        if len(free) < len(gpus):
            crowded.add(name)
    return cores, crowded


def device_cores(device: Device) -> tuple[int, ...]:
    """Return the cores that a device's address names; those of emulated machines are counted round.

    A GPU's worker may use all that this process may use.

    Raises
    ------
    InputError
        If the address is none of this machine.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    if on_gpu(device):
        return tuple(sorted(allowed))
    kind, _, text = device.address.partition(":")
    first, _, last = text.partition("-")
    where = f"device '{device.name}': address '{device.address}'"
    numbers = [text for text in (first, last) if text] or [""]
    if kind not in ("cpu", EMULATED) or not all(text.isascii() and text.isdecimal() for text in numbers):
        raise InputError(
            f"{where} cannot be measured here; write cpu:FIRST[-LAST], cuda:INDEX for a GPU, or {EMULATED}:FIRST for "
            "an emulated machine"
        )
    cores = range(int(first), int(last or first) + 1)
    usable = sorted(allowed)
    if not cores:
        raise InputError(f"{where} names no core; write {kind}:{last}-{first}")
    if kind == EMULATED:
        return tuple(dict.fromkeys(usable[core % len(usable)] for core in cores[: len(usable)]))
    missing = next((core for core in cores if core not in allowed), None)
    if missing is not None:
        raise InputError(f"{where} names core {missing}; this process may use {', '.join(map(str, usable))}")
    return tuple(cores)
