"""Sharpens a stored cost model by a few measured operators of a device that it was not fitted to."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moirai_sim.catalog import MODEL_FILES, find
from moirai_sim.costs.calibrate import NOTHING_S, PROFILE, cpus_of, hashes, output_shapes, read_profiles, times_table
from moirai_sim.costs.card import FORMAT, error_rows, errors_of, licence
from moirai_sim.costs.catalog_model import LearnedModel, save_cost_model
from moirai_sim.costs.kernels import rows_of, stand_in_for
from moirai_sim.costs.measured import FILE, key_hash, read_table, write_table
from moirai_sim.errors import InputError
from moirai_sim.files import folder_in_place_of
from moirai_sim.profiling.schema import operator_key, read_profile, row_operator, write_profile

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from moirai_sim.costs.estimator import TimeEstimator

POINTS = "points.parquet"
"""What a model was adapted to, in its folder."""
_FOLDS = 5


def adapt(
    profiles: Sequence[Path], base: str | Path, out: Path, *, name: str | None = None, seed: int = 0
) -> dict[str, Any]:
    """Write a copy of a cost model that a few measurements of a new device sharpen; see `TimeEstimator.adapt`.

    Points of an earlier adaptation to the same device are replaced, those to other devices are kept.

    Parameters
    ----------
    profiles
        Of operators, on one or several devices that the model was not fitted to; two operators of each are enough.
    base
        Name or folder of the model.
    out
        Folder to write, whole or not at all: the model with its card, ``measured.json`` (operators that were measured
        on the very device are answered from it), and the reconciled ``points.parquet``.
    name
        Of the model; the folder's name if None.
    seed
        Of the folds.

    Returns
    -------
    dict
        The card. ``adapted`` has for each device its ``points``, how many rows were ``ignored`` because nothing in the
        model answers for their family, and ``unadapted_median_ape``. ``splits`` has the errors of adaptations that did
        not see the points in question, by five folds, as ``left-out points of DEVICE``.

    Raises
    ------
    InputError
        If a profile or the model cannot be read, is of links, or of a device that the model was fitted to, or if there
        are too few points to leave one out.
    """
    frame, links, metadata, dropped = read_profiles(profiles)
    if frame is None or links is not None:
        raise InputError("adapting takes profiles of operators; calibrate links by themselves")
    folder = find("cost-models", base)
    model = LearnedModel(folder)
    frame = frame[(frame["median_s"] > NOTHING_S)].reset_index(drop=True)
    records: list[Any] = frame.to_dict("records")
    keys = np.array([key_hash(operator_key(row_operator(row))) for row in records])
    known = _known(model, frame)
    used = frame[known].reset_index(drop=True)
    splits, facts = [], {}
    for device in sorted(frame["device"].unique()):
        here = (frame["device"] == device).to_numpy()
        rows, before = _held_out(model, frame[here & known].reset_index(drop=True), keys[here & known], device, seed)
        splits += rows
        facts[device] = {
            "points": int((here & known).sum()),
            "ignored": int((here & ~known).sum()),
            "unadapted_median_ape": before,
            "sources": sorted(frame["source"][here].unique()),
            "stack": sorted(frame["stack"][here].unique()),
            "licence": licence(frame["source"][here]),
            "inputs": hashes(profiles),
            "dropped": dropped,
        }
    sharpened = _estimator(model, set(frame["device"])).adapt(used)
    sheets = {part.device.name: part.device for parts in rows_of(used).values() for part in parts}
    sharpened.devices_ |= sheets
    card = _card(model.card, name or out.name, splits, facts, frame)
    with folder_in_place_of(out, MODEL_FILES, [path for path in profiles if path.name != POINTS]) as work:
        save_cost_model(sharpened, work, card)
        devices, cpus, outputs = read_table(folder) if (folder / FILE).is_file() else ({}, {}, {})
        devices, cpus = devices | times_table(frame, keys), cpus | cpus_of(frame, metadata)
        write_table(work, devices, cpus, outputs | output_shapes(frame))
        write_profile(_with_others(frame, folder / POINTS), work / POINTS, metadata={"reconciled": True})
        for kept in ("links.json", PROFILE):
            if (folder / kept).is_file():
                (work / kept).write_bytes((folder / kept).read_bytes())
    return card


def _estimator(model: LearnedModel, anew: Collection[str]) -> TimeEstimator:
    """Return an estimator in the state of a stored model, which adapting it leaves as it is.

    What the model has learned from points of the devices ``anew`` is left out.
    """
    from moirai_sim.costs.estimator import TimeEstimator

    def others(by_device: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in by_device.items() if key.partition("|")[0] not in anew}

    estimator = TimeEstimator()
    estimator.devices_ = others(model.devices)
    estimator.models_ = {
        key: replace(
            family, defaults=others(family.defaults), corrections=others(family.corrections),
            tiles=others(family.tiles), points=others(family.points), point_widths=others(family.point_widths),
        )
        for key, family in model.families.items()
    }  # fmt: skip
    return estimator


def _with_others(frame: pd.DataFrame, earlier: Path) -> pd.DataFrame:
    """Return the points, with those of other devices that the model was adapted to before."""
    import pandas as pd

    if not earlier.is_file():
        return frame
    points, _ = read_profile(earlier)
    return pd.concat([points[~points["device"].isin(frame["device"])], frame], ignore_index=True)


def _known(model: LearnedModel, frame: pd.DataFrame) -> NDArray[np.bool_]:
    """Return which rows an ensemble of the model answers for, [n]; refuse devices that it was fitted to."""
    fitted = {group.split("|", 1)[0] for family in model.families.values() for group in family.groups}
    again = sorted(fitted & set(frame["device"]))
    if again:
        raise InputError(f"{model.folder}: was fitted to {', '.join(again)}; calibrate a model from the profile alone")
    known = np.zeros(len(frame), dtype=bool)
    for key, parts in rows_of(frame).items():
        for part in parts:
            known[part.index] = stand_in_for(model.families, key) is not None
    return known


def _held_out(
    model: LearnedModel, points: pd.DataFrame, keys: NDArray[np.str_], device: str, seed: int
) -> tuple[list[dict[str, Any]], float]:
    """Return the errors of adaptations that did not see the points they price, and the median without any."""
    distinct, group = np.unique(keys, return_inverse=True)
    if len(distinct) < 2:
        raise InputError(
            f"profile: {len(distinct)} operators of '{device}' are of a family that '{model.name}' can price; at least "
            "2 are needed to leave one out"
        )
    fold = np.random.default_rng(seed).permutation(len(distinct))[group] % _FOLDS
    pieces = []
    for i in sorted(set(fold.tolist())):
        fitted = _estimator(model, [device]).adapt(points[fold != i].reset_index(drop=True))
        pieces.append(errors_of(fitted, points[fold == i].reset_index(drop=True)))
    whole = {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}
    before = errors_of(_estimator(model, [device]), points)["ape"]
    return error_rows(f"left-out points of {device}", whole), round(float(np.median(before)), 4)


def _card(
    base: Any,  # noqa: ANN401 - as JSON has it
    name: str,
    splits: list[dict[str, Any]],
    facts: dict[str, Any],
    frame: pd.DataFrame,
) -> dict[str, Any]:
    replaced = {row["split"] for row in splits}
    hardware = dict(frame[["device", "device_type"]].itertuples(index=False, name=None))
    return dict(base) | {
        "format": FORMAT,
        "name": name,
        "base": base.get("name", ""),
        "splits": [row for row in base.get("splits", ()) if row["split"] not in replaced] + splits,
        "adapted": base.get("adapted", {}) | facts,
        "hardware": base.get("hardware", {}) | {device: json.loads(sheet) for device, sheet in hardware.items()},
        "stack": sorted({*base.get("stack", ()), *frame["stack"].unique()}),
    }
