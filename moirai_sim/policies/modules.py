"""Cut vertices of a problem, and the modules between them as problems of their own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import networkx as nx
import numpy as np

from moirai_sim.placement import Placement
from moirai_sim.problem import UNSUPPORTED, PlacementProblem

if TYPE_CHECKING:
    from numpy.typing import NDArray


def cut_vertices(problem: PlacementProblem) -> NDArray[np.int64]:
    """Return the operators that split the problem in series, in order.

    Every other operator is an ancestor or a descendant of such an operator, and no edge passes it by. So all work
    before it ends before it starts, and while it runs no transfer is in flight.
    """
    n = problem.n_operators
    order = problem.topological_order
    position = np.empty(n, dtype=np.int64)
    position[order] = np.arange(n)
    furthest = np.arange(n)
    degree_out, degree_in = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
    if len(problem.edges):
        before, after = position[problem.edges[:, 0]], position[problem.edges[:, 1]]
        np.maximum.at(furthest, before, after)
        degree_out, degree_in = np.bincount(before, minlength=n), np.bincount(after, minlength=n)
    reached = np.concatenate([[0], np.maximum.accumulate(furthest)[:-1]])
    sinks_before = np.concatenate([[0], np.cumsum(degree_out == 0)[:-1]])
    sources_after = np.cumsum((degree_in == 0)[::-1])[::-1] - (degree_in == 0)
    cut = (reached <= np.arange(n)) & (sinks_before == 0) & (sources_after == 0)
    return np.asarray(order[cut])


def restrict(problem: PlacementProblem, keep: NDArray[np.bool_]) -> tuple[PlacementProblem, NDArray[np.int64]]:
    """Return the problem of some of the operators, and their original indices.

    Where one of them waits for another through operators left out, an edge that only orders takes their place. The
    optimum is a lower bound of the original's: from any schedule the other work can be taken away.
    """
    chosen = np.flatnonzero(keep)
    number = np.full(problem.n_operators, -1, dtype=np.int64)
    number[chosen] = np.arange(len(chosen))
    inner = keep[problem.edges].all(axis=1) if len(problem.edges) else np.zeros(0, dtype=bool)
    table = np.column_stack([number[problem.edges[inner]].reshape(-1, 2), problem.edge_tensor[inner]])
    bridges = [(number[i], number[j], -1) for i, j in _bridges(problem, keep)]
    if bridges:
        table = np.unique(np.concatenate([table, np.array(bridges, dtype=np.int64)]), axis=0)
    table = table[~_implied(table, len(chosen))]
    smaller = replace(
        problem,
        operators=tuple(problem.operators[i] for i in chosen),
        operator_ns=problem.operator_ns[chosen],
        weight_bytes=problem.weight_bytes[chosen],
        edges=table[:, :2].copy(),
        edge_tensor=table[:, 2].copy(),
        colocation=None if problem.colocation is None else problem.colocation[chosen],
    )
    return smaller, chosen


def _bridges(problem: PlacementProblem, keep: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return the pairs of kept operators that are joined by a path of operators left out."""
    indptr, edge_ids = problem.predecessors
    behind: dict[int, set[int]] = {}  # kept operators from which one left out is reached
    pairs: set[tuple[int, int]] = set()
    for j in problem.topological_order.tolist():
        producers = problem.edges[edge_ids[indptr[j] : indptr[j + 1]], 0].tolist()
        reached: set[int] = set()
        for i in producers:
            if not keep[i]:
                reached |= behind[i]
            elif not keep[j]:
                reached.add(i)
        if keep[j]:
            pairs.update((i, j) for i in reached)
        else:
            behind[j] = reached
    return sorted(pairs)


def _implied(table: NDArray[np.int64], n: int) -> NDArray[np.bool_]:
    """Tell which edges (producer, consumer, tensor) only order what a longer path orders anyway."""
    graph = nx.DiGraph()
    graph.add_nodes_from(range(n))
    graph.add_edges_from(table[:, :2].tolist())
    needed = set(nx.transitive_reduction(graph).edges)
    return np.array([q < 0 and (i, j) not in needed for i, j, q in table.tolist()], dtype=bool)


def ancestors(problem: PlacementProblem) -> NDArray[np.bool_]:
    """Return whether operator i comes before operator j, [n, n]; for up to a few thousand operators."""
    n = problem.n_operators
    before = np.zeros((n, n), dtype=bool)  # row j: the ancestors of j
    indptr, edge_ids = problem.predecessors
    for j in problem.topological_order.tolist():
        for i in problem.edges[edge_ids[indptr[j] : indptr[j + 1]], 0].tolist():
            before[j] |= before[i]
            before[j, i] = True
    return before.T.copy()


@dataclass(frozen=True, eq=False)
class Module:
    """The operators after one cut vertex up to and including the next."""

    problem: PlacementProblem
    """One column of durations a device. Its first operator, where ``entry`` is True, is the cut vertex before, which
    takes no time here: its end is time 0."""
    operators: NDArray[np.int64]
    """[size] operators of the whole problem, in index order but for the entry (first) and the exit (last)."""
    edges: NDArray[np.int64]
    """Edges of the whole problem, as in ``problem``."""
    weight_bytes: NDArray[np.int64]
    """[size] what the operators weigh in the whole problem, but for the entry; the module's own problem leaves memory
    aside."""
    entry: bool
    exit: bool
    """Whether the last operator is a cut vertex."""

    def between(self, source: int, target: int) -> PlacementProblem:
        """Return the module's problem with the entry on device ``source`` and the exit on ``target`` (-1: anywhere)."""
        duration = self.problem.operator_ns.copy()
        for row, device in ((0, source), (len(duration) - 1, target)):
            if device >= 0:
                kept = duration[row, device]
                duration[row] = UNSUPPORTED
                duration[row, device] = kept
        return replace(self.problem, operator_ns=duration)

    @property
    def held_bytes(self) -> int:
        """What the module weighs."""
        return int(self.weight_bytes.sum())

    @property
    def is_link(self) -> bool:
        """Whether the module is its entry and its exit with at most one tensor: then its optimum is a sum."""
        return len(self.operators) == 2 and self.entry and self.exit and len(self.edges) == 1

    def key(self) -> bytes:
        """Return what makes two modules equal: same costs, edges and transfers, whatever the names."""
        p = self.problem
        parts = (p.operator_ns, p.edges, p.edge_tensor, p.transfer_ns, np.array([self.entry, self.exit]))
        return b"".join(np.array(part.shape).tobytes() + np.ascontiguousarray(part).tobytes() for part in parts)


def modules_of(problem: PlacementProblem, cuts: NDArray[np.int64]) -> list[Module]:
    """Return the modules of a problem in series order; memory, co-location and names are left behind."""
    n = problem.n_operators
    position = np.empty(n, dtype=np.int64)
    position[problem.topological_order] = np.arange(n)
    # operators after cut c - 1, up to and including cut c, are in segment c
    segment = np.searchsorted(position[cuts], position)
    edge_segment = segment[problem.edges[:, 1]] if len(problem.edges) else np.zeros(0, dtype=np.int64)
    by_segment = np.argsort(segment, kind="stable")
    bounds = np.searchsorted(segment[by_segment], np.arange(len(cuts) + 2))
    by_edge = np.argsort(edge_segment, kind="stable")
    edge_bounds = np.searchsorted(edge_segment[by_edge], np.arange(len(cuts) + 2))
    modules = []
    for c in range(len(cuts) + 1):
        members = by_segment[bounds[c] : bounds[c + 1]]
        if not len(members):
            continue
        exit_ = c < len(cuts)
        if exit_:
            members = np.append(members[members != cuts[c]], cuts[c])
        operators = np.concatenate([cuts[c - 1 : c], members]) if c else members
        edges = by_edge[edge_bounds[c] : edge_bounds[c + 1]]
        modules.append(_module(problem, operators, np.sort(edges), entry=c > 0, exit_=exit_))
    return modules


def _module(
    problem: PlacementProblem, operators: NDArray[np.int64], edges: NDArray[np.int64], *, entry: bool, exit_: bool
) -> Module:
    number = dict(zip(operators.tolist(), range(len(operators)), strict=True))
    ends = np.array([[number[i], number[j]] for i, j in problem.edges[edges].tolist()], dtype=np.int64).reshape(-1, 2)
    tensors, numbered = np.unique(problem.edge_tensor[edges], return_inverse=True)
    silent = int((tensors == -1).any())
    table = np.column_stack([ends, numbered - silent])
    order = np.lexsort((table[:, 2], table[:, 1], table[:, 0]))
    duration = problem.device_ns[operators].copy()
    if entry:
        duration[0] = np.where(duration[0] < 0, UNSUPPORTED, 0)
    module = replace(
        problem,
        operators=tuple(problem.operators[i] for i in operators),
        operator_ns=duration,
        weight_bytes=np.zeros(len(operators), dtype=np.int64),
        device_type=np.arange(problem.n_devices, dtype=np.int64),
        edges=table[order, :2],
        edge_tensor=table[order, 2],
        tensor_bytes=problem.tensor_bytes[tensors[silent:]],
        transfer_ns=problem.transfer_ns[tensors[silent:]],
        colocation=None,
        cluster=None,
    )
    weight = problem.weight_bytes[operators]
    weight[: int(entry)] = 0
    return Module(problem=module, operators=operators, edges=edges[order], weight_bytes=weight, entry=entry, exit=exit_)


def assemble(problem: PlacementProblem, modules: list[Module], parts: list[Placement]) -> Placement:
    """Join placements of the modules, on devices of the whole problem and with orders, each after the one before."""
    n, m = problem.n_operators, len(problem.edges)
    device = np.full(n, -1, dtype=np.int64)
    order, transfer_order = np.full(n, -1, dtype=np.int64), np.full(m, -1, dtype=np.int64)
    base = 0
    for module, part in zip(modules, parts, strict=True):
        first = int(module.entry)
        if part.order is None or part.transfer_order is None:
            raise ValueError("a module's answer has no order")
        device[module.operators[first:]] = part.device[first:]
        order[module.operators[first:]] = base + part.order[first:]
        sent = part.transfer_order >= 0
        transfer_order[module.edges[sent]] = base + part.transfer_order[sent]
        base += len(module.operators) + len(module.edges) + 1
    return Placement(device=device, order=order, transfer_order=transfer_order)
