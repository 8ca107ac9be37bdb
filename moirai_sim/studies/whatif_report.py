"""Report of a ``whatif`` study: what each change is worth, what pays most, and what the model cannot tell apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moirai_sim.evidence import difference_interval, interval
from moirai_sim.studies.page import Report, Section
from moirai_sim.studies.prices import price_eur
from moirai_sim.studies.sizes_report import size_sections
from moirai_sim.studies.whatif import ANSWER, BASE, SIZES
from moirai_sim.units import number_of, unit_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    import plotly.graph_objects as go

    from moirai_sim.studies.store import Store

NO_DIFFERENCE = "no difference beyond the model's error"
TOLERANCE = 0.01
"""A placement breaks where placing anew is better by more than this share."""
HELD = "Solid: placed anew for each value. Dashed: the placement of the base, kept."
BREAKS = (
    "The range of each swept value in which the base's placement stays within 1 % of placing anew (and meets the "
    "target, if there is one), the nearest values outside it, and what keeping it costs there: its time over that of a "
    "new one."
)


def build(study: dict[str, Any], store: Store) -> Report:
    """Return the report of a ``whatif`` folder."""
    if next(store.read(), None) is None:
        return Report(study["name"], "no variant has finished", [("variants", "0")], [], {"study": study})
    table = variants_table(store, study.get("prices", {}))
    answered = table.dropna(subset=["objective_ms"])
    gains = answered[answered["verdict"] == "faster"]
    cards = [
        ("variants", f"{len(table):,}"),
        ("failed", f"{int((table['status'] == 'error').sum()):,}"),
        ("pruned by a bound", f"{int((table['status'] == 'pruned').sum()):,}"),
        ("faster than the base", f"{len(gains):,}"),
        ("no difference beyond error", f"{int((answered['verdict'] == NO_DIFFERENCE).sum()):,}"),
    ]
    sections = [
        Section("Tornado", "Largest gain and loss of each scenario against the base.", picture=_tornado(answered)),
        Section("What pays", _pays_text(answered), rows=_pays(answered)),
    ]
    if answered["price_eur"].notna().any():
        text = "On the front are the variants that no other beats in price, time and energy at once; they are listed."
        known, front = _front(answered)
        picture = _pareto_picture(known, front)
        listed = known[front].sort_values("price_eur")[["model", "changes", "price_eur", "objective_ms", "energy_j"]]
        listed = listed.dropna(axis="columns", how="all")
        sections.append(Section("Cost against time", text, picture=picture, rows=listed))
    sections += [Section(f"As {key} changes", HELD, picture=_sweep(answered, key)) for key in _swept(answered)]
    broken = breaks(table)
    if len(broken):
        sections.append(Section("Where the placement of the base breaks", BREAKS, rows=broken))
    sections = size_sections(study, store) + sections
    if study.get("target"):
        sections.insert(0, Section("Reaching the target", _target_text(table, study["target"]), rows=_reaching(table)))
    failed = table[table["status"] == "error"]
    if len(failed):
        sections.append(Section("Failed variants", rows=failed[["model", "scenario", "changes", "error"]]))
    shown = table.drop(columns=["error", "overrides"]).dropna(axis="columns", how="all")
    sections.append(Section("All variants", "Click a heading to sort.", rows=shown))
    return Report(study["name"], study.get("description", ""), cards, sections, {"study": study})


def variants_table(store: Store, prices: Mapping[str, float] | None = None) -> pd.DataFrame:
    """Return one row a variant: the objective with its 90 % interval, and the speed-up over the base with its own.

    ``prices`` are those of the study; sizes that a search tried are not variants and are left out.

    ``verdict`` is "faster", "slower", or that the difference is within what the cost model's error allows.
    """
    import pandas as pd

    results = [r for r in store.read() if r["key"]["scenario"] not in (SIZES, ANSWER)]
    for result in results:
        found = result["outcome"].get("parts")
        result["outcome"]["price_eur"] = None if found is None else price_eur(found, prices or {})
    base = {r["key"]["model"]: r["outcome"] for r in results if r["key"]["scenario"] == BASE}
    rows = []
    for result in results:
        key, outcome = result["key"], result["outcome"]
        found = outcome["status"] in ("optimal", "feasible")
        row = {
            "model": key["model"],
            "scenario": key["scenario"],
            "changes": ", ".join(f"{name} = {value}" for name, value in key["overrides"].items()),
            "overrides": key["overrides"],
            "status": outcome["status"],
            "objective_ms": outcome["objective_ns"] / 1e6 if found else float("nan"),
            "held_ms": (outcome.get("held_ns") or float("nan")) / 1e6,
            "target_ms": (key["target_ns"] or float("nan")) / 1e6,
            "gap": outcome.get("gap"),
            "devices": outcome.get("devices"),
            "devices_used": outcome.get("devices_used"),
            "price_eur": outcome.get("price_eur"),
            "energy_j": outcome.get("energy_j"),
            "error": outcome.get("error", ""),
        }
        reference = base.get(key["model"], {})
        if found:
            low, high = interval(outcome["log_spread"])
            row |= {"low_ms": row["objective_ms"] * low, "high_ms": row["objective_ms"] * high}
        if found and reference.get("objective_ns"):
            row |= _against(reference, outcome)
        rows.append(row)
    columns = ["low_ms", "high_ms", "speed_up", "speed_up_low", "speed_up_high", "verdict", "euro_per_ms_saved"]
    table = pd.DataFrame(rows)
    for name in columns:
        if name not in table:
            table[name] = None if name == "verdict" else float("nan")
    for name in ("gap", "price_eur", "energy_j"):
        table[name] = pd.to_numeric(table[name])
    is_base = (table["scenario"] != BASE).astype(int)
    return (
        table.assign(order=is_base)
        .sort_values(["model", "order", "scenario", "changes"], kind="stable")
        .drop(columns="order")
    )


def _against(base: dict[str, Any], outcome: dict[str, Any]) -> dict[str, Any]:
    speed_up = base["objective_ns"] / outcome["objective_ns"]
    low, high = difference_interval(base["log_spread"], outcome["log_spread"])
    verdict = "faster" if speed_up * low > 1 else "slower" if speed_up * high < 1 else NO_DIFFERENCE
    saved_ms = (base["objective_ns"] - outcome["objective_ns"]) / 1e6
    extra = None
    if base.get("price_eur") is not None and outcome.get("price_eur") is not None:
        extra = outcome["price_eur"] - base["price_eur"]
    pays = extra is not None and saved_ms > 0 and verdict == "faster"
    return {
        "speed_up": speed_up,
        "speed_up_low": speed_up * low,
        "speed_up_high": speed_up * high,
        "verdict": verdict,
        "euro_per_ms_saved": extra / saved_ms if pays and extra is not None else float("nan"),
    }


def pareto(table: pd.DataFrame, columns: list[str]) -> pd.Series:
    """Tell which rows no other row beats or equals in all columns and beats in one; smaller is better."""
    import pandas as pd

    values = table[columns].to_numpy(dtype=float)
    best = [not ((values <= row).all(axis=1) & (values < row).any(axis=1)).any() for row in values]
    return pd.Series(best, index=table.index)


def _pays(table: pd.DataFrame) -> pd.DataFrame:
    gains = table[table["verdict"] == "faster"]
    columns = [
        "model",
        "scenario",
        "changes",
        "speed_up",
        "speed_up_low",
        "speed_up_high",
        "price_eur",
        "euro_per_ms_saved",
    ]
    return gains.sort_values(["euro_per_ms_saved", "speed_up"], ascending=[True, False])[columns].head(50)


def _pays_text(table: pd.DataFrame) -> str:
    priced = table.dropna(subset=["euro_per_ms_saved"]).sort_values("euro_per_ms_saved")
    if priced.empty:
        return "Gains beyond the model's error, largest first. Give the study prices to rank them by price."
    best = priced.iloc[0]
    return f"Most for the money: {best['changes']} ({best['euro_per_ms_saved']:,.0f} EUR for each millisecond saved)."


def _reaching(table: pd.DataFrame) -> pd.DataFrame:
    reached = table[table["objective_ms"] <= table["target_ms"]]
    return reached.sort_values(["price_eur", "devices", "objective_ms"])[
        ["model", "scenario", "changes", "devices", "price_eur", "objective_ms", "low_ms", "high_ms"]
    ].head(50)


def _target_text(table: pd.DataFrame, target: str) -> str:
    pruned = int((table["status"] == "pruned").sum())
    ruled_out = f" A lower bound ruled {pruned} variants out without placing them." if pruned else ""
    several = table["model"].nunique() > 1
    by_model = table.groupby("model", sort=False)
    found = [(f"{model}: " if several else "") + _smallest(rows, target) for model, rows in by_model]
    return " ".join(found) + ruled_out


def _smallest(table: pd.DataFrame, target: str) -> str:
    """Return a sentence on the smallest variant that reaches the target with one model."""
    reached = _reaching(table)
    if reached.empty:
        return f"No variant reaches {target}."
    first = reached.iloc[0]
    sure = first["high_ms"] <= table["target_ms"].iloc[0]
    certainty = "also at the upper end of its interval" if sure else "but not at the upper end of its interval"
    return f"Smallest that reaches {target}: {first['changes'] or 'the base'} ({certainty})."


def _tornado(table: pd.DataFrame) -> go.Figure:
    import plotly.graph_objects as go

    changed = table[table["scenario"] != BASE]
    spans = changed.groupby("scenario")["speed_up"].agg(["min", "max"])
    spans = spans.assign(width=spans["max"].clip(lower=1) - spans["min"].clip(upper=1)).sort_values("width")
    figure = go.Figure()
    for label, side in (("slower", spans["min"].clip(upper=1)), ("faster", spans["max"].clip(lower=1))):
        figure.add_bar(y=list(spans.index), x=side - 1, base=1, orientation="h", name=label)
    figure.update_layout(
        barmode="overlay", height=140 + 28 * len(spans), margin={"l": 10, "r": 10, "t": 30, "b": 10},
        xaxis={"title": "speed-up over the base", "automargin": True}, yaxis={"automargin": True},
    )  # fmt: skip
    return figure


def _front(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    """Return the variants whose price is known, and which of them no other beats."""
    known = table.dropna(subset=["price_eur"])
    columns = ["price_eur", "objective_ms"] + (["energy_j"] if known["energy_j"].notna().all() else [])
    front = known["price_eur"].isna()
    for _, rows in known.groupby("model", sort=False):  # models do not compete
        front[rows.index] = pareto(rows, columns)
    return known, front


def _pareto_picture(known: pd.DataFrame, front: pd.Series) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    for label, rows in (("beaten by another", known[~front]), ("Pareto front", known[front])):
        figure.add_scatter(
            x=rows["price_eur"], y=rows["objective_ms"], mode="markers", name=label, text=rows["changes"],
            marker={"size": 9}, error_y={
                "type": "data", "symmetric": False, "thickness": 1,
                "array": rows["high_ms"] - rows["objective_ms"], "arrayminus": rows["objective_ms"] - rows["low_ms"],
            },
            hovertemplate="%{text}<br>%{x:,.0f} EUR, %{y:.4g} ms<extra></extra>",
        )  # fmt: skip
    figure.update_layout(
        height=440, margin={"l": 10, "r": 10, "t": 30, "b": 10},
        xaxis={"title": "price, EUR", "automargin": True}, yaxis={"title": "objective, ms", "automargin": True},
    )  # fmt: skip
    return figure


def breaks(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row a sweep of one key: where the base's placement holds, and what keeping it costs outside.

    It holds where its objective is within `TOLERANCE` of placing anew and meets the target, if there is one.
    """
    import numpy as np
    import pandas as pd

    rows = []
    single = table[table["overrides"].map(len) == 1]
    keys = single["overrides"].map(lambda overrides: next(iter(overrides)))
    numbers = single["overrides"].map(lambda overrides: number_of(next(iter(overrides.values()))))
    single = single.assign(key=keys, number=numbers).dropna(subset=["number"])
    for (model, key), group in single.groupby(["model", "key"], sort=True):
        swept = group.drop_duplicates("number").sort_values("number")
        if len(swept) < 3 or not swept["held_ms"].notna().any():
            continue
        cost = (swept["held_ms"] / swept["objective_ms"]).to_numpy()
        late = (swept["held_ms"] > swept["target_ms"]).to_numpy()
        holds = (cost <= 1 + TOLERANCE) & ~late
        names = [next(iter(overrides.values())) for overrides in swept["overrides"]]
        row = {"model": model, "swept": key, "holds from": "", "holds to": "", "breaks below": "", "breaks above": ""}
        row |= {"cost below": float("nan"), "cost above": float("nan")}
        if holds.any():
            edges = np.flatnonzero(np.diff(np.concatenate([[0], holds.astype(int), [0]])))
            first, end = max(edges.reshape(-1, 2).tolist(), key=lambda run: run[1] - run[0])
            row |= {"holds from": names[first], "holds to": names[end - 1]}
            if first > 0:
                row |= {"breaks below": names[first - 1], "cost below": float(cost[first - 1])}
            if end < len(names):
                row |= {"breaks above": names[end], "cost above": float(cost[end])}
        rows.append(row)
    return pd.DataFrame(rows)


def _swept(table: pd.DataFrame) -> list[str]:
    """Return the keys that take at least three numeric values somewhere."""
    from collections import defaultdict

    values: dict[str, set[float]] = defaultdict(set)
    for overrides in table["overrides"]:
        for key, value in overrides.items():
            number = number_of(value)
            if number is not None:
                values[key].add(number)
    return sorted(key for key, found in values.items() if len(found) >= 3)


def _sweep(table: pd.DataFrame, key: str) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    rows = table[table["overrides"].map(lambda overrides: key in overrides)]
    unit = next(filter(None, (unit_of(overrides[key]) for overrides in rows["overrides"])), "")  # 0 may have none
    scale = number_of(f"1 {unit}") or 1.0
    for (model, scenario), group in rows.groupby(["model", "scenario"], sort=True):
        numbers = group["overrides"].map(lambda overrides: number_of(overrides[key]))
        group = group.assign(number=numbers / scale).sort_values("number")
        figure.add_scatter(
            x=group["number"], y=group["objective_ms"], mode="lines+markers", name=f"{scenario} · {model}",
            text=group["devices_used"],
            hovertemplate="%{x}: %{y:.4g} ms on %{text} devices<extra></extra>", legendgroup=f"{scenario} · {model}",
        )  # fmt: skip
        if group["held_ms"].notna().any():
            figure.add_scatter(
                x=group["number"], y=group["held_ms"], mode="lines", line={"dash": "dash"}, showlegend=False,
                legendgroup=f"{scenario} · {model}",
                hovertemplate="%{x}: %{y:.4g} ms with the placement of the base<extra></extra>",
            )  # fmt: skip
    figure.update_layout(
        height=420, margin={"l": 10, "r": 10, "t": 30, "b": 10},
        xaxis={"title": f"{key}{f', {unit}' if unit else ''}", "automargin": True},
        yaxis={"title": "objective, ms", "automargin": True},
    )  # fmt: skip
    return figure
