"""Network ``fair``: transfers in flight share the links of their routes max-min fairly.

Forwarding is cut-through: a tensor occupies all links of its route at once, at one rate, and is there one route latency
after its last byte has left. Alone on the network it takes exactly the time that the problem gives it, so a calibrated
time above the data sheet's is a limit of the flow's own rate. A full-duplex link is one resource a direction, a
half-duplex link one for both; a host bus that devices share is a link of their routes like any other.
"""

from __future__ import annotations

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
        self._bytes = problem.tensor_bytes[problem.edge_tensor[plan.edge]].tolist()
        hops = max((len(links) for links, _ in self._routes.values()), default=1)
        self.flows = new_flows(self.links.capacity, 256, hops)
        self._free = list(range(255, -1, -1))
        self._carries: dict[int, tuple[int, int, int]] = {}
        """Slot to (job, start, latency)."""
        self._begun: list[int] = []
        self._ended: list[int] = []
        self._altered: list[int] = []
        self._settling = False
        self._next = NEVER

    def queue(self, now: int, transfers: list[int]) -> None:
        """Start a flow for each transfer."""
        engine, plan = self._engine, self._engine.plan
        for job in transfers:
            t = job % plan.stride
            links, latency = self._routes[plan.source[t], plan.target[t]]
            work = plan.transfer[t] - latency
            if work <= 0 or self._bytes[t] == 0:
                end = now + plan.transfer[t]
                engine.at(end).append(~job)
                engine.on_transfer((job, now, now, end))
                continue
            if not self._free:
                slots = len(self.flows.rate)
                self.flows = grown(self.flows)
                self._free.extend(range(2 * slots - 1, slots - 1, -1))
            slot = self._free.pop()
            self._carries[slot] = (job, now, latency)
            flows = self.flows
            flows.route[slot] = -1
            flows.route[slot, : len(links)] = links
            flows.limit[slot] = self._bytes[t] / work
            flows.left[slot] = work
            self._begun.append(slot)
        if self._begun:
            self._settle_later()

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
        for slot, (job, _, _) in list(self._carries.items()):
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
            job, start, latency = self._carries.pop(slot)
            engine.at(now + latency).append(~job)
            engine.on_transfer((job, start, start, now + latency))
            self._ended.append(slot)
        self._settle_later()
