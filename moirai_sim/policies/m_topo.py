"""m-TOPO of Baechi: fill device after device in topological order."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moirai_sim.placement import Placement
from moirai_sim.policies.groups import groups_of, no_room

if TYPE_CHECKING:
    from moirai_sim.policies.base import Request
    from moirai_sim.problem import PlacementProblem


class MTopo:
    """Walk the operators in topological order and fill one device after the other to a balanced share of memory.

    Jeon et al., "Baechi: Fast Device Placement of Machine Learning Graphs", SoCC 2020, section 3.2.1: the share of each
    of k devices is the model's memory divided by k plus the largest operator, which balances memory without search.

    Extensions: devices may differ in memory, so a share is at most what the device holds, and what no share takes goes
    to any device with memory left; a co-location group is placed whole with its first member; a device that cannot run
    an operator is passed over; a model without weights is balanced by its mean execution time instead.
    """

    name: ClassVar[str] = "m-topo"

    def place(self, problem: PlacementProblem, request: Request) -> Placement:
        """Return the placement; each device runs greedily by upward rank."""
        groups = groups_of(problem)
        size = groups.weight
        if not size.any():
            runs = np.maximum(groups.can_run.sum(axis=1), 1)
            size = np.where(groups.can_run, groups.work, 0).sum(axis=1) // runs
        share = -(-int(size.sum()) // problem.n_devices) + int(size.max(initial=0))
        taken = np.zeros(problem.n_devices, dtype=np.int64)
        free = problem.memory_bytes.copy()
        home = np.full(len(size), -1, dtype=np.int64)
        current = 0
        for g in groups.of[problem.topological_order].tolist():
            if home[g] >= 0:
                continue
            possible = groups.can_run[g, problem.device_type] & (free >= groups.weight[g])
            if not possible.any():
                return no_room("no device has enough memory left for some operator")
            within = np.flatnonzero(possible & (taken + size[g] <= share))
            ahead = within[within >= current]
            home[g] = ahead[0] if len(ahead) else within[0] if len(within) else np.argmax(possible)
            if len(ahead) and groups.can_run[g, problem.device_type[current]]:
                current = int(ahead[0])
            taken[home[g]] += size[g]
            free[home[g]] -= groups.weight[g]
        return Placement(device=home[groups.of])
