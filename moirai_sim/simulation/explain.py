"""Why a timeline lasts as long as it does: its critical path, what bounds it, and what a faster part would save.

The critical path leads back from the last end to time 0. Each step is the span whose end let the next one start: an
input that arrived last, or the work that held its device or port until then. Its pieces have no gaps, so their times
sum to the makespan.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from moirai_sim.errors import InputError
from moirai_sim.simulation.options import DEFAULT, SimulationOptions
from moirai_sim.units import format_ns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moirai_sim.placement import Placement
    from moirai_sim.problem import PlacementProblem
    from moirai_sim.timeline import Span, Timeline

Reason = Literal["start", "input", "device busy", "port busy", "idle"]
"""Why a step began when it did: nothing was in its way, its input arrived, its device or port became free, or nothing
that the timeline shows (a launch, or the order of the placement)."""


@dataclass(frozen=True)
class Step:
    """One span on the critical path, from ``start_ns`` to ``end_ns``."""

    kind: Literal["operator", "transfer", "idle"]
    name: str
    resource: str
    start_ns: int
    end_ns: int
    reason: Reason
    waited_ns: int
    """How long it had been ready before it started."""

    @property
    def lasted_ns(self) -> int:
        """Time on the path."""
        return self.end_ns - self.start_ns


@dataclass(frozen=True)
class Saving:
    """The makespan with one device or link twice as fast, by simulation of the same placement."""

    resource: str
    makespan_ns: int
    saved_ns: int
    """Negative where a faster part makes the whole slower (Graham's anomalies)."""


@dataclass(frozen=True)
class Explanation:
    """Answer of `explain`."""

    makespan_ns: int
    steps: tuple[Step, ...]
    savings: tuple[Saving, ...] = ()

    @property
    def shares(self) -> dict[str, float]:
        """Share of the makespan on the path by cause: compute, transfer, idle; they sum to 1."""
        total: dict[str, int] = {"compute": 0, "transfer": 0, "idle": 0}
        for step in self.steps:
            total["compute" if step.kind == "operator" else step.kind] += step.lasted_ns
        return {cause: ns / self.makespan_ns if self.makespan_ns else 0.0 for cause, ns in total.items()}

    @property
    def waits(self) -> dict[str, int]:
        """How long the steps of the path waited, ready, for a device or a port, ns."""
        total = {"device busy": 0, "port busy": 0}
        for step in self.steps:
            if step.reason in total:
                total[step.reason] += step.waited_ns
        return total

    @property
    def bound(self) -> str:
        """What bounds the makespan, in one sentence."""
        shares, waits = self.shares, self.waits
        cause = max(shares, key=lambda name: shares[name])
        text = f"{cause} is {shares[cause]:.0%} of the critical path"
        wait = max(waits, key=lambda name: waits[name])
        if waits[wait] > 0:
            text += f"; its steps waited {format_ns(waits[wait])} because of '{wait}'"
        return text

    def rows(self) -> list[dict[str, object]]:
        """Return the path as a table, one row a step."""
        return [
            {
                "kind": step.kind,
                "name": step.name,
                "resource": step.resource,
                "start_ns": step.start_ns,
                "end_ns": step.end_ns,
                "reason": step.reason,
                "waited_ns": step.waited_ns,
            }
            for step in self.steps
        ]

    def to_json(self) -> dict[str, object]:
        """Return the whole explanation as a document."""
        return {
            "bound": self.bound,
            "shares": self.shares,
            "waits_ns": self.waits,
            "critical_path": self.rows(),
            "twice_as_fast": [
                {"resource": s.resource, "makespan_ns": s.makespan_ns, "saved_ns": s.saved_ns} for s in self.savings
            ],
        }

    def text(self, *, longest: int = 10) -> str:
        """Return the explanation for people: the bound, the longest steps of the path, and the savings."""
        lines = [f"makespan {format_ns(self.makespan_ns)}: {self.bound}"]
        lines.append(f"critical path: {len(self.steps)} steps, the longest:")
        lines += [
            f"  {format_ns(step.lasted_ns):>10}  {step.kind:<8} {step.name} on {step.resource}"
            for step in sorted(self.steps, key=lambda step: (-step.lasted_ns, step.start_ns))[:longest]
        ]
        if self.savings:
            lines.append("twice as fast would save:")
            for saving in self.savings:
                share = saving.saved_ns / self.makespan_ns if self.makespan_ns else 0.0
                lines.append(f"  {format_ns(saving.saved_ns):>10}  {share:7.1%}  {saving.resource}")
        return "\n".join(lines)


def explain(
    problem: PlacementProblem,
    placement: Placement,
    *,
    savings: bool = True,
    resources: Sequence[str] | None = None,
    options: SimulationOptions = DEFAULT,
) -> Explanation:
    """Explain the timeline of a placement.

    Parameters
    ----------
    savings
        Whether to simulate again with each device and link twice as fast.
    resources
        Devices and links to speed up; all that the placement uses where None.
    options
        Device models.

    Raises
    ------
    InputError
        If a resource has an unknown name, or the placement cannot run.
    """
    from moirai_sim.simulation.engine import simulate, simulate_schedule

    timeline = simulate(problem, placement, options=options)
    found = critical_path(timeline)
    if not savings:
        return Explanation(timeline.makespan_ns, found)
    names = list(resources) if resources is not None else used_resources(problem, placement)
    pairs = _used_pairs(problem, placement)
    answers = []
    for name in names:
        makespan = simulate_schedule(faster(problem, name, 2.0, pairs), placement, options=options).makespan_ns
        answers.append(Saving(name, makespan, timeline.makespan_ns - makespan))
    answers.sort(key=lambda saving: (-saving.saved_ns, saving.resource))
    return Explanation(timeline.makespan_ns, found, tuple(answers))


def critical_path(timeline: Timeline) -> tuple[Step, ...]:
    """Return the critical path of a timeline, first step first; see the module for what it is."""
    spans = timeline.spans
    if not spans:
        return ()
    by_end: dict[int, list[Span]] = defaultdict(list)
    for span in spans:
        by_end[span.end_ns].append(span)
    ends = sorted(by_end)
    current = max(spans, key=lambda span: (span.end_ns, span.start_ns, span.kind == "operator"))
    seen = {id(current)}
    steps: list[Step] = []
    while True:
        cause, reason = _cause(timeline.network, current, by_end.get(current.start_ns, ()), seen)
        waited = current.start_ns - current.ready_ns
        steps.append(
            Step(current.kind, current.name, current.resource, current.start_ns, current.end_ns, reason, waited)
        )
        if cause is None and current.start_ns > 0:
            # The timeline does not show what held it; go on from the last thing that ended before.
            before = bisect_left(ends, current.start_ns)
            until = ends[before - 1] if before else 0
            steps.append(Step("idle", "", current.resource, until, current.start_ns, "idle", 0))
            cause = max(by_end[until], key=lambda span: span.start_ns) if before else None
        if cause is None:
            return tuple(reversed(steps))
        seen.add(id(cause))
        current = cause


def _cause(network: str, span: Span, ended: Sequence[Span], seen: set[int]) -> tuple[Span | None, Reason]:
    """Return the span that ended when this one started and held it: an input, else work on the same resource."""
    candidates = [other for other in ended if id(other) not in seen and other is not span]
    waited = span.start_ns > span.ready_ns
    if not waited:
        for other in candidates:
            if other.kind == "transfer" and span.kind == "operator" and span.name in other.consumers:
                return other, "input"
        for other in candidates:
            if span.kind == "transfer" and other.name == span.producer and other.kind == "operator":
                return other, "input"
        if span.kind == "operator" and span.start_ns > 0:
            same = [o for o in candidates if o.kind == "operator" and o.resource == span.resource]
            others = [o for o in candidates if o.kind == "operator"]
            if same or others:
                return (same or others)[0], "input"
    for other in candidates:
        if other.kind != span.kind:
            continue
        if span.kind == "operator" and other.resource == span.resource:
            return other, "device busy"
        if span.kind == "transfer" and _share_a_port(network, span, other):
            return other, "port busy"
    return None, "start" if span.start_ns == 0 else "idle"


def _share_a_port(network: str, one: Span, other: Span) -> bool:
    if network == "half-duplex":
        return bool({one.source, one.target} & {other.source, other.target})
    return network == "one-port" and (one.source == other.source or one.target == other.target)


def used_resources(problem: PlacementProblem, placement: Placement) -> list[str]:
    """Return the devices and links (``source->target`` where the problem has no cluster) that a placement uses."""
    names = [problem.devices[k] for k in np.unique(placement.device).tolist()]
    pairs = _used_pairs(problem, placement)
    if problem.cluster is None or not pairs:
        return names + [f"{problem.devices[s]}->{problem.devices[t]}" for s, t in pairs]
    from moirai_sim.clusters.routes import route

    links = {
        name: None for s, t in pairs for name in route(problem.cluster, problem.devices[s], problem.devices[t]).links
    }
    return names + sorted(links)


def _used_pairs(problem: PlacementProblem, placement: Placement) -> list[list[int]]:
    """Return the (source, target) devices between which a placement sends something."""
    from moirai_sim.placement import transfer_edges

    device = np.asarray(placement.device)
    edges = np.flatnonzero(transfer_edges(problem, device) == np.arange(len(problem.edges)))
    pairs: list[list[int]] = np.unique(device[problem.edges[edges]].reshape(-1, 2), axis=0).tolist()
    return pairs


def faster(
    problem: PlacementProblem, resource: str, factor: float, pairs: Sequence[Sequence[int]] | None = None
) -> PlacementProblem:
    """Return the problem with one device, link or pair of devices (``source->target``) ``factor`` times as fast.

    A factor below 1 slows it down. Only durations change: times of operators on the device, the bandwidth (not the
    latency) of the link. Every route keeps its way. Of a link, the (source, target) devices of ``pairs`` alone gain
    where those are given: all k squared are looked at otherwise.

    Raises
    ------
    InputError
        If there is no such device, link or pair.
    """
    if resource in problem.devices:
        k = problem.devices.index(resource)
        column = problem.operator_ns[:, problem.device_type[k]]
        quick = np.where(column < 0, column, np.rint(column / factor).astype(np.int64))
        device_type = problem.device_type.copy()
        device_type[k] = problem.operator_ns.shape[1]
        return replace(
            problem,
            operator_ns=np.column_stack([problem.operator_ns, quick]),
            evidence=None,  # which has a column a device type too
            device_type=device_type,
        )
    if problem.cluster is not None and resource in problem.cluster.link:
        return _faster_link(problem, resource, factor, pairs)
    source, arrow, target = resource.partition("->")
    if not arrow or source not in problem.devices or target not in problem.devices:
        raise InputError(f"'{resource}' is no device, link or pair of devices of {problem.name}")
    s, t = problem.devices.index(source), problem.devices.index(target)
    times = np.rint(problem.transfer_ns[:, problem.route_class[s, t]] / factor).astype(np.int64)
    route_class = problem.route_class.copy()
    route_class[s, t] = problem.transfer_ns.shape[1]
    return replace(problem, transfer_ns=np.column_stack([problem.transfer_ns, times]), route_class=route_class)


def _faster_link(
    problem: PlacementProblem, name: str, factor: float, pairs: Sequence[Sequence[int]] | None
) -> PlacementProblem:
    """Speed up the routes over a link as far as the link is their narrowest part."""
    from moirai_sim.clusters.routes import route

    cluster = problem.cluster
    if cluster is None:  # for the type checker: the caller has looked
        return problem
    changed = replace(cluster.link[name], bandwidth_bytes_per_s=cluster.link[name].bandwidth_bytes_per_s * factor)
    links = tuple(changed if link.name == name else link for link in cluster.links)
    route_class, columns = problem.route_class.copy(), list(problem.transfer_ns.T)
    classes: dict[tuple[int, int, float], int] = {}
    for s, t in itertools.permutations(range(problem.n_devices), 2) if pairs is None else pairs:
        if name not in (way := route(cluster, problem.devices[s], problem.devices[t])).links:
            continue
        old = int(problem.route_class[s, t])
        widest = min((changed if link == name else cluster.link[link]).bandwidth_bytes_per_s for link in way.links)
        ratio = widest / way.bandwidth_bytes_per_s
        if ratio == 1:
            continue
        key = (old, way.latency_ns, ratio)
        if key not in classes:
            classes[key] = len(columns)
            work = np.maximum(0, problem.transfer_ns[:, old] - way.latency_ns)
            columns.append(problem.transfer_ns[:, old] - work + np.ceil(work / ratio).astype(np.int64))
        route_class[s, t] = classes[key]
    if not classes:
        return replace(problem, cluster=replace(cluster, links=links))
    return replace(
        problem,
        cluster=replace(cluster, links=links),
        route_class=route_class,
        transfer_ns=np.stack(columns, axis=1),
    )
