"""What a notebook shows for a graph, a cluster or a timeline: a small table, and bars for a timeline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from moirai_sim.units import format_bytes, format_count, format_ns

if TYPE_CHECKING:
    from moirai_sim.clusters.cluster import Cluster
    from moirai_sim.graphs.operator import OperatorGraph
    from moirai_sim.timeline import Span, Timeline

MAX_BARS = 2000
"""Bars in one picture; the longest are drawn where a timeline has more."""
_ROW, _WIDTH, _LABEL = 22, 900, 120


def graph_html(graph: OperatorGraph) -> str:
    """Return a table of a graph's size and its commonest operators."""
    kinds = Counter(operator.op_type for operator in graph).most_common(8)
    return _table(
        graph.name,
        [
            ("operators", f"{len(graph):,}"),
            ("FLOPs", format_count(graph.flops)),
            ("weights", format_bytes(graph.weight_bytes)),
            ("commonest", ", ".join(f"{count} {kind}" for kind, count in kinds)),
        ],
    )


def cluster_html(cluster: Cluster) -> str:
    """Return a table of a cluster's devices and links."""
    devices = Counter(device.type.name for device in cluster.devices)
    links = Counter(
        f"{format_bytes(link.bandwidth_bytes_per_s)}/s, {format_ns(link.latency_ns)}" for link in cluster.links
    )
    rows = [("device", f"{count} x {name}") for name, count in sorted(devices.items())]
    rows += [("link", f"{count} x {figures}") for figures, count in sorted(links.items())]
    return _table(cluster.name, rows)


def timeline_html(timeline: Timeline) -> str:
    """Return a table of a timeline's figures over a picture of what each resource did when."""
    rows = [
        ("policy", timeline.policy),
        ("status", timeline.status),
        ("makespan", format_ns(timeline.makespan_ns)),
        ("proven lower bound", f"{format_ns(timeline.lower_bound_ns)} (gap {timeline.gap:.1%})"),
        ("network", timeline.network),
    ]
    return _table("timeline", rows) + _bars(timeline.spans, timeline.makespan_ns)


def _table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th style='text-align:left'>{escape(a)}</th><td>{escape(b)}</td></tr>" for a, b in rows)
    return f"<table><caption>{escape(title)}</caption>{cells}</table>"


def _bars(spans: Sequence[Span], length_ns: int) -> str:
    if not spans or length_ns <= 0:
        return ""
    lanes = {name: i for i, name in enumerate(sorted({span.resource for span in spans}, key=lambda n: ("->" in n, n)))}
    scale = _WIDTH / length_ns
    shapes = [
        f"<text x='0' y='{lane * _ROW + 15}' font-size='11' fill='currentColor'>{escape(name)}</text>"
        for name, lane in lanes.items()
    ]
    longest = sorted(spans, key=lambda span: span.start_ns - span.end_ns)[:MAX_BARS]
    for span in longest:
        colour = "#4c78a8" if span.kind == "operator" else "#f58518"
        title = f"{span.name}: {format_ns(span.start_ns)} to {format_ns(span.end_ns)}"
        shapes.append(
            f"<rect x='{_LABEL + span.start_ns * scale:.1f}' y='{lanes[span.resource] * _ROW + 3}' height='{_ROW - 6}' "
            f"width='{max(0.5, (span.end_ns - span.start_ns) * scale):.1f}' fill='{colour}'>"
            f"<title>{escape(title)}</title></rect>"
        )
    size = f"viewBox='0 0 {_LABEL + _WIDTH} {len(lanes) * _ROW}' style='max-width:100%'"
    return f"<svg {size} xmlns='http://www.w3.org/2000/svg'>{''.join(shapes)}</svg>"
