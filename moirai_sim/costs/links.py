"""What a transfer or a collective costs: curves of time over size, fitted to measured transfers.

A curve is monotone: below the smallest size it is the latency, above the largest it goes on at the bandwidth reached
there, and between them it interpolates log(time) over log(size), so the efficiency of every size is that of the
measurement. Stored as JSON.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moirai_sim.errors import InputError
from moirai_sim.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    from numpy.typing import NDArray

    from moirai_sim.clusters.cluster import Route

FORMAT = "moirai-sim/links@1"
_KNOTS = 24
_HOLD_OUT = 0.2
_LARGEST = 0.1


@dataclass(frozen=True)
class Curve:
    """Time over size for one kind of transfer among a number of devices."""

    bytes: tuple[int, ...]
    """Ascending."""
    time_s: tuple[float, ...]
    """Not descending."""

    @property
    def latency_s(self) -> float:
        """Time of the smallest transfer."""
        return self.time_s[0]

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """Bytes per second that one more byte gets at the large end; of the largest transfer if noise hides that."""
        if len(self.bytes) < 2:
            return self.bytes[-1] / self.time_s[-1]
        half = int(np.searchsorted(self.bytes, self.bytes[-1] / 4))
        half = min(half, len(self.bytes) - 2)
        rise = self.time_s[-1] - self.time_s[half]
        return (self.bytes[-1] - self.bytes[half]) / rise if rise > 0 else self.bytes[-1] / self.time_s[-1]

    def seconds(self, size: NDArray[Any]) -> NDArray[np.float64]:
        """Return the time of each size."""
        x = np.maximum(np.asarray(size, dtype=np.float64), 1.0)
        inside = np.exp(np.interp(np.log(x), np.log(self.bytes), np.log(self.time_s)))
        beyond = np.maximum(x - self.bytes[-1], 0) / self.bandwidth_bytes_per_s
        return np.asarray(inside + beyond, dtype=np.float64)


class LinkModel:
    """Fitted curves by collective and number of participants.

    Parameters
    ----------
    name
        Of the catalog entry or the folder.
    curves
        (collective, participants) -> curve. ``("send", 2)`` is point to point.
    card
        Data, hardware, held-out errors.
    """

    def __init__(self, name: str, curves: Mapping[tuple[str, int], Curve], card: Mapping[str, Any]) -> None:
        self.name = name
        self.curves = dict(sorted(curves.items()))
        self.card = card

    def transfer_ns(self, size: int | NDArray[np.int64], route: Route | None = None) -> Any:  # noqa: ANN401
        """Return the time of point-to-point transfers, whole ns: an int for an int, an array [q] for an array [q].

        ``route`` may be given where the caller has one: links slower than those measured then bound the bandwidth.
        """
        seconds = self.collective_s("send", 2, np.atleast_1d(np.asarray(size)))
        nanoseconds = np.ceil(seconds * 1e9 - 1e-6).astype(np.int64)
        if route is not None:
            slowest = np.ceil(np.atleast_1d(size) / route.bandwidth_bytes_per_s * 1e9).astype(np.int64)
            measured = self.curves["send", 2].bandwidth_bytes_per_s
            if route.bandwidth_bytes_per_s < measured / 4:  # another kind of link than the one that was measured
                nanoseconds = np.maximum(nanoseconds, route.latency_ns + slowest)
        return int(nanoseconds[0]) if np.ndim(size) == 0 else nanoseconds

    def collective_s(self, collective: str, participants: int, size: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the time of a collective among ``participants`` devices, seconds, [q].

        A number of participants that was not measured takes the nearest one that was, with the bytes that each device
        sends in a ring (2 (p - 1) / p of the size for all-reduce) made equal (Patarasu and Yuan, JPDC 2009).

        Raises
        ------
        InputError
            If that collective was never measured.
        """
        known = [count for kind, count in self.curves if kind == collective]
        if not known:
            kinds = sorted({kind for kind, _ in self.curves})
            raise InputError(f"link model '{self.name}' has no '{collective}'; it has {', '.join(kinds)}")
        nearest = min(known, key=lambda count: (abs(np.log(count / participants)), count))
        share = ring_share(collective, participants) / ring_share(collective, nearest)
        curve = self.curves[collective, nearest]
        hops = (participants - 1) / (nearest - 1) if collective == "all-reduce" else 1.0
        return curve.seconds(np.asarray(size) * share) + curve.latency_s * max(0.0, hops - 1.0) * 0.5

    def write(self, folder: Path) -> None:
        """Write ``links.json`` into a folder."""
        curves = [
            {"collective": kind, "participants": count, "bytes": list(curve.bytes), "time_s": list(curve.time_s)}
            for (kind, count), curve in self.curves.items()
        ]
        document = {"format": FORMAT, "name": self.name, "card": self.card, "curves": curves}
        write_whole(folder / "links.json", json.dumps(document, indent=1) + "\n")


def ring_share(collective: str, participants: int) -> float:
    """Return the bytes that each device sends, as a share of the tensor, when the collective runs as a ring."""
    if collective == "all-reduce":
        return 2 * (participants - 1) / participants
    if collective in ("all-gather", "reduce-scatter"):
        return (participants - 1) / participants
    return 1.0


def load_link_model(folder: Path) -> LinkModel:
    """Read a link model.

    Raises
    ------
    InputError
        If the folder holds none, or it is broken.
    """
    path = folder / "links.json" if folder.is_dir() else folder
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a link model ({error}); write it with 'calibrate'") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise InputError(f"{path}: is no link model; its format must be '{FORMAT}'")
    try:
        curves = {
            (str(entry["collective"]), int(entry["participants"])): Curve(
                tuple(map(int, entry["bytes"])), tuple(map(float, entry["time_s"]))
            )
            for entry in document["curves"]
        }
        return LinkModel(str(document["name"]), curves, document.get("card", {}))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: a curve is broken ({error!r}); write it again with 'calibrate'") from error


def fit_curve(size: NDArray[np.int64], time_s: NDArray[np.float64]) -> Curve:
    """Fit a monotone curve: isotonic regression of log(time) over log(size), thinned to at most 24 knots."""
    from sklearn.isotonic import IsotonicRegression

    sizes, inverse = np.unique(size, return_inverse=True)
    middle = np.array([np.median(time_s[inverse == i]) for i in range(len(sizes))])
    weight = np.bincount(inverse)
    smooth = np.exp(IsotonicRegression().fit_transform(np.log(sizes), np.log(middle), sample_weight=weight))
    if len(sizes) > _KNOTS:
        grid = np.unique(np.geomspace(sizes[0], sizes[-1], _KNOTS).round().astype(np.int64))
        smooth = np.exp(np.interp(np.log(grid), np.log(sizes), np.log(smooth)))
        sizes = grid
    return Curve(tuple(int(s) for s in sizes), tuple(float(t) for t in smooth))


def fit_links(frame: pd.DataFrame, name: str, *, seed: int = 0) -> LinkModel:
    """Fit a link model to a link profile and say how well it predicts sizes that it did not see.

    The card's ``splits`` hold, for each collective and number of participants, the errors on a random fifth of the
    sizes and on the largest tenth of them, each left out of the fit.

    Raises
    ------
    InputError
        If a collective has fewer than five sizes: nothing could be held out.
    """
    curves, splits = {}, []
    rng = np.random.default_rng(seed)
    for (kind, count), part in frame.groupby(["collective", "participants"], sort=True):
        size, time_s = part["bytes"].to_numpy(np.int64), part["median_s"].to_numpy(np.float64)
        distinct = np.unique(size)
        if len(distinct) < 5:
            raise InputError(
                f"links: '{kind}' among {count} has {len(distinct)} sizes; profile at least 5 to hold out some"
            )
        inner = distinct[1:-1]
        random = rng.choice(inner, max(1, int(_HOLD_OUT * len(distinct))), replace=False)
        largest = distinct[-max(1, int(_LARGEST * len(distinct))) :]
        for split, held in (("random", random), ("larger", largest)):
            out = np.isin(size, held)
            error = np.abs(fit_curve(size[~out], time_s[~out]).seconds(size[out]) / time_s[out] - 1)
            splits.append(
                {
                    "split": split,
                    "family": f"{kind}-{count}",
                    "n": int(out.sum()),
                    "mean_ape": float(error.mean()),
                    "median_ape": float(np.median(error)),
                    "coverage": None,
                    "time_weighted_ape": float((error * time_s[out]).sum() / time_s[out].sum()),
                }
            )
        curves[str(kind), int(str(count))] = fit_curve(size, time_s)
    sources = sorted(frame["source"].unique())
    return LinkModel(name, curves, {"splits": splits, "sources": sources, "rows": len(frame)})
