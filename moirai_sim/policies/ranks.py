"""Mean costs and ranks: what list schedulers know of an operator before they place it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moirai_sim.compiled import kernel

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.problem import PlacementProblem

    Ints = NDArray[np.int64]
    Floats = NDArray[np.float64]


def mean_operator_ns(problem: PlacementProblem) -> Floats:
    """Return the mean time of each operator over the devices that can run it, [n] ns."""
    devices = np.bincount(problem.device_type, minlength=problem.operator_ns.shape[1])
    can_run = (problem.operator_ns >= 0) * devices
    return np.asarray((np.maximum(problem.operator_ns, 0) * can_run).sum(axis=1) / np.maximum(can_run.sum(axis=1), 1))


def mean_transfer_ns(problem: PlacementProblem) -> Floats:
    """Return the mean time of each edge's tensor over all pairs of different devices, [m] ns; 0 for bare order."""
    pairs = problem.route_class[~np.eye(problem.n_devices, dtype=bool)]
    mean = np.zeros(len(problem.edges))
    carries = problem.edge_tensor >= 0
    if len(pairs) and carries.any():
        share = np.bincount(pairs, minlength=problem.transfer_ns.shape[1]) / len(pairs)
        mean[carries] = (problem.transfer_ns @ share)[problem.edge_tensor[carries]]
    return mean


def upward_ranks(problem: PlacementProblem, operator: Floats, transfer: Floats) -> Floats:
    """Return the longest path from each operator to the end, [n]: itself included, over given operator and edge times.

    Topcuoglu et al., TPDS 2002, equation 6.
    """
    return _longest(
        problem.topological_order[::-1].copy(),
        *problem.successors,
        problem.edges[:, 1].copy(),
        operator,
        transfer,
        True,
    )


def downward_ranks(problem: PlacementProblem, operator: Floats, transfer: Floats) -> Floats:
    """Return the longest path from the start to each operator, [n]: itself excluded (equation 8)."""
    return _longest(
        problem.topological_order, *problem.predecessors, problem.edges[:, 0].copy(), operator, transfer, False
    )


@kernel
def _longest(
    order: Ints, indptr: Ints, edge_ids: Ints, other_end: Ints, operator: Floats, transfer: Floats, upward: bool
) -> Floats:
    rank = np.zeros(len(operator))
    for i in order:
        longest = 0.0
        for position in range(indptr[i], indptr[i + 1]):
            edge = edge_ids[position]
            j = other_end[edge]
            longest = max(longest, transfer[edge] + rank[j] + (0.0 if upward else operator[j]))
        rank[i] = longest + (operator[i] if upward else 0.0)
    return rank
