"""Smaller problems with the same answers: apply(problem) -> smaller problem, invert(answer) -> answer.

``contract`` merges groups of operators into one; co-location, fusion and coarsening are all contractions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from moirai_sim.placement import Placement, transfer_edges
from moirai_sim.policies.bounds import FAR
from moirai_sim.problem import UNSUPPORTED, PlacementProblem

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Contraction:
    """A problem whose operators are groups of the original's, and the way back."""

    original: PlacementProblem
    problem: PlacementProblem
    label: NDArray[np.int64]
    """[n] operator of ``problem`` that an original operator became part of."""
    lossless: bool
    """An optimum of ``problem`` is an optimum of ``original``."""

    def invert(self, placement: Placement) -> Placement:
        """Return the same answer for the original operators; the members of a group run one after another."""
        if len(placement.device) != self.problem.n_operators:  # no answer; what is merged may fit only apart
            proven = placement.status != "infeasible" or self.lossless
            return placement if proven else replace(placement, status="limit")
        if placement.replicas:
            first, *others = (self.invert(one) for one in placement.cycle)
            return replace(first, replicas=tuple(replace(one, status="feasible") for one in others))
        device = placement.device[self.label]
        order = transfer_order = None
        if placement.order is not None:
            order, transfer_order = self._expand_orders(placement, device)
        bound = placement.lower_bound_ns if self.lossless else 0
        status = "feasible" if placement.status == "optimal" and not self.lossless else placement.status
        return replace(
            placement,
            device=device,
            order=order,
            transfer_order=transfer_order,
            lower_bound_ns=bound,
            status=status,
        )

    def _expand_orders(
        self, placement: Placement, device: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        if placement.order is None:
            raise ValueError("the placement has no order to expand")
        n = self.original.n_operators
        topological = np.empty(n, dtype=np.int64)
        topological[self.original.topological_order] = np.arange(n)
        leaders, positions = self._leading_transfers(placement, device)
        keys = np.concatenate([placement.order[self.label], positions])
        minor = np.concatenate([topological, np.full(len(leaders), n)])
        rank = np.empty(len(keys), dtype=np.int64)
        rank[np.lexsort((minor, keys))] = np.arange(len(keys))
        if placement.transfer_order is None:  # each transfer takes the position of its producer
            return rank, None
        transfer_order = np.full(len(self.original.edges), -1, dtype=np.int64)
        transfer_order[leaders] = rank[n:]
        return rank[:n], transfer_order

    def _leading_transfers(
        self, placement: Placement, device: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the original edges that stand for transfers and the positions of the same transfers in ``problem``."""
        if placement.transfer_order is None:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        k = self.problem.n_devices
        small = transfer_edges(self.problem, placement.device)
        led = np.flatnonzero(small == np.arange(len(small)))
        key = self.problem.edge_tensor[led] * k + placement.device[self.problem.edges[led, 1]]
        position = dict(zip(key.tolist(), placement.transfer_order[led].tolist(), strict=True))
        large = transfer_edges(self.original, device)
        leaders = np.flatnonzero(large == np.arange(len(large)))
        wanted = self.original.edge_tensor[leaders] * k + device[self.original.edges[leaders, 1]]
        return leaders, np.array([position[key] for key in wanted.tolist()], dtype=np.int64)


def contract(problem: PlacementProblem, groups: NDArray[np.int64]) -> Contraction:
    """Merge operators of equal group (-1: alone); groups that close a cycle, or fit no device as one, stay apart.

    A merged operator takes the sum of its members' times and weights, starts when all inputs of all members are
    there, and hands out its tensors at its end. The contraction is lossless if that changes no schedule: where the
    members must share a device anyway, only the last of them takes time, and only it feeds others (a fused kernel).
    """
    label = _acyclic(problem, _runnable(problem, _number(np.asarray(groups, dtype=np.int64))))
    size = int(label.max()) + 1 if len(label) else 0
    first = np.full(size, problem.n_operators, dtype=np.int64)
    np.minimum.at(first, label, np.arange(problem.n_operators))
    label = np.argsort(np.argsort(first))[label]  # number the groups by their first member

    operator_ns = np.zeros((size, problem.operator_ns.shape[1]), dtype=np.int64)
    np.add.at(operator_ns, label, np.maximum(problem.operator_ns, 0))
    stuck = np.zeros(operator_ns.shape, dtype=bool)
    np.logical_or.at(stuck, label, problem.operator_ns < 0)
    operator_ns[stuck] = UNSUPPORTED
    weight = np.zeros(size, dtype=np.int64)
    np.add.at(weight, label, problem.weight_bytes)
    last = np.zeros(size, dtype=np.int64)
    last[label[problem.topological_order]] = problem.topological_order

    ends = label[problem.edges].reshape(-1, 2)
    table = np.column_stack([ends, problem.edge_tensor])[ends[:, 0] != ends[:, 1]]
    table = np.unique(table, axis=0) if len(table) else table.reshape(0, 3)
    smaller = replace(
        problem,
        operators=tuple(problem.operators[i] for i in last),
        operator_ns=operator_ns,
        weight_bytes=weight,
        edges=table[:, :2].copy(),
        edge_tensor=table[:, 2].copy(),
        colocation=_joined(problem.colocation, label, size),
    )
    lossless = _lossless(problem, label, last)
    return Contraction(original=problem, problem=smaller, label=label, lossless=lossless)


def chains(problem: PlacementProblem) -> NDArray[np.int64]:
    """Return a group for each operator, [n]: equal along chains of one consumer and one producer, -1 elsewhere."""
    n = problem.n_operators
    pairs = np.unique(problem.edges, axis=0) if len(problem.edges) else np.zeros((0, 2), dtype=np.int64)
    single_out = np.bincount(pairs[:, 0], minlength=n) == 1
    single_in = np.bincount(pairs[:, 1], minlength=n) == 1
    linked = single_out[pairs[:, 0]] & single_in[pairs[:, 1]]
    follower = dict(pairs[linked].tolist())
    group = np.full(n, -1, dtype=np.int64)
    for i in problem.topological_order.tolist():
        if i in follower:
            group[i] = i if group[i] < 0 else group[i]
            group[follower[i]] = group[i]
    return group


def coarse(problem: PlacementProblem, size: int) -> Contraction:
    """Merge chains, then neighbours in topological order until each group holds one part in ``size`` of the work.

    Groups that would make a cycle, or that no device can run as one, are taken apart again, so there may be more.
    """
    merged = contract(problem, chains(problem))
    if merged.problem.n_operators <= size:
        return merged
    work = np.where(problem.operator_ns < 0, FAR, problem.operator_ns).min(axis=1)
    order = problem.topological_order
    before = np.concatenate([[0], np.cumsum(work[order])[:-1]])
    group = np.empty(problem.n_operators, dtype=np.int64)
    group[order] = np.minimum(size * before // max(1, int(work.sum())), size - 1)
    return contract(problem, group)


def contract_colocated(problem: PlacementProblem) -> Contraction | None:
    """Merge the co-location groups that can run as one; None where nothing can be merged.

    Operators of a group that stays apart (others must run between its members) keep their group number.
    """
    if problem.colocation is None:
        return None
    contraction = contract(problem, problem.colocation)
    return contraction if contraction.problem.n_operators < problem.n_operators else None


def _number(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give every operator without a group a group of its own; number the groups from 0."""
    alone = groups < 0
    distinct = groups.copy()
    distinct[alone] = groups.max(initial=-1) + 1 + np.arange(alone.sum())
    return np.unique(distinct, return_inverse=True)[1].astype(np.int64)


def _runnable(problem: PlacementProblem, label: NDArray[np.int64]) -> NDArray[np.int64]:
    """Dissolve the groups that no device can run as one, or has the memory for."""
    size = int(label.max(initial=-1)) + 1
    runs = np.ones((size, problem.operator_ns.shape[1]), dtype=bool)
    np.logical_and.at(runs, label, problem.operator_ns >= 0)
    weight = np.zeros(size, dtype=np.int64)
    np.add.at(weight, label, problem.weight_bytes)
    somewhere = np.zeros(size, dtype=bool)
    for kind in np.unique(problem.device_type).tolist():
        room = problem.memory_bytes[problem.device_type == kind].max()
        somewhere |= runs[:, kind] & (weight <= room)
    return _number(np.where(somewhere[label], label, -1))


def _acyclic(problem: PlacementProblem, label: NDArray[np.int64]) -> NDArray[np.int64]:
    """Dissolve the groups that lie on a cycle of the contracted graph until there is none."""
    while len(label):
        size = int(label.max()) + 1
        ends = label[problem.edges].reshape(-1, 2)
        ends = ends[ends[:, 0] != ends[:, 1]]
        graph = csr_array((np.ones(len(ends), dtype=np.int8), (ends[:, 0], ends[:, 1])), shape=(size, size))
        components, component = connected_components(graph, directed=True, connection="strong")
        if components == size:
            break
        tangled = np.bincount(component)[component] > 1
        label = _number(np.where(tangled[label], -1, label))
    return label


def _joined(colocation: NDArray[np.int64] | None, label: NDArray[np.int64], size: int) -> NDArray[np.int64] | None:
    """Return the co-location groups of the merged operators; groups that share a merged operator become one."""
    if colocation is None or not (colocation >= 0).any():
        return None
    member = np.flatnonzero(colocation >= 0)
    group = np.unique(colocation[member], return_inverse=True)[1]
    nodes = size + int(group.max()) + 1
    graph = csr_array((np.ones(len(member), dtype=np.int8), (label[member], size + group)), shape=(nodes, nodes))
    component = connected_components(graph, directed=False)[1][:size]
    several = np.bincount(component)[component] > 1
    joined = np.where(several, component, -1).astype(np.int64)
    return joined if several.any() else None


def _lossless(problem: PlacementProblem, label: NDArray[np.int64], last: NDArray[np.int64]) -> bool:
    earlier = last[label] != np.arange(problem.n_operators)
    if not earlier.any():
        return True
    group = np.full(problem.n_operators, -1) if problem.colocation is None else problem.colocation
    tied = (group[earlier] >= 0) & (group[earlier] == group[last[label[earlier]]])
    takes_time = (problem.operator_ns[earlier] > 0).any()
    leaves = label[problem.edges[:, 0]] != label[problem.edges[:, 1]]
    read = np.zeros(problem.n_operators, dtype=bool)
    read[problem.edges[:, 0]] = True  # and so, as nothing leaves, on the way to the last of its group
    alone = (earlier & ~read).any() or (earlier[problem.edges[:, 0]] & leaves).any()
    return bool(tied.all()) and not takes_time and not bool(alone)
