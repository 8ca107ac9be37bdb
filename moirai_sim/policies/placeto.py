"""Placeto: a graph network that learns to improve placements by reinforcement."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moirai_sim.errors import InputError
from moirai_sim.placement import Placement
from moirai_sim.policies.groups import no_room

if TYPE_CHECKING:
    from moirai_sim.policies.base import Request
    from moirai_sim.problem import PlacementProblem

ITERATIONS = 100
"""Most updates that `Placeto.place` trains for."""


class Placeto:
    """Walk the operators and move each to the device that a learned policy picks; the reward is the drop in time.

    Addanki, Bojja Venkatakrishnan, Gupta, Mao, Alizadeh, "Placeto: Learning Generalizable Device Placement Algorithms
    for Distributed Machine Learning", NeurIPS 2019. Embeddings from 8 rounds of message passing along and against the
    edges, pooled over ancestors, descendants and parallel operators of the one at hand; a softmax over devices;
    REINFORCE with a baseline for each step and an entropy bonus that decays.

    Here the policy trains on the problem itself within the time limit and answers with the best placement seen.
    `placeto_agent.train` trains one agent on a family of problems, and `placeto_agent.Agent.place` uses it on others.

    Extensions: features hold the time on each device, as devices differ; devices without memory for an operator are
    masked; a co-location group moves with its first member; episodes begin at the best answer of the simple policies.
    The simulated time is that of the compiled replay; under ``fair`` the links count as ports.
    """

    name: ClassVar[str] = "placeto"

    def place(self, problem: PlacementProblem, request: Request) -> Placement:
        """Return the best placement that training met.

        Raises
        ------
        InputError
            If PyTorch is not installed.
        """
        try:
            from moirai_sim.policies.placeto_agent import Agent, Family, train
        except ImportError as error:
            raise InputError(
                "policy 'placeto' needs PyTorch; install it with: pip install 'moirai-sim[torch]'"
            ) from error
        from moirai_sim.policies.starts import QUICK, find_starts

        deadline = time.perf_counter() + request.time_limit_s
        ported = problem.with_network("one-port") if problem.network == "fair" else problem
        starts = find_starts(ported, request, (*QUICK, "random"))
        if not starts:
            return no_room("no simple policy finds a placement that fits the memory")
        if problem.n_devices == 1:
            return Placement(device=np.zeros(problem.n_operators, dtype=np.int64))
        family = Family([ported], starts=[starts[0].placement.device])
        agent = Agent(problem.n_devices, seed=request.seed)
        curve = train(agent, family, iterations=ITERATIONS, seed=request.seed, deadline=deadline)
        facts: dict[str, object] = {"updates": len(curve), "seed": request.seed}
        if family.best_ns[0] >= starts[0].value_ns:
            answer = starts[0].placement
            return Placement(
                answer.device, answer.order, None if ported is not problem else answer.transfer_order, provenance=facts
            )
        return Placement(device=family.best_device[0], provenance=facts)
