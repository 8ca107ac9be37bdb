"""The part of a what-if report that answers how many of which device reach the target."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moirai_sim.evidence import interval
from moirai_sim.studies.page import Section
from moirai_sim.studies.sizes import sentence

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    import plotly.graph_objects as go

    from moirai_sim.studies.store import Store

COLOURS = {
    "reached": "#2a9d8f",
    "missed": "#e9c46a",
    "failed": "#8d6a9f",
    "ruled out": "#c8553d",
    "dearer": "#9aa5b1",
}
"""By finding, in the order of the legend."""
SHOWN = 200
"""Rows of the table; the picture and the results folder hold all."""
ASKED = ("sizes", "prices", "cluster", "policy", "network", "objective", "seed")


def size_sections(study: Mapping[str, Any], store: Store) -> list[Section]:
    """Return a section for each model whose sizes a study has searched, with its current prices and target."""
    from moirai_sim.studies.whatif import ANSWER

    if not study.get("sizes"):
        return []
    sections = []
    for result in store.read():
        key, answer = result["key"], result["outcome"]
        if (
            key["scenario"] != ANSWER
            or key["prices"] != study["prices"]
            or list(key["sizes"]) != sorted(study["sizes"])
        ):
            continue
        text = sentence(answer)
        picture = _map(answer) if 1 <= len(answer["names"]) <= 2 else None
        title = f"How many of which device: {key['model']}"
        sections.append(Section(title, text, picture=picture, rows=sizes_table(answer)))
    return sections


def sizes_table(answer: Mapping[str, Any]) -> pd.DataFrame:
    """Return the first sizes of a search in order of price, with what became of each and why."""
    import pandas as pd

    rows = []
    for finding in answer["findings"][:SHOWN]:
        row = dict(zip(answer["names"], finding["counts"], strict=True))
        row |= {"price_eur": finding["price_eur"], "devices": finding["devices"], "finding": finding["finding"]}
        value, bound = finding["objective_ns"], finding["lower_bound_ns"]
        row |= {"why": _why(finding), "bound_ms": bound and bound / 1e6, "objective_ms": value and value / 1e6}
        if value and finding["log_spread"] is not None:
            low, high = interval(finding["log_spread"])
            row |= {"low_ms": value * low / 1e6, "high_ms": value * high / 1e6}
        rows.append(row)
    table = pd.DataFrame(rows)
    for name in ("price_eur", "bound_ms", "objective_ms"):
        table[name] = pd.to_numeric(table[name])
    return table.dropna(axis="columns", how="all")


def _why(finding: Mapping[str, Any]) -> str:
    if finding["finding"] == "ruled out":
        if finding["by"] != finding["counts"]:
            return f"has no more of anything than {' x '.join(map(str, finding['by']))}, which is ruled out"
        return "the model does not fit its memory" if finding["reason"] == "memory" else "its own bound"
    reasons = {
        "reached": "its placement meets the target",
        "missed": "its placement misses the target; no proof that all do",
        "dearer": "a size before it reaches the target",
        "failed": finding["reason"],
    }
    return str(reasons[finding["finding"]])


def _map(answer: Mapping[str, Any]) -> go.Figure:
    """Draw the findings over the counts of two kinds of device, or of one."""
    import plotly.graph_objects as go

    figure = go.Figure()
    names = answer["names"]
    for finding, colour in COLOURS.items():
        rows = [row for row in answer["findings"] if row["finding"] == finding]
        if not rows:
            continue
        price = ["" if row["price_eur"] is None else f", {row['price_eur']:,.0f} EUR" for row in rows]
        figure.add_scatter(
            x=[row["counts"][0] for row in rows], y=[row["counts"][1] if len(names) > 1 else 0 for row in rows],
            mode="markers", name=finding, marker={"size": 14, "symbol": "square", "color": colour}, text=price,
            hovertemplate=f"%{{x}} and %{{y}}%{{text}}: {finding}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(
        height=420 if len(names) > 1 else 240, margin={"l": 10, "r": 10, "t": 30, "b": 10},
        xaxis={"title": names[0], "automargin": True, "dtick": 1 if len(answer["findings"]) < 400 else None},
        yaxis={"title": names[1] if len(names) > 1 else "", "automargin": True, "visible": len(names) > 1},
    )  # fmt: skip
    return figure
