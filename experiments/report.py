"""How wrong are our numbers? ``python experiments/report.py [VALIDATION_FOLDER...]`` writes ``experiments/REPORT.md``.

What the folders hold is kept first, small: ``validation/results/NAME.csv`` has all cases, ``NAME.json`` the summary. It
gathers all kept validation studies, the accuracy experiment and the shipped cost models; nothing is typed in.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from moirai_sim.files import write_whole
from moirai_sim.studies.store import read_folder
from moirai_sim.studies.validate_summary import FORESEEN, cases_of, summarise

HERE = Path(__file__).parent
KEPT = HERE / "validation" / "results"
FIGURES = ["cases", "median_ape", "mean_ape", "p95_ape", "max_ape", "rank_correlation", "regret", "noise_median_ape"]
FIGURES += ["rank_ceiling", "disturbed", "undisturbed_cases", "undisturbed_median_ape", "undisturbed_p95_ape"]
FIGURES += [f"{when}_{name}" for when in FORESEEN for name in ("median_ape", "p95_ape", "rank_correlation", "regret")]
FIGURES += ["split_median_ape", "split_p95_ape", "inside"]
FIGURES += ["latency_p50_median_ape", "latency_p95_median_ape"]


def main() -> None:
    """Keep the folders, then write the report."""
    for folder in map(Path, sys.argv[1:]):
        keep(folder)
    parts = [
        "# How wrong are our numbers?\n\n",
        "Made by `python experiments/report.py`; errors are shares of the measured time.\n",
    ]
    for path in sorted(KEPT.glob("*.json")):
        parts += validation(json.loads(path.read_text(encoding="utf-8")))
    for path in sorted((HERE / "accuracy").glob("*.csv")):
        parts.append(f"\n## Cost model accuracy: {path.stem}\n\n{table(pd.read_csv(path))}")
    for path in sorted((HERE.parent / "cost_models").glob("*/card.json")):
        parts += card(path)
    write_whole(HERE / "REPORT.md", "".join(parts))


def keep(folder: Path) -> None:
    """Keep the cases and the summary of a validation folder."""
    study, store = read_folder(folder)
    results = list(store.read())
    old = json.loads((store.folder / "summary.json").read_text(encoding="utf-8"))
    summary = summarise(results, study["seed"]) | {"machine": old["machine"]}
    kept = {"name": study["name"], "description": study["description"], "summary": summary}
    cases = pd.DataFrame(cases_of(results)).sort_values(["cluster", "model", "placement"])
    texts = {"json": json.dumps(kept, indent=1) + "\n", "csv": cases.to_csv(index=False, float_format="%.5g")}
    for kind, text in texts.items():  # clusters lie in this folder, wherever its checkout lay
        write_whole(KEPT / f"{study['name']}.{kind}", re.sub(r"[^\s,\"]*/(?=experiments/)", "", text))


def validation(kept: dict[str, Any]) -> list[str]:
    """Return what a validation study found: overall, by model, operator family and link."""
    summary = kept["summary"]
    hardware = summary["machine"]["hardware"]
    parts = [
        f"\n## Predicted against measured placements: {kept['name']}\n\n{kept['description']} "
        f"{hardware['cpu']}, {hardware['cores']} cores.\n\n",
        table(pd.DataFrame([{name: summary[name] for name in FIGURES if name in summary}])),
    ]
    by = [name for name in ("models", "families", "links") if summary[name]]
    return [*parts, *(f"\nBy {name}:\n\n{table(pd.DataFrame(summary[name]))}" for name in by)]


def card(path: Path) -> list[str]:
    """Return the held-out errors that a cost model ships with."""
    found = json.loads(path.read_text(encoding="utf-8"))
    splits = pd.DataFrame(found.get("splits", []))
    body = (
        table(splits) if len(splits) else "No held-out table: see `held_out` in the card; do not call it calibrated.\n"
    )
    return [f"\n## Shipped cost model: {path.parent.name}\n\n{body}"]


def table(frame: pd.DataFrame) -> str:
    """Return a Markdown table with four significant digits."""
    text = frame.map(lambda value: f"{value:.4g}" if isinstance(value, float) else str(value))
    head = "| " + " | ".join(map(str, text.columns)) + " |\n" + "|---" * len(text.columns) + "|\n"
    return head + "".join("| " + " | ".join(row) + " |\n" for row in text.itertuples(index=False, name=None))


if __name__ == "__main__":
    main()
