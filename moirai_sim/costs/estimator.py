"""The estimator behind every learned cost model: time = (launch + physical limit) x learned inefficiency.

For each family of kernels two gradient boosted ensembles explain ``log(time / (launch + limit))``: a *shared* one from
dimensionless features alone, which carries over to devices that were never measured, and a *sharp* one that also knows
device and software stack and answers for those that were. Where it is known which kernels ran, further ensembles learn
which one the library takes for what size, and the sharp one reads what they expect. It is fitted to rows as far as they
can be trusted: those that a cross-validated fit misses by far count less. Ensembles of matrix products and convolutions
on GPUs are monotone where physics is, given the kernel: never faster for more padding, reading or waiting, never slower
for rows that begin on a larger boundary. Products on a GPU that was not measured are priced by a physical tile model,
too (`kernels.blended`), and a few measurements of a device correct what is expected of it (`few_shot`).

Intervals are split-conformal (Vovk et al. 2005) with residuals of the matching kind of hold-out: random rows for what
resembles the training data, the largest tenth for what is larger, left-out devices for a device never seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin, clone
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.utils.validation import check_is_fitted
from threadpoolctl import threadpool_limits

from moirai_sim.costs import tiles
from moirai_sim.costs.families import COLUMNS
from moirai_sim.costs.features import KERNEL, kernel_traits
from moirai_sim.costs.few_shot import adapt_family
from moirai_sim.costs.kernels import (
    DOMAIN,
    Booster,
    FamilyModel,
    Rows,
    alignment_of,
    blended,
    design_of,
    family_of_key,
    inputs_of,
    launch_of,
    parameters_for,
    predict_rows,
    rows_of,
    sharp_of,
    tiled,
    unmasked,
    with_kernels,
    with_position,
)
from moirai_sim.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd
    from numpy.typing import NDArray

    from moirai_sim.clusters.cluster import DeviceType

    Array = NDArray[np.float64]


_FEW_CROSS = 300
"""Rows from which on it is cross-validated which kernel a library takes, and which row is noise."""
_CHOSEN = "gemm"
"""Family of which it is learned what `KERNEL` says: batched products gain a hundredth of their error from it, and cost
as much time; of convolutions it told nothing."""
_KERNEL_RATE = 0.1
"""Learning rate of the ensembles that expect kernels."""
_ROUGH_TREES, _ROUGH_LEAVES, _ROUGH_RATE = 60, 63, 0.2
"""Size and learning rate of the fits that tell which rows are noise: quick, and sharp enough for that."""
_ROUTED = "moe"
"""Family without noise of that kind: what a fit misses of mixtures of experts is a routing that few rows share."""
_NOISE_FLOOR = 0.05
"""Misses in log time below which no row is trusted more than another: what repeats of a kernel scatter by."""
_FEW_ROWS = 20_000
"""Rows below which threads mostly wait for each other, and on a busy machine for long."""
_SMALL = 20_000
"""Rows below which a profile is small."""
_STRANGER = 0.5
"""Least half-width of an interval for a second device, in log time: what one says of it is 26 % off on average."""
_UNKNOWN = 0.7
"""Half-width of an interval, in log time, where there is too little to learn one from: half to twice the time."""


class TimeEstimator(RegressorMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Predicts seconds of kernels of any family on any device; scikit-learn compatible.

    Parameters
    ----------
    trees, leaves
        Size of the shared ensemble of each family: small, since detail is what does not carry over.
    sharp_trees, sharp_leaves
        Size of the sharp ensemble of each family.
    sharp_features
        Share of the features that each split of the sharp ensemble may choose from, drawn at random.
    kernel_trees, kernel_leaves
        Size of the ensembles that expect the library's choice of kernel.
    learning_rate, min_leaf
        Of both; see `sklearn.ensemble.HistGradientBoostingRegressor`.
    max_rows
        A family with more rows is thinned at random to this many.
    intervals
        Whether the hold-outs that intervals need are fitted.
    interval_rows
        Those hold-outs are fitted to at most this many rows: a little wide rather than slow.
    random_state
        Seed of thinning and hold-outs.

    Attributes
    ----------
    models_
        `FamilyModel` by key (family and kind of arithmetic).
    devices_
        Data sheets of the devices that were measured, by name.
    """

    def __init__(
        self,
        trees: int = 120,
        leaves: int = 10,
        sharp_trees: int = 300,
        sharp_leaves: int = 255,
        sharp_features: float = 0.4,
        kernel_trees: int = 60,
        kernel_leaves: int = 255,
        learning_rate: float = 0.05,
        min_leaf: int = 10,
        max_rows: int = 100_000,
        intervals: bool = True,
        interval_rows: int = 15_000,
        random_state: int = 0,
    ) -> None:
        self.trees = trees
        self.leaves = leaves
        self.sharp_trees = sharp_trees
        self.sharp_leaves = sharp_leaves
        self.sharp_features = sharp_features
        self.kernel_trees = kernel_trees
        self.kernel_leaves = kernel_leaves
        self.learning_rate = learning_rate
        self.min_leaf = min_leaf
        self.max_rows = max_rows
        self.intervals = intervals
        self.interval_rows = interval_rows
        self.random_state = random_state

    def fit(self, X: pd.DataFrame, y: Array | None = None) -> Self:  # noqa: N803
        """Fit to a profile (columns of `moirai_sim.profiling.schema`); ``y`` defaults to its ``median_s``, seconds."""
        seconds = np.asarray(X["median_s"] if y is None else y, dtype=np.float64)
        if len(X) == 0 or not (np.isfinite(seconds) & (seconds > 0)).all():
            raise InputError("profile: needs rows, all with a positive finite time")
        self.devices_: dict[str, DeviceType] = {}
        self.models_: dict[str, FamilyModel] = {}
        generator = np.random.default_rng(self.random_state)
        traits = np.array([kernel_traits(str(name)) for name in X.get("kernel", [""] * len(X))])
        for key, parts in rows_of(X).items():
            parts = _thin(parts, self.max_rows, generator)
            self.devices_ |= {part.device.name: part.device for part in parts}
            samples = _Samples(key, parts, seconds, traits)
            with _threads(len(samples.target)):
                model = self._fit_family(samples, np.arange(len(samples.target)))
            if self.intervals:
                few = _Samples(key, _thin(parts, self.interval_rows, generator), seconds, traits)
                with _threads(len(few.target)):
                    self._calibrate_intervals(model, few, generator)
            self.models_[key] = model
        return self

    def adapt(self, X: pd.DataFrame, y: Array | None = None) -> Self:  # noqa: N803
        """Sharpen the prices of a device that `fit` never saw by a few of its measurements.

        Where the tile model has a say (`kernels.tiled`) its parameters are fitted to the points, around what the
        devices already known make them expect. Elsewhere a ridge regression on a handful of features corrects what is
        predicted; its prior spreads are those between devices, so that few points move little but the level. Each data
        type has one of its own, around that of all of them. What is still missed of the points is carried to similar
        sizes (`kriging`), and the interval becomes what five-fold fits miss, narrower near the points.

        Parameters
        ----------
        X, y
            As for `fit`. Rows of families that the estimator does not know correct what stands in for them; those that
            nothing can stand in for are ignored.
        """
        seconds = np.asarray(X["median_s"] if y is None else y, dtype=np.float64)
        log_time = np.log(seconds)
        found = rows_of(X)
        for key in sorted(found, key=lambda key: key not in self.models_):  # a family's own points before a guest's
            for name in sorted({part.device.name for part in found[key]}):
                own = [part for part in found[key] if part.device.name == name]
                adapt_family(self.models_, self.devices_, key, own, log_time)
        return self

    def predict(self, X: pd.DataFrame) -> Array:  # noqa: N803
        """Return seconds, [n]."""
        return self.predict_interval(X)[0]

    def predict_interval(self, X: pd.DataFrame) -> tuple[Array, Array, Array, NDArray[np.bool_]]:  # noqa: N803
        """Return median estimate, low and high end of the 90 % interval (s) and the extrapolation flag, [n] each."""
        check_is_fitted(self)
        out = np.empty((3, len(X)))
        flag = np.empty(len(X), dtype=bool)
        for key, parts in rows_of(X).items():
            for part in parts:
                found = predict_rows(self.models_, self.devices_, key, part)
                out[:, part.index], flag[part.index] = np.stack(found[:3]), found[3]
        return out[0], out[1], out[2], flag

    def _booster(
        self,
        rows: int,
        trees: int,
        leaves: int,
        rising: Sequence[int] | None = None,
        features: float = 1.0,
        rate: float | None = None,
    ) -> HistGradientBoostingRegressor:
        """Return an ensemble that is yet to be fitted to so many rows."""
        return HistGradientBoostingRegressor(
            max_iter=trees, max_leaf_nodes=leaves, learning_rate=rate or self.learning_rate,
            min_samples_leaf=min(self.min_leaf, max(rows // 20, 1)), early_stopping=False,
            random_state=self.random_state, monotonic_cst=rising, max_features=features,
        )  # fmt: skip

    def _fit_kernels(
        self, samples: _Samples, coded: NDArray[np.float32], train: NDArray[np.int64]
    ) -> tuple[dict[str, Booster], list[Array]]:
        """Learn which kernel the library takes; return what learned it, and what it expects of each training row.

        What a row's own kernel is must not tell: each is expected by fits to the other two thirds.
        """
        known = np.isfinite(samples.traits[train]).all(axis=1)
        kernels: dict[str, Booster] = {}
        expected: list[Array] = []
        if known.sum() < _FEW_CROSS or family_of_key(samples.key) != _CHOSEN:
            return kernels, expected
        rows = int(known.sum())
        booster = self._booster(rows, self.kernel_trees, self.kernel_leaves, None, self.sharp_features, _KERNEL_RATE)
        for name, trait in zip(KERNEL, samples.traits[train].T, strict=True):
            if np.ptp(trait[known]) == 0:
                continue
            kernels[name] = clone(booster).fit(coded[known], trait[known]).predict
            guess = np.empty(len(train))
            guess[known] = self._unseen(booster, coded[known], trait[known])
            if not known.all():
                guess[~known] = kernels[name](coded[~known])
            expected.append(guess)
        return kernels, expected

    def _trust(self, samples: _Samples, x: NDArray[np.float32], y: Array) -> Array:
        """Return the weight of each row, [n]: one over what fits to the other two thirds miss, noise aside."""
        if len(y) < _FEW_CROSS or family_of_key(samples.key) == _ROUTED:
            return np.ones(len(y))
        rough = self._booster(len(y), _ROUGH_TREES, _ROUGH_LEAVES, None, self.sharp_features, _ROUGH_RATE)
        weight: Array = 1 / np.hypot(y - self._unseen(rough, x, y), _NOISE_FLOOR)
        return weight

    def _unseen(self, booster: HistGradientBoostingRegressor, x: NDArray[np.float32], y: Array) -> Array:
        """Return what fits to the other two thirds say of each row, [n]."""
        folds = KFold(3, shuffle=True, random_state=self.random_state)
        found: Array = cross_val_predict(booster, x, y, cv=folds)
        return found

    def _fit_family(self, samples: _Samples, train: NDArray[np.int64], *, known: bool = True) -> FamilyModel:
        """Fit a family; unless its devices are to be ``known``, without what answers for those alone."""
        launch = samples.launch(train)
        x, base = samples.inputs(launch)
        y = samples.log_time - base
        ops = {op: float(y[rows].mean()) for op in samples.op_names if (rows := train[samples.op[train] == op]).size}
        x[:, -1] = [ops.get(op, 0.0) for op in samples.op]
        general = x[train]
        general[:, samples.own] = 0  # what is constant is never split on
        rows = len(train)
        shared = self._booster(rows, self.trees, self.leaves, samples.rising).fit(general, y[train])
        sharp = None
        kernels: dict[str, Booster] = {}
        if self.sharp_trees and known:  # fitted to the times: what the shared one leaves has its noise, too
            coded = with_position(x[train], samples.group_code[train])
            kernels, expected = self._fit_kernels(samples, coded, train)
            rising = [*samples.rising, 0, *[0] * len(kernels)]
            inputs = with_kernels(coded, expected)
            weight = self._trust(samples, inputs, y[train])
            sharp = self._booster(rows, self.sharp_trees, self.sharp_leaves, rising, self.sharp_features)
            sharp.fit(inputs, y[train], weight)
        load = samples.load(launch)[train]
        table = samples.table[train][:, DOMAIN]
        return FamilyModel(
            groups=list(samples.groups),
            launch_s=launch,
            ops=ops,
            dtypes=sorted(set(samples.dtypes)),
            domain=[table.min(axis=0).tolist(), table.max(axis=0).tolist()],
            parts=int(samples.table[train, COLUMNS.index("parts")].max()),
            unmasked=bool(unmasked(samples.key, samples.table[train]).any()),
            shared=shared.predict,
            sharp=None if sharp is None else sharp.predict,
            kernels=kernels,
            bins=np.quantile(load, [0.25, 0.5, 0.75]).tolist(),
            widths={kind: [_UNKNOWN] * 4 for kind in ("random", "larger", "device")},
            defaults=samples.defaults(),
            tiles=samples.tiles(train, launch),
            types=samples.types(),
            alignment=float(alignment_of(samples.key, samples.table[train]).min()),
        )

    def _calibrate_intervals(self, model: FamilyModel, samples: _Samples, generator: np.random.Generator) -> None:
        shape = np.unique(samples.table, axis=0, return_inverse=True)[1].ravel()
        fold = generator.permutation(shape.max() + 1)[shape] % 3
        everything = np.arange(len(fold))
        larger = samples.larger()
        device = samples.device_code
        splits = [("random", fold == i) for i in range(3)]
        splits.append(("larger", larger))
        if device.max() > 0:
            splits += [("device", device == i) for i in range(device.max() + 1)]
        found: dict[str, list[tuple[Array, Array]]] = {}
        for kind, test in splits:
            if test.sum() < 1:
                continue
            known = kind != "device"
            seen = ~np.isin(shape, shape[test]) if known else ~test  # not what another stack ran, either
            if seen.sum() < 20:
                continue
            fitted = self._fit_family(samples, everything[seen], known=known)
            residual = samples.residual(fitted, everything[test], known=known)
            found.setdefault(kind, []).append((samples.load(fitted.launch_s)[test], np.abs(residual)))
        for kind, pieces in found.items():
            if kind == "device":  # the next one may be stranger than the strangest of them, the fewer they are
                widest = np.max([_conformal(*piece, model.bins) for piece in pieces], axis=0)
                model.widths[kind] = (widest * (1 + 1 / len(pieces))).tolist()
                continue
            load, size = (np.concatenate(part) for part in zip(*pieces, strict=True))
            model.widths[kind] = _conformal(load, size, model.bins)
        at_least = model.widths["random"]
        for kind, factor, least in (("larger", 1.5, 0.0), ("device", 3.0, _STRANGER)):
            if kind not in found:  # nothing of the kind to learn from: say that little is known
                model.widths[kind] = [max(factor * w, least) for w in at_least]
            model.widths[kind] = [max(a, b) for a, b in zip(model.widths[kind], at_least, strict=True)]


def estimator_for(profile: pd.DataFrame, *, intervals: bool = True) -> TimeEstimator:
    """Return an unfitted estimator of a size that suits a profile: small data wants small leaves."""
    if len(profile) >= _SMALL:
        return TimeEstimator(intervals=intervals)
    several = profile["device"].nunique() > 1
    return TimeEstimator(
        trees=300, leaves=8, sharp_trees=300 if several else 0, sharp_leaves=8, learning_rate=0.05, min_leaf=3,
        intervals=intervals,
    )  # fmt: skip


def _threads(rows: int) -> threadpool_limits:
    """Return a context in which as many threads fit ensembles as that many rows keep busy. The trees are the same."""
    return threadpool_limits(1 if rows < _FEW_ROWS else None, user_api="openmp")


def _conformal(load: Array, residual: Array, bins: list[float]) -> list[float]:
    """Return the finite-sample 90 % quantile of the residuals in each bin, or of all where a bin holds too few."""
    widths = []
    where = np.searchsorted(bins, load)
    for i in range(len(bins) + 1):
        chosen = residual[where == i] if (where == i).sum() >= 30 else residual
        level = min(np.ceil((len(chosen) + 1) * 0.9) / len(chosen), 1.0)
        widths.append(float(np.quantile(chosen, level)))
    return widths


def _thin(parts: list[Rows], limit: int, generator: np.random.Generator) -> list[Rows]:
    total = sum(len(part.index) for part in parts)
    if total <= limit:
        return parts
    thinned = []
    for part in parts:
        keep = np.sort(generator.permutation(len(part.index))[: max(len(part.index) * limit // total, 1)])
        thinned.append(
            Rows(part.table[keep], part.op_type[keep], part.device, part.dtype, part.stack, part.index[keep])
        )
    return thinned


def _rising(feature: str) -> int:
    """Return 1 where more of a feature never makes a kernel faster, -1 where it never makes one slower, else 0."""
    if feature.startswith("align_"):  # rows that begin on a larger boundary
        return -1
    worse = feature.startswith(("limit_", "pad_")) and "_or_" not in feature  # of one tile; "or" compares two
    return int(worse or feature in ("quantisation", "reload"))


class _Samples:
    """All rows of one family, stacked."""

    def __init__(self, key: str, parts: list[Rows], seconds: Array, traits: Array) -> None:
        designs = [design_of(key, part.table, part.dtype, part.device) for part in parts]
        self.key = key
        self.table = np.concatenate([part.table for part in parts])
        self.limit = np.concatenate([d.limit_s for d in designs])
        self.features = np.concatenate([d.features for d in designs])
        inputs = (*designs[0].names, "share", "op")
        self.rising = [_rising(name) for name in inputs]
        self.own = [i for i, name in enumerate(inputs) if name.startswith(("alone_", "pages_", "size_"))]
        """Columns that do not carry over: what its caches spare, which pages it finds and which kernel its library
        takes for a size is each device's own."""
        self.index = np.concatenate([part.index for part in parts])
        self.log_time = np.log(seconds[self.index])
        self.target = seconds[self.index]
        self.traits = traits[self.index]
        self.op = np.concatenate([part.op_type for part in parts])
        self.op_names = sorted({str(op) for op in self.op})
        self.dtypes = [part.dtype for part in parts]
        self.devices = [part.device for part in parts]
        names = [f"{part.device.name}|{part.stack}" for part in parts]
        self.groups = sorted(set(names))
        sizes = [len(part.index) for part in parts]
        self.group_code = np.repeat([self.groups.index(n) for n in names], sizes)
        self.part_code = np.repeat(np.arange(len(parts)), sizes)
        devices = sorted({part.device.name for part in parts})
        self.device_code = np.repeat([devices.index(part.device.name) for part in parts], sizes)

    def launch(self, train: NDArray[np.int64]) -> dict[str, float]:
        """Return the launch floor of each group: the fastest hundredth of its kernels."""
        found = {}
        for i, name in enumerate(self.groups):
            times = self.target[train[self.group_code[train] == i]]
            if times.size:
                found[name] = float(np.quantile(times, 0.01))
        return found

    def _launch_each(self, launch: Mapping[str, float]) -> Array:
        each: Array = np.array([launch_of(launch, name) for name in self.groups])[self.group_code]
        return each

    def load(self, launch: Mapping[str, float]) -> Array:
        """Return log(limit / launch), [n]."""
        return np.log(self.limit / self._launch_each(launch))

    def inputs(self, launch: Mapping[str, float]) -> tuple[NDArray[np.float32], Array]:
        """Return the inputs of the shared ensemble (the last column, the operator's, still empty) and the base."""
        return inputs_of(self.features, self.limit, self._launch_each(launch))

    def larger(self) -> NDArray[np.bool_]:
        """Return the tenth with most work of each group."""
        work = self.table[:, COLUMNS.index("flops")] + self.table[:, COLUMNS.index("read_bytes")]
        mask = np.zeros(len(work), dtype=bool)
        for i in range(len(self.groups)):
            members = self.group_code == i
            mask[members] = work[members] > np.quantile(work[members], 0.9)
        return mask

    def defaults(self) -> dict[str, str]:
        """Return the group with most rows for each device."""
        counts = np.bincount(self.group_code, minlength=len(self.groups))
        best: dict[str, str] = {}
        for i in np.argsort(counts, kind="stable"):
            best[self.groups[i].split("|", 1)[0]] = self.groups[i]
        return best

    def types(self) -> dict[str, list[str]]:
        """Return the data types that each group was measured with."""
        found: dict[str, set[str]] = {}
        for i, dtype in enumerate(self.dtypes):
            group = self.groups[self.group_code[np.flatnonzero(self.part_code == i)[0]]]
            found.setdefault(group, set()).add(dtype)
        return {group: sorted(dtypes) for group, dtypes in sorted(found.items())}

    def tiles(self, train: NDArray[np.int64], launch: Mapping[str, float]) -> dict[str, list[float]]:
        """Return the parameters of the tile model of each GPU and data type, where there is such a model."""
        alike: dict[str, list[int]] = {}
        for i, (device, dtype) in enumerate(zip(self.devices, self.dtypes, strict=True)):
            if tiled(self.key, device):
                alike.setdefault(f"{device.name}|{dtype}", []).append(i)
        found = {}
        for name, parts in sorted(alike.items()):
            rows = train[np.isin(self.part_code[train], parts)]
            if rows.size:
                device, dtype = self.devices[parts[0]], self.dtypes[parts[0]]
                floor = self._launch_each(launch)[rows]
                found[name] = tiles.fit(self.table[rows], self.log_time[rows], dtype, device, floor)
        return found

    def residual(self, model: FamilyModel, test: NDArray[np.int64], *, known: bool) -> Array:
        """Return log(measured / predicted) of the test rows."""
        x, base = self.inputs(model.launch_s)
        x[:, -1] = [model.ops.get(op, 0.0) for op in self.op]
        if known and model.sharp is not None:
            predicted = base[test] + sharp_of(model, x[test], self.group_code[test])
        else:
            predicted = base[test] + model.shared(x[test])
        if not known and model.tiles:
            for i in np.unique(self.part_code[test]):
                here, device, dtype = self.part_code[test] == i, self.devices[i], self.dtypes[i]
                if tiled(self.key, device):
                    parameters = parameters_for(model, f"{device.name}|{dtype}")
                    rows = test[here]
                    floor = self._launch_each(model.launch_s)[rows]
                    predicted[here] = blended(
                        model, parameters, predicted[here], self.table[rows], dtype, device, floor
                    )
        return np.asarray(self.log_time[test] - predicted)
