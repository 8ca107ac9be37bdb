"""What a placement loses where devices and links slow down or fail."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from moirai_sim.errors import InputError
from moirai_sim.simulation.engine import records
from moirai_sim.simulation.options import SimulationOptions
from moirai_sim.simulation.plan import make_plan

if TYPE_CHECKING:
    from moirai_sim.placement import Placement
    from moirai_sim.problem import PlacementProblem


@dataclass(frozen=True)
class Losses:
    """One request with faults against the same request without."""

    healthy_ns: int
    """Makespan without the faults."""
    makespan_ns: int | None
    """Makespan with them; None where some operators never end."""
    lost: tuple[str, ...]
    """Operators that never end, in the order of the problem."""
    done_share: float
    """Operator time that was completed, as a share of all."""

    @property
    def delay_ns(self) -> int | None:
        """How much later the request ends; None where it does not."""
        return None if self.makespan_ns is None else self.makespan_ns - self.healthy_ns


def losses(problem: PlacementProblem, placement: Placement, options: SimulationOptions) -> Losses:
    """Return what the faults of ``options`` cost one request.

    Raises
    ------
    InputError
        If a fault names a resource that is not there, or the placement cannot run.
    """
    plan = make_plan(problem, placement, options=options)
    healthy, _ = records(plan, replace(options, faults=()))
    if len(healthy) < problem.n_operators:
        raise InputError(
            f"placement: its orders contradict each other or the edges, whatever fails; give orders that follow the "
            f"edges of {problem.name}, or none"
        )
    faulty, _ = records(plan, options)
    duration = np.array(plan.duration, dtype=np.int64)
    done = np.zeros(problem.n_operators, dtype=bool)
    done[faulty[:, 0]] = True
    return Losses(
        healthy_ns=int(healthy[:, 3].max(initial=0)),
        makespan_ns=int(faulty[:, 3].max(initial=0)) if done.all() else None,
        lost=tuple(problem.operators[i] for i in np.sort(plan.operator[~done]).tolist()),
        done_share=float(duration[done].sum() / duration.sum()) if duration.sum() else 1.0,
    )
