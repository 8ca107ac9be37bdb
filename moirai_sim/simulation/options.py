"""SimulationOptions: how devices differ from the plain ones that run one operator at a time and launch in no time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moirai_sim.errors import InputError
from moirai_sim.units import parse_ns

_SLOWEST = 1e-6
"""Least speed of what has not failed; slower, and times would be no whole nanoseconds of 63 bits."""
_LONGEST_NS = 10**15


@dataclass(frozen=True)
class Fault:
    """A device or link that runs at another speed from a moment on."""

    resource: str
    """Name of a device, or of a link (network ``fair``)."""
    at_ns: int
    speed: float = 0.0
    """Factor on the speed until the next fault of the same resource, 1 for its own. What is in progress goes on at the
    new speed. A link of speed 0 may come back; a device has failed for good, and what it ran, sent or received is
    lost."""


def parse_fault(text: str) -> Fault:
    """Return the fault that a text names: ``RESOURCE@TIME`` fails then, ``RESOURCE@TIME=SPEED`` changes its speed.

    Raises
    ------
    InputError
        If the text has another form, e.g. a time without a unit.
    """
    resource, at, rest = text.rpartition("@")
    when, equals, speed = rest.partition("=")
    try:
        factor = float(speed) if equals else 0.0
    except ValueError:
        factor = math.nan
    if not at or not resource or math.isnan(factor):
        raise InputError(f"fault '{text}': write RESOURCE@TIME or RESOURCE@TIME=SPEED, e.g. 'gpu0@3 ms=0.5'")
    return Fault(resource, parse_ns(when), factor)


@dataclass(frozen=True)
class SimulationOptions:
    """Device models of a simulation. The defaults are the meaning of a placement in ``docs/design.md``."""

    streams: int = 1
    """Operators that a device runs at once, each at full speed: parts that do not slow each other down."""
    launch_ns: int = 0
    """Time of the host to launch an operator, ns."""
    asynchronous_launch: bool = True
    """The host of a device launches its operators one after the other, in order of priority, from the arrival of the
    request on, and does not wait for them to run; else a device stands still while its next operator is launched."""
    copy_engines: int | None = None
    """Transfers in which a device takes part at once. 0: it has no copy engine, so that it cannot compute meanwhile.
    None: as many as the network allows."""
    in_order: bool = False
    """Tensors from one device to another follow each other, as over one connection, and the next one is sent once the
    last byte of the one before has left; else all of them share their links. Network ``fair`` alone."""
    reader_share: float = 0.0
    """Share of a transfer's time that its first reader spends instead of the link, with its device busy: 0 where an
    engine copies meanwhile, 1 where a core reads what lies in the cache or memory of another."""
    part_ns: int | tuple[int, ...] = 0
    """Time to start a *part*, ns, on every device or on each: the operators that a device runs in one call of its
    backend. A new one begins with an operator that waits for another device and after one that another device waits
    for. The transfer times of the problem hold one part each, the mean of the devices', which moves from there to where
    parts really begin."""
    spread: float | Mapping[str, float] = 0.0
    """Standard deviation of the logarithm of an operator's time around its mean, which is the time of the problem: one
    for all, or by operator name; see `spread_of`."""
    distribution: Literal["lognormal", "exponential"] = "lognormal"
    """``exponential`` draws every time with a spread above 0 from the exponential distribution of that mean."""
    faults: tuple[Fault, ...] = ()
    seed: int = 0
    """Every device draws from a stream of its own, so that a change on one leaves the others as they were."""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises
        ------
        InputError
            With every option that is out of range.
        """
        problems = []
        if self.streams < 1:
            problems.append(f"streams: read {self.streams}; a device runs at least 1 operator at a time")
        if self.seed < 0:
            problems.append(f"seed: read {self.seed}; give a whole number of at least 0")
        if not 0 <= self.launch_ns <= _LONGEST_NS:
            problems.append(f"launch_ns: read {self.launch_ns}; a launch takes between 0 ns and eleven days")
        if np.min(self.part_ns) < 0:
            problems.append(f"part_ns: read {self.part_ns}; a part takes at least 0 ns to start")
        if self.copy_engines is not None and self.copy_engines < 0:
            problems.append(f"copy_engines: read {self.copy_engines}; give 0 or more, or none at all for no limit")
        if not 0 <= self.reader_share <= 1:
            problems.append(f"reader_share: read {self.reader_share}; a share lies between 0 and 1")
        spreads = self.spread.values() if isinstance(self.spread, Mapping) else [self.spread]
        if any(not 0 <= value < math.inf for value in spreads):
            problems.append(f"spread: read {self.spread}; a standard deviation is a finite number of at least 0")
        problems += [
            f"fault of '{fault.resource}': its time must be at least 0, its speed 0 or between 1e-6 and 1e6"
            for fault in self.faults
            if fault.at_ns < 0 or not (fault.speed == 0 or _SLOWEST <= fault.speed <= 1 / _SLOWEST)
        ]
        if problems:
            raise InputError(problems)

    @property
    def transfer_part_ns(self) -> int:
        """What the transfer times of the problem hold of a part."""
        return round(float(np.mean(self.part_ns)))

    @property
    def disturbed(self) -> bool:
        """Whether operators can take other times than those of the problem."""
        return bool(self.spread) or bool(self.faults)


def spread_of(low: float, high: float) -> float:
    """Return the spread of a lognormal time whose 90 % interval is (low, high), as a cost model predicts it."""
    return math.log(high / low) / (2 * 1.6448536269514722)


DEFAULT = SimulationOptions()
