"""Pictures of a timeline: interactive (plotly) and for papers (matplotlib)."""

from __future__ import annotations

import io
import zlib
from importlib.util import find_spec
from typing import TYPE_CHECKING

from moirai_sim.errors import InputError
from moirai_sim.files import write_whole
from moirai_sim.simulation.trace import tracks
from moirai_sim.units import format_ns

if TYPE_CHECKING:
    from pathlib import Path

    import plotly.graph_objects as go

    from moirai_sim.simulation.explain import Explanation
    from moirai_sim.timeline import Span, Timeline

# Paul Tol's "muted" scheme: told apart by colour-blind people, and in print.
_COLOURS = (
    "#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499",
)  # fmt: skip
_TRANSFER, _PATH = "#BBBBBB", "#EE3311"


def figure(timeline: Timeline, explanation: Explanation | None = None) -> go.Figure:
    """Return a Gantt chart: a row each exclusive resource, operators coloured by name, transfers grey.

    Parameters
    ----------
    explanation
        Draws a red frame around the spans of its critical path.
    """
    import plotly.graph_objects as go

    chart = go.Figure()
    rows = _draw(chart, timeline, _critical(explanation))
    chart.update_layout(
        title=_title(timeline),
        barmode="overlay",
        xaxis_title="time (ms)",
        yaxis={"autorange": "reversed", "categoryorder": "array", "categoryarray": rows},
        template="plotly_white",
        height=120 + 28 * max(1, len(rows)),
    )
    return chart


def compare_gantts(predicted: Timeline, measured: Timeline) -> go.Figure:
    """Return the Gantt charts of two timelines, one above the other, on one time axis."""
    from plotly.subplots import make_subplots

    chart = make_subplots(
        rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.12, subplot_titles=(_title(predicted), _title(measured))
    )
    height = 140
    for row, timeline in enumerate((predicted, measured), start=1):
        labels = _draw(chart, timeline, frozenset(), row=row, col=1)
        chart.update_yaxes(autorange="reversed", categoryorder="array", categoryarray=labels, row=row, col=1)
        height += 26 * len(labels)
    chart.update_xaxes(title="time (ms)", row=2, col=1)
    chart.update_layout(barmode="overlay", template="plotly_white", height=height)
    return chart


def _draw(chart: go.Figure, timeline: Timeline, critical: frozenset[tuple[str, str, int]], **place: int) -> list[str]:
    """Add a row of bars for each track; return the labels of the rows."""
    rows = tracks(timeline)
    for label, spans in rows.items():
        chart.add_bar(
            y=[label] * len(spans),
            base=[span.start_ns / 1e6 for span in spans],
            x=[(span.end_ns - span.start_ns) / 1e6 for span in spans],
            orientation="h",
            marker={
                "color": [_colour(span) for span in spans],
                "line": {
                    "color": [_PATH if _key(span) in critical else "white" for span in spans],
                    "width": [2 if _key(span) in critical else 0.3 for span in spans],
                },
            },
            customdata=[
                [span.name, format_ns(span.end_ns - span.start_ns), format_ns(span.start_ns - span.ready_ns)]
                for span in spans
            ],
            hovertemplate="%{customdata[0]}<br>%{customdata[1]}, waited %{customdata[2]}<extra>%{y}</extra>",
            showlegend=False,
            **place,
        )
    return list(rows)


def check_gantt(path: Path) -> None:
    """Refuse a file that `write_gantt` cannot write, before work is done for it.

    Raises
    ------
    InputError
        If the file has an unknown ending, or matplotlib (extra ``figures``) is missing for it.
    """
    if path.suffix.lower() not in (".html", ".png"):
        raise InputError(f"{path}: a Gantt chart is written as .html or .png; choose one of these endings")
    if path.suffix.lower() == ".png" and find_spec("matplotlib") is None:
        cure = "install it with: pip install 'moirai-sim[figures]', or write .html"
        raise InputError(f"{path}: a picture needs matplotlib; {cure}")


def write_gantt(timeline: Timeline, path: Path, explanation: Explanation | None = None) -> None:
    """Write the chart as the ending of the file says: ``.html`` (interactive) or ``.png``.

    Raises
    ------
    InputError
        As `check_gantt`.
    """
    check_gantt(path)
    write = write_png if path.suffix.lower() == ".png" else write_html
    write(timeline, path, explanation)


def write_html(timeline: Timeline, path: Path, explanation: Explanation | None = None) -> None:
    """Write the interactive chart as one self-contained HTML file."""
    write_whole(path, figure(timeline, explanation).to_html(include_plotlyjs=True, full_html=True))


def write_png(timeline: Timeline, path: Path, explanation: Explanation | None = None, *, dpi: int = 200) -> None:
    """Write the chart as a PNG picture (needs matplotlib, extra ``figures``)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    critical = _critical(explanation)
    rows = tracks(timeline)
    picture = Figure(figsize=(7.0, 0.8 + 0.28 * max(1, len(rows))), layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.add_subplot()
    for y, spans in enumerate(rows.values()):
        axes.broken_barh(
            [(span.start_ns / 1e6, (span.end_ns - span.start_ns) / 1e6) for span in spans],
            (y - 0.4, 0.8),
            facecolors=[_colour(span) for span in spans],
            edgecolors=[_PATH if _key(span) in critical else "white" for span in spans],
            linewidths=[1.0 if _key(span) in critical else 0.2 for span in spans],
        )
    axes.set_yticks(range(len(rows)), labels=list(rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel("time (ms)")
    axes.set_title(_title(timeline), fontsize=9)
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    write_whole(path, buffer.getvalue())


def _title(timeline: Timeline) -> str:
    policy = f"{timeline.policy}, " if timeline.policy else ""
    turns = f", first of {len(timeline.cycle)} placements that take turns" if timeline.replicas else ""
    return f"{policy}{timeline.network}, {format_ns(timeline.makespan_ns)}{turns}"


def _colour(span: Span) -> str:
    return _TRANSFER if span.kind == "transfer" else _COLOURS[zlib.crc32(span.name.encode()) % len(_COLOURS)]


def _key(span: Span) -> tuple[str, str, int]:
    return span.kind, span.name, span.start_ns


def _critical(explanation: Explanation | None) -> frozenset[tuple[str, str, int]]:
    return (
        frozenset((step.kind, step.name, step.start_ns) for step in explanation.steps) if explanation else frozenset()
    )
