"""Traces: a timeline for chrome://tracing and ui.perfetto.dev, and as a table (Parquet)."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from moirai_sim.files import write_whole

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from moirai_sim.problem import PlacementProblem
    from moirai_sim.timeline import Span, Timeline

_DEVICES, _NETWORK, _COUNTERS = 1, 2, 3


def tracks(timeline: Timeline) -> dict[str, list[Span]]:
    """Return the spans of each exclusive resource, by its label, in order of time.

    Devices come first, then ports (``one-port``, ``half-duplex``) or connections. A resource that does several things
    at once (a device with streams, a connection under fair sharing) has one track for each, ``NAME #2`` and so on, so
    that no two spans of a track overlap.
    """
    devices: dict[str, list[Span]] = defaultdict(list)
    network: dict[str, list[Span]] = defaultdict(list)
    for device in dict.fromkeys(timeline.placement.values()):
        devices[device] = []
    for span in timeline.spans:
        if span.kind == "operator":
            devices[span.resource].append(span)
        elif timeline.network == "one-port":
            network[f"{span.source} send"].append(span)
            network[f"{span.target} receive"].append(span)
        elif timeline.network == "half-duplex":
            network[f"{span.source} port"].append(span)
            network[f"{span.target} port"].append(span)
        else:
            network[span.resource].append(span)
    found: dict[str, list[Span]] = {}
    for group in (devices, network):
        for name in sorted(group):
            lanes: list[list[Span]] = [[]]
            for span in sorted(group[name], key=lambda span: (span.start_ns, span.end_ns)):
                lane = next((lane for lane in lanes if not lane or lane[-1].end_ns <= span.start_ns), None)
                if lane is None:
                    lanes.append(lane := [])
                lane.append(span)
            found |= {name if i == 0 else f"{name} #{i + 1}": lane for i, lane in enumerate(lanes)}
    return found


def chrome_trace(timeline: Timeline, problem: PlacementProblem | None = None) -> dict[str, Any]:
    """Return a trace in the Trace Event Format (JSON object form); times are microseconds.

    Parameters
    ----------
    problem
        Adds a counter of the memory of each device, and names the links that connections use.
    """
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}}
        for pid, name in ((_DEVICES, "devices"), (_NETWORK, "network"), (_COUNTERS, "counters"))
    ]
    for tid, (label, spans) in enumerate(tracks(timeline).items(), start=1):
        pid = _NETWORK if spans and spans[0].kind == "transfer" else _DEVICES
        events.append({"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": label}})
        events.append({"ph": "M", "pid": pid, "tid": tid, "name": "thread_sort_index", "args": {"sort_index": tid}})
        for span in spans:
            details: dict[str, Any] = {"waited_us": (span.start_ns - span.ready_ns) / 1e3}
            if span.kind == "transfer":
                details |= {"consumers": list(span.consumers), "bytes": span.bytes}
            events.append(
                {
                    "ph": "X",
                    "pid": pid,
                    "tid": tid,
                    "name": span.name,
                    "cat": span.kind,
                    "ts": span.start_ns / 1e3,
                    "dur": (span.end_ns - span.start_ns) / 1e3,
                    "args": details,
                }
            )
    for name, points in link_load(timeline, problem).items():
        events += _counter(f"load of {name}", "bytes/s", points)
    if problem is not None:
        from moirai_sim.simulation.memory import memory_use

        for device, held in memory_use(problem, timeline).curve.items():
            events += _counter(f"memory of {device}", "bytes", held)
    about = {"makespan_ns": timeline.makespan_ns, "policy": timeline.policy, "network": timeline.network}
    return {"traceEvents": events, "displayTimeUnit": "ns", "otherData": about}


def link_load(timeline: Timeline, problem: PlacementProblem | None = None) -> dict[str, list[tuple[int, float]]]:
    """Return the bytes per second on each link over time as (ns, rate from then on).

    A transfer counts with its mean rate. Links are those of the problem's cluster; without one, pairs of devices.
    """
    changes: dict[str, list[tuple[int, float]]] = defaultdict(list)
    cluster = problem.cluster if problem is not None else None
    for span in timeline.spans:
        if span.kind != "transfer" or not span.bytes or span.end_ns == span.start_ns:
            continue
        rate = span.bytes * 1e9 / (span.end_ns - span.start_ns)
        names: tuple[str, ...] = (span.resource,)
        if cluster is not None:
            from moirai_sim.clusters.routes import route

            names = route(cluster, span.source, span.target).links
        for name in names:
            changes[name] += [(span.start_ns, rate), (span.end_ns, -rate)]
    curves: dict[str, list[tuple[int, float]]] = {}
    for name in sorted(changes):
        points: list[tuple[int, float]] = [(0, 0.0)]
        for when, rate in sorted(changes[name]):
            total = max(0.0, points[-1][1] + rate)
            if points[-1][0] == when:
                points.pop()
            points.append((when, total))
        curves[name] = points
    return curves


def _counter(name: str, unit: str, points: list[tuple[int, float]] | list[tuple[int, int]]) -> list[dict[str, Any]]:
    return [
        {"ph": "C", "pid": _COUNTERS, "name": name, "ts": when / 1e3, "args": {unit: value}} for when, value in points
    ]


def write_trace(timeline: Timeline, path: Path, problem: PlacementProblem | None = None) -> None:
    """Write `chrome_trace` as a JSON file, whole or not at all."""
    write_whole(path, json.dumps(chrome_trace(timeline, problem)) + "\n")


def spans_frame(timeline: Timeline) -> pd.DataFrame:
    """Return the spans as a table, one row each; times in ns."""
    import pandas as pd

    columns = [
        "kind", "name", "resource", "ready_ns", "start_ns", "end_ns", "producer", "consumers", "source", "target",
        "bytes", "operators",
    ]  # fmt: skip
    rows = [
        [list(value) if isinstance(value := getattr(span, name), tuple) else value for name in columns]
        for span in timeline.spans
    ]
    return pd.DataFrame(rows, columns=columns).astype({"bytes": "Int64"})


def write_parquet(timeline: Timeline, path: Path) -> None:
    """Write `spans_frame` as a Parquet file, whole or not at all."""
    buffer = io.BytesIO()
    spans_frame(timeline).to_parquet(buffer, index=False)
    write_whole(path, buffer.getvalue())
