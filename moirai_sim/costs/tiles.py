"""Matrix products on a GPU that was never measured, or hardly: a tile model of nine parameters that carry over.

The result is cut into tiles that run in waves, one a compute unit at a time; a tile advances through the contraction in
steps, each of which costs its arithmetic and a fixed effort. Operands come from memory meanwhile, and the result goes
back at the end. The library's choice of tile, and of cutting the contraction as well, is taken to be the best one.

Trees learn a device's peculiarities, and those do not carry over: what is learned of one GPU beyond these parameters
says nothing about the next. The parameters do, for they are shares of the data sheet's rates or times of the unit's own
arithmetic. What the fitted model misses at points of the device itself is carried to their neighbours by kriging
(Gaussian process regression: Rasmussen and Williams, 2006, chapter 2).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from moirai_sim.costs.families import COLUMNS
from moirai_sim.costs.features import TENSOR_TILES, sustained_flops

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from moirai_sim.clusters.cluster import DeviceType

    Array = NDArray[np.float64]

PARAMETERS: dict[str, tuple[float, float]] = {
    "launch_us": (2.7, 0.15),  # start and end of a kernel
    "peak": (0.9, 0.1),  # share of the data sheet's arithmetic rate
    "read": (0.85, 0.1),  # share of its memory bandwidth when operands are read
    "write": (0.85, 0.3),  # and when results are written; above 1 where a cache takes them
    "step": (1.0, 0.4),  # fixed effort of a step, in arithmetic times of a block of `_BLOCK` cubed
    "prologue": (1.0, 0.5),  # that of a tile, in the same
    "split_us": (1.5, 0.3),  # adding up the parts of a contraction that was cut
    "overlap": (3.0, 0.3),  # order of the norm that joins arithmetic and reading: 1 is their sum, infinity the larger
    "quantisation": (0.5, 0.5),  # how much of a last incomplete wave is paid for
}
"""What is expected of a device of which nothing is known, and the spread of its logarithm between devices."""
_ALIKE = {"float16": "bfloat16", "bfloat16": "float16"}
"""Data types of the same size and, on matrix units, the same rate: what is known of one says most of the other."""
_EXPECTED = np.log([value for value, _ in PARAMETERS.values()])
_SPREAD = np.array([spread for _, spread in PARAMETERS.values()])
_BLOCK = 64
_MATRIX_UNITS = 4.0
"""So many times the rate of single precision has what computes on matrix units, at least."""
_FEW = 8
"""Rows or columns of a product that are no tile."""
_SPLITS = (1, 2, 4, 8, 16, 32)
_NOISE = 0.1
_MOST_ROWS = 1500
_MOST_STEPS = 25
_FOLDS = 5

_LENGTHS = (4.5, 3.0, 2.0, 2.0)
"""Doublings of m, n, k and of tiles a compute unit along which what the model misses fades."""
_COMMON, _OWN, _LEVEL, _REST = 0.05, 0.05, 0.02, 0.07
"""Standard deviations, in log time, of what it misses with every software stack, with one of them, of a stack's level,
and of what no neighbour tells. These and `_LENGTHS` are rounded from the likeliest values for A100 and for H100."""
_OUTLIER = 0.3
_MOST_POINTS = 500
_AT_ONCE = 4096


def expected(known: Sequence[Sequence[float]]) -> list[float]:
    """Return the parameters of a device of which nothing was measured: the mean of those known and of the prior."""
    found: list[float] = np.vstack([_EXPECTED, *known]).mean(axis=0).tolist()
    return found


def parameters_of(known: Mapping[str, Sequence[float]], device: str, dtype: str) -> Sequence[float]:
    """Return a device's own parameters, or those expected from devices measured with this data type, or with any.

    Parameters
    ----------
    known
        Logarithms of `PARAMETERS`, in their order, by ``device|dtype``.
    """
    for alike in (dtype, _ALIKE.get(dtype, dtype)):
        own = known.get(f"{device}|{alike}")
        if own is not None:
            return own
    for alike in (dtype, _ALIKE.get(dtype, dtype)):
        others = [v for k, v in known.items() if k.endswith(f"|{alike}")]
        if others:
            return expected(others)
    return expected(list(known.values()))


def log_seconds(parameters: Sequence[float] | Array, table: Array, dtype: str, device: DeviceType) -> Array:
    """Return the logarithm of the time in seconds, [n], of matrix products (rows of `COLUMNS`, [n, columns])."""
    launch, peak, read, write, step, prologue, split, overlap, quantisation = np.exp(parameters)
    b, m, n, k = (np.maximum(table[:, COLUMNS.index(c)], 1.0) for c in ("batch", "m", "n", "k"))
    units = float(device.compute_units or 64)
    rate = sustained_flops(device, dtype) / units
    bandwidth = device.memory_bandwidth_bytes_per_s
    block = 2.0 * _BLOCK**3 / rate
    reading = table[:, COLUMNS.index("read_bytes")] / (bandwidth * read)
    best = np.full(len(table), np.inf)
    plain = sustained_flops(device, "float32")
    if rate * units < _MATRIX_UNITS * plain:  # no matrix units: a product of few rows needs no tiles
        computing = 2.0 * b * m * n * k / (plain * peak)
        rows = (computing**overlap + reading**overlap) ** (1 / overlap)
        best = np.where(np.minimum(m, n) <= _FEW, rows, best)
    for tile_n, tile_m in TENSOR_TILES:
        tiles = np.ceil(n / tile_n) * np.ceil(m / tile_m) * b
        each = np.hypot(2.0 * tile_n * tile_m * _BLOCK / (rate * peak), step * block)
        for parts in _SPLITS:
            share = tiles * parts / units
            waves = np.maximum(share + min(quantisation, 1.0) * (np.ceil(share) - share), 1.0)
            computing = waves * (np.ceil(k / parts / _BLOCK) * each + prologue * block)
            time = (computing**overlap + reading**overlap) ** (1 / overlap)
            if parts > 1:  # partial sums in single precision are written and read again
                time = np.where(k < parts * _BLOCK, np.inf, time + split * 1e-6 + 4 * parts * b * m * n / bandwidth)
            best = np.minimum(best, time)
    found: Array = np.log(launch * 1e-6 + best + table[:, COLUMNS.index("write_bytes")] / (bandwidth * write))
    return found


def fit(
    table: Array, log_time: Array, dtype: str, device: DeviceType, centre: Sequence[float] | None = None
) -> list[float]:
    """Return the parameters that explain measured times, [n], by robust least squares with a prior at ``centre``."""
    from scipy.optimize import least_squares

    start = _EXPECTED if centre is None else np.asarray(centre)
    if len(table) > _MOST_ROWS:
        keep = np.random.default_rng(0).permutation(len(table))[:_MOST_ROWS]
        table, log_time = table[keep], log_time[keep]

    def miss(parameters: Array) -> Array:
        off = (log_seconds(parameters, table, dtype, device) - log_time) / _NOISE
        robust = np.sign(off) * np.sqrt(2 * (np.sqrt(1 + off**2) - 1))
        return np.concatenate([robust, (parameters - start) / _SPREAD])

    found: list[float] = least_squares(miss, start, diff_step=1e-3, max_nfev=_MOST_STEPS).x.tolist()
    return found


def refit(
    table: Array,
    log_time: Array,
    stacks: NDArray[np.str_],
    dtype: str,
    device: DeviceType,
    centre: Sequence[float],
) -> tuple[list[float], dict[str, Any], float | None]:
    """Return what a few points tell: parameters, the points for `krige`, and a half-width in log time.

    The width is that of the 90 % interval far from all points; `krige` says how much narrower it is near them. It is
    the finite-sample quantile of what five-fold fits missed; fewer than 10 sizes tell none. ``stacks``: [n] software
    stacks of the points, of which at most 500 are kept.
    """
    if len(table) > _MOST_POINTS:
        keep = np.random.default_rng(0).permutation(len(table))[:_MOST_POINTS]
        table, log_time, stacks = table[keep], log_time[keep], stacks[keep]

    def learn(rows: NDArray[np.bool_]) -> tuple[list[float], dict[str, Any]]:
        parameters = fit(table[rows], log_time[rows], dtype, device, centre)
        missed = log_time[rows] - log_seconds(parameters, table[rows], dtype, device)
        points = {"at": _positions(table[rows], device).tolist(), "stack": stacks[rows].tolist()}
        return parameters, {**points, "missed": missed.tolist()}

    parameters, points = learn(np.ones(len(table), dtype=bool))
    shape = np.unique(table, axis=0, return_inverse=True)[1].ravel()  # what was measured twice is one
    if shape.max(initial=-1) < 9:
        return parameters, points, None
    fold = np.random.default_rng(0).permutation(shape.max() + 1)[shape] % _FOLDS
    off = np.empty(len(table))
    for i in np.unique(fold):
        part, known = learn(fold != i)
        for stack in np.unique(stacks[fold == i]):
            test = (fold == i) & (stacks == stack)
            more, share = krige(known, table[test], str(stack), device)
            missed = log_time[test] - log_seconds(part, table[test], dtype, device) - more
            off[test] = np.abs(missed) / share
    level = min(np.ceil((len(off) + 1) * 0.9) / len(off), 1.0)
    return parameters, points, float(np.quantile(off, level))


def krige(points: Mapping[str, Any], table: Array, stack: str, device: DeviceType) -> tuple[Array, Array]:
    """Return what to add to `log_seconds`, [n], and the uncertainty that is left, [n], as a share of that far away.

    Parameters
    ----------
    points
        As `refit` returns them: positions ``at``, [p, 4], software ``stack``, [p], and the log time ``missed``, [p].
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
