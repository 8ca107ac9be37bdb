"""Networks: when a transfer starts and ends. One class a network model; `make_network` chooses."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moirai_sim.simulation.engine import Engine


class Network(Protocol):
    """Takes transfers and books their ends with the engine."""

    def queue(self, now: int, transfers: list[int]) -> None:
        """Take the transfers (jobs, in the order in which they are to be served) that became ready ``now``."""


class Unlimited:
    """Transfers never wait (``none``)."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def queue(self, now: int, transfers: list[int]) -> None:
        """Start every transfer at once."""
        engine, plan = self._engine, self._engine.plan
        for job in transfers:
            end = now + plan.transfer[job % plan.stride]
            engine.at(end).append(~job)
            engine.on_transfer((job, now, now, end))


class Ports:
    """A transfer holds a port of both devices for its whole time, first come, first served.

    ``one-port`` gives a device a port to send and one to receive; ``half-duplex`` one port for both.
    """

    def __init__(self, engine: Engine, *, duplex: bool) -> None:
        self._engine = engine
        devices = engine.plan.problem.n_devices
        self._send = [0] * devices
        """[k] when the port has served all that was queued."""
        self._receive = [0] * devices if duplex else self._send

    def queue(self, now: int, transfers: list[int]) -> None:
        """Settle start and end of each transfer: nothing overtakes, so later ones change nothing."""
        engine, plan = self._engine, self._engine.plan
        source, target, lasts, m = plan.source, plan.target, plan.transfer, plan.stride
        send, receive, ends, on_transfer = self._send, self._receive, engine.ends, engine.on_transfer
        for job in transfers:
            t = job % m
            s, d = source[t], target[t]
            start = send[s] if send[s] > receive[d] else receive[d]
            if start < now:
                start = now
            end = send[s] = receive[d] = start + lasts[t]
            if end in ends:
                ends[end].append(~job)
            else:
                engine.at(end).append(~job)
            on_transfer((job, now, start, end))


class OrderedPorts:
    """Ports that serve their transfers strictly in the order of their numbers, and wait for one that is not ready."""

    def __init__(self, engine: Engine, *, duplex: bool) -> None:
        self._engine = engine
        plan, devices = engine.plan, engine.plan.problem.n_devices
        self._send: list[list[int]] = [[] for _ in range(devices)]
        """[k] transfers that the port has yet to serve, the next one last."""
        self._receive: list[list[int]] = [[] for _ in range(devices)] if duplex else self._send
        self._send_free = [0] * devices
        self._receive_free = [0] * devices if duplex else self._send_free
        self._ready: dict[int, int] = {}
        for t in range(len(plan.edge) - 1, -1, -1):
            self._send[plan.source[t]].append(t)
            self._receive[plan.target[t]].append(t)

    def queue(self, now: int, transfers: list[int]) -> None:
        """Settle every transfer that has its turn at both ports, which may give others theirs."""
        engine, plan = self._engine, self._engine.plan
        send, receive, ready = self._send, self._receive, self._ready
        for t in transfers:
            ready[t] = now
        todo = transfers[::-1]
        while todo:
            t = todo.pop()
            s, d = plan.source[t], plan.target[t]
            if t not in ready or send[s][-1] != t or receive[d][-1] != t:
                continue
            send[s].pop()
            receive[d].pop()
            start = max(now, self._send_free[s], self._receive_free[d])
            end = self._send_free[s] = self._receive_free[d] = start + plan.transfer[t]
            engine.at(end).append(~t)
            engine.on_transfer((t, ready.pop(t), start, end))
            todo.extend(queue[-1] for queue in (send[s], receive[d]) if queue)


class CopyEngines:
    """Lets a transfer through when it is the next one at both devices and both have a copy engine free.

    A device without copy engines sends and receives itself: a transfer that waits for it keeps it from starting
    operators, and has it to itself until the end.
    """

    def __init__(self, engine: Engine, behind: Network, engines: int) -> None:
        self._engine = engine
        self.behind = behind
        self._blocks = engines == 0
        devices = engine.plan.problem.n_devices
        self._idle = [max(1, engines)] * devices
        self._queue: list[deque[int]] = [deque() for _ in range(devices)]
        """[k] transfers that wait."""
        self._holding = [0] * devices
        """[k] transfers that keep the device from computing: those that wait and the one under way."""
        self._changed = set(range(devices))
        """Devices that may be able to let a transfer through."""

    def fail(self, lost: Sequence[int]) -> None:
        """Note that a device has failed, with the transfers under way that it takes along; those that wait go, too."""
        for t in lost:
            self.arrived(t)
        waiting = {job for queue in self._queue for job in queue if not self._can_go(job)}
        for end, queue in enumerate(self._queue):
            self._queue[end] = deque(job for job in queue if job not in waiting)
        for job in waiting:
            self._let_go(job % self._engine.plan.stride)
        self._changed = set(range(len(self._queue)))

    def _can_go(self, job: int) -> bool:
        """Tell whether both devices of a transfer still work."""
        plan, failed = self._engine.plan, self._engine.failed
        t = job % plan.stride
        return plan.source[t] not in failed and plan.target[t] not in failed

    def arrived(self, t: int) -> None:
        """Note the end of a transfer; launches of operators have larger numbers and are none."""
        plan = self._engine.plan
        if t >= len(plan.edge):
            return
        for k in (plan.source[t], plan.target[t]):
            self._idle[k] += 1
            self._changed.add(k)
        self._let_go(t)

    def _let_go(self, t: int) -> None:
        """Let both devices of a transfer compute again, if it kept them from it."""
        engine, plan = self._engine, self._engine.plan
        for k in (plan.source[t], plan.target[t]) if self._blocks else ():
            self._holding[k] -= 1
            engine.free[k] += engine.options.streams
            engine.touched.append(k)

    def queue(self, now: int, transfers: list[int]) -> None:
        """Let the new transfers wait, then let through all that can go."""
        engine, plan = self._engine, self._engine.plan
        for job in transfers:
            t = job % plan.stride
            for k in (plan.source[t], plan.target[t]):
                self._queue[k].append(job)
                self._changed.add(k)
                if self._blocks:
                    self._holding[k] += 1
                    engine.free[k] -= engine.options.streams
        go = []
        # Without an engine of its own a device lets through what waits once it stops computing, too.
        todo = list(range(len(self._queue))) if self._blocks else list(self._changed)
        self._changed.clear()
        while todo:
            k = todo.pop()
            while self._queue[k]:
                job = self._queue[k][0]
                s, d = plan.source[job % plan.stride], plan.target[job % plan.stride]
                if self._queue[s][0] != job or self._queue[d][0] != job or not (self._free(s) and self._free(d)):
                    break
                self._idle[s] -= 1
                self._idle[d] -= 1
                self._queue[s].popleft()
                self._queue[d].popleft()
                go.append(job)
                todo.append(d if k == s else s)  # with an engine left it may let its next one through
        if go:
            self.behind.queue(now, sorted(go))

    def _free(self, k: int) -> bool:
        if not self._idle[k]:
            return False
        streams = self._engine.options.streams
        return not self._blocks or self._engine.free[k] + self._holding[k] * streams == streams


def make_network(engine: Engine) -> Network:
    """Return the network of the engine's problem, behind the copy engines of its devices."""
    network, engines = engine.plan.problem.network, engine.options.copy_engines
    if network in ("one-port", "half-duplex") and engines != 0:
        ports = OrderedPorts if engine.plan.strict else Ports
        return ports(engine, duplex=network == "one-port" and engines != 1)
    if network == "fair":
        from moirai_sim.simulation.fair import Fair

        behind: Network = Fair(engine)
    else:
        behind = Unlimited(engine)
    return behind if engines is None else CopyEngines(engine, behind, engines)
