"""Policy: one class with one method. Third parties register theirs under the entry point ``moirai_sim.policies``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    from moirai_sim.placement import Placement
    from moirai_sim.problem import PlacementProblem

Objective = Literal["latency", "throughput"]


@dataclass(frozen=True)
class Request:
    """What is asked of a policy beside the problem."""

    objective: Objective = "latency"
    time_limit_s: float = 60.0
    """A policy returns its best answer within this time; short heuristics ignore it."""
    seed: int = 0
    """Equal seeds give equal answers, as long as no time limit cuts the work short."""
    workers: int = 1
    """Processes or solver threads that the policy may use."""


class Policy(Protocol):
    """Answers a placement problem. The class docstring names the paper and every extension of it."""

    name: ClassVar[str]
    """The name on the command line."""

    def place(self, problem: PlacementProblem, request: Request) -> Placement:
        """Return a placement.

        A policy that finds none returns ``Placement(device=empty, status="infeasible" | "limit")``. Operators are
        placed only where ``operator_ns`` is not UNSUPPORTED, within ``memory_bytes`` and the co-location groups.
        """
