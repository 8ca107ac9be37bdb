"""Cycles of known placements: which of them should take turns so that a stream has the shortest period."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moirai_sim.placement import Placement
from moirai_sim.policies.loads import fits, resource_loads_ns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from moirai_sim.problem import PlacementProblem

WHOLE_DEVICES = 64
"""On up to this many devices a copy of the whole model is considered."""


def whole_models(problem: PlacementProblem) -> list[Placement]:
    """Return the placements that keep the whole model on one device each."""
    everywhere = (np.full(problem.n_operators, k) for k in range(min(problem.n_devices, WHOLE_DEVICES)))
    return [Placement(device=device) for device in everywhere if fits(problem, device)]


def best_cycle(problem: PlacementProblem, pool: Sequence[Placement], replicas: int) -> Placement | None:
    """Return the cycle of up to ``replicas`` placements of a pool with the shortest period found; None if none fits.

    Greedy, from each placement as the first: the next turn goes to the placement that leaves the largest load of a
    device, port or link least, ties to the least sum of loads, then to the earlier in the pool.
    """
    loads = np.array([resource_loads_ns(problem, one.device) for one in pool])
    best: tuple[float, list[int]] | None = None
    for first in range(len(pool)):
        chosen, total = list[int](), np.zeros_like(loads[0])
        while len(chosen) < replicas:
            following = _next(problem, pool, loads, chosen, total) if chosen else first
            if following is None or not _hold(problem, pool, [*chosen, following]):
                break
            chosen.append(following)
            total = total + loads[following]
            period = int(total.max()) / len(chosen)
            if best is None or (period, len(chosen)) < (best[0], len(best[1])):
                best = period, chosen.copy()
    if best is None:
        return None
    head, *others = (replace(pool[index], replicas=()) for index in best[1])
    return replace(head, replicas=tuple(others))


def _next(
    problem: PlacementProblem, pool: Sequence[Placement], loads: NDArray[np.int64], chosen: list[int],
    total: NDArray[np.int64],
) -> int | None:  # fmt: skip
    after = total + loads
    order = np.lexsort((np.arange(len(pool)), after.sum(axis=1), after.max(axis=1))).tolist()
    return next((index for index in order if _hold(problem, pool, [*chosen, index])), None)


def _hold(problem: PlacementProblem, pool: Sequence[Placement], chosen: list[int]) -> bool:
    return fits(problem, np.stack([pool[index].device for index in sorted(set(chosen))]))
