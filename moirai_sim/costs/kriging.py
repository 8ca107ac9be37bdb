"""What a few measured kernels of a device tell of sizes like theirs, by kriging.

Whatever a model expects of a device that it hardly knows, it misses neighbouring sizes by similar factors, for the
library runs the same kernels there. What is missed of the points is carried to their neighbours, and fades with
distance (Gaussian process regression: Rasmussen and Williams, 2006, chapter 2).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from moirai_sim.costs.families import COLUMNS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from moirai_sim.clusters.cluster import DeviceType

    Array = NDArray[np.float64]

_FOLDS = 5
_LENGTHS = (4.5, 3.0, 2.0, 2.0)
"""Doublings of m, n, k and of tiles a compute unit along which what the model misses fades; what those are of other
kernels than products is for `families` to say."""
_COMMON, _OWN, _LEVEL, _REST = 0.05, 0.05, 0.02, 0.07
"""Standard deviations, in log time, of what it misses with every software stack, with one of them, of a stack's level,
and of what no neighbour tells. These and `_LENGTHS` are rounded from the likeliest values for products of 16 bits on
A100 and on H100; most other families gain by them, too."""
_OUTLIER = 0.6
"""What is missed by more counts as this much."""
MOST_POINTS = 500
"""Of a family and data type. What `krige` does grows with the cube of them, and with them for each kernel."""
_AT_ONCE = 4096


def sharpen(
    table: Array,
    missed: Array,
    stacks: NDArray[np.str_],
    device: DeviceType,
    refit: Callable[[NDArray[np.bool_]], Array],
) -> tuple[dict[str, Any], float | None]:
    """Return what a few points of one data type tell: the points for `krige`, and a half-width in log time.

    The width is that of the 90 % interval far from all points; `krige` says how much narrower it is near them. It is
    the finite-sample quantile of what five-fold fits missed; fewer than 10 sizes tell none.

    Parameters
    ----------
    table, stacks
        Kernels (rows of `COLUMNS`), [n, columns], and their software stack, [n].
    missed
        Log time, [n], by which they took longer than the model expects that was fitted to all of them.
    refit
        Returns the same, [n], of the model fitted to some of them.
    """

    def known(rows: NDArray[np.bool_], missed: Array) -> dict[str, Any]:
        at = _positions(table[rows], device)
        return {"at": at.tolist(), "stack": stacks[rows].tolist(), "missed": missed[rows].tolist()}

    points = known(np.ones(len(table), dtype=bool), missed)
    shape = np.unique(table, axis=0, return_inverse=True)[1].ravel()  # what was measured twice is one
    if shape.max(initial=-1) < 9:
        return points, None
    fold = np.random.default_rng(0).permutation(shape.max() + 1)[shape] % _FOLDS
    off = np.empty(len(table))
    for i in np.unique(fold):
        left = refit(fold != i)
        rest = known(fold != i, left)
        for stack in np.unique(stacks[fold == i]):
            test = (fold == i) & (stacks == stack)
            more, share = krige(rest, table[test], str(stack), device)
            off[test] = np.abs(left[test] - more) / share
    level = min(np.ceil((len(off) + 1) * 0.9) / len(off), 1.0)
    return points, float(np.quantile(off, level))


def krige(points: Mapping[str, Any], table: Array, stack: str, device: DeviceType) -> tuple[Array, Array]:
    """Return what to add to the log time, [n], and the uncertainty that is left, [n], as a share of that far away.

    Parameters
    ----------
    points
        As `sharpen` returns them: positions ``at``, [p, 4], software ``stack``, [p], and the log time ``missed``, [p].
    stack
        Software stack that is asked for; "" for the one with most points.
    """
    stack = stack or Counter(points["stack"]).most_common(1)[0][0]
    names = np.array(points["stack"])
    at = np.array(points["at"])
    known = _covariance(at, at, names[:, None] == names)
    weights = np.linalg.inv(known + _REST**2 * np.eye(len(at)))
    pull = weights @ np.clip(points["missed"], -_OUTLIER, _OUTLIER)
    anywhere = _COMMON**2 + _OWN**2 + _LEVEL**2 + _REST**2
    where = _positions(table, device)
    more, share = np.empty(len(where)), np.empty(len(where))
    for start in range(0, len(where), _AT_ONCE):
        rows = slice(start, start + _AT_ONCE)
        near = _covariance(where[rows], at, names == stack)
        more[rows] = near @ pull
        share[rows] = np.sqrt(1 - ((near @ weights) * near).sum(axis=1) / anywhere)
    return more, share


def _positions(table: Array, device: DeviceType) -> Array:
    """Return logarithms of m, n, k and of large tiles a compute unit, [n, 4]: distance 1 is `_LENGTHS`."""
    b, m, n, k = (np.maximum(table[:, COLUMNS.index(c)], 1.0) for c in ("batch", "m", "n", "k"))
    share = b * np.ceil(m / 128) * np.ceil(n / 128) / float(device.compute_units or 64)
    found: Array = np.log2(np.column_stack([b * m, n, k, share])) / _LENGTHS
    return found


def _covariance(a: Array, b: Array, same: NDArray[np.bool_]) -> Array:
    """Return that of what is missed at positions [n, 4] and [p, 4], a Matern kernel; ``same``: whether stacks are."""
    from scipy.spatial.distance import cdist

    far = np.sqrt(3.0) * cdist(a, b)
    found: Array = (_COMMON**2 + _OWN**2 * same) * (1 + far) * np.exp(-far) + _LEVEL**2 * same
    return found
