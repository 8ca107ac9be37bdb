"""Fits link models to profiles of links, and says how wrong they are on what they did not see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moirai_sim.costs.links import Curve, Group, LinkModel
from moirai_sim.errors import InputError
from moirai_sim.profiling.schema import LINK_DEFAULTS

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    Sizes = NDArray[np.int64]
    Times = NDArray[np.float64]

ALL = "all links"
"""Family under which the errors of all collectives together stand in a card."""
_KNOTS = (24, 96)
"""Numbers of knots to choose from: more where protocols change at steps that few would smooth away."""
_FOLDS = 5
_HOLD_OUT = 0.2
_LARGEST = 0.1
_LEAST_SIZES = 5
_EVERY = (8, 4, 2)
"""Steps through the sizes that are not held out at random: what fewer would have given."""


def fit_curve(size: Sizes, time_s: Times) -> Curve:
    """Fit a monotone curve: isotonic regression of log(time) over log(size), thinned to at most 24 or 96 knots.

    How many, cross-validation within the given points decides.
    """
    from sklearn.isotonic import IsotonicRegression

    sizes, inverse = np.unique(size, return_inverse=True)
    middle = np.array([np.median(time_s[inverse == i]) for i in range(len(sizes))])
    weight = np.bincount(inverse).astype(np.float64)

    def fitted(chosen: NDArray[np.intp], knots: int) -> Curve:
        x, y = np.log(sizes[chosen]), np.log(middle[chosen])
        smooth = IsotonicRegression().fit_transform(x, y, sample_weight=weight[chosen])
        if len(chosen) > knots:
            grid = np.unique(np.geomspace(sizes[chosen[0]], sizes[chosen[-1]], knots).round().astype(np.int64))
            return Curve(tuple(grid.tolist()), tuple(np.exp(np.interp(np.log(grid), x, smooth)).tolist()))
        return Curve(tuple(sizes[chosen].tolist()), tuple(np.exp(smooth).tolist()))

    everything = np.arange(len(sizes))
    if len(sizes) <= _KNOTS[-1] * 2:
        return fitted(everything, _KNOTS[0] if len(sizes) <= _KNOTS[0] * 2 else _KNOTS[-1])
    errors = []
    for knots in _KNOTS:
        found = []
        for fold in range(_FOLDS):
            out = everything % _FOLDS == fold
            guess = fitted(everything[~out], knots).seconds(sizes[out])
            found.append(np.abs(guess / middle[out] - 1))
        errors.append(float(np.concatenate(found).mean()))
    return fitted(everything, _KNOTS[int(np.argmin(errors))])


def fit_links(frame: pd.DataFrame, name: str, *, seed: int = 0) -> LinkModel:
    """Fit a link model to a link profile and say how well it predicts what it did not see.

    The card's ``splits`` hold, for each collective and for `ALL` of them, and its ``groups`` for each group of devices,
    the errors on a random fifth of the sizes and on the largest
    tenth of them, and for collectives that were measured among several numbers of participants those of each number,
    each left out of the fit.

    Raises
    ------
    InputError
        If a group has fewer than five sizes: nothing could be held out.
    """
    points = {group: (size, time_s) for group, size, time_s in _groups(frame)}
    problems = [
        f"links: {_label(group)} has {len(np.unique(size))} sizes; profile at least {_LEAST_SIZES} to hold out some"
        for group, (size, _) in points.items()
        if len(np.unique(size)) < _LEAST_SIZES
    ]
    if problems:
        raise InputError(problems)
    curves: dict[Group, Curve] = {}
    found: dict[str, list[tuple[Group, Times]]] = {"random": [], "larger": [], "left-out participants": []}
    fewer: dict[int, list[Times]] = {every: [] for every in _EVERY}
    rng = np.random.default_rng(seed)
    for group, (size, time_s) in points.items():
        distinct = np.unique(size)
        random = rng.choice(distinct[1:-1], max(1, int(_HOLD_OUT * len(distinct))), replace=False)
        largest = distinct[-max(1, int(_LARGEST * len(distinct))) :]
        for split, held in (("random", random), ("larger", largest)):
            out = np.isin(size, held)
            guess = fit_curve(size[~out], time_s[~out]).seconds(size[out])
            found[split].append((group, np.array([guess, time_s[out]])))
        others = np.setdiff1d(distinct, random)
        for every in _EVERY:
            if len(others[::every]) >= _LEAST_SIZES:
                known, out = np.isin(size, others[::every]), np.isin(size, random)
                guess = fit_curve(size[known], time_s[known]).seconds(size[out])
                fewer[every].append(np.array([guess, time_s[out]]))
        curves[group] = fit_curve(size, time_s)
    for group, (size, time_s) in points.items():
        rest = LinkModel(name, {g: c for g, c in curves.items() if _others(g, group)}, {})
        if rest.curves:
            guess = rest.collective_s(
                group.collective, group.participants, size, nodes=group.nodes, device=group.device, stack=group.stack
            )
            found["left-out participants"].append((group, np.array([guess, time_s])))
    card = {
        "splits": [row for split, pieces in found.items() for row in _by_collective(split, pieces)],
        "groups": [{"group": _label(g), **_row(split, "", *pair)} for split, ps in found.items() for g, pair in ps],
        "sources": sorted(frame["source"].unique()),
        "hardware": sorted({group.device for group in points if group.device}),
        "stack": sorted({group.stack for group in points if group.stack}),
        "rows": len(frame),
        "learning_curve": [
            {"sizes": f"one in {every} of those not held out"} | _ape(*np.concatenate(pieces, axis=1))
            for every, pieces in fewer.items()
            if pieces
        ],
    }
    return LinkModel(name, curves, card)


def _by_collective(split: str, pieces: Sequence[tuple[Group, Times]]) -> Iterator[dict[str, Any]]:
    for kind in [*sorted({group.collective for group, _ in pieces}), ALL]:
        pairs = [pair for group, pair in pieces if kind in (group.collective, ALL)]
        if pairs:
            yield _row(split, kind, *np.concatenate(pairs, axis=1))


def _groups(frame: pd.DataFrame) -> Iterator[tuple[Group, Sizes, Times]]:
    """Yield the points of each group: by device type only where published data names several machines."""
    columns = ["collective", "participants", *LINK_DEFAULTS]
    table = frame.assign(**{key: frame.get(key, value) for key, value in LINK_DEFAULTS.items()})
    for _, part in table.groupby(columns, sort=True):
        first = part[columns].iloc[0]
        group = Group(
            str(first["collective"]), int(first["participants"]), int(first["nodes"]), str(first["device"]),
            str(first["stack"]), int(first["latency_ns"]), float(first["bandwidth_bytes_per_s"]),
        )  # fmt: skip
        yield group, part["bytes"].to_numpy(np.int64), part["median_s"].to_numpy(np.float64)


def _others(one: Group, left_out: Group) -> bool:
    """Return whether two groups differ in the number of participants alone."""
    return one.participants != left_out.participants and one == replace(left_out, participants=one.participants)


def _label(group: Group) -> str:
    parts = [f"{group.collective} among {group.participants}"]
    parts += [f"in {group.nodes} machines"] * (group.nodes > 1) + [part for part in (group.device, group.stack) if part]
    if group.bandwidth_bytes_per_s:
        parts.append(f"over {group.latency_ns / 1e6:g} ms and {group.bandwidth_bytes_per_s / 1e6:g} MB/s")
    return ", ".join(parts)


def _row(split: str, family: str, guess: Times, time_s: Times) -> dict[str, Any]:
    error = np.abs(guess / time_s - 1)
    return {
        "split": split,
        "family": family,
        **_ape(guess, time_s),
        "coverage": None,
        "time_weighted_ape": float((error * time_s).sum() / time_s.sum()),
    }


def _ape(guess: Times, time_s: Times) -> dict[str, Any]:
    error = np.abs(guess / time_s - 1)
    return {"n": len(error), "mean_ape": float(error.mean()), "median_ape": float(np.median(error))}
