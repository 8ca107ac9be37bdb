"""Policy: one class with one method. Third parties register theirs under the entry point ``moirai_sim.policies``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from moirai_sim.errors import InputError

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
    replicas: int = 1
    """Placements that may take turns in serving a stream (data parallelism); see `Placement.replicas`."""
    max_latency_ns: int | None = None
    """A request that is alone may take this long, by whichever placement of the cycle it runs."""
    max_period_ns: int | None = None
    """The period of a stream may be this long."""

    def __post_init__(self) -> None:
        """Refuse numbers that ask for nothing.

        Raises
        ------
        InputError
            If ``replicas`` or a limit is below 1.
        """
        limits = (("replicas", self.replicas), ("max_latency_ns", self.max_latency_ns))
        problems = [
            f"{what}: must be at least 1, read {value}"
            for what, value in (*limits, ("max_period_ns", self.max_period_ns))
            if value is not None and value < 1
        ]
        if problems:
            raise InputError(problems)

    @property
    def is_stream(self) -> bool:
        """Whether the period matters: as the objective, or as a limit."""
        return self.objective == "throughput" or self.max_period_ns is not None


class Policy(Protocol):
    """Answers a placement problem. The class docstring names the paper and every extension of it."""

    name: ClassVar[str]
    """The name on the command line."""

    def place(self, problem: PlacementProblem, request: Request) -> Placement:
        """Return a placement.

        A policy that finds none returns ``Placement(device=empty, status="infeasible" | "limit")``. Operators are
        placed only where ``operator_ns`` is not UNSUPPORTED, within ``memory_bytes`` and the co-location groups.
        A policy need not look at ``request.max_latency_ns`` and ``max_period_ns``: an answer that exceeds them is
        refused after it. Only one that does look at them may claim ``infeasible`` or a bound because of them.
        """
