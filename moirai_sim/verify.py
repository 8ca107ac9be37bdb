"""Checks any timeline against its problem. Shares no code with policies or simulator, so that it can disagree."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from moirai_sim.problem import UNLIMITED, PlacementProblem

if TYPE_CHECKING:
    from collections.abc import Iterable

    from moirai_sim.clusters.cluster import Cluster
    from moirai_sim.timeline import Span, Timeline


def verify(problem: PlacementProblem, timeline: Timeline) -> list[str]:
    """Return every violation, one line each; an empty list means that the timeline is right.

    Checked: every operator runs exactly once, on its device, for its duration; every tensor that crosses devices
    travels exactly once to each device that reads it; nothing starts before its inputs are there; devices and ports
    do one thing at a time (of zero-length work too: it may not lie inside other work); shared links carry no more than
    they can; memory, co-location and unsupported devices; the makespan, the bound and the period; the limits on latency
    and period that the timeline was asked to keep. Where placements take turns, all of this of each; a device then
    holds the weights of whatever any of them puts there. Of a measured timeline: that every operator ran once, on its
    device, one part after the other.
    """
    found: list[str] = []
    if timeline.status in ("infeasible", "limit", "error"):
        if timeline.spans:
            found.append(f"status '{timeline.status}' but the timeline has spans")
        return found
    if timeline.network != problem.network:
        found.append(f"timeline is for network '{timeline.network}', problem for '{problem.network}'")
    index = {name: i for i, name in enumerate(problem.operators)}
    where = {name: k for k, name in enumerate(problem.devices)}
    device = _devices(problem, timeline, index, where, found)
    if found:
        return found
    if timeline.status == "measured":
        return _measured(problem, timeline)
    runs = _operator_spans(problem, timeline, index, device, found)
    arrivals = _transfer_spans(problem, timeline, index, where, device, runs, found)
    _check_inputs(problem, device, runs, arrivals, found)
    _check_exclusive(problem, timeline, found)
    _check_links(problem, timeline, found)
    _check_limits(problem, device, found)
    if timeline.replicas:
        _check_replicas(problem, timeline, found)
    _check_figures(problem, timeline, found)
    return found


def _measured(problem: PlacementProblem, timeline: Timeline) -> list[str]:
    """Return what is wrong with a timeline that was measured, whose spans cover parts and last what they lasted.

    Every operator ran exactly once, on its device; a device did one thing at a time; the makespan is the last end.
    """
    found: list[str] = []
    ran: dict[str, int] = dict.fromkeys(problem.operators, 0)
    for span in timeline.spans:
        for name in (span.operators or (span.name,)) if span.kind == "operator" else ():
            if name not in ran:
                found.append(f"span '{span.name}' covers '{name}', which is no operator of the model")
                continue
            ran[name] += 1
            home = timeline.placement[name]
            if span.resource != home:
                found.append(f"operator '{name}' ran on '{span.resource}' but is placed on '{home}'")
    found += [f"operator '{name}' ran {times} times" for name, times in ran.items() if times != 1]
    computed = replace(timeline, spans=[span for span in timeline.spans if span.kind == "operator"])
    _check_exclusive(problem, computed, found)
    last = max((span.end_ns for span in computed.spans), default=0)
    if last != timeline.makespan_ns:
        found.append(f"makespan_ns is {timeline.makespan_ns} but the last part ends at {last}")
    return found


def _devices(
    problem: PlacementProblem,
    timeline: Timeline,
    index: dict[str, int],
    where: dict[str, int],
    found: list[str],
) -> dict[int, int]:
    device: dict[int, int] = {}
    for name, target in timeline.placement.items():
        if name not in index:
            found.append(f"placement names '{name}', which is no operator of the model")
        elif target not in where:
            found.append(f"placement puts '{name}' on '{target}', which is no device of the cluster")
        else:
            device[index[name]] = where[target]
    found += [f"operator '{name}' has no device" for name, i in index.items() if i not in device]
    return device


def _operator_spans(
    problem: PlacementProblem,
    timeline: Timeline,
    index: dict[str, int],
    device: dict[int, int],
    found: list[str],
) -> dict[int, Span]:
    runs: dict[int, Span] = {}
    for span in timeline.spans:
        if span.kind != "operator":
            continue
        i = index.get(span.name)
        if i is None:
            found.append(f"span '{span.name}' is no operator of the model")
            continue
        if i in runs:
            found.append(f"operator '{span.name}' runs twice")
            continue
        runs[i] = span
        if span.resource != problem.devices[device[i]]:
            found.append(
                f"operator '{span.name}' runs on '{span.resource}' but is placed on '{problem.devices[device[i]]}'"
            )
        cost = int(problem.operator_ns[i, problem.device_type[device[i]]])
        if cost < 0:
            found.append(f"operator '{span.name}' cannot run on '{problem.devices[device[i]]}'")
        elif span.end_ns - span.start_ns != cost:
            found.append(f"operator '{span.name}' lasts {span.end_ns - span.start_ns} ns instead of {cost} ns")
        if span.start_ns < 0:
            found.append(f"operator '{span.name}' starts before time 0")
    found += [f"operator '{name}' never runs" for name, i in index.items() if i not in runs]
    return runs


def _transfer_spans(
    problem: PlacementProblem,
    timeline: Timeline,
    index: dict[str, int],
    where: dict[str, int],
    device: dict[int, int],
    runs: dict[int, Span],
    found: list[str],
) -> dict[tuple[int, int], Span]:
    """Match every transfer span with the tensor it carries; return the spans by (tensor, target device)."""
    needed: dict[tuple[int, int], set[int]] = defaultdict(set)  # (tensor, target) -> consumers
    producer_of: dict[int, int] = {}
    for (i, j), tensor in zip(problem.edges.tolist(), problem.edge_tensor.tolist(), strict=True):
        if tensor >= 0 and device[i] != device[j]:
            needed[tensor, device[j]].add(j)
            producer_of[tensor] = i
    open_transfers: dict[tuple[int, int, frozenset[int]], list[int]] = defaultdict(list)
    for (tensor, target), readers in sorted(needed.items()):
        open_transfers[producer_of[tensor], target, frozenset(readers)].append(tensor)
    arrivals: dict[tuple[int, int], Span] = {}
    for span in timeline.spans:
        if span.kind != "transfer":
            continue
        producer = index.get(span.producer, -1)
        source, target = where.get(span.source, -1), where.get(span.target, -1)
        strangers = [name for name in (span.source, span.target) if name not in where]
        found += [f"transfer '{span.name}' names '{name}', which is no device of the cluster" for name in strangers]
        if strangers:
            continue
        consumers = frozenset(index.get(name, -1) for name in span.consumers)
        candidates = open_transfers.get((producer, target, consumers), [])
        if not candidates:
            found.append(f"transfer '{span.name}' to '{span.target}' carries nothing that is needed, or comes twice")
            continue
        fitting = [t for t in candidates if span.bytes is None or int(problem.tensor_bytes[t]) in (-1, span.bytes)]
        exact = [t for t in fitting if _duration_fits(problem, span, t, source, target)]
        tensor = (exact or fitting or candidates)[0]
        candidates.remove(tensor)
        arrivals[tensor, target] = span
        if not fitting:
            found.append(f"transfer '{span.name}' carries {span.bytes} bytes instead of {problem.tensor_bytes[tensor]}")
        if source != device[producer]:
            found.append(f"transfer '{span.name}' leaves '{span.source}', where its producer does not run")
        elif not _duration_fits(problem, span, tensor, source, target):
            alone = problem.transfer_time_ns(tensor, source, target)
            found.append(f"transfer '{span.name}' lasts {span.end_ns - span.start_ns} ns; alone it takes {alone} ns")
        run = runs.get(producer)
        if run is not None and span.start_ns < run.end_ns:
            found.append(f"transfer '{span.name}' starts at {span.start_ns} ns, before its producer ends")
    found.extend(
        f"the output of '{problem.operators[i]}' never travels to '{problem.devices[target]}'"
        for (i, target, _), tensors in sorted(open_transfers.items(), key=lambda item: item[0][:2])
        for _ in tensors
    )
    return arrivals


def _duration_fits(problem: PlacementProblem, span: Span, tensor: int, source: int, target: int) -> bool:
    if source < 0 or source == target:
        return False
    alone = problem.transfer_time_ns(tensor, source, target)
    lasted = span.end_ns - span.start_ns
    return lasted >= alone if problem.network == "fair" else lasted == alone


def _check_inputs(
    problem: PlacementProblem,
    device: dict[int, int],
    runs: dict[int, Span],
    arrivals: dict[tuple[int, int], Span],
    found: list[str],
) -> None:
    """Check that a span is ready no earlier than its inputs are there, and starts no earlier than it is ready."""
    there = dict.fromkeys(runs, 0)
    for (i, j), tensor in zip(problem.edges.tolist(), problem.edge_tensor.tolist(), strict=True):
        before, after = runs.get(i), runs.get(j)
        if before is None or after is None:
            continue
        if after.start_ns < before.end_ns:
            found.append(f"operator '{after.name}' starts before '{before.name}', which it reads, ends")
        span = arrivals.get((tensor, device[j])) if tensor >= 0 and device[i] != device[j] else None
        if span is not None and after.start_ns < span.end_ns:
            found.append(f"operator '{after.name}' starts before the transfer '{span.name}' arrives")
        there[j] = max(there[j], (span or before).end_ns)
    index = {name: i for i, name in enumerate(problem.operators)}
    expected = [(runs[i], ns) for i, ns in there.items()]
    expected += [(span, runs[i].end_ns) for span in arrivals.values() if (i := index[span.producer]) in runs]
    for span, ns in expected:
        if span.ready_ns < ns:
            found.append(f"'{span.name}' says it is ready at {span.ready_ns} ns, but its inputs are there at {ns} ns")
        if span.start_ns < span.ready_ns:
            found.append(f"'{span.name}' is ready at {span.ready_ns} ns but starts at {span.start_ns} ns")


def _check_exclusive(problem: PlacementProblem, timeline: Timeline, found: list[str]) -> None:
    resources: dict[tuple[str, ...], list[Span]] = defaultdict(list)
    for span in timeline.spans:
        for resource in _resources(problem.network, span):
            resources[resource].append(span)
    for resource, spans in sorted(resources.items()):
        spans.sort(key=lambda span: (span.start_ns, span.end_ns))
        latest = spans[0]
        for span in spans[1:]:
            if span.start_ns < latest.end_ns:
                label = " ".join(map(str, resource))
                found.append(f"{label}: '{latest.name}' and '{span.name}' overlap at {span.start_ns} ns")
            if span.end_ns > latest.end_ns:
                latest = span


def _resources(network: str, span: Span) -> Iterable[tuple[str, ...]]:
    if span.kind == "operator":
        return [("device", span.resource)]
    if network == "one-port":
        return [("send port of", span.source), ("receive port of", span.target)]
    if network == "half-duplex":
        return [("port of", span.source), ("port of", span.target)]
    return []


def _check_links(problem: PlacementProblem, timeline: Timeline, found: list[str]) -> None:
    """Check, under ``fair``, that no link carries more than it can.

    Whatever the rates were, the bytes of all transfers that lie inside a window fit the link times the window. Windows
    run from a start of one transfer to the end of another, from at most 2,000 starts a link.
    """
    if problem.network != "fair" or problem.cluster is None:
        return
    crossings = _crossings(problem.cluster, timeline)
    for (link, direction), uses in sorted(crossings.items()):
        per_ns = problem.cluster.link[link].bandwidth_bytes_per_s / 1e9
        uses = [use for use in uses if use[1] > use[0]]  # what is so small that it is all latency fills no link
        if not uses:
            continue
        start, end, size = np.array(sorted(uses, key=lambda use: use[1]), dtype=np.float64).T
        starts = np.unique(start)
        for begin in starts[:: max(1, len(starts) // 2_000)]:
            inside = start >= begin
            carried = np.cumsum(size[inside])
            # Ends are whole nanoseconds, so each transfer may be a nanosecond off.
            possible = per_ns * (end[inside] - begin + np.arange(1, len(carried) + 1)) * (1 + 1e-9)
            over = np.flatnonzero(carried > possible)
            if len(over):
                until = int(end[inside][over[0]])
                out_of = f" out of '{direction}'" if direction else ""
                found.append(f"link '{link}'{out_of} carries more than it can from {int(begin)} ns to {until} ns")
                break


def _crossings(cluster: Cluster, timeline: Timeline) -> dict[tuple[str, str], list[tuple[int, int, int]]]:
    """Return start, end and bytes of what crosses each link in each direction; the end of the last byte that enters."""
    crossings: dict[tuple[str, str], list[tuple[int, int, int]]] = defaultdict(list)
    routes: dict[tuple[str, str], tuple[int, tuple[str, ...]]] = {}
    for span in timeline.spans:
        pair = span.source, span.target
        if span.kind != "transfer" or not span.bytes or pair[0] == pair[1] or not set(pair) <= cluster.device.keys():
            continue
        if pair not in routes:
            routes[pair] = _way(cluster, *pair)
        latency, nodes = routes[pair]
        for a, b in pairwise(nodes):
            link = cluster.graph.edges[a, b]["link"]
            direction = a if cluster.link[link].duplex == "full" else ""
            crossings[link, direction].append((span.start_ns, span.end_ns - latency, span.bytes))
    return crossings


def _way(cluster: Cluster, source: str, target: str) -> tuple[int, tuple[str, ...]]:
    """Return latency and nodes of the route: least latency, then fewest links, then first by the names of the nodes."""
    known: dict[str, tuple[int, int, tuple[str, ...]]] = {source: (0, 0, (source,))}
    changed = [source]
    while changed:  # Bellman and Ford's algorithm: slow, short, and not the one that is checked
        nearer = []
        for node in changed:
            latency, hops, nodes = known[node]
            for other in cluster.graph[node]:
                step = cluster.link[cluster.graph.edges[node, other]["link"]].latency_ns
                way = (latency + step, hops + 1, (*nodes, other))
                if other not in known or way < known[other]:
                    known[other] = way
                    nearer.append(other)
        changed = list(dict.fromkeys(nearer))
    return known[target][0], known[target][2]


def _check_limits(problem: PlacementProblem, device: dict[int, int], found: list[str]) -> None:
    used: dict[int, int] = defaultdict(int)
    for i, k in device.items():
        used[k] += int(problem.weight_bytes[i])
    for k, size in sorted(used.items()):
        limit = int(problem.memory_bytes[k])
        if limit != UNLIMITED and size > limit:
            found.append(f"device '{problem.devices[k]}' holds {size} {problem.memory_unit} of weights but has {limit}")
    if problem.colocation is not None:
        homes: dict[int, set[int]] = defaultdict(set)
        for i, group in enumerate(problem.colocation.tolist()):
            if group >= 0:
                homes[group].add(device[i])
        found.extend(f"co-location group {group} is split" for group, ks in sorted(homes.items()) if len(ks) > 1)


def _check_replicas(problem: PlacementProblem, timeline: Timeline, found: list[str]) -> None:
    weight = dict(zip(problem.operators, problem.weight_bytes.tolist(), strict=True))
    held: dict[str, set[str]] = defaultdict(set)
    for number, replica in enumerate(timeline.cycle):
        if number:
            found += [f"replica {number}: {line}" for line in verify(problem, replica)]
        for name, device in replica.placement.items():
            held[device].add(name)
    for device, limit in zip(problem.devices, problem.memory_bytes.tolist(), strict=True):
        size = sum(weight.get(name, 0) for name in held[device])
        if limit != UNLIMITED and size > limit:
            what = f"{size} {problem.memory_unit} of weights for all replicas"
            found.append(f"device '{device}' holds {what} but has {limit}")


def _check_figures(problem: PlacementProblem, timeline: Timeline, found: list[str]) -> None:
    ends = [span.end_ns for span in timeline.spans]
    if ends and max(ends) != timeline.makespan_ns:
        found.append(f"makespan_ns is {timeline.makespan_ns} but the last span ends at {max(ends)}")
    if timeline.period_ns is not None:
        busiest = max(_loads_ns(problem, timeline).values(), default=0.0)
        turns = len(timeline.cycle)
        if timeline.period_ns * turns < busiest:
            requests = "a request" if turns == 1 else f"in {turns} requests"
            found.append(f"period_ns is {timeline.period_ns} but one resource works {busiest:.0f} ns {requests}")
    if timeline.max_period_ns is not None:
        period = timeline.period_ns
        if period is None:  # of one request, as `place` and `simulate` write it: what a stream of them would have
            period = math.ceil(max(_loads_ns(problem, timeline).values(), default=0.0) / len(timeline.cycle))
        if period > timeline.max_period_ns:
            found.append(f"the period is {period} ns; asked for at most {timeline.max_period_ns} ns")
    if timeline.max_latency_ns is not None and timeline.latency_ns > timeline.max_latency_ns:
        found.append(f"a request takes {timeline.latency_ns} ns; asked for at most {timeline.max_latency_ns} ns")
    if timeline.lower_bound_ns > timeline.objective_ns:
        found.append(f"lower_bound_ns {timeline.lower_bound_ns} exceeds the objective {timeline.objective_ns}")
    if timeline.status == "optimal" and timeline.lower_bound_ns != timeline.objective_ns:
        found.append("status is 'optimal' but the lower bound is not the objective")


def _loads_ns(problem: PlacementProblem, timeline: Timeline) -> dict[tuple[str, ...], float]:
    """Return how long each device, port and link works for a request by each placement that takes turns, ns."""
    load: dict[tuple[str, ...], float] = defaultdict(float)
    for one in timeline.cycle:
        for span in one.spans:
            for resource in _resources(problem.network, span):
                load[resource] += span.end_ns - span.start_ns
        if problem.network != "fair" or problem.cluster is None:
            continue
        for (name, direction), uses in _crossings(problem.cluster, one).items():
            per_ns = problem.cluster.link[name].bandwidth_bytes_per_s / 1e9
            load["link", name, direction] += sum(size for _, _, size in uses) / per_ns * (1 - 1e-9)
    return load
