"""m-ETF of Baechi: earliest task first, with memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from moirai_sim.policies.earliest_start import earliest_start_schedule

if TYPE_CHECKING:
    from moirai_sim.placement import Placement
    from moirai_sim.policies.base import Request
    from moirai_sim.problem import PlacementProblem


class MEtf:
    """Of all ready operators and devices with memory for them, take the pair with the earliest start.

    Jeon et al., "Baechi: Fast Device Placement of Machine Learning Graphs", SoCC 2020, section 3.2.2, after Hwang et
    al., "Scheduling Precedence Graphs in Systems with Interprocessor Communication Times", SIAM J. Comput. 18 (1989).

    Extensions: an operator's time differs by device, but as in the paper only the start decides, and ties go to the
    higher upward rank over mean times, then the device listed first; ports are those of the problem's network (the
    paper's are half-duplex); weights stay for as long as the placement lasts, activations are not counted; a
    co-location group follows its first member.
    """

    name: ClassVar[str] = "m-etf"

    def place(self, problem: PlacementProblem, request: Request) -> Placement:
        """Return the placement and the order in which pairs were taken."""
        return earliest_start_schedule(problem)
