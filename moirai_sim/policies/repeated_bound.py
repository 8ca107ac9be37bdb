"""A bound for series of repeated blocks: the exact least time of one block of each kind, times how often it occurs.

Every placement of the whole takes the sum of its blocks' times (series decomposition), so the sum of their least times
is a bound; memory is left to `bounds`. A block's least time over all devices of a large cluster is bounded by CP-SAT on
*ideal* devices: of each type as many as there are, at most one an operator, joined by the fastest routes between any
two of the types. Every schedule on the real devices is one on these, and no slower.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moirai_sim.policies.bounds import FAR, critical_path_ns
from moirai_sim.policies.cp_model import CpModel
from moirai_sim.policies.starts import too_wide
from moirai_sim.problem import UNLIMITED, UNSUPPORTED, PlacementProblem

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.policies.modules import Module
    from moirai_sim.policies.repeated import Repeated

MOST_DEVICES = 48
"""Blocks that need more ideal devices than this are bounded by their critical path alone."""


def repeated_bound_ns(blocks: Repeated, time_limit_s: float, seed: int = 0) -> int:
    """Return a proven lower bound of the makespan, ns."""
    deadline = time.perf_counter() + time_limit_s
    count = Counter(blocks.kind)
    total = 0
    for done, (block, times) in enumerate(sorted(count.items())):
        left = (deadline - time.perf_counter()) / (len(count) - done)
        total += times * _least_ns(blocks.problem, blocks.example[block], left, seed)
    return total


def _least_ns(problem: PlacementProblem, module: Module, time_limit_s: float, seed: int) -> int:
    """Return a bound of the time of a block over all its placements, ns."""
    least = critical_path_ns(module.problem)
    ideal, rank = ideal_devices(problem, module)
    if ideal.n_devices > MOST_DEVICES or time_limit_s <= 0 or too_wide(ideal):
        return least
    alone = int(np.where((ideal.operator_ns < 0).any(axis=0), FAR, ideal.operator_ns.sum(axis=0)).min())
    if least >= alone or alone >= FAR:
        return least
    allowed = rank[None, :] <= np.arange(ideal.n_operators)[:, None]  # equal devices are numbered by first use
    answer = CpModel(ideal, alone, allowed).solve(time_limit_s, seed=seed)
    return max(least, min(alone, answer.bound_ns))


def ideal_devices(problem: PlacementProblem, module: Module) -> tuple[PlacementProblem, NDArray[np.int64]]:
    """Return a block on ideal devices, one column of durations each, and the number of each among those of its type.

    A type that another matches in every operator and route is replaced by more devices of the other.
    """
    n = len(module.operators)
    of_type = [np.flatnonzero(problem.device_type == kind) for kind in np.unique(problem.device_type)]
    duration = np.where(module.problem.operator_ns < 0, FAR, module.problem.operator_ns)
    duration = np.stack([duration[:, devices[0]] for devices in of_type], axis=1)
    size = len(of_type)
    routes = np.full((len(module.problem.transfer_ns), size, size), FAR, dtype=np.int64)
    for a in range(size):
        for b in range(size):
            classes = np.unique(problem.route_class[np.ix_(of_type[a], of_type[b])])
            if (classes >= 0).any():
                routes[:, a, b] = module.problem.transfer_ns[:, classes[classes >= 0]].min(axis=1)
    kept = list(range(size))
    copies = [len(devices) for devices in of_type]
    for a in range(size):
        better = next((b for b in kept if b != a and _matches(b, a, duration, routes)), None)
        if better is not None:
            kept.remove(a)
            copies[better] += copies[a]
    copies = [min(n, copies[b]) for b in kept]
    kind = np.repeat(np.array(kept, dtype=np.int64), copies)
    ideal = replace(
        module.problem,
        operator_ns=np.where(duration >= FAR, UNSUPPORTED, duration)[:, kind],
        devices=tuple(f"ideal{k}" for k in range(len(kind))),
        device_type=np.arange(len(kind), dtype=np.int64),
        memory_bytes=np.full(len(kind), UNLIMITED, dtype=np.int64),
        route_class=np.where(np.eye(len(kind), dtype=bool), -1, kind[:, None] * size + kind[None, :]).astype(np.int64),
        transfer_ns=np.where(routes >= FAR, 0, routes).reshape(len(routes), size * size),  # no pair of these types
    )
    return ideal, np.concatenate([np.arange(count) for count in copies])


def _matches(b: int, a: int, duration: NDArray[np.int64], routes: NDArray[np.int64]) -> bool:
    """Tell whether type b does all that type a does, no slower: among themselves and with any third."""
    if (duration[:, b] > duration[:, a]).any():
        return False
    for c in range(routes.shape[1]):
        others = (b,) if c in (a, b) else (c,)
        for other in others:
            if (routes[:, b, other] > routes[:, a, c]).any() or (routes[:, other, b] > routes[:, c, a]).any():
                return False
    return True
