"""Placeto: a graph network that learns to improve placements by reinforcement."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moirai_sim.errors import InputError
from moirai_sim.placement import Placement
from moirai_sim.policies.groups import no_room

if TYPE_CHECKING:
    from moirai_sim.policies.base import Request
    from moirai_sim.problem import PlacementProblem

GROUPS = 64
"""Larger graphs are coarsened to about so many groups of equal work before the agent walks them."""
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

    As in the paper, operators of large graphs are grouped first; here neighbours in topological order, into about
    `GROUPS` groups of equal work. Extensions: features hold the time on each device, as devices differ; devices without
    memory for an operator are masked; a co-location group moves with its first member; episodes begin at the best
    answer of the simple policies, which is the answer if no episode beats it. The simulated time is that of the
    compiled replay; under ``fair`` the links count as ports.
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
        from moirai_sim.policies.reductions import coarse
        from moirai_sim.policies.starts import QUICK, find_starts
        from moirai_sim.simulation.replay import replay

        deadline = time.perf_counter() + request.time_limit_s
        ported = problem.with_network("one-port") if problem.network == "fair" else problem
        request = replace(request, max_latency_ns=None)  # training may come to what keeps a limit
        starts = find_starts(ported, request, (*QUICK, "random"))
        if not starts:
            return no_room("no simple policy finds a placement that fits the memory")
        if problem.n_devices == 1:
            return Placement(device=np.zeros(problem.n_operators, dtype=np.int64))
        groups = coarse(ported, GROUPS) if problem.n_operators > GROUPS else None
        small = ported if groups is None else groups.problem
        begin = starts if groups is None else find_starts(small, request, (*QUICK, "random"))
        facts: dict[str, object] = {"groups": small.n_operators, "updates": 0, "seed": request.seed}
        if begin:  # groups may not fit where their operators do
            family = Family([small], starts=[begin[0].placement.device])
            agent = Agent(problem.n_devices, seed=request.seed)
            facts["updates"] = len(train(agent, family, iterations=ITERATIONS, seed=request.seed, deadline=deadline))
            device = family.best_device[0] if groups is None else family.best_device[0][groups.label]
            if replay(ported, Placement(device=device)).makespan_ns < starts[0].value_ns:
                return Placement(device=device, provenance=facts)
        answer = starts[0].placement
        kept = answer.transfer_order if ported is problem else None
        return Placement(answer.device, answer.order, kept, provenance=facts | {"found_by": starts[0].policy})
