"""Calls: functions called at an instant, before or after the engine's rounds."""

from __future__ import annotations

from collections.abc import Callable

import simpy

FIRST, LAST = 0, 2
"""Priorities at one instant: arrivals, faults and ends of flows come before the engine's rounds (SimPy's normal
priority, 1), new rates of flows after them."""


class Call(simpy.Event):  # type: ignore[misc]
    """Calls a function at an instant with a priority, which ``Environment.timeout`` does not offer."""

    def __init__(
        self, env: simpy.Environment, delay: int, priority: int, function: Callable[[simpy.Event], None]
    ) -> None:
        super().__init__(env)
        self._ok, self._value = True, None
        self.callbacks.append(function)
        env.schedule(self, priority, delay)
