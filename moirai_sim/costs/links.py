"""What a transfer or a collective costs: curves of time over size, fitted to measured transfers by `links_fit`.

A curve is monotone: below the smallest size it is the latency, above the largest it goes on at the bandwidth reached
there, and between them it interpolates log(time) over log(size), so the efficiency of every size is that of the
measurement. Stored as JSON.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moirai_sim.costs.card import known_errors
from moirai_sim.errors import InputError
from moirai_sim.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from moirai_sim.clusters.cluster import Route

FORMAT = "moirai-sim/links@1"
COPIES = {("cpu", "gpu"): "copy host-device pinned", ("gpu", "cpu"): "copy device-host pinned"}
"""Collectives that price a transfer between devices of these kinds in one server: copies from and to pinned memory of
the host, nothing else running. Their group's device type is the GPU's, or empty for the machine that was profiled."""
_STEEPEST = 1.0
"""Most that log time is let to rise with log participants, at equal bytes: a ring's latency goes with their number."""
_TYPICAL = 2**16
"""Bytes by which routes are compared."""


@dataclass(frozen=True, order=True)
class Group:
    """Who takes part in a transfer or collective."""

    collective: str
    """``send`` for point to point, ``part`` for the start of a part, one of `COPIES`, else ``all-reduce``, ..."""
    participants: int
    """Devices; 2 for ``send``."""
    nodes: int = 1
    """Machines that they lie in."""
    device: str = ""
    """Device type; empty where the model is of the one machine that it was measured on."""
    stack: str = ""
    """Library and version; empty where only one was measured."""
    latency_ns: int = 0
    """Of the route that was measured; 0 where it is not told."""
    bandwidth_bytes_per_s: float = 0.0
    """Likewise."""

    def ideal_ns(self, size: Any) -> Any:  # noqa: ANN401
        """Return what so many bytes take by the figures of the route that was measured."""
        return self.latency_ns + size / self.bandwidth_bytes_per_s * 1e9


@dataclass(frozen=True)
class Curve:
    """Time over size for one kind of transfer among a number of devices.

    Raises
    ------
    ValueError
        If sizes and times are not as many as each other, at least one, positive, finite and in order.
    """

    bytes: tuple[int, ...]
    """Ascending."""
    time_s: tuple[float, ...]
    """Not descending."""

    def __post_init__(self) -> None:
        """Check sizes and times."""
        sizes, times = np.array(self.bytes, dtype=np.float64), np.array(self.time_s, dtype=np.float64)
        if not (0 < len(sizes) == len(times) and sizes[0] > 0 and (np.diff(sizes) > 0).all()):
            raise ValueError("sizes must be positive, rise, and be as many as times")
        if not (times[0] > 0 and (np.diff(times) >= 0).all() and np.isfinite(times[-1])):
            raise ValueError("times must be positive and finite, and not fall")

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
    """Fitted curves of one or several kinds of machine.

    Parameters
    ----------
    name
        Of the catalog entry or the folder.
    curves
        Curve of each group that was measured.
    card
        Data, hardware, held-out errors.
    """

    def __init__(self, name: str, curves: Mapping[Group, Curve], card: Mapping[str, Any]) -> None:
        self.name = name
        self.curves = dict(sorted(curves.items()))
        self.card = card

    @property
    def by_device(self) -> bool:
        """Whether times depend on which devices are at the ends, and not on the one machine alone that was profiled."""
        return any(group.device or group.collective in COPIES.values() for group in self.curves)

    def serves(self, device: str, collective: str = "send", nodes: int = 1) -> bool:
        """Return whether that collective was measured among devices of a type, or on the one machine of the model."""
        return bool(self._alike(collective, nodes, device, None))

    def curve(
        self, collective: str, participants: int = 2, *, nodes: int = 1, device: str = "", stack: str | None = None
    ) -> Curve:
        """Return the curve of a group that was measured.

        Raises
        ------
        InputError
            If it was not.
        """
        found = self._alike(collective, nodes, device, stack).get(participants)
        if found is None:
            raise self._unknown(f"'{collective}' among {participants} devices")
        return found

    def transfer_ns(
        self,
        size: int | NDArray[np.int64],
        route: Route | None = None,
        *,
        collective: str = "send",
        device: str = "",
        nodes: int = 1,
    ) -> Any:  # noqa: ANN401
        """Return the time of transfers between two devices, whole ns: an int for an int, an array [q] for an array [q].

        ``route`` may be given where the caller has one: links slower than those measured then bound the bandwidth.
        Where the model tells the routes that were measured, the one most like it is taken, and what differs by the
        figures of both is added.
        """
        near = None if route is None or collective != "send" else self._nearest(route, nodes, device)
        if route is not None and near is not None:
            group, curve = near
            sizes = np.atleast_1d(np.asarray(size))
            own = route.latency_ns + sizes / route.bandwidth_bytes_per_s * 1e9
            found = np.ceil(curve.seconds(sizes) * 1e9 - 1e-6 + own - group.ideal_ns(sizes)).astype(np.int64)
            # Not below its own figures, where the measured route was faster than by its figures.
            found = np.maximum(found, np.ceil(np.minimum(own, curve.seconds(sizes) * 1e9)).astype(np.int64))
            return int(found[0]) if np.ndim(size) == 0 else found
        curve = self.curve(collective, nodes=nodes, device=device)
        nanoseconds = np.ceil(curve.seconds(np.atleast_1d(np.asarray(size))) * 1e9 - 1e-6).astype(np.int64)
        if route is not None and route.bandwidth_bytes_per_s < curve.bandwidth_bytes_per_s:  # than what was measured
            slowest = np.ceil(np.atleast_1d(size) / route.bandwidth_bytes_per_s * 1e9).astype(np.int64)
            nanoseconds = np.maximum(nanoseconds, route.latency_ns + slowest)
        return int(nanoseconds[0]) if np.ndim(size) == 0 else nanoseconds

    def _nearest(self, route: Route, nodes: int, device: str) -> tuple[Group, Curve] | None:
        """Return the transfers measured over the route that is most like this one; None where no routes were told."""
        told = [
            (group, curve)
            for group, curve in self.curves.items()
            if group.bandwidth_bytes_per_s and (group.collective, group.nodes, group.device) == ("send", nodes, device)
        ]
        wanted = route.latency_ns + _TYPICAL / route.bandwidth_bytes_per_s * 1e9
        return min(told, key=lambda one: abs(float(one[0].ideal_ns(_TYPICAL)) - wanted), default=None)

    def collective_s(
        self,
        collective: str,
        participants: int,
        size: NDArray[np.int64],
        *,
        nodes: int = 1,
        device: str = "",
        stack: str | None = None,
    ) -> NDArray[np.float64]:
        """Return the time of a collective among ``participants`` devices, seconds, [q].

        For a number of participants that was not measured the bytes that each device sends in a ring
        (2 (p - 1) / p of the size for all-reduce) are made equal (Patarasu and Yuan, JPDC 2009), and log time is taken
        linear in log p through the two nearest numbers that were; with only one, half of the latency of an all-reduce
        goes with p - 1.

        Parameters
        ----------
        collective, participants, nodes, device
            As in `Group`.
        size
            [q] bytes of the tensor: of the whole result, for all-gather, and of the whole operand otherwise.
        stack
            As in `Group`; by default the one with most curves.

        Raises
        ------
        InputError
            If that collective was never measured on such devices.
        """
        known = self._alike(collective, nodes, device, stack)
        if not known:
            raise self._unknown(f"'{collective}'")
        sent = np.asarray(size) * ring_share(collective, participants)
        near = sorted(known, key=lambda count: (abs(np.log(count / participants)), count))[:2]
        log_s = [np.log(known[count].seconds(sent / ring_share(collective, count))) for count in near]
        if len(near) == 1 or near[0] == participants:
            hops = max(participants - 1, 1) / max(near[0] - 1, 1) if collective == "all-reduce" else 1.0
            added = known[near[0]].latency_s * max(0.0, hops - 1.0) * 0.5
            return np.asarray(np.exp(log_s[0]) + added)
        slope = np.clip((log_s[1] - log_s[0]) / np.log(near[1] / near[0]), 0.0, _STEEPEST)
        return np.asarray(np.exp(log_s[0] + slope * np.log(participants / near[0])))

    def _alike(self, collective: str, nodes: int, device: str, stack: str | None) -> dict[int, Curve]:
        """Return curves by participants; those of the machine itself where the device type was not measured."""
        for owner in (device, ""):
            found = {
                g: c for g, c in self.curves.items() if (g.collective, g.nodes, g.device) == (collective, nodes, owner)
            }
            if found:
                stacks = [group.stack for group in found]
                wanted = max(sorted(set(stacks)), key=stacks.count) if stack is None else stack
                return {group.participants: curve for group, curve in found.items() if group.stack == wanted}
        return {}

    def contents(self) -> str:
        """Return what was measured, as text."""
        return ", ".join(
            sorted({f"{g.collective} among {g.participants} {g.device or 'devices'}" for g in self.curves})
        )

    def _unknown(self, what: str) -> InputError:
        return InputError(f"link model '{self.name}' has no {what}; it has {self.contents()}")

    def write(self, folder: Path) -> None:
        """Write ``links.json`` into a folder."""
        curves = [
            {key: value for key, value in asdict(group).items() if value}
            | {"bytes": list(curve.bytes), "time_s": [float(f"{t:.12g}") for t in curve.time_s]}
            for group, curve in self.curves.items()
        ]
        document = {"format": FORMAT, "name": self.name, "card": self.card, "curves": curves}
        write_whole(folder / "links.json", json.dumps(document, indent=1) + "\n")


def ring_share(collective: str, participants: int) -> float:
    """Return the bytes that each device sends, as a share of the tensor, when the collective runs as a ring."""
    if collective == "all-reduce":
        return 2 * (participants - 1) / participants
    if collective in ("all-gather", "reduce-scatter", "all-to-all"):
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
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as a link model ({error}); write it with 'calibrate'") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise InputError(f"{path}: is no link model; its format must be '{FORMAT}'")
    try:
        curves = {}
        for entry in document["curves"]:
            group = Group(
                str(entry["collective"]), int(entry["participants"]), int(entry.get("nodes", 1)),
                str(entry.get("device", "")), str(entry.get("stack", "")), int(entry.get("latency_ns", 0)),
                float(entry.get("bandwidth_bytes_per_s", 0)),
            )  # fmt: skip
            curves[group] = Curve(tuple(map(int, entry["bytes"])), tuple(map(float, entry["time_s"])))
        card = document.get("card", {})
        known_errors(card)
        return LinkModel(str(document["name"]), curves, card)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"{path}: a curve is broken ({error!r}); write it again with 'calibrate'") from error
