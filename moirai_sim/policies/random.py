"""A random placement: the floor of every comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moirai_sim.placement import Placement
from moirai_sim.policies.groups import groups_of, no_room

if TYPE_CHECKING:
    from moirai_sim.policies.base import Request
    from moirai_sim.problem import PlacementProblem


class Random:
    """Put each operator (or co-location group) on a device drawn uniformly from those that can run and hold it.

    Groups are placed by decreasing weight, so that what fits at all usually fits.
    """

    name: ClassVar[str] = "random"

    def place(self, problem: PlacementProblem, request: Request) -> Placement:
        """Return a placement drawn with ``request.seed``."""
        rng = np.random.default_rng(request.seed)
        groups = groups_of(problem)
        free = problem.memory_bytes.copy()
        home = np.empty(len(groups.weight), dtype=np.int64)
        for g in np.argsort(-groups.weight, kind="stable").tolist():
            choices = np.flatnonzero(groups.can_run[g, problem.device_type] & (free >= groups.weight[g]))
            if not len(choices):
                return no_room("the random order left no device with enough memory for some operator")
            home[g] = rng.choice(choices)
            free[home[g]] -= groups.weight[g]
        return Placement(device=home[groups.of], provenance={"seed": request.seed})
