"""Disturbances: operator times that vary, and devices and links that slow down or fail at a moment."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from moirai_sim.errors import InputError, did_you_mean
from moirai_sim.simulation.calls import FIRST, Call

if TYPE_CHECKING:
    from moirai_sim.simulation.engine import Engine
    from moirai_sim.simulation.options import Fault

_BLOCK = 1024


class Disturbances:
    """Draws the times of an engine's operators and lets its faults happen."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        plan, options = engine.plan, engine.options
        problem = plan.problem
        names = [problem.operators[i] for i in plan.operator.tolist()]
        given = options.spread
        self._spread = [given.get(name, 0.0) if isinstance(given, Mapping) else given for name in names]
        self._exponential = options.distribution == "exponential"
        self._streams = [
            np.random.default_rng([options.seed, zlib.crc32(device.encode())]) for device in problem.devices
        ]
        self._draws: list[list[float]] = [[] for _ in problem.devices]
        """[k] random numbers drawn ahead, a block at a time."""
        self._speed = [1.0] * problem.n_devices
        self._device = {name: k for k, name in enumerate(problem.devices)}
        links = engine.link_names
        wrong = [
            f"fault: there is no device or shared link '{fault.resource}'; "
            f"{did_you_mean(fault.resource, [*problem.devices, *links])}"
            for fault in options.faults
            if fault.resource not in self._device and fault.resource not in links
        ]
        if isinstance(given, Mapping):
            wrong += [f"spread: there is no operator '{name}'" for name in sorted(given.keys() - set(names))]
        if wrong:
            raise InputError(wrong)
        for fault in options.faults:
            Call(engine.env, fault.at_ns, FIRST, partial(self._happen, fault))

    def duration(self, i: int) -> int:
        """Return the time of the operator with plan number i that starts now, ns."""
        plan = self._engine.plan
        k = plan.device[i]
        lasts = float(plan.duration[i])
        spread = self._spread[i]
        if spread:
            draws = self._draws[k]
            if not draws:
                stream = self._streams[k]
                block = stream.exponential(size=_BLOCK) if self._exponential else stream.standard_normal(_BLOCK)
                draws.extend(block.tolist())
            draw = draws.pop()
            lasts *= draw if self._exponential else math.exp(spread * draw - spread * spread / 2)
        return round(lasts / self._speed[k])

    def _happen(self, fault: Fault, _event: object) -> None:
        engine = self._engine
        k = self._device.get(fault.resource)
        if k is None:
            engine.shared.set_capacity(fault.resource, fault.speed)  # type: ignore[attr-defined]
            return
        now, plan, old = engine.env.now, engine.plan, self._speed[k]
        if old == 0:
            return  # what has failed stays so: its work is lost

        def revised(when: int, job: int) -> int | None:
            if job >= 0 and plan.device[job % len(plan.device)] == k:
                return now + round((when - now) * old / fault.speed) if fault.speed else None
            if job >= 0 or fault.speed:
                return when
            t = ~job % plan.stride
            return None if t < len(plan.edge) and k in (plan.source[t], plan.target[t]) else when

        lost = engine.revise(revised)
        self._speed[k] = fault.speed
        if not fault.speed:
            engine.free[k] = -(2**60)
            engine.failed.add(k)
            if hasattr(engine.shared, "drop"):
                lost += engine.shared.drop(k)
            if hasattr(engine.network, "fail"):
                engine.network.fail([~job % plan.stride for job in lost if job < 0])
                engine.at(now)  # the other ends may go on
