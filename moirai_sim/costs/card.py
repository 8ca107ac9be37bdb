"""Model cards: held-out errors by split and family, what a model rests on, and what may be said of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from moirai_sim.costs.families import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import pandas as pd
    from numpy.typing import NDArray

    from moirai_sim.costs.estimator import TimeEstimator

FORMAT = "moirai-sim/card@1"


def gpu_held_out(profile: pd.DataFrame, estimator: TimeEstimator, *, seed: int = 0) -> list[dict[str, Any]]:
    """Return errors of fits to published measurements of GPUs that did not see the rows they price.

    Splits are ``random`` (a fifth of the operators; equal ones never on both sides), ``larger`` (the tenth of each
    family with most work), and ``left-out device`` (each in turn, pooled) where a family has several.

    `calibrate.held_out` is for our own profiles: whole models were timed too, and leave their operators out together.

    Parameters
    ----------
    profile
        Columns of `moirai_sim.profiling.schema`.
    estimator
        Unfitted; cloned for each fit.
    seed
        Of the random split.

    Returns
    -------
    Rows of split, family, n, mean and median absolute percentage error (fractions) and coverage of the 90 % interval.
    """
    from sklearn.base import clone

    found: list[dict[str, Any]] = []
    shape = profile.groupby(["op_type", "dtype", "input_shapes", "output_shapes", "attributes"], sort=True).ngroup()
    work = (profile["flops"] + profile["read_bytes"]).to_numpy()
    limit = profile["family"].map((profile["flops"] + profile["read_bytes"]).groupby(profile["family"]).quantile(0.9))
    draw = np.random.default_rng(seed).random(int(shape.max()) + 1)
    splits: list[tuple[str, list[NDArray[np.bool_]]]] = [
        ("random", [draw[shape.to_numpy()] < 0.2]),
        ("larger", [work > limit.to_numpy()]),
    ]
    devices = sorted(profile["device"].unique())
    if len(devices) > 1:
        splits.append(("left-out device", [(profile["device"] == device).to_numpy() for device in devices]))
    for split, tests in splits:
        pieces = []
        for test in tests:
            train = profile[~test]
            known = profile["family"].isin(train["family"].unique()).to_numpy()
            test = test & known
            if test.any() and len(train):
                fitted = clone(estimator).fit(train.reset_index(drop=True))
                pieces.append(errors_of(fitted, profile[test].reset_index(drop=True)))
        found += error_rows(
            split, {key: np.concatenate([p[key] for p in pieces]) for key in pieces[0]} if pieces else {}
        )
    return found


def errors_of(estimator: TimeEstimator, test: pd.DataFrame) -> dict[str, NDArray[Any]]:
    """Return ``family``, absolute percentage error ``ape`` and whether the interval holds the time ``inside``, [n]."""
    seconds, low, high, _ = estimator.predict_interval(test)
    truth = test["median_s"].to_numpy()
    family = test["family"].to_numpy(dtype=str)
    return {"family": family, "ape": np.abs(seconds / truth - 1), "inside": (low <= truth) & (truth <= high)}


def error_rows(split: str, errors: Mapping[str, NDArray[Any]]) -> list[dict[str, Any]]:
    """Return the errors of one split by family, and of ``all`` together: rows of a card's ``splits``."""
    rows = []
    for family in sorted(set(errors.get("family", ()))) + (["all"] if errors else []):
        chosen = errors["family"] == family if family != "all" else np.ones(len(errors["ape"]), dtype=bool)
        ape = errors["ape"][chosen]
        rows.append(
            {
                "split": split, "family": str(family), "n": len(ape), "mean_ape": round(float(ape.mean()), 4),
                "median_ape": round(float(np.median(ape)), 4),
                "coverage": round(float(errors["inside"][chosen].mean()), 4),
            }
        )  # fmt: skip
    return rows


def licence(sources: Iterable[str]) -> str:
    """Return under which terms a model stands whose measurements have these sources (``measured``, or citations)."""
    published = sorted(set(sources) - {"measured"})
    own = "measurements by whoever ran 'calibrate' and parameters fitted to them, theirs to pass on"
    return f"{own}; measurements of others under the licences of {'; '.join(published)}" if published else own


def known_errors(card: Mapping[str, Any]) -> str:
    """Return one line on how wrong a model is on what it did not see, as far as its card knows.

    A model is called calibrated only where errors on a hold-out stand in its card.
    """
    for family, what in (("all", "kernels"), ("all links", "transfers")):
        whole = [row for row in card.get("splits", ()) if row["family"] == family]
        if whole:
            return "calibrated; median error held out: " + _by_split(
                {row["split"]: f"{row['median_ape']:.0%} ({row['n']:,} {what})" for row in whole}
            )
    if card.get("splits"):
        worst = max(row["median_ape"] for row in card["splits"])
        return f"calibrated; median error held out: at most {worst:.0%} in {len(card['splits'])} splits"
    widths = card.get("held_out_p90_abs_log_error")
    if not widths:
        return "uncalibrated: nothing was held out"
    found = {}
    for split in ("random", "larger", "device"):
        each = [np.exp(width) for family in widths.values() for width in family[split]]
        found[split] = f"{min(each):.2f} to {max(each):.2f}"
    return "not calibrated (no errors by split); 90% of held-out kernels within a factor of " + _by_split(found)


def _by_split(figures: Mapping[str, str]) -> str:
    return ", ".join(f"{split} {figure}" for split, figure in figures.items())


def gpu_card(
    name: str,
    profile: pd.DataFrame,
    splits: Sequence[Mapping[str, Any]],
    learning: Sequence[Mapping[str, Any]],
    widths: Mapping[str, Mapping[str, Sequence[float]]],
) -> dict[str, Any]:
    """Return the card of a model that was fitted to published measurements of GPUs.

    ``splits`` may be empty where nobody measured them; ``widths`` (of `FamilyModel`, by key) say what is known then.
    """
    hardware = profile.drop_duplicates("device")[["device", "device_type"]]
    return {
        "format": FORMAT,
        "name": name,
        "data": sorted(profile["source"].unique().tolist()),
        "licence": "fitted parameters only; the measurements stay under the licences that data names",
        "rows": len(profile),
        "hardware": {device: json.loads(sheet) for device, sheet in hardware.itertuples(index=False)},
        "stack": sorted(profile["stack"].unique().tolist()),
        "splits": [dict(row) for row in splits],
        "held_out_p90_abs_log_error": {key: dict(kinds) for key, kinds in widths.items()},
        "learning_curve": [dict(row) for row in learning],
        "stand_ins": (
            f"No kernels of {', '.join(sorted(set(FAMILIES) - set(profile['family'])))} were measured: a stand-in "
            "(element-wise, then normalisation) prices them, and flags them. Neither were fused kernels, nor grouped "
            "and depthwise convolutions, which their family prices by size."
        ),
        "not_for": (
            "CPUs and devices other than NVIDIA GPUs; training steps; kernels beside others on one device; attention "
            "of many queries that is not causal; sums of very small operators, where the host decides; operators "
            "flagged as extrapolated without looking at their interval"
        ),
    }
