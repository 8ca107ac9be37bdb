"""Network ``fair``: transfers in flight share the links of their routes max-min fairly.

Forwarding is cut-through: a tensor occupies all links of its route at once, at one rate, and is there one route latency
after its last byte has left. Alone on the network it takes exactly the time that the problem gives it, so a calibrated
time above the data sheet's is a limit of the flow's own rate. A full-duplex link is one resource a direction, a
half-duplex link one for both; a host bus that devices share is a link of their routes like any other.

With the option ``in_order`` the tensors of a pair of devices stand in line, as over one connection. What a tensor takes
beyond its bytes at the bandwidth of its route then holds up nobody: it is the way there, which many go at once.
"""

from __future__ import annotations

from collections import deque
from math import ceil
from typing import TYPE_CHECKING

import numpy as np
import simpy

from moirai_sim.clusters.routes import Links
from moirai_sim.errors import InputError
from moirai_sim.simulation.calls import FIRST, LAST, Call
from moirai_sim.simulation.fairness import NEVER, change, grown, new_flows

if TYPE_CHECKING:
    from moirai_sim.simulation.engine import Engine

_NONE = np.zeros(0, dtype=np.int64)


class Fair:
    """Max-min fair sharing over the links of the problem's cluster."""

    def __init__(self, engine: Engine) -> None:
        problem = engine.plan.problem
        if problem.cluster is None:
            raise InputError(
                f"{problem.name}: the network 'fair' shares links, but the problem has no cluster; "
                "give --cluster, or choose the network 'one-port'"
            )
        if (problem.tensor_bytes < 0).any():
            raise InputError(f"{problem.name}: the network 'fair' needs the bytes of every tensor; use 'one-port'")
        self._engine = engine
        self.links = Links(problem.cluster)
        plan = engine.plan
        pairs = sorted(set(zip(plan.source, plan.target, strict=True)))
        self._routes = {(s, t): self.links.between(problem.devices[s], problem.devices[t]) for s, t in pairs if s != t}
        self._lines: dict[tuple[int, int], deque[tuple[int, int]]] = {}
        """In order: by pair of devices that send, (job, ready) of the transfers that wait."""
        self._bytes = problem.tensor_bytes[problem.edge_tensor[plan.edge]].tolist()
        hops = max((len(links) for links, _ in self._routes.values()), default=1)
        self.flows = new_flows(self.links.capacity, 256, hops)
        self._free = list(range(255, -1, -1))
        self._carries: dict[int, tuple[int, int, int, int]] = {}
        """Slot to (job, ready, start, latency)."""
        self._begun: list[int] = []
        self._ended: list[int] = []
        self._altered: list[int] = []
        self._settling = False
        self._next = NEVER

    def queue(self, now: int, transfers: list[int]) -> None:
        """Start a flow for each transfer."""
        plan, in_order = self._engine.plan, self._engine.options.in_order
        for job in transfers:
            pair = plan.source[job % plan.stride], plan.target[job % plan.stride]
            if in_order and pair in self._lines:
                self._lines[pair].append((job, now))
            elif self._begin(job, now, now) and in_order:
                self._lines[pair] = deque()
        if self._begun:
            self._settle_later()

    def _begin(self, job: int, ready: int, now: int) -> bool:
        """Start the flow of a transfer; False for one that has none, since its time is all latency."""
        plan = self._engine.plan
        t = job % plan.stride
        links, latency = self._routes[plan.source[t], plan.target[t]]
        if plan.transfer[t] <= latency or self._bytes[t] == 0:
            end = now + plan.transfer[t]
            self._engine.at(end).append(~job)
            self._engine.on_transfer((job, ready, now, end))
            return False
        work = plan.transfer[t] - latency
        if self._engine.options.in_order:
            sent = min(work, max(1, ceil(self._bytes[t] / min(self.links.capacity[link] for link in links))))
            work, latency = sent, latency + work - sent
        if not self._free:
            slots = len(self.flows.rate)
            self.flows = grown(self.flows)
            self._free.extend(range(2 * slots - 1, slots - 1, -1))
        slot = self._free.pop()
        self._carries[slot] = (job, ready, now, latency)
        flows = self.flows
        flows.route[slot] = -1
        flows.route[slot, : len(links)] = links
        flows.limit[slot] = self._bytes[t] / work
        flows.left[slot] = work
        self._begun.append(slot)
        return True

    def set_capacity(self, name: str, factor: float) -> None:
        """Let a link carry ``factor`` times its bandwidth from now on; 0 stops all its transfers."""
        for link in self.links.directions[name]:
            self.flows.capacity[link] = self.links.capacity[link] * factor
            self._altered.append(link)
        self._settle_later()

    def drop(self, device: int) -> list[int]:
        """End all flows from and to a device that failed, without a delivery; return ``~job`` of each."""
        plan = self._engine.plan
        lost = []
        for pair in [pair for pair in self._lines if device in pair]:
            lost += [~job for job, _ in self._lines.pop(pair)]
        for slot, (job, *_) in list(self._carries.items()):
            if device in (plan.source[job % plan.stride], plan.target[job % plan.stride]):
                del self._carries[slot]
                if slot in self._begun:
                    self._begun.remove(slot)
                    self._free.append(slot)
                else:
                    self._ended.append(slot)
                lost.append(~job)
        self._settle_later()
        return lost

    def _next_in_line(self, job: int, now: int) -> None:
        """Let the transfer begin that waited for this one."""
        t = job % self._engine.plan.stride
        pair = self._engine.plan.source[t], self._engine.plan.target[t]
        line = self._lines.get(pair)
        while line:
            if self._begin(*line.popleft(), now):
                return
        self._lines.pop(pair, None)

    def _settle_later(self) -> None:
        """Ask for new rates once all of this instant is known."""
        if not self._settling:
            self._settling = True
            Call(self._engine.env, 0, LAST, self._settle)

    def _settle(self, _event: simpy.Event) -> None:
        self._settling = False
        env = self._engine.env
        ended, begun, altered = (
            np.array(slots, dtype=np.int64) if slots else _NONE for slots in (self._ended, self._begun, self._altered)
        )
        soonest = int(change(self.flows, env.now, ended, begun, altered))  # type: ignore[no-untyped-call]
        self._free.extend(self._ended)
        self._ended, self._begun, self._altered = [], [], []
        if soonest != self._next and soonest != NEVER:
            Call(env, soonest - env.now, FIRST, self._wake)
        self._next = soonest

    def _wake(self, _event: simpy.Event) -> None:
        """End the flows that finish now; a wake-up that other flows have made void does nothing."""
        engine, now = self._engine, self._engine.env.now
        if now != self._next:
            return
        self._next = NEVER
        for slot in np.flatnonzero(self.flows.finish <= now).tolist():
            if slot not in self._carries:
                continue  # its device failed at this very instant
            job, ready, start, latency = self._carries.pop(slot)
            engine.at(now + latency).append(~job)
            engine.on_transfer((job, ready, start, now + latency))
            self._ended.append(slot)
            self._next_in_line(job, now)
        self._settle_later()
