"""Measure what a placement really takes: the same nouns in, the same `Timeline` out as the simulator."""

from __future__ import annotations

import platform
import time
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from moirai_sim.errors import ExecutionError, InputError
from moirai_sim.execution.backends import ONNXRUNTIME
from moirai_sim.execution.split import Executed, Part, execute_as, part_model, share_places, split
from moirai_sim.execution.weights import with_random_weights
from moirai_sim.execution.worker import SLOW, Assignment, Job, Record
from moirai_sim.execution.workers import Workers
from moirai_sim.graphs.load import load_model
from moirai_sim.profiling.backends.onnxruntime import random_array
from moirai_sim.profiling.telemetry import versions
from moirai_sim.simulation.engine import simulate_schedule
from moirai_sim.simulation.schedule import placement_from_schedule
from moirai_sim.timeline import Span, Timeline

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from moirai_sim.execution.ray_workers import RayWorkers
    from moirai_sim.graphs.operator import Operator, OperatorGraph
    from moirai_sim.placement import Placement
    from moirai_sim.problem import PlacementProblem

    Crew = Workers | RayWorkers
    """Workers of this machine, or of several."""

WARM_UP = 3
_AHEAD_NS = 2_000_000
"""A run is announced so long before it starts, so that every worker is ready."""
UNDISTURBED = 1.0
"""A run whose `Run.disturbed` is at most this counts as undisturbed."""
_LOW = 0.1
"""Quantile of the undisturbed runs that stands for them: see docs/design.md, "What is measured"."""
_DELAYED = 0.005
"""The share of a run in which a worker may wait for its core, as the scheduler tells."""
PATIENCE_S, _ENOUGH = 0.15, 3
"""How long to wait for undisturbed runs, and how many of them are enough."""
_PLAIN_RUNS = 9
_BURST_NS, _BURST = 30_000_000, 8
"""Time that a burst of requests takes at most, unless one takes longer, and the most requests of it that count."""
_TRIES, _MOST_PATIENCE_S = 4, 0.5
"""Patience is at least so many runs long, unless they take longer than this."""
_WAIT_SHARE = 0.7
"""How long workers wait for a disturbed core before a run, as a share of the patience with a burst."""
_TOLERANCE = 1e-3
"""Largest difference of an output from the unsplit model's, as a share of that output's largest value."""


class Subject:
    """A model made ready to be measured under many placements.

    Parameters
    ----------
    model
        The model with weights.
    graph
        The same model as operators.
    seed
        Of the random inputs.
    """

    def __init__(self, model: onnx.ModelProto, graph: OperatorGraph, *, seed: int = 0) -> None:
        self.model = model
        self.graph = graph
        self.seed = seed
        self.whole = Executed(model, graph)
        self.feeds: dict[str, NDArray[Any]] = {
            name: random_array(spec.shape, np.dtype(spec.dtype), seed)
            for name, spec in self.whole.tensors.items()
            if name in self.whole.inputs
        }
        self._reference: list[NDArray[Any]] | None = None

    @cached_property
    def portable(self) -> Executed:
        """The kernels where not only ONNX Runtime runs parts."""
        return Executed(self.model, self.graph, portable=True)

    @cached_property
    def outputs(self) -> list[str]:
        """Outputs that kernels write (not inputs or constants handed through)."""
        return [name for name in self.whole.outputs if name in self.whole.writer]

    def reference(self, workers: Crew) -> list[NDArray[Any]]:
        """Return the outputs of the unsplit model in a plain session on the first device, of ONNX Runtime if any is."""
        if self._reference is None:
            first = next((name for name in workers.names if workers.backends[name] == ONNXRUNTIME), workers.names[0])
            self._reference = self.load_plain(workers, first)
        return self._reference

    def load_plain(self, workers: Crew, device: str) -> list[NDArray[Any]]:
        """Let a worker hold the unsplit model in a plain session, in place of the last one; return its outputs."""
        arguments = (self.model.SerializeToString(), self.feeds, self.outputs, workers.threads[device])
        outputs: list[NDArray[Any]] = workers.call([device], "load_plain", *arguments)[device]
        return outputs


Timed = tuple[int, float]
"""Duration of a run in ns, and how much it was disturbed: `Run.disturbed`."""


def undisturbed(runs: Sequence[Timed]) -> bool:
    """Return whether nothing disturbed one of the runs."""
    return any(disturbed <= UNDISTURBED for _, disturbed in runs)


def typical_ns(rounds: Sequence[Sequence[Timed]], *, quiet: bool = True) -> float:
    """Return what rounds of runs take, ns.

    Parameters
    ----------
    quiet
        Take, of each round with undisturbed runs, their tenth percentile, and of these the median. What still disturbed
        them, unnoticed, made them longer, never shorter, and longer runs and those on several devices more often.
        Without a single undisturbed run the least disturbed ones count. Else take the machine as it came: the median
        over rounds of the median of all their runs.
    """
    if not quiet:
        return median(median(ns for ns, _ in runs) for runs in rounds)
    alone = [[ns for ns, disturbed in runs if disturbed <= UNDISTURBED] for runs in rounds]
    if not any(alone):
        alone = [[ns for ns, _ in sorted((run for runs in rounds for run in runs), key=lambda run: run[1])[:_ENOUGH]]]
    return median(float(np.quantile(own, _LOW)) for own in alone if own)


def time_plain(
    workers: Crew, devices: Sequence[str], runs: int, *, patience_s: float = PATIENCE_S
) -> dict[str, list[Timed]]:
    """Time the plain sessions that workers hold, all at once, one run after the other on each.

    Repeated for a while until some runs of each were undisturbed.
    """
    found: dict[str, list[Timed]] = {name: [] for name in devices}
    give_up = time.monotonic() + patience_s
    while True:
        for name, times in workers.call(devices, "plain", runs).items():
            found[name] += [(ns, slowed / SLOW) for ns, slowed in times]
        quiet = [sum(disturbed <= UNDISTURBED for _, disturbed in times) for times in found.values()]
        if min(quiet) >= min(_ENOUGH, runs) or time.monotonic() > give_up:
            return found


@dataclass(frozen=True)
class Run:
    """One run of a placement."""

    origin: int
    """Start of time by the monotonic clock, ns."""
    records: Mapping[str, Record]
    disturbed: float
    """How much something else took of the core that suffered most, as a multiple of what is let pass."""

    @property
    def makespan_ns(self) -> int:
        """Time from the origin to the last end."""
        return max(end for record in self.records.values() for *_, end in record.runs) - self.origin

    @property
    def timed(self) -> Timed:
        """Makespan in ns, and how much the run was disturbed."""
        return self.makespan_ns, self.disturbed


@dataclass(frozen=True)
class Loaded:
    """A placement that the workers hold and can run again and again."""

    workers: Crew
    key: int
    subject: Subject
    executed: Executed
    parts: tuple[Part, ...]
    placement: Mapping[str, str]
    tensors: tuple[str, ...]
    participants: tuple[str, ...]
    makespan_ns: list[int] = field(default_factory=list)
    """The shortest makespan so far, once a burst has run: says how many requests the next one takes."""

    def run(self, offsets_ns: Sequence[int] = (0,)) -> tuple[int, dict[str, Record]]:
        """Run requests that arrive at these offsets; return the origin of time and what every worker recorded."""
        origin = time.monotonic_ns() + _AHEAD_NS
        arrivals = [origin + offset for offset in offsets_ns]
        records = self.workers.call(self.participants, "run", self.key, arrivals)
        return origin, records

    def run_hot(self, *, patience_s: float = PATIENCE_S, rest_ns: int = 0) -> list[Run]:
        """Run requests one after the other without a pause; return a run for each.

        After a pause caches are cold and cores asleep, which is no property of the placement, and what serves requests
        does not pause. A request begins when the one before it has ended on all devices and the pace of their cores was
        looked at. What another process, or another machine of the same host, does to a run is no property of the
        placement either: bursts are repeated for a while until some runs are undisturbed.

        Parameters
        ----------
        patience_s
            How long to look for undisturbed runs, at least some runs long; 0 takes the machine as it comes.
        rest_ns
            A pause before each request all the same, in which caches grow cold.
        """
        if patience_s and self.makespan_ns:
            patience_s = max(patience_s, min(_TRIES * self.makespan_ns[0] / 1e9, _MOST_PATIENCE_S))
        give_up = time.monotonic() + patience_s
        wait_ns = round(patience_s * _WAIT_SHARE * 1e9)
        runs: list[Run] = []
        while True:
            count = int(np.clip(_BURST_NS // max(self.makespan_ns[0], 1), 1, _BURST)) if self.makespan_ns else 1
            records = self.workers.call(self.participants, "hot", self.key, count, wait_ns, rest_ns)
            runs += [self._run_of(dict(zip(records, own, strict=True))) for own in zip(*records.values(), strict=True)]
            self.makespan_ns[:] = [min(run.makespan_ns for run in runs)]
            quiet = sum(run.disturbed <= UNDISTURBED for run in runs)
            if quiet >= _ENOUGH or time.monotonic() > give_up:
                return runs

    def _run_of(self, records: Mapping[str, Record]) -> Run:
        """Return a run of one request that workers began together."""
        begun = min(record.begun for record in records.values())
        last = max(end for record in records.values() for *_, end in record.runs)
        waited = max(record.delayed_ns for record in records.values()) / max(last - begun, 1)
        slowed = max(record.slowed for record in records.values())
        if self.workers.shares_cores:  # workers wait for each other's work then, which is no disturbance
            waited = 0.0
        return Run(begun, records, max(waited / _DELAYED, slowed / SLOW))

    def run_stream(self, requests: int) -> Run:
        """Run requests that all arrive at once, as many under way as there are slots."""
        _, records = self.run([0] * requests)
        return self._run_of(records)

    def check(self, request: int = 0) -> float:
        """Compare the outputs of the last run with the unsplit model; return the largest relative difference.

        Raises
        ------
        ExecutionError
            If an output differs.
        """
        expected = self.subject.reference(self.workers)
        found: dict[str, NDArray[Any]] = {}
        for part in self.workers.call(self.participants, "results", self.key, request).values():
            found |= part
        worst = 0.0
        for name, right in zip(self.subject.outputs, expected, strict=True):
            own = found[name].astype(np.float64)
            finite = np.isfinite(right)
            if not np.array_equal(own[~finite], right[~finite], equal_nan=True):  # masked with minus infinity
                raise ExecutionError(f"output '{name}' differs from the unsplit model's where that is not finite")
            scale = max(float(np.max(np.abs(right[finite]), initial=0)), np.finfo(np.float32).tiny)
            difference = np.max(np.abs(own[finite] - right[finite]), initial=0) / scale
            if not difference <= _TOLERANCE:
                raise ExecutionError(
                    f"output '{name}' differs from the unsplit model's by {difference:.2g} of its scale"
                )
            worst = max(worst, float(difference))
        return worst

    def close(self) -> None:
        """Let the workers forget this placement."""
        self.workers.call(self.participants, "unload", self.key)

    def timeline(self, origin: int, records: Mapping[str, Record], request: int = 0) -> Timeline:
        """Return one request of a run as a timeline."""
        jobs: dict[str, list[Part]] = defaultdict(list)
        for part in self.parts:
            jobs[part.device].append(part)
        covered = covered_operators(self.executed, self.subject.graph, self.parts, self.placement)
        spans = []
        for name, record in records.items():
            for number, index, ready, start, end in record.runs:
                if number == request:
                    part = jobs[name][index]
                    spans.append(
                        Span(
                            "operator",
                            part.operators[-1],
                            name,
                            ready - origin,
                            start - origin,
                            end - origin,
                            operators=covered[part],
                        )
                    )
            for number, tensor, sent, arrived in record.arrivals:
                if number == request:
                    spans.append(self._transfer(self.tensors[tensor], name, sent - origin, arrived - origin))
        spans.sort(key=lambda span: (span.start_ns, span.end_ns, span.kind, span.name))
        return Timeline(
            status="measured",
            policy="",
            network="measured",
            makespan_ns=max(span.end_ns for span in spans if span.kind == "operator"),
            placement=dict(self.placement),
            spans=spans,
        )

    def _transfer(self, tensor: str, target: str, start: int, end: int) -> Span:
        executed = self.executed
        producer = executed.owner[executed.writer[tensor]]
        consumers = dict.fromkeys(
            executed.owner[i]
            for i in range(len(executed.nodes))
            if self.placement[executed.owner[i]] == target and tensor in executed.nodes[i].input
        )
        source = self.placement[producer]
        return Span(
            "transfer",
            f"{producer}->{next(iter(consumers))}",
            f"{source}->{target}",
            start,
            start,
            end,
            producer=producer,
            consumers=tuple(consumers),
            source=source,
            target=target,
            bytes=executed.tensors[tensor].bytes,
        )


def nearest_run(runs: Sequence[Run], ns: float) -> Run:
    """Return the run whose makespan is the nearest to a time."""
    return min(runs, key=lambda run: abs(run.makespan_ns - ns))


def load(
    workers: Crew, subject: Subject, problem: PlacementProblem, placement: Placement, *, in_flight: int = 1
) -> Loaded:
    """Split a model by a placement and give the parts to the workers.

    Parameters
    ----------
    workers
        Of the problem's cluster.
    subject
        The model that the problem was made from.
    problem
        Names operators and devices.
    placement
        With an order: it is kept. Without one the parts run in the order in which the simulator runs them.
    in_flight
        Requests that may be under way at once; each has buffers of its own.
    """
    device = {name: problem.devices[k] for name, k in zip(problem.operators, placement.device, strict=True)}
    rank = placement.order
    if rank is None:
        rank = placement_from_schedule(problem, placement, simulate_schedule(problem, placement)).order
    order = [problem.operators[i] for i in np.argsort(np.asarray(rank), kind="stable")]
    return load_order(workers, subject, device, order, in_flight=in_flight)


def load_order(
    workers: Crew,
    subject: Subject,
    device: Mapping[str, str],
    order: Sequence[str],
    *,
    in_flight: int = 1,
    most_kernels: int | None = None,
) -> Loaded:
    """Do what `load` does, for a device of every operator by name and the operators in the order to run.

    ``most_kernels`` of a part make more parts, which show what parts cost.
    """
    unknown = sorted(set(device.values()) - set(workers.names))
    if unknown:
        raise InputError(f"placement: no worker for device '{unknown[0]}'; workers: {', '.join(workers.names)}")
    whole = subject.whole if set(workers.backends.values()) <= {ONNXRUNTIME} else subject.portable
    executed = execute_as(subject.model, subject.graph, device, whole)
    parts = tuple(split(executed, device, order, most_kernels=most_kernels))
    assignments, tensors = _assignments(executed, parts, subject, in_flight, workers.threads)
    key = workers.load(assignments)
    return Loaded(workers, key, subject, executed, parts, dict(device), tuple(tensors), tuple(assignments))


def measure(
    subject: Subject,
    problem: PlacementProblem,
    placement: Placement,
    *,
    workers: Crew | None = None,
    repeats: int = 15,
    budget_s: float = 10.0,
) -> Timeline:
    """Run a placement on the devices of its cluster and return the timeline of its median run.

    Parameters
    ----------
    subject
        The model.
    problem
        Made from the same model and the cluster to run on.
    placement
        What to run; without an order, in the one in which the simulator runs it.
    workers
        Those of the cluster, to be kept; None starts and ends them here.
    repeats
        Measured runs, after a few to warm up.
    budget_s
        Fewer runs, but at least three, where they take longer than this.

    Returns
    -------
    Timeline
        Status "measured"; ``provenance`` holds the makespans of all repeats, the time of the unsplit model, how far the
        clocks of the devices may be apart, and what it takes to make the timeline again.

    Raises
    ------
    InputError
        If the devices are not on this machine.
    ExecutionError
        If a worker fails, or an output differs from the unsplit model's.
    """
    if problem.cluster is None:
        raise InputError(f"{problem.name}: a published instance has no devices to run on; give a model and a cluster")
    with nullcontext(workers) if workers is not None else Workers(problem.cluster) as crew:
        loaded = load(crew, subject, problem, placement)
        try:
            for _ in range(WARM_UP):
                loaded.run()
            difference = loaded.check()
            runs: list[Timeline] = []
            disturbed = 0
            end = time.monotonic() + budget_s
            while len(runs) < repeats and (len(runs) < 3 or time.monotonic() < end):
                burst = loaded.run_hot()
                run = nearest_run(burst, typical_ns([[run.timed for run in burst]]))
                disturbed += run.disturbed > UNDISTURBED
                runs.append(loaded.timeline(run.origin, run.records))
            subject.load_plain(crew, crew.names[0])
            plain = time_plain(crew, crew.names[:1], _PLAIN_RUNS)[crew.names[0]]
        finally:
            if crew.processes:
                loaded.close()
    middle = sorted(runs, key=lambda run: run.makespan_ns)[len(runs) // 2]
    facts = {
        "makespans_ns": [run.makespan_ns for run in runs],
        "disturbed_runs": disturbed,
        "unsplit_ns": int(typical_ns([plain])),
        "parts": len(loaded.parts),
        "order": "simulated" if placement.order is None else "given",
        "largest_output_difference": difference,
        "clock_error_ns": crew.clock_error_ns,
        "machine": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "repeats": repeats,
        "seed": subject.seed,
        "versions": versions(),
        **problem.facts,
    }
    policy = str(placement.provenance.get("policy", ""))
    return replace(middle, policy=policy, network=problem.network, provenance=facts)


def load_subject(source: str | Path, graph: OperatorGraph) -> Subject:
    """Read a model with its weights.

    Parameters
    ----------
    source
        As in `load_model`: an ``.onnx`` file, its weights beside it if they are not inside, or ``zoo:NAME``.
    graph
        The same source as operators.

    Raises
    ------
    InputError
        If the model or its weights cannot be read, or exceed 2 GiB.
    """
    return Subject(with_random_weights(load_model(source)), graph)


def _assignments(
    executed: Executed, parts: Sequence[Part], subject: Subject, slots: int, threads: Mapping[str, int]
) -> tuple[dict[str, Assignment], list[str]]:
    names = list(dict.fromkeys(name for part in parts for name in (*part.inputs, *part.outputs)))
    names = [name for name in names if name not in subject.feeds]
    number = {name: i for i, name in enumerate(names)}
    specs = {name: executed.tensors[name] for name in names}
    place, place_bytes = share_places(parts, {name: spec.bytes for name, spec in specs.items()}, executed.outputs)
    by_device: dict[str, list[Part]] = defaultdict(list)
    for part in parts:
        by_device[part.device].append(part)
    return {
        device: Assignment(
            jobs=tuple(
                Job(
                    part_model(executed, part),
                    part.inputs,
                    part.outputs,
                    tuple(number[name] for name in part.awaits),
                    tuple((number[name], targets) for name, targets in part.sends),
                )
                for part in own
            ),
            tensors=specs,
            place=place,
            place_bytes=place_bytes,
            shared=bool(place),
            feeds={n: a for n, a in subject.feeds.items() if any(n in part.inputs for part in own)},
            results=tuple(n for n in executed.outputs if any(n in part.outputs for part in own)),
            peers=tuple(peer for peer in by_device if peer != device),
            slots=slots,
            threads=threads[device],
            optimized=not executed.portable,
        )
        for device, own in by_device.items()
    }, names


def covered_operators(
    executed: Executed, graph: OperatorGraph, parts: Sequence[Part], device: Mapping[str, str]
) -> dict[Part, tuple[str, ...]]:
    """Return the user's operators of each part; one that has no kernel counts where its result is made or read.

    First where a twin of it is computed, then at a reader on its device, then at a producer.
    """
    host: dict[str, Part] = {}
    for layout in (False, True):  # a part that only changes the layout of a result counts if there is no other
        for part in parts:
            for i in part.kernels:
                if layout or not executed.nodes[i].op_type.startswith("Reorder"):
                    host.setdefault(executed.owner[i], part)
    computed = {_computation(graph[name]): part for name, part in host.items() if name in graph.operators}
    for operator in graph:  # ONNX Runtime computes once what several operators would compute alike
        if operator.name not in host and _computation(operator) in computed:
            host[operator.name] = computed[_computation(operator)]
    for name in reversed(list(graph.operators)):
        if name not in host:
            host_of = (host.get(j) for j in graph.digraph.successors(name) if device[j] == device[name])
            found = next((part for part in host_of if part is not None), None)
            if found is not None:
                host[name] = found
    for name in graph.operators:
        if name not in host:
            near = (host.get(j) for j in graph.digraph.predecessors(name))
            host[name] = next((part for part in near if part is not None), parts[0])
    covered: dict[Part, list[str]] = {part: [] for part in parts}
    for name in graph.operators:
        covered[host[name]].append(name)
    return {part: tuple(names) for part, names in covered.items()}


def _computation(operator: Operator) -> Hashable:
    """Return what two operators have in common that compute the same."""
    read = tuple(tensor.name for tensor in operator.inputs)
    return operator.op_type, read, repr(sorted(operator.attributes.items(), key=lambda item: item[0]))
