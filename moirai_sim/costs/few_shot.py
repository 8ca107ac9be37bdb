"""Sharpens what was learned about a family of kernels by a few measurements of a device that it was not fitted to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moirai_sim.costs import kriging, tiles
from moirai_sim.costs.kernels import blended, expect, name_of_points, parameters_for, stand_in_for

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from moirai_sim.clusters.cluster import DeviceType
    from moirai_sim.costs.kernels import Expected, FamilyModel, Rows

    Array = NDArray[np.float64]

_NOISE = 0.12
"""Scatter of log time that no correction of a device's level explains; sets the weight of the ridge prior."""


def adapt_family(
    models: Mapping[str, FamilyModel], devices: Mapping[str, DeviceType], key: str, parts: list[Rows], log_time: Array
) -> None:
    """Let the model that answers for a family learn from points of one device, and forget those of an earlier time.

    Points of a device that it was fitted to change nothing, and neither do those that nothing answers for.

    Parameters
    ----------
    models
        By key of the ensemble.
    devices
        Those that the models were fitted to, by name.
    key
        Of the family's ensemble; where that is missing, what stands in for it learns how far it is off.
    parts
        The points, all of one device.
    log_time
        Of the whole profile, logarithm of seconds.
    """
    if stand_in_for(models, key) is None:
        return
    points = _Points([expect(models, devices, key, part) for part in parts], parts, log_time)
    model, stand_in, device = points.model, points.stand_in, points.device
    if points.measured:
        return
    if key == stand_in or device.name not in model.defaults:
        _answer_for(model, device.name, parts)
    for learned in (model.corrections, model.tiles, model.points, model.point_widths):
        for earlier in [name for name in learned if _told(name, device.name, key, stand_in)]:
            del learned[earlier]
    if not points.by_tiles and key == stand_in:  # for data types without points
        model.corrections[device.name] = _ridge(points.basis, points.rest).tolist()
    for kind in np.unique(points.dtype).tolist():
        _adapt_type(points, kind, name_of_points(device.name, kind, key, stand_in))


def _told(name: str, device: str, key: str, stand_in: str) -> bool:
    """Return whether it is points of a family on a device that told what a model keeps under a name."""
    dtype = name.split("|")[1] if "|" in name else ""
    return name in (name_of_points(device, dtype, key, stand_in), device if key == stand_in else "")


def _adapt_type(points: _Points, kind: str, own: str) -> None:
    """Learn what the points of one data type tell of it, and keep that under the name ``own``."""
    model, by_tiles = points.model, points.by_tiles
    here, others = np.flatnonzero(points.dtype == kind), np.flatnonzero(points.dtype != kind)
    if len(here) > kriging.MOST_POINTS:
        here = here[np.random.default_rng(0).permutation(len(here))[: kriging.MOST_POINTS]]
    table, basis, rest, launch_s = (x[here] for x in (points.table, points.basis, points.rest, points.launch_s))
    log_time, base = points.log_time[here], points.base[here]
    centre = parameters_for(model, own) if by_tiles else ()

    def learn(rows: NDArray[np.bool_]) -> tuple[list[float], Array]:
        """Fit to some of the points; return what that learned, and by how much it then misses each of them."""
        if by_tiles:
            parameters = tiles.fit(table[rows], log_time[rows], kind, points.device, launch_s[rows], centre)
            return parameters, log_time - blended(model, parameters, base, table, kind, points.device, launch_s)
        together = np.concatenate([here[rows], others])
        found = _ridge(points.basis[together], points.rest[together])
        if others.size:  # around what all types have in common
            found += _ridge(basis[rows], (rest - basis @ found)[rows])
        return found.tolist(), rest - basis @ found

    learned, missed = learn(np.ones(len(here), dtype=bool))
    (model.tiles if by_tiles else model.corrections)[own] = learned
    stacks = points.stack[here]
    model.points[own], width = kriging.sharpen(table, missed, stacks, points.device, lambda rows: learn(rows)[1])
    if width is not None:
        model.point_widths[own] = width


class _Points:
    """Measurements of one device, and what a family's model expects of them."""

    def __init__(self, expected: list[Expected], parts: list[Rows], log_time: Array) -> None:
        first = expected[0]
        self.model, self.stand_in, self.by_tiles = first.model, first.stand_in, first.by_tiles
        self.measured = first.answer.measured
        self.device = parts[0].device
        self.table = np.concatenate([part.table for part in parts])
        self.stack = np.concatenate([np.full(len(part.index), part.stack) for part in parts])
        self.dtype = np.concatenate([np.full(len(part.index), part.dtype) for part in parts])
        self.log_time = log_time[np.concatenate([part.index for part in parts])]
        self.basis = np.concatenate([each.basis() for each in expected])
        self.base = np.concatenate([each.log_time for each in expected])
        self.launch_s = np.concatenate([np.full(len(each.log_time), each.launch_s) for each in expected])
        self.rest = self.log_time - self.base


def _ridge(basis: Array, rest: Array) -> Array:
    """Return coefficients that explain ``rest``, [n], of a prior with mean 0 and spread 1."""
    system = basis.T @ basis + _NOISE**2 * np.eye(basis.shape[1])
    return np.linalg.solve(system, basis.T @ rest).astype(np.float64)


def _answer_for(model: FamilyModel, device: str, parts: list[Rows]) -> None:
    """Let the software stack with most points answer for a device that was not measured, where none is asked for."""
    if model.defaults.get(device) not in model.groups:
        model.defaults[device] = f"{device}|{max(parts, key=lambda part: len(part.index)).stack}"
