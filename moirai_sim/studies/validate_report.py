"""Report of a ``validate`` study (and of the quickstart): predicted against measured, placement by placement."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from moirai_sim.errors import InputError
from moirai_sim.graphs.load import model_names
from moirai_sim.studies.page import Report, Section
from moirai_sim.studies.validate_summary import PERCENTILES

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd
    import plotly.graph_objects as go

    from moirai_sim.studies.store import Store

MAX_GANTTS = 12
"""Pairs of Gantt charts in one report: the worst cases first, since they teach the most."""


def build(study: dict[str, Any], store: Store) -> Report:
    """Return the report of a ``validate`` folder.

    Raises
    ------
    InputError
        If ``validate`` did not come to its end there.
    """
    import pandas as pd

    path = store.folder / "summary.json"
    if not path.is_file():
        raise InputError(f"{store.folder}: 'validate' was broken off here; run it again, it goes on where it was")
    summary = json.loads(path.read_text(encoding="utf-8"))
    cases = cases_table(store)
    measured = cases.dropna(subset=["measured_ms"])
    shown = cases.drop(columns=["name"] if (cases["problem"] != "").any() else ["name", "problem"])
    cards = [
        ("cases", f"{summary['cases']:,}"),
        ("median error", _percent(summary["median_ape"])),
        ("mean error", _percent(summary["mean_ape"])),
        ("95th percentile", _percent(summary["p95_ape"])),
        ("worst", _percent(summary["max_ape"])),
        ("rank correlation", _number(summary["rank_correlation"])),
        ("regret", _percent(summary["regret"])),
        ("machine's own noise", _percent(summary["noise_median_ape"])),
        ("rank correlation possible", _number(summary.get("rank_ceiling"))),
        ("median error, undisturbed", _percent(summary.get("undisturbed_median_ape"))),
    ]
    cards += [
        (f"median error of {name} latency", _percent(summary[f"latency_{name}_median_ape"]))
        for name in PERCENTILES
        if f"latency_{name}_median_ape" in summary
    ]
    sections = [
        Section(
            "Predicted against measured",
            "Points on the line are right; the band is 10 %. Bars: spread over resampled rounds (90 %).",
            picture=_scatter(measured),
        ),
        Section("Error by model and placement", picture=_errors(measured)),
        Section("Cases", "Click a heading to sort. Errors are shares of the measured time.", rows=shown),
    ]
    for title, name in (("Residuals by operator family", "families"), ("Residuals by link", "links")):
        if summary.get(name):
            sections.append(Section(title, rows=pd.DataFrame(summary[name])))
    sections += list(_gantts(store, measured))
    return Report(
        study["name"], study.get("description", ""), cards, sections, {"study": study, **summary.get("machine", {})}
    )


def cases_table(store: Store) -> pd.DataFrame:
    """Return one row a case: model, cluster, placement and its other names, times in ms, and the error as a share."""
    import pandas as pd

    rows = []
    for result in store.read():
        key, outcome = result["key"], result["outcome"]
        row = {name: key[name] for name in ("model", "cluster", "placement")}
        row["also"] = ", ".join(outcome.get("also", []))
        if outcome["status"] == "measured":
            predicted, measured = outcome["predicted_ns"] / 1e6, outcome["measured_ns"] / 1e6
            row |= {"predicted_ms": predicted, "measured_ms": measured, "error": predicted / measured - 1}
            row |= {"low_ms": outcome["low_ns"] / 1e6, "high_ms": outcome["high_ns"] / 1e6}
        row |= {"status": outcome["status"], "name": result["name"]}
        row |= {"problem": outcome.get("error") or outcome.get("reason", "")}
        rows.append(row)
    columns = ["model", "cluster", "placement", "also", "predicted_ms", "measured_ms", "error", "low_ms", "high_ms"]
    frame = pd.DataFrame(rows, columns=[*columns, "status", "problem", "name"])
    frame["model"] = frame["model"].map(model_names(frame["model"]))
    return frame.sort_values(columns[:3], ignore_index=True)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _scatter(cases: pd.DataFrame) -> go.Figure:
    import plotly.graph_objects as go

    low = min(cases["measured_ms"].min(), cases["predicted_ms"].min()) * 0.8
    high = max(cases["measured_ms"].max(), cases["predicted_ms"].max()) * 1.25
    figure = go.Figure()
    figure.add_scatter(
        x=[low, high, high, low], y=[low * 0.9, high * 0.9, high * 1.1, low * 1.1], fill="toself", mode="none",
        fillcolor="rgba(120,140,180,0.18)", hoverinfo="skip", showlegend=False,
    )  # fmt: skip
    figure.add_scatter(x=[low, high], y=[low, high], mode="lines", line={"width": 1, "color": "gray"}, showlegend=False)
    for model, rows in cases.groupby("model", sort=True):
        figure.add_scatter(
            x=rows["measured_ms"], y=rows["predicted_ms"], mode="markers", name=str(model),
            text=rows["placement"] + " · " + rows["cluster"],
            error_x={
                "type": "data", "symmetric": False, "thickness": 1,
                "array": rows["high_ms"] - rows["measured_ms"], "arrayminus": rows["measured_ms"] - rows["low_ms"],
            },
            hovertemplate="%{text}<br>measured %{x:.4g} ms, predicted %{y:.4g} ms<extra></extra>",
        )  # fmt: skip
    figure.update_layout(
        height=480, margin={"l": 10, "r": 10, "t": 30, "b": 10},
        xaxis={"type": "log", "title": "measured, ms", "automargin": True},
        yaxis={"type": "log", "title": "predicted, ms", "automargin": True},
    )  # fmt: skip
    return figure


def _errors(cases: pd.DataFrame) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    for placement, rows in cases.groupby("placement", sort=True):
        figure.add_bar(x=rows["model"], y=rows["error"], name=str(placement), hovertemplate="%{y:.1%}<extra></extra>")
    figure.update_layout(
        height=400, barmode="group", margin={"l": 10, "r": 10, "t": 30, "b": 10},
        yaxis={"title": "predicted / measured - 1", "tickformat": "~%", "automargin": True},
        xaxis={"automargin": True},
    )  # fmt: skip
    return figure


def _gantts(store: Store, cases: pd.DataFrame) -> Iterator[Section]:
    from moirai_sim.simulation.gantt import compare_gantts
    from moirai_sim.timeline import read_timeline

    worst = cases.assign(size=cases["error"].abs()).sort_values("size", ascending=False, kind="stable")
    several = worst[worst["placement"] != "single"]
    for case in several.head(MAX_GANTTS).itertuples():
        paths = [store.folder / "timelines" / f"{case.name}-{side}.json" for side in ("predicted", "measured")]
        if all(path.is_file() for path in paths):
            predicted, measured = (read_timeline(path) for path in paths)
            title = f"{case.model} · {case.placement} · {case.cluster}"
            text = f"Predicted {case.predicted_ms:.4g} ms above, measured {case.measured_ms:.4g} ms below."
            yield Section(title, text, picture=compare_gantts(predicted, measured))
