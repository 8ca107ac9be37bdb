"""HEFT: heterogeneous earliest finish time, blind to contention as published, and with reserved ports."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moirai_sim.policies.insertion import insertion_schedule
from moirai_sim.policies.ranks import mean_operator_ns, mean_transfer_ns, upward_ranks

if TYPE_CHECKING:
    from moirai_sim.placement import Placement
    from moirai_sim.policies.base import Request
    from moirai_sim.problem import PlacementProblem


class Heft:
    """By decreasing upward rank, put each operator where it ends first, in the first gap that is long enough.

    Topcuoglu, Hariri, Wu, "Performance-Effective and Low-Complexity Task Scheduling for Heterogeneous Computing", TPDS
    13 (2002): upward ranks over mean times, earliest finish time with insertion.

    Extensions: where the network has ports, transfers are reserved on them with insertion, so that the schedule it sees
    is the one that happens (`HeftBlind` is the published form); a tensor is sent once to each device; memory is a
    filter; a co-location group follows its first member; under ``fair`` the links count as ports while placing.
    """

    name: ClassVar[str] = "heft"
    reserve_ports: ClassVar[bool] = True

    def place(self, problem: PlacementProblem, request: Request) -> Placement:
        """Return the placement and the orders of HEFT's schedule."""
        rank = upward_ranks(problem, mean_operator_ns(problem), mean_transfer_ns(problem))
        depth = np.empty(problem.n_operators, dtype=np.int64)
        depth[problem.topological_order] = np.arange(problem.n_operators)
        return insertion_schedule(
            problem,
            np.lexsort((depth, -rank)),
            np.full(problem.n_operators, -1, dtype=np.int64),
            reserve_ports=self.reserve_ports,
        )


class HeftBlind(Heft):
    """HEFT as published: transfers never wait for one another while operators are placed; see `Heft`."""

    name: ClassVar[str] = "heft-blind"
    reserve_ports: ClassVar[bool] = False
