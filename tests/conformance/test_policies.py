"""Every built-in policy passes the public kit; a policy that breaks a rule does not."""

from __future__ import annotations

import numpy as np
import pytest

from moirai_sim.placement import Placement
from moirai_sim.policies.base import Request
from moirai_sim.policies.registry import load_policy, policy_names
from moirai_sim.problem import PlacementProblem
from moirai_sim.testing import check_policy

THROUGHPUT = ("milp-throughput", "pipeline-dp")
UNTIMED = [name for name in policy_names() if name not in (*THROUGHPUT, "placeto", "search")]


@pytest.mark.parametrize("name", UNTIMED)
def test_latency_policies_conform(name: str) -> None:
    check_policy(load_policy(name), time_limit_s=5)


@pytest.mark.parametrize("name", [name for name in THROUGHPUT if name in policy_names()])
def test_throughput_policies_conform(name: str) -> None:
    check_policy(load_policy(name), objective="throughput")


class _Base:
    """A policy for these tests: all on the first device, or whatever a subclass breaks."""

    name = "base"

    def place(self, problem: PlacementProblem, request: Request) -> Placement:
        return Placement(device=np.zeros(problem.n_operators, dtype=np.int64))


class _ForgetsMemory(_Base):
    """Ignores limits."""


class _Boasts(_Base):
    """Claims bounds that it cannot have."""

    def place(self, problem: PlacementProblem, request: Request) -> Placement:
        answer = load_policy("cp").place(problem, request)
        return answer if not len(answer.device) else Placement(device=answer.device, lower_bound_ns=10**6)


class _GivesUp(_Base):
    """Says infeasible always."""

    def place(self, problem: PlacementProblem, request: Request) -> Placement:
        return Placement(device=np.zeros(0, dtype=np.int64), status="infeasible")


class _Wavers(_Base):
    """Answers differently each time."""

    def __init__(self) -> None:
        self.calls = 0

    def place(self, problem: PlacementProblem, request: Request) -> Placement:
        self.calls += 1
        answer = load_policy("cp").place(problem, request)
        if not len(answer.device) or self.calls % 2:
            return answer
        return Placement(device=answer.device)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (_ForgetsMemory(), "weights but has|cannot run"),
        (_Boasts(), "claims the bound"),
        (_GivesUp(), "there is an answer"),
        (_Wavers(), "two answers"),
    ],
)
def test_the_kit_catches(policy: _Base, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_policy(policy)
