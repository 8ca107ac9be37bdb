"""Keep the results of evaluate studies small: ``python experiments/summarise.py RESULTS_FOLDER EXPERIMENT_FOLDER``.

Writes ``results.csv`` (one row a run) and ``results.md``: times by model and policy, and our own policies against each
other one. A failed run is a row without a time.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moirai_sim.files import write_whole
from moirai_sim.graphs.load import model_names
from moirai_sim.studies.store import read_folder
from moirai_sim.studies.tables import PROBLEM, policies_table, runs_table

COLUMNS = [*PROBLEM, "policy", "seed", "status", "operators"]
FIGURES = [
    "objective_ms",
    "latency_ms",
    "bound_ms",
    "gap",
    "versus_best",
    "versus_single",
    "placements_used",
    "devices_used",
    "seconds",
]

OWN = ("moirai", "diviml", "auto")
"""Policies that are shown against all others."""


def summarise(results: Path, experiment: Path) -> None:
    """Summarise the runs that belong to a results folder beside the experiment's studies."""
    _, store = read_folder(results)
    runs = runs_table(store)
    runs["model"] = runs["model"].map(model_names(runs["model"]))
    runs["cluster"] = [None if name is None else Path(name).name.removesuffix(".yaml") for name in runs["cluster"]]
    write_whole(experiment / "results.csv", runs[COLUMNS + FIGURES].to_csv(index=False, float_format="%.6g"))
    write_whole(experiment / "results.md", markdown(runs))


def markdown(runs: pd.DataFrame) -> str:
    """Return tables of all settings: time by model and policy, ms, the best of a row in bold."""
    parts = ["## All problems\n", _table(policies_table(runs).round(4).astype(str))]
    for policy in OWN:
        if policy in set(runs["policy"]):
            parts.append(
                f"\n## `{policy}` against each: its time is so many times lower, its answer so many times sooner\n"
            )
            parts.append(_table(against(runs, policy)))
    names = [name for name in PROBLEM if name not in ("model", "network")]
    for values, rows in runs.groupby(names, dropna=False):
        setting: dict[str, Any] = {
            name: value for name, value in zip(names, list(values), strict=True) if value is not None and value == value
        }
        asked = [str(setting.get("cluster", "own devices")), str(setting["objective"])]
        scale = setting.get("memory_scale")
        asked.append("the devices' own memory" if scale is None else f"every device holds {scale:g} of the model")
        asked += [f"up to {setting['replicas']} placements take turns"] if setting["replicas"] > 1 else []
        asked += [f"latency at most {setting['max_latency']}"] if "max_latency" in setting else []
        asked += [f"throughput at least {setting['min_throughput']}"] if "min_throughput" in setting else []
        parts.append(f"\n## {', '.join(asked)}; ms, with the best proven bound and the gap to it\n")
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


def against(runs: pd.DataFrame, policy: str) -> pd.DataFrame:
    """Return one row an objective and another policy: ratios of times over the problems that both answer."""
    wide = runs.assign(**{name: runs[name].astype(object).fillna("") for name in PROBLEM})
    value = wide.pivot_table(index=[*PROBLEM, "seed"], columns="policy", values="objective_ms")
    seconds = wide.pivot_table(index=[*PROBLEM, "seed"], columns="policy", values="seconds").reindex(value.index)
    rows = []
    for objective in sorted(set(runs["objective"])):
        here = value.index.get_level_values("objective") == objective
        for other in value.columns.drop(policy):
            gain = (value.loc[here, other] / value.loc[here, policy]).dropna()
            sooner = (seconds.loc[here, other] / seconds.loc[here, policy])[gain.index]
            if len(gain):
                mean = np.exp(np.log(gain).mean())
                figures = [f"{gain.max():.2f}", f"{mean:.3f}", f"{gain.min():.2f}", f"{sooner.median():.2g}"]
                rows.append([other, objective, *figures, len(gain)])
    columns = ["policy", "objective", "up to", "geometric mean", "at least", "sooner (median)", "problems"]
    return pd.DataFrame(rows, columns=columns)


def _cell(value: float, best: float) -> str:
    if pd.isna(value):
        return "–"
    return f"**{value:.4g}**" if value <= best * (1 + 1e-9) else f"{value:.4g}"


def _table(frame: pd.DataFrame) -> str:
    head = "| " + " | ".join(map(str, frame.columns)) + " |\n" + "|---" * len(frame.columns) + "|\n"
    return head + "".join("| " + " | ".join(map(str, row)) + " |\n" for row in frame.itertuples(index=False))


if __name__ == "__main__":
    summarise(Path(sys.argv[1]), Path(sys.argv[2]))
