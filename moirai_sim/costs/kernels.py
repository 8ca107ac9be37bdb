"""Kernels in the form in which ensembles price them, what is learned about a family of them, and the prediction itself.

Shared by the estimator, which fits, and by stored models, which must not need scikit-learn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moirai_sim.clusters.cluster import DeviceType
from moirai_sim.costs import tiles
from moirai_sim.costs.families import COLUMNS, dimensions, family
from moirai_sim.costs.features import Design, alignment, on_vectors, peak_flops
from moirai_sim.costs.kriging import krige
from moirai_sim.errors import InputError
from moirai_sim.graphs.operator import DTYPE_BITS

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

Booster = Callable[["NDArray[np.float32]"], "Array"]
"""A fitted ensemble: [n, features] float32 -> [n] log ratio."""

_CPU = "-cpu"
_PRODUCTS = ("gemm", "batched-matmul", "conv", "attention", "moe")
"""Families that GPUs compute on vector or matrix units, by data type."""
_SEVERAL = 3
"""Devices that a shared ensemble has to have met: of one or two it learns what no other device does."""
_GUEST = 1.6
"""Least half-width of an interval, in log time, where another family's ensemble stands in: a fifth to five times. What
stands in for each family of the shipped models, were it missing, is off by a factor of 1.8 to 9, with 90 % certainty
each (by a script that is not kept); that covers nine in ten of all of them together."""
DOMAIN = tuple(COLUMNS.index(c) for c in ("batch", "m", "n", "k", "flops", "read_bytes", "write_bytes"))


def arithmetic(family_name: str, dtype: str, kind: str = "gpu") -> str:
    """Return the key of the ensemble that serves a family, a data type and a kind of device.

    CPUs have ensembles of their own, and so have matrix units, which behave as another machine.
    """
    if kind == "cpu":
        return family_name + _CPU
    if family_name not in _PRODUCTS:
        return family_name
    return f"{family_name}-{'vector' if on_vectors(dtype) else 'tensor'}"


def family_of_key(key: str) -> str:
    """Return the family that an ensemble's key names."""
    return key.removesuffix("-vector").removesuffix("-tensor").removesuffix(_CPU)


def design_of(key: str, table: Array, dtype: str, device: DeviceType, asked: str = "") -> Design:
    """Return the limits and features that the ensemble of a key reads.

    Parameters
    ----------
    asked
        Key of the ensemble that it stands in for.
    """
    products = family_of_key(asked or key) in _PRODUCTS
    return Design(family_of_key(key), table, dtype, device, cpu=key.endswith(_CPU), products=products)


def unmasked(key: str, table: Array) -> NDArray[np.bool_]:
    """Return which kernels are attention of several queries that all see every key, [n]."""
    several = table[:, COLUMNS.index("m")] > 1
    found: NDArray[np.bool_] = several & (table[:, COLUMNS.index("extra")] < 0)
    return found & (family_of_key(key) == "attention")


def alignment_of(key: str, table: Array) -> Array:
    """Return the largest power of two, at most 64, that divides the rows of both operands of matrix products, [n]."""
    if family_of_key(key) not in ("gemm", "batched-matmul"):
        return np.full(len(table), 64.0)
    return np.minimum(*(alignment(table[:, COLUMNS.index(c)]) for c in ("n", "k")))


def _physical_s(rows: Rows) -> Array:
    """Return the seconds that no kernel can be faster than, [n]: by arithmetic, and by bytes that no cache holds."""
    device = rows.device
    flops, read, written = (rows.table[:, COLUMNS.index(c)] for c in ("flops", "read_bytes", "write_bytes"))
    size = read + written
    by_bytes = np.where(size > 2 * (device.l2_cache_bytes or 0), size / device.memory_bandwidth_bytes_per_s, 0.0)
    least: Array = np.maximum(flops / peak_flops(device, rows.dtype), by_bytes)
    return least


def tiled(key: str, device: DeviceType) -> bool:
    """Return whether the tile model has a say in what was not measured: matrix products on GPUs."""
    return family_of_key(key) == "gemm" and device.kind == "gpu"


def name_of_points(device: str, dtype: str, key: str, stand_in: str) -> str:
    """Return the name under which a family's model keeps what a few points of a device told.

    Parameters
    ----------
    key, stand_in
        Of the ensemble that the points ask for, and of the one that answers; see `stand_in_for`.
    """
    return f"{device}|{dtype}" if key == stand_in else f"{device}|{dtype}|{family_of_key(key)}"


def parameters_for(model: FamilyModel, name: str) -> Sequence[float]:
    """Return the parameters of the tile model for a device and data type, by `name_of_points`.

    What a few points tell of one device says nothing of another, and those of a family that the model only stands in
    for nothing of its own.
    """
    if name in model.tiles:
        return model.tiles[name]
    device, dtype = name.split("|")[:2]
    own = [k for k in model.tiles if k.count("|") == 1 and (k not in model.points or k.partition("|")[0] == device)]
    return tiles.parameters_of({k: model.tiles[k] for k in own}, device, dtype)


def blended(
    model: FamilyModel,
    parameters: Sequence[float],
    shared: Array,
    table: Array,
    dtype: str,
    device: DeviceType,
    launch_s: Array,
) -> Array:
    """Return the log time of matrix products on a device that was not measured, [n], by the tile model.

    Where the shared ensemble has met several devices, it has half of the say: the two err in different ways. ``shared``
    is the log time that it expects, ``launch_s`` the floor of the software stack, [n] both.
    """
    by_tiles = tiles.log_seconds(parameters, table, dtype, device, launch_s)
    met = {group.partition("|")[0] for group in model.launch_s}
    return by_tiles if len(met) < _SEVERAL else (by_tiles + shared) / 2


@dataclass
class Rows:
    """Kernels of one family, data type, device and stack, as the estimator sees them."""

    table: Array
    op_type: NDArray[np.str_] | NDArray[np.object_]
    device: DeviceType
    dtype: str
    stack: str
    index: NDArray[np.int64]
    """Positions in the profile."""


@dataclass
class FamilyModel:
    """What was learned about one family of kernels."""

    groups: list[str]
    """Device and stack of each group that was measured, ``device|stack``."""
    launch_s: dict[str, float]
    """Floor under every time: launch and framework overhead, by group."""
    ops: dict[str, float]
    """Mean log ratio of each operator type; one that was never seen takes 0."""
    dtypes: list[str]
    domain: list[list[float]]
    """Smallest and largest of the sizes that were measured."""
    shared: Booster
    """For devices that were not measured, and where there is no sharp one."""
    sharp: Booster | None
    """For the groups that were; reads the position in ``groups`` and what `kernels` expect, too."""
    bins: list[float]
    """Edges between the bins of ``log(limit / launch)`` in which intervals are calibrated."""
    widths: dict[str, list[float]]
    """Half-widths of the 90 % interval in log time by kind of hold-out, one for each bin."""
    kernels: dict[str, Booster] = field(default_factory=dict)
    """What is expected of the kernel that the library takes, by name in `features.KERNEL`; read the position, too."""
    parts: int = 0
    """Most operators that one of the measured kernels does the work of."""
    unmasked: bool = False
    """Whether attention of several queries that all see every key was measured."""
    corrections: dict[str, list[float]] = field(default_factory=dict)
    """Coefficients of the few-shot correction, by device and by `name_of_points`."""
    defaults: dict[str, str] = field(default_factory=dict)
    """The group that answers for a device when no stack is asked for; of one known by a few points, their stack."""
    tiles: dict[str, list[float]] = field(default_factory=dict)
    """Parameters of the tile model, which prices GPUs that were not measured, by `name_of_points`; see `tiled`."""
    types: dict[str, list[str]] = field(default_factory=dict)
    """Data types that each group was measured with."""
    alignment: float = 1.0
    """Largest power of two, at most 64, that divides the rows of both operands of every measured matrix product."""
    points: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The few measurements of a device that was not fitted to, and what is missed of them, by `name_of_points`; see
    `krige`."""
    point_widths: dict[str, float] = field(default_factory=dict)
    """Half-widths of the 90 % interval far from those points."""


def rows_of(profile: pd.DataFrame) -> dict[str, list[Rows]]:
    """Return the kernels of a profile by key of the ensemble that serves them.

    Raises
    ------
    InputError
        If shapes, attributes or a data sheet in the profile cannot be read.
    """
    try:
        table, families = _table(profile)
        devices = {text: DeviceType(**json.loads(text)) for text in profile["device_type"].unique()}
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise InputError(f"profile: shapes, attributes or data sheet cannot be read ({error})") from error
    found: dict[str, list[Rows]] = {}
    keys = [families, *(profile[c].to_numpy() for c in ("dtype", "device_type", "stack"))]
    positions = np.arange(len(profile))
    import pandas as pd

    grouped = pd.DataFrame(dict(zip("fdts", keys, strict=True)), index=positions).groupby(list("fdts"), sort=True)
    op_types = profile["op_type"].to_numpy(dtype=str)
    for found_key, members in grouped.indices.items():
        name, dtype, text, stack = (str(part) for part in found_key)  # type: ignore[attr-defined]  # four keys
        index = np.asarray(members, dtype=np.int64)
        rows = Rows(table[index], op_types[index], devices[text], dtype, stack, index)
        found.setdefault(arithmetic(name, dtype, rows.device.kind), []).append(rows)
    return found


def _table(profile: pd.DataFrame) -> tuple[Array, NDArray[np.str_]]:
    read: dict[tuple[str, ...], tuple[str, tuple[float, ...]]] = {}
    names, rows = [], []
    for key in zip(*(profile[c] for c in ("op_type", "input_shapes", "output_shapes", "attributes")), strict=True):
        known = read.get(key)
        if known is None:
            inputs, outputs, attributes = (json.loads(text) for text in key[1:])
            known = family(key[0], inputs, attributes), dimensions(key[0], inputs, outputs, attributes)
            read[key] = known
        names.append(known[0])
        rows.append(known[1])
    work = profile[["flops", "read_bytes", "write_bytes", "weight_bytes"]].to_numpy(dtype=np.float64)
    bits = profile["dtype"].map(lambda d: DTYPE_BITS.get(d, 32)).to_numpy(dtype=np.float64)
    parts = profile["parts"].map(lambda text: len(json.loads(text)) if text != "[]" else 0).to_numpy(dtype=np.float64)
    return np.column_stack([np.array(rows, dtype=np.float64).reshape(-1, 6), work, bits, parts]), np.array(names)


def inputs_of(features: NDArray[np.float32], limit: Array, launch: Array) -> tuple[NDArray[np.float32], Array]:
    """Return what ensembles read (the last column, the operator type's, still 0) and the log time they correct, [n]."""
    share = np.clip(np.log(limit / launch), -6, 3)
    x = np.column_stack([features, share, np.zeros(len(limit))]).astype(np.float32)
    return x, np.log(launch + limit)


def launch_of(launch: Mapping[str, float], group: str) -> float:
    """Return the launch floor of a group; of an unknown one the median of the same software, or of all.

    The same is what has the same words but for versions ("vllm 0.14.0 fp8_block" and "vllm 0.24.0 fp8_block"), or else
    the same first word.
    """
    if group in launch:
        return launch[group]

    def software(name: str) -> list[str]:
        return [word for word in name.partition("|")[2].split() if not word[0].isdigit()]

    known = {name: software(name) for name in launch}
    own = software(group)
    alike = [launch[name] for name, words in known.items() if words == own]
    alike = alike or [launch[name] for name, words in known.items() if words[:1] == own[:1]]
    return float(np.median(alike or list(launch.values())))


def predict_rows(
    models: Mapping[str, FamilyModel], devices: Mapping[str, DeviceType], key: str, rows: Rows
) -> tuple[Array, Array, Array, NDArray[np.bool_]]:
    """Return seconds, low, high and the extrapolation flag of kernels of one family on one device, [n] each."""
    expected = expect(models, devices, key, rows)
    model, stand_in, seen = expected.model, expected.stand_in, expected.answer.measured
    name = name_of_points(rows.device.name, rows.dtype, key, stand_in)
    told = name if name in model.points else name_of_points(rows.device.name, rows.dtype, stand_in, stand_in)
    log_time = expected.log_time
    share = np.ones(len(log_time))
    if expected.by_tiles:
        floor = np.full(len(log_time), expected.launch_s)
        log_time = blended(model, parameters_for(model, name), log_time, rows.table, rows.dtype, rows.device, floor)
    elif not seen:
        correction = model.corrections.get(told, model.corrections.get(rows.device.name))
        if correction is not None:
            log_time = log_time + expected.basis() @ np.asarray(correction)
    if not seen and told in model.points:
        more, share = krige(model.points[told], rows.table, rows.stack, rows.device)
        log_time = log_time + more
    outside = _outside(expected, rows)
    width = model.point_widths[name] * share if not seen and name in model.point_widths else _width(expected, outside)
    seconds = np.exp(log_time)
    least = _physical_s(rows) if expected.by_tiles else np.zeros(len(seconds))
    seconds = np.maximum(seconds, least)
    return seconds, np.maximum(seconds * np.exp(-width), least), seconds * np.exp(width), outside


def _outside(expected: Expected, rows: Rows) -> NDArray[np.bool_]:
    """Return which kernels lie outside what the model saw, [n]."""
    model = expected.model
    if expected.stranger or not _computes_in(rows.device, expected.key, rows.dtype):
        return np.ones(len(rows.table), dtype=bool)
    sizes = rows.table[:, DOMAIN]
    low, high = (np.asarray(edge) for edge in model.domain)
    outside: NDArray[np.bool_] = np.any((sizes > high * 1.0001) | (sizes < low * 0.9999), axis=1)
    outside |= np.array([op not in model.ops for op in rows.op_type.tolist()], dtype=bool)
    outside |= rows.table[:, COLUMNS.index("parts")] > model.parts
    outside |= alignment_of(expected.key, rows.table) < model.alignment
    if not model.unmasked:
        outside |= unmasked(expected.key, rows.table)
    return outside


def _width(expected: Expected, outside: NDArray[np.bool_]) -> Array:
    """Return half of the 90 % interval of log time, [n], that hold-outs tell; points of the device tell another."""
    model = expected.model
    bins = np.searchsorted(model.bins, np.log(expected.design.limit_s / expected.launch_s))
    random, larger, device = (np.asarray(model.widths[kind])[bins] for kind in ("random", "larger", "device"))
    width: Array = np.where(outside, larger, random)
    if expected.stranger:
        width = np.maximum(width, device)
    if expected.stand_in not in _relatives(expected.key):
        width = np.maximum(width, _GUEST)
    return width


@dataclass(frozen=True)
class Answer:
    """What answers for a device."""

    group: str | None
    """The measured group whose sharp ensemble does; None where the shared one has to."""
    device: DeviceType
    """That group's device, or the one asked for."""
    measured: bool
    """Whether they are the same."""


def answering(model: FamilyModel, devices: Mapping[str, DeviceType], rows: Rows) -> Answer:
    """Return what answers for the device of some kernels.

    For a GPU that was not measured it is one with the same chip, if there is one (A100 of 40 and 80 GB, H100 and H200):
    how far a kernel stays from its limit is the chip's and its library's, what clock, power and memory change is in the
    limit.
    """
    device = rows.device

    def distance(other: DeviceType) -> tuple[bool, float, str]:
        ratio = other.memory_bandwidth_bytes_per_s / device.memory_bandwidth_bytes_per_s
        return not same_speed(other, device), abs(np.log(ratio)), other.name

    chip = _chip(device)
    alike = [
        other for other in devices.values() if same_speed(other, device) or (chip is not None and _chip(other) == chip)
    ]
    for other in sorted(alike, key=distance):
        group = f"{other.name}|{rows.stack}"
        if group not in model.groups:
            group = model.defaults.get(other.name, group)
        if not rows.stack and rows.dtype not in model.types.get(group, [rows.dtype]):  # another stack may know the type
            own = (name for name in model.groups if name.startswith(f"{other.name}|"))
            group = next((name for name in own if rows.dtype in model.types.get(name, ())), group)
        if group in model.groups:
            return Answer(group, other, same_speed(other, device))
    return Answer(None, device, False)


def same_speed(one: DeviceType, other: DeviceType) -> bool:
    """Return whether two data sheets say the same but for size of memory, price and source."""
    return one == replace(other, memory_bytes=one.memory_bytes, price_eur=one.price_eur, source=one.source)


def _chip(device: DeviceType) -> tuple[int, int, int] | None:
    """Return what boards with the same chip share, roughly enough for any data sheet; None where one does not tell."""
    units, cache, clock_hz = device.compute_units, device.l2_cache_bytes, device.clock_hz
    if device.kind != "gpu" or not units or not cache or not clock_hz or "float32" not in device.peak_flops:
        return None
    cycle = device.peak_flops["float32"] / units / clock_hz  # operations of a unit
    return units, round(np.log2(cache)), round(np.log2(cycle))


def _computes_in(device: DeviceType, key: str, dtype: str) -> bool:
    """Return whether a device computes in a data type, as far as it matters to a family of kernels."""
    return not key.endswith(("-vector", "-tensor")) or {"uint8": "int8"}.get(dtype, dtype) in device.peak_flops


def with_kernels(coded: NDArray[np.float32], expected: Sequence[Array]) -> NDArray[np.float32]:
    """Return the inputs of a sharp ensemble: what the others read, and what is expected of the kernel.

    That is rounded to eighths, so that a stored ensemble, which adds in another precision, means the same.
    """
    if not expected:
        return coded
    return np.column_stack([coded, *((np.round(8 * each) / 8).astype(np.float32) for each in expected)])


def sharp_of(model: FamilyModel, x: NDArray[np.float32], position: NDArray[np.int64] | int) -> Array:
    """Return what the sharp ensemble says of groups by their position in ``groups``, one for all rows or [n]; [n]."""
    if model.sharp is None:
        raise ValueError("the family has no sharp ensemble")
    coded = with_position(x, position)
    return model.sharp(with_kernels(coded, [expect(coded) for expect in model.kernels.values()]))


def with_position(x: NDArray[np.float32], position: NDArray[np.int64] | int) -> NDArray[np.float32]:
    """Return the inputs of the shared ensemble and a group's position, which those of known groups read, too."""
    return np.column_stack([x, np.broadcast_to(np.float32(position), len(x))])


@dataclass(frozen=True)
class Expected:
    """What is expected of kernels before points of their device are heeded."""

    key: str
    """Of the ensemble that is asked for."""
    stand_in: str
    """Of the one that answers; see `stand_in_for`."""
    model: FamilyModel
    answer: Answer
    by_tiles: bool
    """Whether the tile model has a say; see `blended`."""
    design: Design
    x: NDArray[np.float32]
    """What ensembles read, [n, features]."""
    log_time: Array
    """What ensembles say, [n]; where the tile model has a say, the shared one."""
    launch_s: float
    """Floor under every time."""
    knows_type: bool
    """Whether what answers was measured with the data type."""

    @property
    def stranger(self) -> bool:
        """Whether what answers was not measured on the device, with the data type, or with the family."""
        return self.stand_in != self.key or not self.knows_type or not self.answer.measured

    def basis(self) -> Array:
        """Return the basis of the few-shot correction, [n, b], each column times its prior standard deviation.

        Level, share of work, and a few slopes.
        """
        share = 1 / (1 + np.exp(-self.x[:, -2].astype(np.float64)))  # limit / (launch + limit)
        columns = [np.full(len(share), 0.25), 0.35 * share]
        names = self.design.names
        columns += [s * share * self.x[:, names.index(name)] for name, s in _SPREADS.items() if name in names]
        return np.column_stack(columns)


def expect(models: Mapping[str, FamilyModel], devices: Mapping[str, DeviceType], key: str, rows: Rows) -> Expected:
    """Return what is expected of kernels of one family on one device.

    Raises
    ------
    InputError
        If the models have no ensemble that answers for the family.
    """
    stand_in = stand_in_for(models, key)
    if stand_in is None:
        raise InputError(f"the model has no ensemble for {family_of_key(key)}; known: {', '.join(models)}")
    model = models[stand_in]
    answer = answering(model, devices, rows)
    own = f"{rows.device.name}|{rows.stack}"
    if not rows.stack:
        own = model.defaults.get(rows.device.name, own)
    launch = launch_of(model.launch_s, answer.group or own)
    design = design_of(stand_in, rows.table, rows.dtype, rows.device, key)
    read = design
    if answer.device != rows.device:
        read = design_of(stand_in, rows.table, rows.dtype, answer.device, key)
    x, _ = inputs_of(read.features, read.limit_s, np.full(len(rows.table), launch))
    x[:, -1] = [model.ops.get(op, 0.0) for op in rows.op_type.tolist()]
    # Products on a GPU that was not measured, or batches where none was: each is taken for one larger product.
    product = family_of_key(key) in ("gemm", "batched-matmul") and tiled(stand_in, rows.device)
    by_tiles = product and bool(model.tiles) and (answer.group is None or stand_in != key)
    log_time = np.log(launch + design.limit_s) + _learned(model, x, None if by_tiles else answer.group)
    known = rows.dtype in model.types.get(answer.group or "", model.dtypes)
    return Expected(key, stand_in, model, answer, by_tiles, design, x, log_time, launch, known)


def _learned(model: FamilyModel, x: NDArray[np.float32], group: str | None) -> Array:
    """Return what the sharp ensemble says of a group, or the shared one of none, [n]."""
    if group is None or model.sharp is None:
        return model.shared(x)
    return sharp_of(model, x, model.groups.index(group))


_SPREADS = {
    "balance": 0.1,
    "reload": 0.05,
    "quantisation": 0.05,
    "waves": 0.04,
    "m": 0.03,
    "n": 0.03,
    "k": 0.03,
    "width": 0.03,
}
"""Prior standard deviation, between devices, of the slope of log time along a feature."""


def stand_in_for(models: Collection[str], key: str) -> str | None:
    """Return the key of the ensemble that answers for kernels, theirs if there is one; None if none can."""
    return next((k for k in _stand_ins(key) if k in models), None)


def _relatives(key: str) -> tuple[str, str]:
    """Return the ensembles of a family's own kind of kernel: a batch of products is much like one larger product."""
    return key, key.replace("batched-matmul", "gemm")


def _stand_ins(key: str) -> list[str]:
    name = family_of_key(key)
    gpu = [f"{name}-vector", f"{name}-tensor", "elementwise", "normalization", "gemm-vector", "gemm-tensor"]
    cpu = [name + _CPU, "elementwise" + _CPU, "normalization" + _CPU, "gemm" + _CPU, "conv" + _CPU]
    return [*_relatives(key), *(cpu + gpu if key.endswith(_CPU) else gpu + cpu)]
