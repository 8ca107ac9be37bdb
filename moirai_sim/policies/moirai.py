"""Policy ``moirai``: coarsen the graph as the inference backend will, place the coarse graph exactly, expand."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from moirai_sim.policies.auto import Auto
from moirai_sim.policies.milp import Milp
from moirai_sim.policies.reductions import chains, contract
from moirai_sim.policies.run import require_latency

if TYPE_CHECKING:
    from moirai_sim.placement import Placement
    from moirai_sim.policies.base import Request
    from moirai_sim.problem import PlacementProblem

MILP_OPERATORS = 60
"""Coarse graphs above this size are left to ``auto``: HiGHS finds no answer for larger ones in reasonable time."""


class Moirai:
    """Fusion-aware coarsening, then exact placement (Moirai, arXiv 2312.04025).

    What the backend fuses comes as co-location groups and is merged before any policy runs. Moirai coarsens further:
    chains whose inner values have no other consumer become one operator. The coarse graph is solved by the paper's MILP
    while it is small, else by ``auto``, and the answer is expanded to the user's operators. Merging free operators may
    cost quality, so no optimum is claimed for the original unless a bound of its own proves it.
    """

    name: ClassVar[str] = "moirai"

    def place(self, problem: PlacementProblem, request: Request) -> Placement:
        """Return the expanded answer of the coarse problem."""
        require_latency(request, self.name)
        started = time.perf_counter()
        coarse = contract(problem, chains(problem))
        small = coarse.problem.n_operators <= MILP_OPERATORS and problem.network != "fair"
        solver = Milp() if small else Auto()
        answer = coarse.invert(solver.place(coarse.problem, request))
        if not len(answer.device) and not coarse.lossless:  # merged operators are harder to fit into memory
            solver = Auto()
            left = max(0.0, request.time_limit_s - (time.perf_counter() - started))
            answer = solver.place(problem, replace(request, time_limit_s=left))
        facts = {"coarse_operators": coarse.problem.n_operators, "solver": solver.name}
        return replace(answer, provenance={**answer.provenance, **facts})
