"""The best single device that fits: the answer that every other policy has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moirai_sim.placement import Placement
from moirai_sim.policies.groups import no_room
from moirai_sim.policies.loads import best_single_device

if TYPE_CHECKING:
    from moirai_sim.policies.base import Request
    from moirai_sim.problem import PlacementProblem


class Single:
    """Put everything on the device that runs the whole model fastest, of those that can hold it.

    Ties go to the device listed first. Where the model fits no device, the policy answers ``limit``.
    """

    name: ClassVar[str] = "single"

    def place(self, problem: PlacementProblem, request: Request) -> Placement:
        """Return the placement on one device."""
        best = best_single_device(problem)
        if best is None:
            return no_room("no device can hold and run the whole model")
        return Placement(device=np.full(problem.n_operators, best[0], dtype=np.int64))
