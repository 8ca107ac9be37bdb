"""Streams of requests through one or several copies of a placement: latencies, throughput, and who is busy.

Requests come open (at given times, whatever happens), or closed (a number of clients, each of which sends its next
request when the last one is answered). Micro-batches are requests that all come at once: they fill a pipeline of
devices and drain it. A request that came earlier goes first wherever it meets a later one; in the order of a placement,
if it has one, the operators of a request take precedence, but a device does not wait for one that is not ready.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moirai_sim.errors import InputError
from moirai_sim.simulation.calls import FIRST, Call
from moirai_sim.simulation.engine import Engine, Record
from moirai_sim.simulation.options import DEFAULT, SimulationOptions
from moirai_sim.simulation.plan import join_plans, make_plan

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.placement import Placement
    from moirai_sim.problem import PlacementProblem

Router = Literal["round-robin", "least-busy"]


@dataclass(frozen=True, eq=False)
class Service:
    """What a stream of requests experienced; of a measured one the requests alone are known."""

    arrival_ns: NDArray[np.int64]
    """[r] in order of arrival."""
    done_ns: NDArray[np.int64]
    """[r]; -1 for a request that a fault left unanswered."""
    warm_up: int
    """Requests at the start that the figures leave out."""
    device_busy: dict[str, float] = field(default_factory=dict)
    """Share of the time that a device computes (mean number of operators at once, with several streams)."""
    device_queue: dict[str, float] = field(default_factory=dict)
    """Mean number of operators that are ready and wait for the device."""
    port_busy: dict[str, float] = field(default_factory=dict)
    """Share of the time that transfers leave (``send NAME``) or reach (``receive NAME``) a device."""
    transfer_queue: dict[str, float] = field(default_factory=dict)
    """Mean number of tensors that wait for a port, by ``source->target``."""
    link_busy: dict[str, float] = field(default_factory=dict)
    """Bytes carried as a share of what the link could carry in its busier direction; of clusters."""

    @property
    def latency_ns(self) -> NDArray[np.int64]:
        """Time from arrival to answer, of the answered requests after warm-up."""
        answered = self.done_ns[self.warm_up :] >= 0
        latency = (self.done_ns - self.arrival_ns)[self.warm_up :][answered]
        return np.asarray(latency, dtype=np.int64)

    @property
    def mean_ns(self) -> float:
        """Mean latency."""
        return float(self.latency_ns.mean()) if self.latency_ns.size else float("nan")

    def percentile_ns(self, share: float) -> float:
        """Return the latency that ``share`` per cent of the requests do not exceed."""
        return float(np.percentile(self.latency_ns, share)) if self.latency_ns.size else float("nan")

    @property
    def throughput_per_s(self) -> float:
        """Requests answered after warm-up, by the time from the last answer within it to the very last one."""
        answers = np.sort(self.done_ns[self.done_ns >= 0])
        counted = len(answers) - self.warm_up
        if counted <= 0:  # faults left fewer answers than the warm-up takes
            return float("nan")
        lasted = int(answers[-1]) - int(answers[self.warm_up - 1] if self.warm_up else self.arrival_ns[0])
        return counted * 1e9 / lasted if lasted else float("nan")

    def to_json(self) -> dict[str, object]:
        """Return figures, utilisation and queues as a document."""
        return {
            "figures": self.figures(),
            "requests": len(self.arrival_ns),
            "unanswered": int((self.done_ns < 0).sum()),
            "device_busy": self.device_busy,
            "device_queue": self.device_queue,
            "port_busy": self.port_busy,
            "transfer_queue": self.transfer_queue,
            "link_busy": self.link_busy,
        }

    def figures(self) -> dict[str, float]:
        """Return the headline figures by name, times in ns."""
        return {
            "mean_ns": self.mean_ns,
            "p50_ns": self.percentile_ns(50),
            "p95_ns": self.percentile_ns(95),
            "p99_ns": self.percentile_ns(99),
            "throughput_per_s": self.throughput_per_s,
        }


@dataclass(frozen=True)
class Estimate:
    """Mean over independent runs, with the half width of its 95 % confidence interval."""

    mean: float
    half_width: float

    def covers(self, value: float) -> bool:
        """Return whether the interval holds ``value``."""
        return abs(value - self.mean) <= self.half_width


def poisson(rate_per_s: float, requests: int, seed: int = 0) -> NDArray[np.int64]:
    """Return arrival times [requests] with exponential gaps, ns."""
    _positive("rate_per_s", rate_per_s)
    gaps = np.random.default_rng([seed, 1]).exponential(1e9 / rate_per_s, requests)
    return _whole_ns(np.cumsum(gaps))


def periodic(rate_per_s: float, requests: int) -> NDArray[np.int64]:
    """Return evenly spaced arrival times [requests] from 0 on, ns."""
    _positive("rate_per_s", rate_per_s)
    return _whole_ns(np.arange(requests) * (1e9 / rate_per_s))


def at_once(requests: int) -> NDArray[np.int64]:
    """Return arrival times for micro-batches: all at 0."""
    return np.zeros(requests, dtype=np.int64)


def read_arrivals(path: Path) -> NDArray[np.int64]:
    """Read arrival times in seconds, one a line in ascending order; lines that begin with # are remarks.

    Raises
    ------
    InputError
        If the file cannot be read, holds no time, or a line is no time or earlier than the one before.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read it ({error})") from error
    times: list[int] = []
    problems = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            ns = int(np.int64(round(float(line) * 1e9)))  # which does not hold milliseconds since 1970
        except (ValueError, OverflowError):
            problems.append(f"{path}:{number}: read '{line}'; give a time in seconds")
            continue
        if ns < (times[-1] if times else 0):
            problems.append(f"{path}:{number}: read '{line}', earlier than the line before; sort the times")
        times.append(ns)
    if not times and not problems:
        problems.append(f"{path}: holds no arrival; give a time in seconds a line")
    if problems:
        raise InputError(problems)
    return np.array(times, dtype=np.int64)


def serve(
    problem: PlacementProblem,
    placements: Placement | Sequence[Placement],
    *,
    arrivals: NDArray[np.int64] | None = None,
    in_flight: int | None = None,
    requests: int | None = None,
    router: Router = "round-robin",
    warm_up: float = 0.1,
    options: SimulationOptions = DEFAULT,
) -> Service:
    """Run a stream of requests.

    Parameters
    ----------
    placements
        One, or a replica each; replicas may share devices. A placement with `Placement.replicas` stands for its cycle.
    arrivals
        Open stream: times in ascending order, ns; see `poisson`, `periodic`, `at_once`, `read_arrivals`.
    in_flight, requests
        Closed stream: so many clients, and so many requests in all.
    router
        Which replica gets a request: each in turn, or the one with the fewest requests in flight.
    warm_up
        Share of the requests, from the first on, that the figures leave out.

    Raises
    ------
    InputError
        If neither or both kinds of stream are asked for, or a number is out of range.
    """
    given = placements if isinstance(placements, Sequence) else [placements]
    replicas = [replica for placement in given for replica in placement.cycle]
    if (arrivals is None) == (in_flight is None):
        raise InputError("stream: give either arrivals (open) or in_flight and requests (closed)")
    if in_flight is not None:
        _positive("in_flight", in_flight)
        _positive("requests", requests or 0)
    if not 0 <= warm_up < 1:
        raise InputError(f"warm_up: read {warm_up}; give a share of at least 0 and below 1")
    if router not in ("round-robin", "least-busy"):
        raise InputError(f"router: read '{router}'; known: round-robin, least-busy")
    if not replicas or (arrivals is not None and (len(arrivals) == 0 or (np.diff(arrivals) < 0).any())):
        raise InputError("stream: give at least one placement and one arrival, arrivals in ascending order")
    total = len(arrivals) if arrivals is not None else int(requests or 0)
    stream = _Stream(problem, replicas, total, int(total * warm_up), router, options)
    if arrivals is not None:
        stream.open(arrivals.tolist())
    else:
        stream.closed(int(in_flight or 0))
    return stream.result()


def estimate(services: Sequence[Service], figure: str) -> Estimate:
    """Return a figure of `Service.figures` over independent runs, with its interval (Student's t)."""
    from scipy import stats

    values = np.array([service.figures()[figure] for service in services])
    if len(values) < 2:
        raise InputError(f"estimate: an interval needs at least 2 runs, got {len(values)}")
    error = float(values.std(ddof=1)) / len(values) ** 0.5
    return Estimate(float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1)) * error)


def serve_seeds(
    problem: PlacementProblem,
    placements: Placement | Sequence[Placement],
    *,
    rate_per_s: float,
    requests: int,
    seeds: Sequence[int],
    options: SimulationOptions = DEFAULT,
    router: Router = "round-robin",
    warm_up: float = 0.1,
) -> list[Service]:
    """Run a Poisson stream once for each seed, which drives arrivals and operator times alike."""
    return [
        serve(
            problem,
            placements,
            arrivals=poisson(rate_per_s, requests, seed),
            router=router,
            warm_up=warm_up,
            options=replace(options, seed=seed),
        )
        for seed in seeds
    ]


class _Stream:
    """Feeds requests to an engine and watches it."""

    def __init__(
        self,
        problem: PlacementProblem,
        replicas: Sequence[Placement],
        total: int,
        warm_up: int,
        router: Router,
        options: SimulationOptions,
    ) -> None:
        self.problem = problem
        self.plan = join_plans([make_plan(problem, p, strict=False, options=options) for p in replicas])
        self.engine = Engine(
            self.plan, options, on_operator=self._operator, on_transfer=self._transfer, on_done=self._done
        )
        self.arrival = np.zeros(total, dtype=np.int64)
        self.done = np.full(total, -1, dtype=np.int64)
        self.warm_up = warm_up
        self._router = router
        self._load = [0] * len(replicas)
        self._replica: dict[int, int] = {}
        self._submitted = 0
        self._counting = warm_up == 0
        self._begin = 0
        self._answered = 0
        k = problem.n_devices
        self._busy, self._queue = [0] * k, [0] * k
        self._pairs: dict[tuple[int, int], list[int]] = {}
        """(source, target) to [busy ns, waiting ns, bytes]."""
        self._bytes = problem.tensor_bytes[problem.edge_tensor[self.plan.edge]].tolist() if len(self.plan.edge) else []

    def open(self, arrivals: list[int]) -> None:
        """Let requests arrive at given times, one event after the other."""

        def arrive(_event: object) -> None:
            now = self.engine.env.now
            while self._submitted < len(arrivals) and arrivals[self._submitted] == now:
                self._submit()
            if self._submitted < len(arrivals):
                Call(self.engine.env, arrivals[self._submitted] - now, FIRST, arrive)

        if self._counting:  # no warm-up: from the first arrival on
            self._begin = arrivals[0]
        Call(self.engine.env, arrivals[0], FIRST, arrive)
        self.engine.run()

    def closed(self, clients: int) -> None:
        """Keep ``clients`` requests in flight."""
        self._clients = True
        for _ in range(min(clients, len(self.arrival))):
            self._submit()
        self.engine.run()

    _clients = False

    def _submit(self) -> None:
        request = self._submitted
        self._submitted += 1
        replica = request % len(self._load)
        if self._router == "least-busy":
            replica = min(range(len(self._load)), key=self._load.__getitem__)
        self._load[replica] += 1
        self._replica[request] = replica
        self.arrival[request] = self.engine.env.now
        self.engine.submit(request, replica)

    def _done(self, request: int, now: int) -> None:
        self.done[request] = now
        self._load[self._replica.pop(request)] -= 1
        self._answered += 1
        if not self._counting and self._answered >= self.warm_up:
            self._counting, self._begin = True, now
        if self._clients and self._submitted < len(self.arrival):
            self._submit()

    def _operator(self, record: Record) -> None:
        if self._counting:
            job, ready, start, end = record
            k = self.plan.device[job % len(self.plan.device)]
            self._busy[k] += end - start
            self._queue[k] += start - ready

    def _transfer(self, record: Record) -> None:
        if self._counting:
            job, ready, start, end = record
            t = job % self.plan.stride
            pair = self._pairs.setdefault((self.plan.source[t], self.plan.target[t]), [0, 0, 0])
            pair[0] += end - start
            pair[1] += start - ready
            pair[2] += max(0, self._bytes[t])

    def result(self) -> Service:
        """Return what was seen; shares are of the time from the end of warm-up to the last answer."""
        problem = self.problem
        lasted = float(int(self.done.max(initial=-1)) - self._begin)
        if lasted <= 0:  # no answer after warm-up: there is no time to take shares of
            lasted = float("nan")
        ports: dict[str, float] = {}
        links: dict[tuple[str, int], float] = {}
        shared = None
        if problem.cluster is not None:
            from moirai_sim.clusters.routes import Links

            shared = Links(problem.cluster)
        for (s, t), (busy, _, size) in sorted(self._pairs.items()):
            for port in (f"send {problem.devices[s]}", f"receive {problem.devices[t]}"):
                ports[port] = ports.get(port, 0.0) + busy / lasted
            if shared is None:
                continue
            for number in shared.between(problem.devices[s], problem.devices[t])[0]:
                link = shared.names[number], number
                links[link] = links.get(link, 0.0) + size / lasted / shared.capacity[number]
        busiest: dict[str, float] = {}
        for (name, _), share in links.items():
            busiest[name] = max(share, busiest.get(name, share))
        return Service(
            arrival_ns=self.arrival,
            done_ns=self.done,
            warm_up=self.warm_up,
            device_busy=dict(zip(problem.devices, (b / lasted for b in self._busy), strict=True)),
            device_queue=dict(zip(problem.devices, (q / lasted for q in self._queue), strict=True)),
            port_busy=ports,
            transfer_queue={
                f"{problem.devices[s]}->{problem.devices[t]}": pair[1] / lasted
                for (s, t), pair in sorted(self._pairs.items())
            },
            link_busy=dict(sorted(busiest.items())),
        )


def _whole_ns(arrivals: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    if arrivals.max(initial=0.0) >= 2.0**62:
        raise InputError("rate_per_s: the last request would arrive after more than a century; give a larger rate")
    return np.asarray(np.rint(arrivals), dtype=np.int64)


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise InputError(f"{name}: read {value}; give a number above 0")
