"""Matrix products on a GPU that was never measured, or hardly: a tile model of nine parameters that carry over.

The result is cut into tiles that run in waves, one a compute unit at a time; a tile advances through the contraction in
steps, each of which costs its arithmetic and a fixed effort. Operands come from memory meanwhile, and the result goes
back at the end. The library's choice of tile, and of cutting the contraction as well, is taken to be the best one.

Trees learn a device's peculiarities, and those do not carry over: what is learned of one GPU beyond these parameters
says nothing about the next. The parameters do, for they are shares of the data sheet's rates or times of the unit's own
arithmetic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moirai_sim.costs.families import COLUMNS
from moirai_sim.costs.features import TENSOR_TILES, peak_flops

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
_EXPECTED = np.log([value for value, _ in PARAMETERS.values()])
_SPREAD = np.array([spread for _, spread in PARAMETERS.values()])
_BLOCK = 64
_SPLITS = (1, 2, 4, 8, 16, 32)
_NOISE = 0.1
_MOST_ROWS = 1500
_MOST_STEPS = 25
_FOLDS = 5


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
    own = known.get(f"{device}|{dtype}")
    if own is not None:
        return own
    return expected([v for k, v in known.items() if k.endswith(f"|{dtype}")] or list(known.values()))


def log_seconds(parameters: Sequence[float] | Array, table: Array, dtype: str, device: DeviceType) -> Array:
    """Return the logarithm of the time in seconds, [n], of matrix products (rows of `COLUMNS`, [n, columns])."""
    launch, peak, read, write, step, prologue, split, overlap, quantisation = np.exp(parameters)
    b, m, n, k = (np.maximum(table[:, COLUMNS.index(c)], 1.0) for c in ("batch", "m", "n", "k"))
    units = float(device.compute_units or 64)
    rate = peak_flops(device, dtype) / units
    bandwidth = device.memory_bandwidth_bytes_per_s
    block = 2.0 * _BLOCK**3 / rate
    reading = table[:, COLUMNS.index("read_bytes")] / (bandwidth * read)
    best = np.full(len(table), np.inf)
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
    table: Array, log_time: Array, dtype: str, device: DeviceType, centre: Sequence[float]
) -> tuple[list[float], float | None]:
    """Return parameters fitted to a few points and the half-width of the 90 % interval in log time.

    The width is the finite-sample 90 % quantile of what five-fold fits missed; fewer than 10 points tell none.
    """
    parameters = fit(table, log_time, dtype, device, centre)
    if len(table) < 10:
        return parameters, None
    fold = np.random.default_rng(0).permutation(len(table)) % _FOLDS
    off = np.empty(len(table))
    for i in range(_FOLDS):
        test = fold == i
        part = fit(table[~test], log_time[~test], dtype, device, centre)
        off[test] = np.abs(log_seconds(part, table[test], dtype, device) - log_time[test])
    level = min(np.ceil((len(off) + 1) * 0.9) / len(off), 1.0)
    return parameters, float(np.quantile(off, level))
