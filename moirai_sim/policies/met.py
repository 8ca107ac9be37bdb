"""Minimum execution time: every operator on its fastest device."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moirai_sim.placement import Placement
from moirai_sim.policies.groups import groups_of, no_room

if TYPE_CHECKING:
    from moirai_sim.policies.base import Request
    from moirai_sim.problem import PlacementProblem


class Met:
    """Put every operator on the device that runs it fastest, whatever else runs there.

    Braun et al., "A Comparison of Eleven Static Heuristics for Mapping a Class of Independent Tasks onto Heterogeneous
    Distributed Computing Systems", JPDC 61 (2001). Extensions: a co-location group takes the device that runs the whole
    group fastest; memory is a filter, served in topological order; ties go to the device listed first.
    """

    name: ClassVar[str] = "met"

    def place(self, problem: PlacementProblem, request: Request) -> Placement:
        """Return the placement; each device runs greedily by upward rank."""
        groups = groups_of(problem)
        free = problem.memory_bytes.copy()
        home = np.full(len(groups.weight), -1, dtype=np.int64)
        for g in groups.of[problem.topological_order].tolist():
            if home[g] >= 0:
                continue
            choices = np.flatnonzero(groups.can_run[g, problem.device_type] & (free >= groups.weight[g]))
            if not len(choices):
                return no_room("no device has enough memory left for some operator")
            home[g] = choices[np.argmin(groups.work[g, problem.device_type[choices]])]
            free[home[g]] -= groups.weight[g]
        return Placement(device=home[groups.of])
