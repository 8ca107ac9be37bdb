"""Tables derived from the results of a study; never the only copy of a number."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from moirai_sim.studies.store import Store

PROBLEM = ["model", "cluster", "network", "objective", "memory_scale", "replicas", "max_latency", "min_throughput"]
"""Columns that say which question was asked; rows that agree in them compete."""


def runs_table(store: Store) -> pd.DataFrame:
    """Return one row a run of an ``evaluate`` study.

    Times are milliseconds. ``versus_best`` is the objective over the best of all policies on the same problem (1 is
    best), ``versus_single`` over the best single device.
    """
    import pandas as pd

    rows = []
    default: dict[tuple[str, str | None], str] = {}
    for result in store.read():
        key, outcome = result["key"], result["outcome"]
        row = {name: key.get(name) for name in (*PROBLEM, "policy", "seed")} | {"replicas": key.get("replicas", 1)}
        row |= {"network": outcome.get("network", key["network"]), "status": outcome["status"]}
        if key["network"] is None and "network" in outcome:
            default[key["model"], key["cluster"]] = outcome["network"]
        row |= {
            "objective_ms": _ms(outcome.get("objective_ns")),
            "bound_ms": _ms(outcome.get("lower_bound_ns")),
            "gap": outcome.get("gap"),
            "latency_ms": _ms(outcome.get("latency_ns", outcome.get("makespan_ns"))),
            "placements_used": outcome.get("replicas", 1),
            "devices_used": outcome.get("devices_used"),
            "operators": outcome.get("operators"),
            "transfers": outcome.get("transfers"),
            "seconds": result["seconds"],
            "error": outcome.get("error", ""),
        }
        rows.append(row)
    for row in rows:  # a failure does not say which network was the default
        row["network"] = row["network"] or default.get((row["model"], row["cluster"]))
    table = pd.DataFrame(rows)
    if table.empty:
        return table
    answered = table["status"].isin(["optimal", "feasible"])
    table.loc[~answered, ["objective_ms", "latency_ms", "gap"]] = float("nan")
    by_problem = table.groupby(PROBLEM, dropna=False, sort=False)
    table["bound_ms"] = by_problem["bound_ms"].transform("max")
    table["versus_best"] = table["objective_ms"] / by_problem["objective_ms"].transform("min")
    single = table["objective_ms"].where(table["policy"] == "single")
    table["versus_single"] = table["objective_ms"] / single.groupby(
        [table[name] for name in PROBLEM], dropna=False, sort=False
    ).transform("min")
    return table.sort_values([*PROBLEM, "versus_best", "policy", "seed"], kind="stable", ignore_index=True)


def policies_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Return one row a policy over all problems of a study: how often it answers, wins, and how far off it is."""
    import numpy as np

    def geometric_mean(values: pd.Series) -> float:
        known = values.dropna()
        known = known[known > 0]
        return float(np.exp(np.log(known).mean())) if len(known) else float("nan")

    grouped = runs.groupby("policy", sort=True)
    table = grouped.agg(
        runs=("status", "size"),
        answered=("objective_ms", "count"),
        wins=("versus_best", lambda ratio: int((ratio <= 1 + 1e-9).sum())),
        versus_best=("versus_best", geometric_mean),
        versus_single=("versus_single", geometric_mean),
        median_gap=("gap", "median"),
        median_seconds=("seconds", "median"),
    ).reset_index()
    return table.sort_values(["versus_best", "policy"], ignore_index=True)


def _ms(ns: float | None) -> float:
    return float("nan") if ns is None else ns / 1e6
