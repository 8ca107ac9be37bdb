"""Report of an ``evaluate`` study: which policy wins where, how far from the bound, and at what price."""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from moirai_sim.graphs.load import model_names
from moirai_sim.studies.page import Report, Section
from moirai_sim.studies.tables import PROBLEM, policies_table, runs_table

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from moirai_sim.studies.store import Store


def build(study: dict[str, Any], store: Store) -> Report:
    """Return the report of an ``evaluate`` folder."""
    runs = runs_table(store)
    if runs.empty:
        return Report(study["name"], "no run has finished", [("runs", "0")], [], {"study": study})
    # Where a file lies is provenance.
    clusters = runs["cluster"].map(lambda name: PurePath(name).name, na_action="ignore")
    runs = runs.assign(model=runs["model"].map(model_names(runs["model"])), cluster=clusters)
    policies = policies_table(runs)
    problems = runs.groupby(PROBLEM, dropna=False).ngroups
    failed = runs[runs["status"] == "error"]
    proven = int((runs["status"] == "optimal").sum())
    best_gap = runs.assign(gap=1 - runs["bound_ms"] / runs["objective_ms"]).groupby(PROBLEM, dropna=False)["gap"].min()
    cards = [
        ("runs", f"{len(runs):,}"),
        ("problems", f"{problems:,}"),
        ("failed runs", f"{len(failed):,}"),
        ("answers proven optimal", f"{proven:,}"),
        ("best policy overall", str(policies["policy"].iloc[0])),
        ("median gap of the best answer", f"{best_gap.median():.1%}"),
    ]
    sections = [
        Section(
            "Policies",
            "versus best: geometric mean of the policy's time over the best answer to the same problem; 1 is best. "
            "versus single: the same over the best single device; below 1 is a gain.",
            rows=policies,
        ),
        Section(
            "Policy by problem",
            "Time over the best answer to the same problem; white cells gave no answer.",
            picture=_heat_map(runs),
        ),
        Section(
            "Quality against placement time",
            "Each point is a policy: lower is better, further left is faster.",
            picture=_quality(policies),
        ),
    ]
    if runs["operators"].nunique() >= 3:
        text = "Median over the problems of a size; a policy that searches stops at its time limit."
        sections.append(Section("Placement time as networks grow", text, picture=_growth(runs)))
    if len(failed):
        sections.append(Section("Failed runs", rows=failed[["model", "cluster", "policy", "error"]]))
    shown = runs.drop(columns=["error"]).dropna(axis="columns", how="all")
    sections.append(Section("All runs", "Click a heading to sort.", rows=shown))
    return Report(study["name"], study.get("description", ""), cards, sections, {"study": study})


def problem_labels(runs: pd.DataFrame) -> pd.Series:
    """Return a short text for the problem of each row: only the columns that differ between rows."""
    import pandas as pd

    varying = [name for name in PROBLEM if runs[name].nunique(dropna=False) > 1] or ["model"]
    rows = zip(*(runs[name].map(_short) for name in varying), strict=True)
    return pd.Series([" · ".join(row) for row in rows], index=runs.index)


def _short(value: object) -> str:
    text = str(value)
    return text.removeprefix("zoo:") if text not in ("None", "nan") else "default"


def _heat_map(runs: pd.DataFrame) -> go.Figure:
    import plotly.graph_objects as go

    grid = runs.assign(problem=problem_labels(runs)).pivot_table(
        index="problem", columns="policy", values="versus_best", aggfunc="median", dropna=False, sort=True
    )
    gaps = runs.assign(problem=problem_labels(runs)).pivot_table(
        index="problem", columns="policy", values="gap", aggfunc="median", dropna=False, sort=True
    )
    order = grid.median().sort_values(kind="stable").index
    grid = grid[order]
    gaps = gaps.reindex(index=grid.index, columns=order)
    small = len(grid) <= 30
    figure = go.Figure(
        go.Heatmap(
            z=grid.to_numpy(),
            x=list(grid.columns),
            y=list(grid.index),
            customdata=gaps.to_numpy(),
            zmin=1,
            zmax=3,
            colorscale="Viridis_r",
            texttemplate="%{z:.2f}" if small else None,
            colorbar={"orientation": "h", "y": 1, "yanchor": "bottom", "thickness": 10, "title": "times the best"},
            hovertemplate="%{y}<br>%{x}: %{z:.3f} times the best<br>gap to the bound %{customdata:.1%}<extra></extra>",
        )
    )
    figure.update_layout(
        height=min(1600, 160 + 26 * len(grid)), margin={"l": 10, "r": 10, "t": 30, "b": 10},
        xaxis={"automargin": True}, yaxis={"automargin": True, "autorange": "reversed"},
    )  # fmt: skip
    return figure


def _quality(policies: pd.DataFrame) -> go.Figure:
    import plotly.graph_objects as go

    known = policies.dropna(subset=["versus_best", "median_seconds"])
    figure = go.Figure(
        go.Scatter(
            x=known["median_seconds"].clip(lower=1e-5),
            y=known["versus_best"],
            text=known["policy"],
            mode="markers+text",
            textposition="top center",
            marker={"size": 11},
            hovertemplate="%{text}: %{y:.3f} times the best in %{x:.3g} s<extra></extra>",
        )
    )
    figure.update_layout(
        height=440, margin={"l": 10, "r": 10, "t": 30, "b": 10},
        xaxis={"type": "log", "title": "median seconds to place", "automargin": True},
        yaxis={"title": "time over the best answer", "automargin": True},
    )  # fmt: skip
    return figure


def _growth(runs: pd.DataFrame) -> go.Figure:
    import plotly.graph_objects as go

    known = runs.dropna(subset=["operators", "seconds"])
    figure = go.Figure()
    for policy, rows in known.groupby("policy", sort=True):
        curve = rows.groupby("operators")["seconds"].median().sort_index()
        figure.add_scatter(
            x=curve.index, y=curve.clip(lower=1e-5), mode="lines+markers", name=str(policy),
            hovertemplate=f"{policy}: %{{x:,}} operators in %{{y:.3g}} s<extra></extra>",
        )  # fmt: skip
    figure.update_layout(
        height=440, margin={"l": 10, "r": 10, "t": 30, "b": 10},
        xaxis={"type": "log", "title": "operators", "automargin": True},
        yaxis={"type": "log", "title": "seconds to place", "automargin": True},
    )  # fmt: skip
    return figure
