"""Fits a cost model to profiles, and says how wrong it is on what it did not see."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moirai_sim.catalog import MODEL_FILES
from moirai_sim.costs.card import FORMAT, licence
from moirai_sim.costs.measured import Times, key_hash, write_table
from moirai_sim.errors import InputError
from moirai_sim.files import folder_in_place_of, sha256
from moirai_sim.profiling.schema import operator_key, read_profile, row_operator, write_profile
from moirai_sim.profiling.sweep import PREFIX

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

PROFILE = "profile.parquet"
"""What a model was fitted to, in its folder."""
_MIN_ROWS = 30
NOTHING_S = 20e-9
"""Below what the clock and the spread of a session's overhead resolve (views): measured, but nothing to learn from."""
_MOST_WITH_INTERVALS = 4
"""Most fits of a split for which intervals are fitted too, which take some five more each."""
_SHARES = (0.125, 0.25, 0.5)
"""Of the operators that the random split leaves to fit to: what fewer would have given."""
_OF_LINKS = ("sources", "hardware", "stack", "rows", "learning_curve")
"""Keys of a link model's card that go into that of the whole model."""
_SPREAD = (0.4, 2.5)
"""Bounds of (sum of operators) / (whole model): outside of them the profile is not of what ran."""
_UNDISTURBED = (0.85, 1.18)
"""The same for networks of a sweep: one outside of them was disturbed, and is dropped; the card names it."""


def calibrate(profiles: Sequence[Path], out: Path, *, name: str | None = None, seed: int = 0) -> dict[str, Any]:
    """Fit a cost model (and a link model, from profiles of links) and write it with its card.

    Times of operators are first reconciled: those of a model that was also timed whole are scaled so that they add up
    to it. Held-out errors come from fits that did not see the rows in question: a random fifth of the operators, the
    largest tenth of each family, each network (all its sizes) in turn, each device in turn.

    Parameters
    ----------
    profiles
        Profiles of operators and of links, in any order.
    out
        Folder to write: ``card.json``, the model, ``measured.json`` (operators that were measured on the very device
        are answered from it), the reconciled ``profile.parquet``, and ``links.json``. Whole or not at all; an earlier
        model in that place is replaced.
    name
        Of the model; the folder's name if None.
    seed
        Of the random hold-out.

    Returns
    -------
    dict
        The card. ``splits``: rows of split, family, n, mean and median absolute percentage error (fractions) and
        coverage of the 90 % interval. ``dropped``: networks of a sweep that were disturbed when they were timed, with
        the ratio that tells, so neither fitted nor among the errors.

    Raises
    ------
    InputError
        If a profile cannot be read, or there is too little to hold anything out: such a model is not called calibrated.
    """
    operators, links, metadata, dropped = read_profiles(profiles)
    name = name or out.name
    card: dict[str, Any] = {
        "format": FORMAT,
        "name": name,
        "seed": seed,
        "inputs": hashes(profiles),
        "splits": [],
        "dropped": dropped,
    }
    with folder_in_place_of(out, MODEL_FILES, [path for path in profiles if path.name != PROFILE]) as folder:
        if links is not None:
            from moirai_sim.costs.links_fit import fit_links

            link_model = fit_links(links, name, seed=seed)
            link_model.write(folder)
            card["links"] = {key: link_model.card[key] for key in _OF_LINKS}
            card["splits"] += link_model.card["splits"]
        if operators is not None:
            _fit(operators, metadata, folder, card, seed)
        else:
            card |= {"data": card["links"]["sources"], "licence": licence(card["links"]["sources"])}
            card["not_for"] = (
                "devices and libraries other than those under 'links', links that others use at the same time, and "
                "numbers of participants across other wires than those measured: see the split of those left out"
            )
            _write_card(folder, card)
    return card


def hashes(profiles: Sequence[Path]) -> dict[str, str]:
    """Return the SHA-256 of each profile by its name, or as it was given where others have the same name."""
    times = Counter(path.name for path in profiles)
    return {path.name if times[path.name] == 1 else path.as_posix(): sha256(path) for path in profiles}


def read_profiles(
    profiles: Sequence[Path],
) -> tuple[pd.DataFrame | None, pd.DataFrame | None, list[dict[str, Any]], dict[str, float]]:
    """Return rows of operators and of links, the metadata of each profile, and the ratios of networks left out."""
    import pandas as pd

    from moirai_sim.profiling.schema import profile_kind

    if not profiles:
        raise InputError("no profile to calibrate from; write one with 'profile operators' or 'profile links'")
    found: dict[str, list[pd.DataFrame]] = {"operators": [], "links": []}
    metadata: list[dict[str, Any]] = []
    dropped: dict[str, float] = {}
    for path in profiles:
        kind = profile_kind(path)
        frame, facts = read_profile(path, kind=kind)
        if kind == "operators":
            frame, disturbed = _reconciled(frame, facts, path)
            dropped |= disturbed
        found[kind].append(frame)
        metadata += facts.get("profiles", [facts])  # a model's own profile may be of several
    whole = [pd.concat(frames, ignore_index=True) if frames else None for frames in found.values()]
    return None if whole[0] is None else _one_sheet_each(whole[0]), whole[1], metadata, dropped


def _one_sheet_each(frame: pd.DataFrame) -> pd.DataFrame:
    """Give every device one data sheet: the best of the limits that several profiles of it measured."""
    merged = {}
    for device, texts in frame.groupby("device", sort=True)["device_type"].unique().items():
        sheets = [json.loads(text) for text in sorted(texts)]
        sheet = dict(sheets[0])
        sheet["memory_bandwidth_bytes_per_s"] = max(one["memory_bandwidth_bytes_per_s"] for one in sheets)
        sheet["peak_flops"] = {
            dtype: max(one["peak_flops"].get(dtype, 0.0) for one in sheets)
            for dtype in sorted({dtype for one in sheets for dtype in one["peak_flops"]})
        }
        merged[device] = json.dumps(sheet, sort_keys=True, separators=(",", ":"))
    return frame.assign(device_type=frame["device"].map(merged))


def _reconciled(frame: pd.DataFrame, metadata: dict[str, Any], path: Path) -> tuple[pd.DataFrame, dict[str, float]]:
    """Scale the operators of each model so that they add up to the time of the whole model.

    Returns that and the ratios of the networks that were disturbed, whose rows are left out.
    A model's rows and its whole run are told by its name, so a profile that was reconciled before is not scaled again.
    """
    scaled, disturbed = frame.copy(), {}
    for model, facts in metadata.get("models", {}).items():
        ratio = float(facts["ratio"])
        rows = scaled["model"] == model
        if model.startswith(PREFIX) and not _UNDISTURBED[0] < ratio < _UNDISTURBED[1]:
            scaled, disturbed[model] = scaled[~rows], ratio  # a network drawn at random can be spared
            continue
        if not _SPREAD[0] < ratio < _SPREAD[1]:
            raise InputError(
                f"{path}: the operators of '{model}' add up to {ratio:.2f} of the whole model; the machine was "
                "busy, or the profile is not of what ran: profile it again"
            )
        for column in ("min_s", "p10_s", "median_s", "mean_s", "p90_s"):
            scaled.loc[rows, column] /= ratio
    return scaled, disturbed


def _fit(frame: pd.DataFrame, metadata: list[dict[str, Any]], folder: Path, card: dict[str, Any], seed: int) -> None:
    from moirai_sim.costs.catalog_model import save_cost_model

    records: list[Any] = frame.to_dict("records")
    keys = np.array([key_hash(operator_key(row_operator(row))) for row in records])
    lasting = (frame["median_s"] > NOTHING_S).to_numpy()
    learned = frame[lasting].reset_index(drop=True)
    if len(learned) < _MIN_ROWS:
        raise InputError(
            f"profile: {len(learned)} operators take time, at least {_MIN_ROWS} are needed to hold some out, and a "
            "model without a hold-out is not calibrated; profile more models"
        )
    splits = held_out(learned, keys[lasting], seed)
    if not splits:
        raise InputError(
            f"profile: {len(learned)} operators are too few to hold some out and fit to {_MIN_ROWS}, and a model "
            "without a hold-out is not calibrated; profile more models"
        )
    from moirai_sim.costs.estimator import estimator_for

    estimator = estimator_for(learned, intervals=True).fit(learned)
    facts: dict[str, Any] = metadata[0] if len(metadata) == 1 else {"profiles": metadata}
    card["splits"] += splits
    card |= {
        "rows": len(frame),
        "sources": sorted(frame["source"].unique()),
        "licence": licence({*frame["source"], *card.get("links", {}).get("sources", ())}),
        "learning_curve": learning_curve(learned, keys[lasting], seed),
        "models": sorted(model for model in frame["model"].unique() if model),
        "hardware": {device: json.loads(sheet) for device, sheet in _pairs(frame, "device", "device_type")},
        "stack": sorted(frame["stack"].unique()),
        "backend": sorted(frame["backend"].unique()),
        "reconciliation": {
            model: {key: found[key] for key in ("median_s", "operators_s", "ratio")}
            for facts_of in metadata
            for model, found in facts_of.get("models", {}).items()
        },
        "machine": [facts_of["hardware"] for facts_of in metadata if "hardware" in facts_of],
        "not_for": (
            "other hardware or versions than those named here, several requests at once on one device, "
            "and operators flagged as extrapolated without looking at their interval"
        ),
    }
    save_cost_model(estimator, folder, card)
    write_table(folder, times_table(frame, keys), cpus_of(frame, metadata), output_shapes(frame))
    kept = frame.sort_values(["device", "model", "family", "name"], kind="stable")
    write_profile(kept, folder / PROFILE, metadata={"reconciled": True, **_without_models(facts)})


def _write_card(folder: Path, card: dict[str, Any]) -> None:
    from moirai_sim.files import write_whole

    write_whole(folder / "card.json", json.dumps(card, indent=1, sort_keys=True) + "\n")


def held_out(frame: pd.DataFrame, keys: NDArray[Any], seed: int) -> list[dict[str, Any]]:
    """Return errors on rows that the fit did not see, by split and family, with ``all`` for all families together.

    Equal operators (``keys``) are never on both sides of a split but that by device: what they take on another one is
    what such a fit carries over.
    """
    from moirai_sim.costs.estimator import estimator_for

    rows = []
    for split, masks in _splits(frame, keys, seed):
        intervals = len(masks) <= _MOST_WITH_INTERVALS
        truth, guess, low, high, families = [], [], [], [], []
        for test in masks:
            train = ~test if split == "device" else ~test & ~np.isin(keys, keys[test])
            if not test.any() or train.sum() < _MIN_ROWS:
                continue
            fitted = estimator_for(frame, intervals=intervals).fit(frame[train].reset_index(drop=True))
            predicted, below, above, _ = fitted.predict_interval(frame[test].reset_index(drop=True))
            truth.append(frame["median_s"].to_numpy()[test])
            families.append(frame["family"].to_numpy()[test])
            guess.append(predicted)
            low.append(below)
            high.append(above)
        if not truth:
            continue
        time, name = np.concatenate(truth), np.concatenate(families)
        error = np.abs(np.concatenate(guess) / time - 1)
        inside = (np.concatenate(low) <= time) & (time <= np.concatenate(high))
        for family in [*sorted(set(name)), "all"]:
            chosen = (name == family) | (family == "all")
            weight = time[chosen] / time[chosen].sum()
            rows.append(
                {
                    "split": split,
                    "family": str(family),
                    "n": int(chosen.sum()),
                    "mean_ape": float(error[chosen].mean()),
                    "median_ape": float(np.median(error[chosen])),
                    "coverage": float(inside[chosen].mean()) if intervals else None,
                    "time_weighted_ape": float((error[chosen] * weight).sum()),
                }
            )
    return rows


def learning_curve(frame: pd.DataFrame, keys: NDArray[Any], seed: int) -> list[dict[str, Any]]:
    """Return the errors on the random split's rows of fits to a share of the other operators: how many rows are enough.

    Shares that lack a family, or have too few rows to fit to, are left out; all rows are the split itself.
    """
    from moirai_sim.costs.estimator import estimator_for

    test = next(_splits(frame, keys, seed))[1][0]
    rest, asked = frame[~test], frame[test].reset_index(drop=True)
    distinct, group = np.unique(keys[~test], return_inverse=True)
    rank = np.random.default_rng(seed).permutation(len(distinct))[group] / len(distinct)
    found = []
    for share in _SHARES:
        part = rest[rank < share].reset_index(drop=True)
        if len(part) < _MIN_ROWS or set(asked["family"]) - set(part["family"]):
            continue
        fitted = estimator_for(frame, intervals=False).fit(part)
        error = np.abs(fitted.predict(asked) / asked["median_s"].to_numpy() - 1)
        found.append({"rows": len(part), "mean_ape": float(error.mean()), "median_ape": float(np.median(error))})
    return found


def _splits(frame: pd.DataFrame, keys: NDArray[Any], seed: int) -> Iterator[tuple[str, list[NDArray[np.bool_]]]]:
    rng = np.random.default_rng(seed)
    distinct, group = np.unique(keys, return_inverse=True)
    yield "random", [rng.permutation(len(distinct))[group] < max(1, len(distinct) // 5)]
    work = (frame["flops"] + frame["read_bytes"] + frame["write_bytes"]).to_numpy(np.float64)
    larger = np.zeros(len(frame), dtype=bool)
    for members in frame.groupby(["device", "family"], sort=True).indices.values():
        larger[members] = work[members] > np.quantile(work[members], 0.9)
    yield "larger", [larger]
    network = frame["model"].str.partition("?")[0]  # its other batches and lengths have the same layers
    networks = sorted(name for name in network.unique() if name and not name.startswith(PREFIX))
    if len(networks) > 1:
        yield "model", [(network == name).to_numpy() for name in networks]
    devices = sorted(frame["device"].unique())
    if len(devices) > 1:
        yield "device", [(frame["device"] == device).to_numpy() for device in devices]


def times_table(frame: pd.DataFrame, keys: NDArray[Any]) -> dict[str, dict[str, Times]]:
    """Return the mean over models of the median, 10th and 90th percentile of each operator, by device and key.

    Only our own measurements: published ones are of other people's machines.
    """
    own = (frame["source"] == "measured").to_numpy()
    table: dict[str, dict[str, Times]] = {}
    grouped = frame[own].assign(key=keys[own]).groupby(["device", "key"], sort=True)
    means = grouped[["median_s", "p10_s", "p90_s"]].mean().reset_index()
    for device, key, middle, low, high in means.itertuples(index=False, name=None):
        table.setdefault(str(device), {})[str(key)] = (float(middle), float(low), float(high))
    return table


def output_shapes(frame: pd.DataFrame) -> dict[str, set[tuple[int, ...]]]:
    """Return the shapes of the first outputs of what `times_table` holds, by device."""
    own = frame[frame["source"] == "measured"]
    texts = own.groupby("device", sort=True)["output_shapes"].unique()
    return {str(device): {tuple((json.loads(text) or [()])[0]) for text in found} for device, found in texts.items()}


def cpus_of(frame: pd.DataFrame, metadata: list[dict[str, Any]]) -> dict[str, str]:
    """Return the CPU, as its maker spells it, of each device that is cores of it, where all profiles are of one."""
    names = {facts["hardware"]["cpu"] for facts in metadata if "hardware" in facts}
    if len(names) != 1:
        return {}
    sheets = dict(_pairs(frame[frame["source"] == "measured"], "device", "device_type"))
    cpu = names.pop()
    return {device: cpu for device, sheet in sheets.items() if json.loads(sheet)["kind"] == "cpu"}


def _pairs(frame: pd.DataFrame, *columns: str) -> list[tuple[Any, ...]]:
    return sorted(frame[list(columns)].drop_duplicates().itertuples(index=False, name=None))


def _without_models(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key != "models"}
