"""The simulator: a placement played on devices and a network, event by event, on a SimPy clock of integer nanoseconds.

One SimPy event stands for one instant at which something ends, not one process for every operator: the interpreter
then spends its time on the work and not on switching. What is measured is the business of observers.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Literal

import numpy as np
import simpy

from moirai_sim.errors import InputError, InternalError, MoiraiError
from moirai_sim.simulation.disturbances import Disturbances
from moirai_sim.simulation.networks import Network, make_network
from moirai_sim.simulation.options import DEFAULT, SimulationOptions
from moirai_sim.simulation.plan import Plan, make_plan
from moirai_sim.simulation.schedule import Schedule, timeline_from_schedule

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.placement import Placement
    from moirai_sim.problem import PlacementProblem
    from moirai_sim.timeline import Timeline

Record = tuple[int, int, int, int]
"""Job, ready, start and end, ns. Operator i of request r is the job ``r * n + i``, transfer q is ``r * stride + q``."""


class Engine:
    """Runs requests through a plan. Every request runs all operators once.

    Parameters
    ----------
    plan
        What to run; see `Plan` for the numbers of operators and transfers.
    options
        How devices differ from the plain ones.
    on_operator, on_transfer
        Observers, called with a `Record` when an operator starts and when the end of a transfer is known.
    on_done
        Observer, called with (request, time) when the last operator of a request has ended.
    """

    def __init__(
        self,
        plan: Plan,
        options: SimulationOptions = DEFAULT,
        *,
        on_operator: Callable[[Record], None],
        on_transfer: Callable[[Record], None],
        on_done: Callable[[int, int], None] | None = None,
    ) -> None:
        devices = plan.problem.n_devices
        self.plan = plan
        self.options = options
        self.env = simpy.Environment(initial_time=0)
        self.on_operator = on_operator
        self.on_transfer = on_transfer
        self.on_done = on_done
        self.free = [options.streams] * devices
        """[k] streams that could start an operator."""
        self.ready: list[list[int]] = [[] for _ in range(devices)]
        """[k] heaps of operators that wait for their device, by job number."""
        self.touched: list[int] = []
        """Devices that may be able to start an operator in the next round."""
        self._turns: list[list[int]] | None = None
        if plan.strict:
            self._turns = [[] for _ in range(devices)]
            for i in range(len(plan.device) - 1, -1, -1):
                self._turns[plan.device[i]].append(i)
        self.ends: dict[int, list[int]] = {}
        """Instant to what ends then; see `at`."""
        self._ready_ns: dict[int, int] = {}
        self._waiting: dict[int, list[int]] = {}
        """Requests in flight: how many inputs each operator still misses."""
        self._exits: dict[int, int] = {}
        self.revised: dict[int, int | None] = {}
        """Ends that faults moved after observers were told: the job's new end, None where it never ends."""
        self._host_free = [0] * devices
        self.failed: set[int] = set()
        """Devices that have failed."""
        self.network = make_network(self)
        self.shared: Network = getattr(self.network, "behind", self.network)
        """The network itself, where copy engines stand before it."""
        self._arrived = getattr(self.network, "arrived", None)
        self.disturbances: Disturbances | None = None
        if options.disturbed:
            self.disturbances = Disturbances(self)

    def submit(self, request: int, replica: int = 0) -> None:
        """Let a request arrive now. Where several could be served, the one with the smallest number goes first."""
        plan, now = self.plan, self.env.now
        self._waiting[request] = plan.inputs.copy()
        self._exits[request] = plan.exits[replica]
        base = request * len(plan.device)
        self.at(now)
        for i in plan.entries[replica]:
            self._ready_ns[base + i] = now
            heappush(self.ready[plan.device[i]], base + i)
            self.touched.append(plan.device[i])
        if plan.stride > len(plan.edge):
            self._launch(request, replica)

    def _launch(self, request: int, replica: int) -> None:
        """Let the hosts launch the operators of a request, each host one after the other."""
        plan, now, host = self.plan, self.env.now, self._host_free
        size = len(plan.device) // len(plan.exits)
        for i in range(replica * size, (replica + 1) * size):
            k = plan.device[i]
            host[k] = max(host[k], now) + self.options.launch_ns
            self.at(host[k]).append(~(request * plan.stride + len(plan.edge) + i))

    def at(self, when: int) -> list[int]:
        """Return the ends to book at an instant: jobs of operators, and ``~job`` of transfers."""
        ends = self.ends.get(when)
        if ends is None:
            ends = self.ends[when] = []
            self.env.timeout(when - self.env.now).callbacks.append(self._round)
        return ends

    def run(self) -> None:
        """Run until nothing more happens.

        Raises
        ------
        InternalError
            If anything fails on the way; the message says when.
        """
        try:
            self.env.run()
        except MoiraiError:
            raise
        except Exception as error:
            raise InternalError(f"the simulation failed at {self.env.now} ns: {error!r}") from error

    @property
    def link_names(self) -> list[str]:
        """The links that a fault can slow down: those that the network shares."""
        links = getattr(self.shared, "links", None)
        return [] if links is None else list(links.directions)

    def _round(self, _event: simpy.Event) -> None:
        """Book all ends of this instant, start operators on idle devices, queue the transfers of those that ended."""
        plan, now, on_operator = self.plan, self.env.now, self.on_operator
        n, q = len(plan.device), plan.stride
        tells, sends, device, free, ready = plan.tells, plan.sends, plan.device, self.free, self.ready
        duration = plan.duration
        ends, ready_ns, touched, turns = self.ends, self._ready_ns, self.touched, self._turns
        readers, arrived, disturbances = plan.readers, self._arrived, self.disturbances
        transfers: list[int] = []
        job = 0
        try:
            for job in ends.pop(now):
                if job >= 0:
                    request, i = divmod(job, n)
                    k = device[i]
                    free[k] += 1
                    touched.append(k)
                    told, sent = tells[i], sends[i]
                    if sent:
                        base = request * q
                        transfers.extend([base + t for t in sent])
                    elif not told:
                        self._exit(request)
                        continue
                else:
                    request, t = divmod(~job, q)
                    told = readers[t]
                    if arrived is not None:
                        arrived(t)
                if told:
                    waiting = self._waiting[request]
                    base = request * n
                    for i in told:
                        left = waiting[i] - 1
                        waiting[i] = left
                        if not left:
                            i_job, k = base + i, device[i]
                            ready_ns[i_job] = now
                            heappush(ready[k], i_job)
                            touched.append(k)
            for k in touched:
                heap = ready[k]
                while heap and free[k] > 0:
                    job = heap[0]
                    if turns is not None:
                        if turns[k][-1] != job:
                            break
                        turns[k].pop()
                    heappop(heap)
                    free[k] -= 1
                    when = now + duration[job % n]
                    if disturbances is not None:
                        when = now + disturbances.duration(job % n)
                    on_operator((job, ready_ns.pop(job), now, when))
                    if when in ends:
                        ends[when].append(job)
                    else:
                        self.at(when).append(job)
            touched.clear()
            if transfers:
                job = ~transfers[0]
                transfers.sort()
                if self.failed and not plan.strict:  # nobody sends to a device that has failed; orders are kept
                    transfers = [job for job in transfers if plan.target[job % q] not in self.failed]
            if transfers or arrived is not None:
                self.network.queue(now, transfers)
        except MoiraiError:
            raise
        except Exception as error:
            raise InternalError(f"the simulation failed at {now} ns, {self.describe(job)}: {error!r}") from error

    def revise(self, change: Callable[[int, int], int | None]) -> list[int]:
        """Move or cancel what is in progress.

        Parameters
        ----------
        change
            Called with (end, ns; job of an operator or ``~job`` of a transfer); returns the new end, None to cancel.

        Returns
        -------
        The jobs cancelled.
        """
        changed = [
            (job, new) for when in sorted(self.ends) for job in self.ends[when] if (new := change(when, job)) != when
        ]
        self.revised.update(changed)
        moving = {job for job, _ in changed}
        for booked in self.ends.values():
            booked[:] = [job for job in booked if job not in moving]
        for job, new in changed:
            if new is not None:
                self.at(new).append(job)
        return [job for job, new in changed if new is None]

    def _exit(self, request: int) -> None:
        self._exits[request] -= 1
        if not self._exits[request]:
            del self._exits[request], self._waiting[request]
            if self.on_done is not None:
                self.on_done(request, self.env.now)

    def describe(self, job: int) -> str:
        """Name the operator or transfer of a job, and where it runs."""
        plan, problem = self.plan, self.plan.problem
        if job >= 0:
            i = job % len(plan.device)
            return f"operator '{problem.operators[plan.operator[i]]}' on device '{problem.devices[plan.device[i]]}'"
        t = ~job % plan.stride
        if t >= len(plan.edge):
            return f"launch of {self.describe(t - len(plan.edge))}"
        producer, consumer = problem.edges[plan.edge[t]].tolist()
        return (
            f"transfer '{problem.operators[producer]}->{problem.operators[consumer]}' from device "
            f"'{problem.devices[plan.source[t]]}' to '{problem.devices[plan.target[t]]}'"
        )


def simulate(
    problem: PlacementProblem,
    placement: Placement,
    *,
    engine: Literal["simpy", "replay"] = "simpy",
    options: SimulationOptions = DEFAULT,
    policy: str = "",
) -> Timeline:
    """Return the timeline of one request; where placements take turns, of one request by each.

    Parameters
    ----------
    engine
        ``replay`` is the compiled one: the same answer to the nanosecond, for the networks without fair sharing and
        for the default options.
    options
        Device models.
    policy
        What the timeline says about where the placement came from.

    Raises
    ------
    InputError
        If the placement cannot run, its orders contradict the edges, or the engine does not know the network.
    """
    schedule = simulate_schedule(problem, placement, engine=engine, options=options)
    timeline = timeline_from_schedule(problem, placement, schedule, policy=policy)
    replicas = [simulate(problem, one, engine=engine, options=options, policy=policy) for one in placement.replicas]
    return replace(timeline, replicas=tuple(replicas)) if replicas else timeline


def simulate_schedule(
    problem: PlacementProblem,
    placement: Placement,
    *,
    engine: Literal["simpy", "replay"] = "simpy",
    options: SimulationOptions = DEFAULT,
) -> Schedule:
    """Return the times of one request as arrays; see `simulate`."""
    if engine == "replay":
        from moirai_sim.simulation.replay import replay

        if options != DEFAULT:
            raise InputError("the engine 'replay' knows plain devices only; use the engine 'simpy' with these options")
        return replay(problem, placement)
    with uncollected():
        plan = make_plan(problem, placement, options=options)
    operators, transfers = records(plan, options)
    left = problem.n_operators - len(operators)
    if left and options.faults:
        ran = np.zeros(problem.n_operators, dtype=bool)
        ran[plan.operator[operators[:, 0]]] = True
        names = [problem.operators[i] for i in np.flatnonzero(~ran)[:8].tolist()] + ["..."] * (left > 8)
        raise InputError(
            f"the request is never done: the faults keep {left} of {problem.n_operators} operators from ending "
            f"({', '.join(names)}); place them elsewhere, or see simulation.faults.losses"
        )
    if left:
        raise InputError(
            f"placement: its orders contradict each other or the edges ({left} of {problem.n_operators} operators can "
            "never start); give orders that follow the edges, or none"
        )
    operator_times = np.empty((problem.n_operators, 3), dtype=np.int64)
    operator_times[plan.operator[operators[:, 0]]] = operators[:, 1:]
    transfer_times = np.full((len(problem.edges), 3), -1, dtype=np.int64)
    transfer_times[plan.edge[transfers[:, 0]]] = transfers[:, 1:]
    return Schedule(*operator_times.T, *transfer_times.T)


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep the cycle collector from walking, again and again, over many new objects that form no cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def records(plan: Plan, options: SimulationOptions = DEFAULT) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Run one request; return a `Record` [?, 4] for every operator and every transfer that came to its end."""
    operators: list[Record] = []
    transfers: list[Record] = []
    run = Engine(plan, options, on_operator=operators.append, on_transfer=transfers.append)
    run.submit(0)
    with uncollected():
        run.run()
    if run.revised:
        ends = run.revised
        operators = [(*r[:3], end) for r in operators if (end := ends.get(r[0], r[3])) is not None]
        transfers = [(*r[:3], end) for r in transfers if (end := ends.get(~r[0], r[3])) is not None]
    return tuple(np.array(found, dtype=np.int64).reshape(-1, 4) for found in (operators, transfers))  # type: ignore[return-value]
