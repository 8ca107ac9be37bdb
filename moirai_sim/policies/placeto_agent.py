"""The agent of `placeto`: its graph network, and training by REINFORCE. Needs PyTorch."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from moirai_sim.policies.groups import groups_of
from moirai_sim.simulation.list_scheduling import Evaluator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from moirai_sim.problem import PlacementProblem

    Ints = NDArray[np.int64]

ROUNDS = 8
"""Rounds of message passing in each direction."""
WIDTH = 16
EPISODES = 8
"""Episodes of one update; the baseline of a step is their mean return at this step."""
LEARNING_RATE = 1e-2
ENTROPY = (0.01, 0.0)
"""Weight of the entropy bonus at the first and the last update."""


class Family:
    """Problems with equal numbers of devices, prepared for training, and the best placement seen of each."""

    def __init__(self, problems: Sequence[PlacementProblem], starts: Sequence[Ints]) -> None:
        self.views = [_View(problem) for problem in problems]
        self.starts = [np.asarray(start, dtype=np.int64) for start in starts]
        self.best_device = [start.copy() for start in self.starts]
        self.best_ns = [view.evaluator.makespan_ns(start) for view, start in zip(self.views, self.starts, strict=True)]

    def note(self, index: int, device: Ints, value_ns: int) -> None:
        """Keep a placement if it is the best so far."""
        if value_ns < self.best_ns[index]:
            self.best_ns[index] = value_ns
            self.best_device[index] = device.copy()


class _View:
    """A problem as the network sees it."""

    def __init__(self, problem: PlacementProblem) -> None:
        n = problem.n_operators
        self.problem = problem
        self.evaluator = Evaluator(problem)
        self.groups = groups_of(problem)
        first = np.zeros(n, dtype=bool)
        order = problem.topological_order
        first[order[np.unique(self.groups.of[order], return_index=True)[1]]] = True
        self.walk = order[first[order]]
        self.members = [np.flatnonzero(self.groups.of == g) for g in range(len(self.groups.weight))]
        self.can_run = self.groups.can_run[:, problem.device_type]
        edges = problem.edges.reshape(-1, 2)
        arcs = np.zeros((n, n), dtype=np.float32)
        arcs[edges[:, 0], edges[:, 1]] = 1
        ancestors = np.eye(n, dtype=bool)  # column j: the operators that j depends on, and itself
        for i in order.tolist():
            for producer in edges[edges[:, 1] == i, 0].tolist():
                ancestors[:, i] |= ancestors[:, producer]
        strict = ancestors & ~np.eye(n, dtype=bool)
        parallel = ~(ancestors | ancestors.T)
        self.down = torch.from_numpy(arcs.T.copy())  # row i sums over the producers of i
        self.up = torch.from_numpy(arcs)
        pools = np.stack([strict.T, strict, parallel]).astype(np.float32)
        self.pools = torch.from_numpy(pools / np.maximum(pools.sum(axis=2, keepdims=True), 1))
        duration = np.maximum(problem.device_ns, 0).astype(np.float32)
        out = np.zeros(n, dtype=np.float32)
        carries = problem.edge_tensor >= 0
        if carries.any():
            mean = problem.transfer_ns.mean(axis=1)[problem.edge_tensor[carries]]
            np.maximum.at(out, edges[carries, 0], mean.astype(np.float32))
        scale = max(1.0, float(duration.mean()))
        self.fixed = torch.from_numpy(np.concatenate([duration, out[:, None]], axis=1) / scale)

    def state(self, device: Ints, step: int) -> torch.Tensor:
        """Return features [b, n, f] of placements [b, n] before step ``step`` of the walk."""
        k = self.problem.n_devices
        batch = len(device)
        here = torch.nn.functional.one_hot(torch.from_numpy(device), k).float()
        walked = torch.zeros(self.problem.n_operators, 2)
        walked[torch.from_numpy(self.walk[step].reshape(1)), 0] = 1
        walked[torch.from_numpy(self.walk[:step].copy()), 1] = 1
        return torch.cat([self.fixed.expand(batch, -1, -1), here, walked.expand(batch, -1, -1)], dim=2)

    def allowed(self, device: Ints, step: int) -> NDArray[np.bool_]:
        """Return which devices can take the group at hand, [b, k], given the others of each placement."""
        g = self.groups.of[self.walk[step]]
        k = self.problem.n_devices
        used = np.zeros((len(device), k), dtype=np.int64)
        for d in range(k):
            used[:, d] = ((device == d) * self.problem.weight_bytes).sum(axis=1)
        moving = self.groups.weight[g]
        used[np.arange(len(device)), device[:, self.walk[step]]] -= moving
        return np.asarray(self.can_run[g] & (used <= self.problem.memory_bytes - moving))


class Agent(nn.Module):  # type: ignore[misc]
    """Embeds a graph and its placement, and gives the log-probabilities of devices for the operator at hand."""

    def __init__(self, n_devices: int, *, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            features = 2 * n_devices + 3
            self.embed = _mlp(features, WIDTH)
            self.messages = nn.ModuleList([_mlp(WIDTH, WIDTH) for _ in range(2)])
            self.updates = nn.ModuleList([_mlp(WIDTH, WIDTH) for _ in range(2)])
            self.pooled = nn.ModuleList([_mlp(2 * WIDTH, WIDTH) for _ in range(3)])
            self.head = nn.Sequential(_mlp(5 * WIDTH, 32), nn.Linear(32, n_devices))

    def forward(self, view: _View, state: torch.Tensor, at: Ints, allowed: NDArray[np.bool_]) -> torch.Tensor:
        """Return log-probabilities [b, k] for operators ``at`` [b] in states [b, n, f]."""
        raw = self.embed(state)
        directions = []
        for matrix, message, update in zip((view.down, view.up), self.messages, self.updates, strict=True):
            hidden = raw
            for _ in range(ROUNDS):
                hidden = raw + update(torch.tanh(matrix @ message(hidden)))
            directions.append(hidden)
        both = torch.cat(directions, dim=2)
        rows = torch.arange(len(at))
        index = torch.from_numpy(at)
        context = [torch.einsum("bn,bnw->bw", view.pools[p][index], pool(both)) for p, pool in enumerate(self.pooled)]
        logits = self.head(torch.cat([both[rows, index], *context], dim=1))
        mask = torch.from_numpy(np.where(allowed, 0.0, -1e9).astype(np.float32))
        return torch.log_softmax(logits + mask, dim=1)

    def place(self, problem: PlacementProblem, start: Ints) -> Ints:
        """Return the placement, [n], that the agent reaches from ``start`` by its most likely choices."""
        view = _View(problem)
        device = np.asarray(start, dtype=np.int64)[None, :].copy()
        with torch.no_grad():
            for step, operator in enumerate(view.walk.tolist()):
                allowed = view.allowed(device, step)
                chosen = self(view, view.state(device, step), np.array([operator]), allowed).argmax(dim=1)
                device[0, view.members[view.groups.of[operator]]] = int(chosen[0])
        return np.asarray(device[0])


def _mlp(features: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width))


def train(
    agent: Agent, family: Family, *, iterations: int, seed: int = 0, deadline: float | None = None
) -> list[float]:
    """Train by REINFORCE, one problem of the family an update; return the learning curve.

    Parameters
    ----------
    deadline
        Value of ``time.perf_counter`` after which training stops, also within an update.

    Returns
    -------
    list of float
        For each update, the mean makespan at the end of its episodes over that at their start.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are too small to share
    try:
        return _train(agent, family, iterations, np.random.default_rng(seed), deadline)
    finally:
        torch.set_num_threads(threads)


def _train(
    agent: Agent, family: Family, iterations: int, rng: np.random.Generator, deadline: float | None
) -> list[float]:
    optimizer = torch.optim.Adam(agent.parameters(), lr=LEARNING_RATE)
    curve = []
    for iteration in range(iterations):
        entropy_weight = ENTROPY[0] + (ENTROPY[1] - ENTROPY[0]) * iteration / max(1, iterations - 1)
        which = iteration % len(family.views)
        episodes = _play(agent, family, which, rng, deadline)
        if episodes is None:
            break
        gains, log_probabilities, entropies = episodes
        returns = np.cumsum(gains[:, ::-1], axis=1)[:, ::-1]
        advantage = returns - returns.mean(axis=0)
        advantage = advantage / (advantage.std() + 1e-8)
        weight = torch.from_numpy(advantage.astype(np.float32).copy())
        loss = -(weight * log_probabilities).mean() - entropy_weight * entropies.mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(agent.parameters(), 1.0)
        optimizer.step()
        curve.append(float(1 - gains.sum(axis=1).mean()))
    return curve


def _play(
    agent: Agent, family: Family, which: int, rng: np.random.Generator, deadline: float | None
) -> tuple[NDArray[np.float64], torch.Tensor, torch.Tensor] | None:
    """Play episodes side by side; return gains [b, steps] as shares of the start, log-probabilities and entropies."""
    view = family.views[which]
    device = np.repeat(family.starts[which][None, :], EPISODES, axis=0)
    before = np.repeat(view.evaluator.makespan_ns(family.starts[which]), EPISODES).astype(np.float64)
    scale = max(1.0, before[0])
    gains = np.zeros((EPISODES, len(view.walk)))
    log_probabilities, entropies = [], []
    rows = np.arange(EPISODES)
    for step, operator in enumerate(view.walk.tolist()):
        if deadline is not None and time.perf_counter() > deadline:
            return None
        log_probability = agent(
            view, view.state(device, step), np.repeat(operator, EPISODES), view.allowed(device, step)
        )
        probability = log_probability.exp()
        shares = np.cumsum(probability.detach().numpy().astype(np.float64), axis=1)
        chosen = (rng.random(EPISODES)[:, None] * shares[:, -1:] >= shares).sum(axis=1)
        device[np.ix_(rows, view.members[view.groups.of[operator]])] = chosen[:, None]
        after = view.evaluator.makespans_ns(device)
        for b in range(EPISODES):
            family.note(which, device[b], int(after[b]))
        gains[:, step] = (before - after) / scale
        before = after.astype(np.float64)
        log_probabilities.append(log_probability[torch.arange(EPISODES), torch.from_numpy(chosen)])
        entropies.append(-(probability * log_probability.clamp(min=-50)).sum(dim=1))
    return gains, torch.stack(log_probabilities, dim=1), torch.stack(entropies, dim=1)
