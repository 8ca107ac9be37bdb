"""Whether a core runs at its own pace: a virtual one shares a physical one with whatever else its host runs.

The guest's scheduler sees nothing of it. Where the host lets another machine use the other thread of a core, kernels
take up to a third longer and calls three quarters, for a few milliseconds or for minutes.
"""

from __future__ import annotations

import time

_STEPS, _TIMES = 500, 3
"""About 10 us of an interpreter, which feels a busy sibling more than kernels do; the first time its code is cold."""
_FIRST_NS = 50_000_000


class Pace:
    """Times a fixed piece of work on the core of this thread, against the least that it has taken so far."""

    def __init__(self) -> None:
        self._least_ns = 2**62
        end = time.monotonic_ns() + _FIRST_NS
        while time.monotonic_ns() < end:
            self.slowed()

    def slowed(self) -> float:
        """Return how much longer than at the core's own pace the work takes now, as a share of that; at least 0."""
        took = min(_time_work() for _ in range(_TIMES))
        self._least_ns = min(self._least_ns, took)
        return took / self._least_ns - 1


def _time_work() -> int:
    start = time.monotonic_ns()
    total = 0
    for step in range(_STEPS):
        total += step
    return time.monotonic_ns() - start
