"""Physical limits of an operator on a device, and the dimensionless features that explain the distance to them.

The limit of a kernel is ``max(arithmetic, memory traffic)``; its parts come from the data sheet alone. Kernels that
multiply matrices cut the result into tiles and run one tile a compute unit at a time, so they pay for a last incomplete
wave and for operands that several tiles read again (tile and wave quantisation: NVIDIA, "Matrix Multiplication
Background User's Guide"; NeuSight, ASPLOS 2025). The tile that a library takes is not known, so every candidate is
priced: the best one is the limit, and how much worse the others are tells the learned part where it stands.

Every feature is a ratio without a unit, or a size that saturates where its effect does, so that what is learned on one
device holds for the next.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from moirai_sim.costs.cpu_features import cpu_design
from moirai_sim.costs.families import COLUMNS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.clusters.cluster import DeviceType

    Table = NDArray[np.float64]

VECTOR_TILES = ((128, 128), (128, 64), (64, 64), (128, 32), (32, 128), (32, 32))
"""Tiles (columns, rows of the result) of single-precision libraries: cuBLAS's sgemm kernels of Maxwell to Ampere."""
TENSOR_TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64))
"""Tiles of matrix units: CUTLASS and cuBLAS kernels of Volta to Hopper."""

KERNEL = ("columns", "rows", "cuts")
"""What the name of a kernel gives away, as logs to base 2: columns and rows of its tile, cuts of the contraction."""
_TILE = re.compile(r"_(\d+)x(\d+)(?:_sliced1x(\d+))?")
_SHARED = re.compile(r"\*(\d+)$")

_INSTEAD = {
    "float16": ("bfloat16", "float32"), "bfloat16": ("float16", "float32"), "tf32": ("float32",),
    "int8": ("float8", "bfloat16", "float16", "float32"), "uint8": ("int8", "float8", "bfloat16", "float16", "float32"),
    "int4": ("int8", "float8", "bfloat16", "float16", "float32"),
    "uint4": ("int8", "float8", "bfloat16", "float16", "float32"),
    "float8": ("bfloat16", "float16", "float32"), "float4": ("bfloat16", "float16", "float8", "float32"),
    "float64": ("float32",),
}  # fmt: skip
"""What a device computes in whose data sheet lacks a type. Short floats are stored only, and widened to 16 bits."""
_RIVALS = ((2, 4), (1, 2), (0, 1), (3, 4), (3, 2), (1, 4))
"""Pairs of tiles, by position, whose comparison tells which one a library takes."""
_RESIDENT = 4
"""Tiles that share a compute unit; how many is not known, 2 and 8 tell the same."""

_PAGE = 2.0**21
"""Bytes of a page of a GPU's memory. How many pages it finds without a delay is not published, and no other limit."""

_AMPERE = 2
_JOULES = (17e-12, 15e-12, 7.5e-12, 5e-12, 4e-12)
"""Energy of a single-precision operation at the lowest voltage, by `generation`; the last one from published rates of
B200 in 16-bit products, of which none was measured here."""
_RESPITE_S = 0.1e-3
"""Time before each kernel in which a board draws little, and which its power limit is averaged over: what prices GPUs
best of which nothing was measured, when two of five are left out (`experiments/accuracy`)."""
_ENERGY = {"tf32": 0.24, "float16": 0.12, "bfloat16": 0.12, "float8": 0.06, "int8": 0.06, "uint8": 0.06,
           "float4": 0.03}  # fmt: skip
"""Energy of an operation on matrix units as a share of one in single precision on vector units."""
_MATRIX_FAMILIES = ("gemm", "batched-matmul", "conv")


def tiles_of(dtype: str) -> tuple[tuple[int, int], ...]:
    """Return the tiles that libraries cut products of a data type into, (columns, rows) of the result."""
    return VECTOR_TILES if on_vectors(dtype) else TENSOR_TILES


def on_vectors(dtype: str) -> bool:
    """Return whether GPUs multiply matrices of a data type on vector units, not on matrix units."""
    return dtype in ("float32", "float64")


@cache
def kernel_traits(name: str) -> tuple[float, ...]:
    """Return the numbers of `KERNEL` for the name of a kernel of NVIDIA's libraries; NaN where it names no tile."""
    tile = _TILE.search(name)
    if tile is None:
        return (np.nan,) * len(KERNEL)
    columns, rows, slices = (float(text or 1) for text in tile.groups())
    blocks = _SHARED.search(name)
    cuts = slices * float(blocks[1] if blocks else 1)
    return tuple(np.log2([columns, rows, cuts]).tolist())


def peak_flops(device: DeviceType, dtype: str) -> float:
    """Return the device's arithmetic rate for a data type, or that of the type it would be computed in, FLOP/s."""
    for name in (dtype, *_INSTEAD.get(dtype, ())):
        if (dtype, name) == ("bfloat16", "float16") and device.kind == "gpu" and generation(device) < _AMPERE:
            continue  # matrix units that know float16 alone
        if name in device.peak_flops:
            return float(device.peak_flops[name])
    return float(device.peak_flops.get("float32", max(device.peak_flops.values())))


def generation(device: DeviceType) -> int:
    """Return the process generation that the data types of a data sheet give away.

    4: 4-bit floats (Blackwell), 3: 8-bit floats (5 nm; Hopper, Ada), 2: bfloat16 (7 nm; Ampere), 1: matrix units for
    float16 (12 nm; Volta, Turing), 0: none of them (16 nm; Pascal).
    """
    rates = device.peak_flops
    if "float4" in rates:
        return 4
    if "float8" in rates:
        return 3
    if "bfloat16" in rates or "tf32" in rates:
        return _AMPERE
    return int(rates.get("float16", 0.0) >= 4 * rates.get("float32", np.inf))


def sustained_flops(device: DeviceType, dtype: str) -> float:
    """Return the arithmetic rate that a GPU's power limit lets it hold, FLOP/s.

    Boards of 70 W promise peaks that they cannot power for longer than a moment: the clock falls until the voltage is
    at its lowest, and from there the rate goes with the power that idling leaves.
    """
    peak = peak_flops(device, dtype)
    if device.kind != "gpu" or not device.peak_watts:
        return peak
    watts = device.peak_watts - (device.idle_watts or 0.1 * device.peak_watts)
    return float(min(peak, watts / (_JOULES[generation(device)] * _ENERGY.get(dtype, 1.0))))


def allowed_flops(device: DeviceType, dtype: str, flops: Table) -> Table:
    """Return the arithmetic rate that the power limit allows kernels of so many operations, FLOP/s, [n].

    It is averaged over more than a kernel: a short one may spend what was saved before it, in `_RESPITE_S`.
    """
    peak, held = peak_flops(device, dtype), sustained_flops(device, dtype)
    if held == peak:
        return np.full_like(flops, peak)
    flops = np.maximum(flops, 1.0)
    return flops / np.maximum(flops / peak, flops / held - _RESPITE_S)


def roofline_s(flops: Table, size: Table, device: DeviceType, dtype: str) -> Table:
    """Return ``max(flops / peak, bytes / bandwidth)`` in seconds, [n] (Williams, Waterman, Patterson, CACM 2009)."""
    return np.maximum(flops / peak_flops(device, dtype), size / device.memory_bandwidth_bytes_per_s)


def _log(value: Table) -> Table:
    return np.log(np.maximum(value, 1e-12))


def _whole(value: Table) -> Table:
    return np.maximum(np.ceil(value), 1.0)


class Design:
    """Limits and features of operators of one family and one data type on one device.

    Attributes
    ----------
    limit_s
        [n] seconds below which the data sheet says the work cannot be done, launch excluded.
    features
        [n, f] float32, the columns are called `names`.
    """

    def __init__(
        self,
        family: str,
        table: Table,
        dtype: str,
        device: DeviceType,
        *,
        cpu: bool = False,
        products: bool = False,
    ) -> None:
        self._columns = {name: table[:, i] for i, name in enumerate(COLUMNS)}
        self._device, self._dtype = device, dtype
        self.generation = float(generation(device))
        self.bandwidth = device.memory_bandwidth_bytes_per_s
        self.units = float(device.compute_units or (64 if device.kind == "gpu" else 1))
        self.cache = float(device.l2_cache_bytes or 4e6)
        self._found: dict[str, Table] = {}
        self._size = np.maximum(self["read_bytes"] + self["write_bytes"], 1.0)
        if cpu:
            self.limit_s, self._found = cpu_design(family, self._columns, peak_flops(device, dtype), device)
        elif family in _MATRIX_FAMILIES:
            self._matrix(tiles_of(dtype), window=family == "conv")
        elif family == "attention":
            self._attention()
        elif family == "moe":
            self._experts()
        else:
            flops = np.maximum(self["flops"], 1.0)
            self._stream(flops / (self._rate(flops) if products else peak_flops(device, "float32")))
        self.names = tuple(self._found)
        self.features = np.stack([np.clip(v, -12.0, 25.0) for v in self._found.values()], axis=1).astype(np.float32)

    def __getitem__(self, column: str) -> Table:
        return self._columns[column]

    def _rate(self, flops: Table, dtype: str = "") -> Table:
        return allowed_flops(self._device, dtype or self._dtype, flops)

    def _add(self, **features: Table) -> None:
        self._found.update(features)

    def _common(self, compute: Table, memory: Table) -> None:
        self.limit_s = np.maximum(compute, memory)
        self._add(
            balance=np.clip(_log(compute / memory), -4, 4),
            cache_fit=np.clip(_log(self._size / self.cache), -8, 2),
            parts=self["parts"],
            bits=self["bits"],
        )

    def _matrix(self, tiles: tuple[tuple[int, int], ...], *, window: bool) -> None:
        b, m, n, k = (np.maximum(self[c], 1.0) for c in ("batch", "m", "n", "k"))
        flops = 2 * b * m * n * k
        element = self["bits"] / 8
        left, result = element, b * m * n * element
        right = _weight_element((self["read_bytes"] - b * m * k * element) / (b * n * k), element)
        if window:  # windows overlap: an image is read once, whatever the product has for rows
            left = element * np.minimum(np.maximum(self["extra"], 1.0) ** 2 / np.maximum(self["width"], 1.0), 1.0)
            right, result = element, np.minimum(result, np.maximum(self["write_bytes"], 1.0))
        useful = flops / self._rate(flops)
        once = np.maximum(self._size, 1.0)
        times, loads, alone, pages, paddings, occupied = [], [], [], [], [], []
        for tile_n, tile_m in tiles:
            columns, rows = _whole(n / tile_n), _whole(m / tile_m)
            count = columns * rows * b
            # Few tiles leave units idle; libraries then cut the contraction as well.
            split = np.clip(np.floor(self.units / count), 1, np.maximum(np.floor(k / 256), 1))
            waves = _whole(count * split / self.units)
            each = 2.0 * tile_m * tile_n
            per_unit = self._rate(count * each * k) / self.units
            compute = waves * each * np.maximum(k / split, 32.0) / per_unit
            # A wave covers a rectangle of tiles, filled along n first; its operands come from memory once.
            wave_columns = np.minimum(columns, self.units)
            wave_rows = np.minimum(rows, np.maximum(np.floor(self.units / columns), 1))
            per_wave = (wave_columns * tile_n * right + wave_rows * tile_m * left) * k
            traffic = b * (columns * rows / (wave_columns * wave_rows)) * per_wave + result
            times.append(compute)
            pages.append(_log(per_wave / _PAGE))
            padding = _log(columns * tile_n * rows * tile_m / (n * m))
            seats = self.units * _RESIDENT
            paddings.append(padding)
            occupied.append(padding + _log(_whole(count / seats) * seats / count))
            loads.append(np.maximum(traffic, once))
            alone.append(columns * rows * b * (tile_n * right + tile_m * left) * k / self.bandwidth)
        limits = np.array([np.maximum(c, t / self.bandwidth) for c, t in zip(times, loads, strict=True)])
        best = limits.argmin(axis=0)
        pick = np.arange(len(best))
        compute, load = np.array(times)[best, pick], np.array(loads)[best, pick]
        if window:  # of a few channels a group: no product, but a kernel that slides the window
            sliding = flops / self._rate(flops, "float32")
            slid = (b > 1) & (sliding < compute)
            compute, load = np.where(slid, sliding, compute), np.where(slid, once, load)
        self._common(compute, load / self.bandwidth)
        self._add(quantisation=_log(compute / useful), reload=np.clip(_log(load / once), 0, 5))
        for (tile_n, tile_m), limit, time, unshared, span in zip(tiles, limits, times, alone, pages, strict=True):
            self._add(**{f"alone_{tile_n}x{tile_m}": np.clip(_log(unshared / self.limit_s), -4, 4)})
            self._add(**{f"pages_{tile_n}x{tile_m}": span})
            self._add(**{f"limit_{tile_n}x{tile_m}": np.clip(_log(limit / self.limit_s), 0, 3)})
            self._add(**{f"pad_{tile_n}x{tile_m}": np.clip(_log(time / useful), 0, 4)})
        for one, other in _RIVALS:
            name = "{}x{}_or_{}x{}".format(*tiles[one], *tiles[other])
            self._add(**{f"pad_{name}": np.clip(paddings[one] - paddings[other], -3, 3)})
            self._add(**{f"fill_{name}": np.clip(occupied[one] - occupied[other], -3, 3)})
        tile_n, tile_m = tiles[0]
        count = b * n * m / (tile_n * tile_m) / self.units
        self._add(
            waves=np.clip(_log(count), -7, 3),
            m=np.clip(_log(m), 0, 7), n=np.clip(_log(n), 0, 7), k=np.clip(_log(k), 0, 11), batch=np.clip(_log(b), 0, 5),
            align_k=alignment(k), align_n=alignment(n), align_m=alignment(m),  # rows that begin on a cache line
            left=np.clip(_log(b * m * k * left / self.cache), -6, 2),
            right=np.clip(_log(b * k * n * right / self.cache), -6, 2),
            result=np.clip(_log(result / self.cache), -6, 2),
            wide=np.clip(_log(n / m), -5, 5),
            size_m=_log(m), size_n=_log(n), size_k=_log(k), size_mn=_log(m * n), size_mk=_log(m * k),
            size_nk=_log(n * k), size_mnk=_log(m * n * k),
            pages_left=_log(b * m * k * left / _PAGE),
            pages_right=_log(b * k * n * right / _PAGE),
            pages_result=_log(result / _PAGE),
        )  # fmt: skip
        self._add(generation=np.full(len(m), self.generation))
        if window:
            self._add(window=self["width"], stride=self["extra"], group=np.clip(_log(k / self["width"]), 0, 8))

    def _stream(self, compute: Table) -> None:
        memory = self._size / self.bandwidth
        rows, width = np.maximum(self["m"], 1.0), np.maximum(self["k"], 1.0)
        self._common(compute, memory)
        self._add(
            waves=np.clip(_log(rows / self.units), -6, 10),
            width=np.clip(_log(width), 0, 10),
            align=np.minimum(alignment(width), 16),
            small=np.clip(_log(self._size / (self.units * 8192.0)), -8, 6),
            write_share=self["write_bytes"] / self._size,
            operands=np.clip(self["n"], 0, 8),
        )

    def _attention(self) -> None:
        b, m, n, d = (np.maximum(self[c], 1.0) for c in ("batch", "m", "n", "k"))
        heads, kv = np.maximum(self["width"], 1.0), np.maximum(np.abs(self["extra"]), 1.0)
        # Where what lies ahead of a query is masked, no more queries than keys see the half of them.
        seen = np.where((m > 1) & (self["extra"] > 0), np.maximum((2 * n - m) / (2 * n), 0.5), 1.0)
        scores = b * heads * m * n
        projection = np.maximum(self["flops"] - scores * (4 * d + 7), 0.0)  # where Q, K and V come packed
        flops = 4 * scores * d * seen + projection
        tiles = b * heads * _whole(m / 128)
        waves = _whole(tiles / self.units)
        self._common(flops / self._rate(flops), self._size / self.bandwidth)
        self._add(
            tiles=np.clip(_log(tiles / self.units), -6, 4),
            last_wave=_log(waves * self.units / tiles) * (tiles > self.units),
            keys=np.clip(_log(n), 0, 10),
            queries=np.clip(_log(m), 0, 10),
            head=_log(d),
            shared=_log(heads / kv),
            readers=np.clip(_log(b * kv / self.units), -6, 5),
            work=np.clip(_log(b * kv * n / self.units), -6, 12),
        )

    def _experts(self) -> None:
        experts, tokens, hidden = (np.maximum(self[c], 1.0) for c in ("batch", "m", "k"))
        inner, top, share = np.maximum(self["n"], 1.0), np.maximum(self["width"], 1.0), self["extra"]
        pairs = np.maximum(tokens * top * share, 1.0)
        active = np.maximum(experts * (1 - (1 - np.minimum(1 / experts, 1.0)) ** pairs), 1.0)
        flops = 6 * pairs * hidden * inner
        weight = 3 * hidden * inner
        element = _weight_element(self["weight_bytes"] / (experts * weight), self["bits"] / 8)  # 0: not told
        size = active * weight * element + 2 * tokens * hidden * 2
        each = pairs / active
        padded = active * _whole(each / 64) * 64
        tiles = active * _whole(each / 64) * _whole(2 * inner / 128)
        self._common(flops / self._rate(flops), size / self.bandwidth)
        self._add(
            each=np.clip(_log(each), 0, 9),
            padding=_log(padded / pairs),
            active=_log(active),
            tokens=np.clip(_log(tokens), 0, 11),
            tiles=np.clip(_log(tiles / self.units), -6, 6),
            inner=_log(inner),
            hidden=_log(hidden),
            top=top,
            weights_fit=np.clip(_log(size / self.cache), -6, 8),
        )


def _weight_element(stored: Table, element: Table) -> Table:
    """Return bytes of a value of a constant operand: fewer than others have where weights are packed.

    ``stored`` is what it seems to take for each of its values; less than a bit and a half, and something else was read.
    """
    return np.where(stored > element / 16, np.minimum(stored, element), element)


def alignment(value: Table) -> Table:
    """Return the largest power of two, at most 64, that divides each value."""
    whole = np.maximum(value, 1.0).astype(np.int64)
    found: Table = np.minimum(whole & -whole, 64).astype(np.float64)
    return found
