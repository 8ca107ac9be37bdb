"""What is the same twice need not be searched twice: devices that can be swapped without changing any cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.problem import PlacementProblem


def interchangeable_devices(problem: PlacementProblem) -> list[list[int]]:
    """Return groups of two or more devices, any of which can be swapped: same type, memory and transfer times."""
    classes = _route_kinds(problem)
    groups: list[list[int]] = []
    for k in range(problem.n_devices):
        for group in groups:
            if _swappable(problem, classes, group[0], k):
                group.append(k)
                break
        else:
            groups.append([k])
    return [group for group in groups if len(group) > 1]


def _route_kinds(problem: PlacementProblem) -> NDArray[np.int64]:
    """Return [k, k] a number for each pair; equal where every tensor takes the same time."""
    if not problem.transfer_ns.size:
        return np.where(problem.route_class < 0, -1, 0)
    kind = np.unique(problem.transfer_ns, axis=1, return_inverse=True)[1].reshape(-1)
    return np.where(problem.route_class < 0, -1, kind[problem.route_class])


def _swappable(problem: PlacementProblem, kind: NDArray[np.int64], a: int, b: int) -> bool:
    if problem.device_type[a] != problem.device_type[b] or problem.memory_bytes[a] != problem.memory_bytes[b]:
        return False
    if kind[a, b] != kind[b, a]:
        return False
    others = np.ones(problem.n_devices, dtype=bool)
    others[[a, b]] = False
    same_out = (kind[a, others] == kind[b, others]).all()
    return bool(same_out and (kind[others, a] == kind[others, b]).all())


def relabel_by_load(
    problem: PlacementProblem, device: NDArray[np.int64], loads: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return an equally good placement in which interchangeable devices have falling loads."""
    new = np.arange(problem.n_devices)
    for group in interchangeable_devices(problem):
        by_load = sorted(group, key=lambda k: (-int(loads[k]), k))
        new[by_load] = group
    return np.asarray(new[device])
