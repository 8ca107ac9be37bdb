"""A page of a report: cards, sections with tables and pictures, written as one self-contained HTML text."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import moirai_sim

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True)
class Section:
    """One heading of a report with a sentence, a picture, a table, or any of them."""

    title: str
    text: str = ""
    picture: go.Figure | None = None
    rows: pd.DataFrame | None = None

    @property
    def figure(self) -> str:
        """The picture as JSON that cannot end its script element; empty where there is none."""
        return "" if self.picture is None else str(self.picture.to_json()).replace("<", "\\u003c")

    @property
    def height(self) -> int:
        """Height of the picture, pixels."""
        return int((self.picture.layout.height if self.picture is not None else 0) or 420)

    @property
    def table(self) -> dict[str, Any] | None:
        """The rows with cells written for people, and the values to sort by."""
        if self.rows is None or not len(self.rows.columns):
            return None
        numeric = {name: self.rows[name].dtype.kind in "iuf" for name in self.rows.columns}
        columns = [{"label": name.replace("_", " "), "number": numeric[name]} for name in self.rows.columns]
        cells = [
            [_cell(value, number=number) for value, number in zip(row, numeric.values(), strict=True)]
            for row in self.rows.itertuples(index=False, name=None)
        ]
        return {"columns": columns, "rows": cells}


@dataclass(frozen=True)
class Report:
    """What a report shows, before it becomes HTML."""

    title: str
    subtitle: str
    cards: Sequence[tuple[str, str]]
    """Label and value of the few figures that matter most."""
    sections: Sequence[Section]
    provenance: dict[str, Any] = field(default_factory=dict)


def render(report: Report) -> str:
    """Return the HTML text of a report. Plotly's script is embedded once, and only where there is a picture."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(
        files("moirai_sim.studies").joinpath("templates/report.html.j2").read_text("utf-8")
    )
    plotly = ""
    if any(section.picture is not None for section in report.sections):
        from plotly.offline import get_plotlyjs

        plotly = get_plotlyjs()
    provenance = {"moirai-sim": moirai_sim.__version__} | report.provenance
    return template.render(
        title=report.title,
        subtitle=report.subtitle,
        cards=report.cards,
        sections=report.sections,
        provenance=json.dumps(provenance, indent=1),
        plotly=plotly,
    )


def _cell(value: Any, *, number: bool) -> dict[str, Any]:  # noqa: ANN401 - any cell of a table
    if not number:
        text = "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)
        return {"text": text, "kind": "long" if len(text) > 60 else "", "sort": None}
    if isinstance(value, float) and not math.isfinite(value):
        return {"text": "–", "kind": "number", "sort": "Infinity"}
    text = f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 10_000 else f"{value:.4g}"
    return {"text": text, "kind": "number", "sort": value}
