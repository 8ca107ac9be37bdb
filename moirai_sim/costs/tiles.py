"""Matrix products on a GPU that was never measured, or hardly: a tile model of ten parameters that carry over.

The result is cut into tiles that run in waves, one a compute unit at a time; a tile advances through the contraction in
steps, each of which costs its arithmetic and a fixed effort. Operands come from memory meanwhile, in part again for
every wave that needs them, and the result goes back at the end. The library's choice of tile, and of cutting the
contraction as well, is taken to be the best one.

Trees learn a device's peculiarities, and those do not carry over: what is learned of one GPU beyond these parameters
says little about the next. The parameters do, for they are shares of the data sheet's rates or times of the unit's own
arithmetic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moirai_sim.costs.families import COLUMNS
from moirai_sim.costs.features import sustained_flops, tiles_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from moirai_sim.clusters.cluster import DeviceType

    Array = NDArray[np.float64]

PARAMETERS: dict[str, tuple[float, float]] = {
    "launch": (0.95, 0.15),  # start and end of a kernel, as a share of the floor under every time of its software stack
    "peak": (0.9, 0.1),  # share of the data sheet's arithmetic rate
    "read": (0.85, 0.1),  # share of its memory bandwidth when operands are read
    "write": (0.85, 0.3),  # and when results are written; above 1 where a cache takes them
    "step": (1.0, 0.4),  # fixed effort of a step, in arithmetic times of a block of `_BLOCK` cubed
    "prologue": (1.0, 0.5),  # that of a tile, in the same
    "split_us": (1.5, 0.3),  # adding up the parts of a contraction that was cut
    "overlap": (3.0, 0.3),  # order of the norm that joins arithmetic and reading: 1 is their sum, infinity the larger
    "quantisation": (0.5, 0.5),  # how much of a last incomplete wave is paid for
    "reload": (0.05, 1.0),  # share that comes from memory of what one wave of tiles reads and an earlier one has read
}
"""What is expected of a device of which nothing is known, and the spread of its logarithm between devices."""
_EXPECTED = np.log([value for value, _ in PARAMETERS.values()])
_SPREAD = np.array([spread for _, spread in PARAMETERS.values()])
_STRANGE = 3.0
_ALIKE = {"float16": "bfloat16", "bfloat16": "float16"}
"""Data types of the same size and, on matrix units, the same rate: what is known of one says most of the other."""
_BLOCK = 64
_MATRIX_UNITS = 4.0
"""So many times the rate of single precision has what computes on matrix units, at least."""
_FEW = 8
"""Rows or columns of a product that are no tile."""
_SPLITS = (1, 2, 4, 8, 16, 32)
_NOISE = 0.1
_MOST_ROWS = 1500
_MOST_STEPS = 25


def expected(known: Sequence[Sequence[float]]) -> list[float]:
    """Return the parameters of a device of which nothing was measured: the mean of those known and of the prior.

    One that lies further from the prior than `_STRANGE` spreads stands for something else, and counts as that far away.
    """
    near = [np.clip(each, _EXPECTED - _STRANGE * _SPREAD, _EXPECTED + _STRANGE * _SPREAD) for each in known]
    found: list[float] = np.mean([_EXPECTED, *near], axis=0).tolist()
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


def log_seconds(
    parameters: Sequence[float] | Array, table: Array, dtype: str, device: DeviceType, launch_s: Array
) -> Array:
    """Return the logarithm of the time in seconds, [n], of matrix products (rows of `COLUMNS`, [n, columns]).

    ``launch_s``: floor under every time of their software stacks, [n].
    """
    launch, peak, read, write, step, prologue, split, overlap, quantisation, reload = np.exp(parameters)
    b, m, n, k = (np.maximum(table[:, COLUMNS.index(c)], 1.0) for c in ("batch", "m", "n", "k"))
    units = float(device.compute_units or 64)
    rate = sustained_flops(device, dtype) / units
    bandwidth = device.memory_bandwidth_bytes_per_s
    block = 2.0 * _BLOCK**3 / rate
    once = table[:, COLUMNS.index("read_bytes")]
    best = np.full(len(table), np.inf)
    plain = sustained_flops(device, "float32")
    if rate * units < _MATRIX_UNITS * plain:  # no matrix units: a product of few rows needs no tiles
        computing = 2.0 * b * m * n * k / (plain * peak)
        reading = once / (bandwidth * read)
        together = (computing**overlap + reading**overlap) ** (1 / overlap)
        best = np.where(np.minimum(m, n) <= _FEW, together, best)
    for tile_n, tile_m in tiles_of(dtype):
        columns, rows = np.ceil(n / tile_n), np.ceil(m / tile_m)
        tiles = columns * rows * b
        # A wave covers a rectangle of tiles, filled along n first, and reads the operands of that.
        wave_columns = np.minimum(columns, units)
        wave_rows = np.minimum(rows, np.maximum(np.floor(units / columns), 1))
        again = columns * rows / (wave_columns * wave_rows) * (wave_columns * tile_n + wave_rows * tile_m) / (m + n)
        reading = once * (1 + min(reload, 1.0) * np.maximum(again - 1, 0.0)) / (bandwidth * read)
        each = np.hypot(2.0 * tile_n * tile_m * _BLOCK / (rate * peak), step * block)
        for parts in _SPLITS:
            share = tiles * parts / units
            waves = np.maximum(share + min(quantisation, 1.0) * (np.ceil(share) - share), 1.0)
            computing = waves * (np.ceil(k / parts / _BLOCK) * each + prologue * block)
            time = (computing**overlap + reading**overlap) ** (1 / overlap)
            if parts > 1:  # partial sums in single precision are written and read again
                time = np.where(k < parts * _BLOCK, np.inf, time + split * 1e-6 + 4 * parts * b * m * n / bandwidth)
            best = np.minimum(best, time)
    found: Array = np.log(launch * launch_s + best + table[:, COLUMNS.index("write_bytes")] / (bandwidth * write))
    return found


def fit(
    table: Array,
    log_time: Array,
    dtype: str,
    device: DeviceType,
    launch_s: Array,
    centre: Sequence[float] | None = None,
) -> list[float]:
    """Return the parameters that explain measured times, [n], by robust least squares with a prior at ``centre``."""
    from scipy.optimize import least_squares

    start = np.array(_EXPECTED if centre is None else centre)
    if len(table) > _MOST_ROWS:
        keep = np.random.default_rng(0).permutation(len(table))[:_MOST_ROWS]
        table, log_time, launch_s = table[keep], log_time[keep], launch_s[keep]

    def miss(parameters: Array) -> Array:
        off = (log_seconds(parameters, table, dtype, device, launch_s) - log_time) / _NOISE
        robust = np.sign(off) * np.sqrt(2 * (np.sqrt(1 + off**2) - 1))
        return np.concatenate([robust, (parameters - start) / _SPREAD])

    found: list[float] = least_squares(miss, start, diff_step=1e-3, max_nfev=_MOST_STEPS).x.tolist()
    return found
