"""What must be placed as one: co-location groups, their memory, and where they can run."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moirai_sim.placement import Placement

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.problem import PlacementProblem


class Groups(NamedTuple):
    """The operators of a problem by group; an operator without co-location is a group of its own."""

    of: NDArray[np.int64]
    """[n] group of an operator; groups are numbered by their first operator."""
    weight: NDArray[np.int64]
    """[g] bytes of all members."""
    can_run: NDArray[np.bool_]
    """[g, t] whether a device type can run every member."""
    work: NDArray[np.int64]
    """[g, t] time of all members on a device type, ns; meaningless where ``can_run`` is false."""


def groups_of(problem: PlacementProblem) -> Groups:
    """Return the groups of a problem."""
    n = problem.n_operators
    label = np.arange(n)
    if problem.colocation is not None:
        tied = np.flatnonzero(problem.colocation >= 0)
        _, first, inverse = np.unique(problem.colocation[tied], return_index=True, return_inverse=True)
        label[tied] = tied[first][inverse]
    of = np.unique(label, return_inverse=True)[1].astype(np.int64).reshape(n)
    count = int(of.max(initial=-1)) + 1
    weight = np.zeros(count, dtype=np.int64)
    np.add.at(weight, of, problem.weight_bytes)
    can_run = np.ones((count, problem.operator_ns.shape[1]), dtype=np.bool_)
    np.logical_and.at(can_run, of, problem.operator_ns >= 0)
    work = np.zeros(can_run.shape, dtype=np.int64)
    np.add.at(work, of, np.maximum(problem.operator_ns, 0))
    return Groups(of, weight, can_run, work)


def csr(keys: NDArray[np.int64], size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the positions in ``keys`` of each key below ``size``: where each begins, [size + 1], and all."""
    indptr = np.zeros(size + 1, dtype=np.int64)
    np.cumsum(np.bincount(keys, minlength=size), out=indptr[1:])
    return indptr, np.argsort(keys, kind="stable").astype(np.int64)


def no_room(reason: str) -> Placement:
    """Return the answer of a heuristic that ran out of memory, which proves nothing about other placements."""
    return Placement(device=np.zeros(0, dtype=np.int64), status="limit", provenance={"reason": reason})
