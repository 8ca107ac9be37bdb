"""Keep the results of an evaluate study small: ``python experiments/summarise.py RESULTS_FOLDER EXPERIMENT_FOLDER``.

Writes ``results.csv`` (one row a run) and ``results.md`` (time over the best single device, by model and policy).
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from moirai_sim.files import write_whole
from moirai_sim.studies.store import read_folder
from moirai_sim.studies.tables import policies_table, runs_table

COLUMNS = ["model", "cluster", "network", "objective", "memory_scale", "policy", "seed", "status", "operators"]
FIGURES = ["objective_ms", "bound_ms", "gap", "versus_best", "versus_single", "devices_used", "seconds"]


def main() -> None:
    """Summarise one results folder."""
    results, experiment = Path(sys.argv[1]), Path(sys.argv[2])
    _, store = read_folder(results)
    runs = runs_table(store)
    write_whole(experiment / "results.csv", runs[COLUMNS + FIGURES].to_csv(index=False, float_format="%.6g"))
    write_whole(experiment / "results.md", markdown(runs))


def markdown(runs: pd.DataFrame) -> str:
    """Return tables of all settings: time by model and policy, ms, the best of a row in bold."""
    parts = ["## All problems\n", _table(policies_table(runs).round(4).astype(str))]
    for (cluster, objective, scale), rows in runs.groupby(["cluster", "objective", "memory_scale"], dropna=False):
        memory = "the devices' own memory" if pd.isna(scale) else f"every device holds {scale:g} of the model"
        parts.append(f"\n## {cluster}, {objective}, {memory}; ms, with the best proven bound and the gap to it\n")
        grid = rows.pivot_table(index="model", columns="policy", values="objective_ms", dropna=False)
        best = grid.min(axis=1)
        text = pd.DataFrame(
            [[_cell(value, low) for value in row] for row, low in zip(grid.to_numpy(), best, strict=True)],
            index=grid.index,
            columns=grid.columns,
        )
        bound = rows.groupby("model")["bound_ms"].max().reindex(grid.index)
        text["bound"] = [f"{value:.4g}" for value in bound]
        text["gap"] = [f"{1 - low / value:.1%}" for low, value in zip(bound, best, strict=True)]
        parts.append(_table(text.reset_index()))
    return "\n".join(parts)


def _cell(value: float, best: float) -> str:
    if pd.isna(value):
        return "–"
    return f"**{value:.4g}**" if value <= best * (1 + 1e-9) else f"{value:.4g}"


def _table(frame: pd.DataFrame) -> str:
    head = "| " + " | ".join(map(str, frame.columns)) + " |\n" + "|---" * len(frame.columns) + "|\n"
    return head + "".join("| " + " | ".join(map(str, row)) + " |\n" for row in frame.itertuples(index=False))


if __name__ == "__main__":
    main()
