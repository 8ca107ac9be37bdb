"""What is the same twice need not be searched twice: devices and servers that can be swapped at no cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.problem import PlacementProblem


def interchangeable_devices(problem: PlacementProblem) -> list[list[int]]:
    """Return groups of two or more devices, any of which can be swapped: same type, memory and transfer times."""
    table = _route_kinds(problem)
    # Rows and columns are compared by weighted sums first: a thousand servers are told apart without reading them all.
    weight = np.random.default_rng(0).integers(2**62, size=problem.n_devices)
    row, column, own = table @ weight, weight @ table, table.diagonal() * weight
    groups: list[list[int]] = []
    for k in range(problem.n_devices):
        first = np.array([group[0] for group in groups], dtype=np.int64)
        alike = (problem.device_type[first] == problem.device_type[k]) & (table[first, k] == table[k, first])
        alike &= problem.memory_bytes[first] == problem.memory_bytes[k]
        for sums, there, back in ((row, table[first, k], table[k, first]), (column, table[k, first], table[first, k])):
            alike &= sums[first] - own[first] - there * weight[k] == sums[[k]] - own[[k]] - back * weight[first]
        found = next((g for g in np.flatnonzero(alike).tolist() if _same_rows(table, int(first[g]), k)), None)
        if found is None:
            groups.append([k])
        else:
            groups[found].append(k)
    return [group for group in groups if len(group) > 1]


def _route_kinds(problem: PlacementProblem) -> NDArray[np.int64]:
    """Return [k, k] a number for each pair; equal where every tensor takes the same time."""
    if not problem.transfer_ns.size:
        return np.where(problem.route_class < 0, -1, 0)
    kind = np.unique(problem.transfer_ns, axis=1, return_inverse=True)[1].reshape(-1)
    return np.where(problem.route_class < 0, -1, kind[problem.route_class])


def relabel_by_load(
    problem: PlacementProblem, device: NDArray[np.int64], loads: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return an equally good placement in which interchangeable devices have falling loads."""
    new = np.arange(problem.n_devices)
    for group in interchangeable_devices(problem):
        by_load = sorted(group, key=lambda k: (-int(loads[k]), k))
        new[by_load] = group
    return np.asarray(new[device])


class Server(NamedTuple):
    """Devices that can be swapped among themselves."""

    devices: tuple[int, ...]
    kind: int
    """Equal for servers that can be swapped as a whole."""


def servers_of(problem: PlacementProblem) -> list[Server]:
    """Return the devices as servers in device order; swapping two servers of one kind changes no cost.

    Two servers are of one kind if their devices are as many and as good, and every transfer within them, between them,
    and between them and any third server takes the same time.
    """
    routes = _route_kinds(problem)
    groups = interchangeable_devices(problem)
    grouped = {k for group in groups for k in group}
    groups = sorted(groups + [[k] for k in range(problem.n_devices) if k not in grouped])
    within = [routes[group[0], group[1]] if len(group) > 1 else -1 for group in groups]
    first = [group[0] for group in groups]
    between = routes[np.ix_(first, first)]
    kinds: list[int] = []
    examples: list[int] = []  # the first server of each kind
    for s, group in enumerate(groups):
        for kind, other in enumerate(examples):
            k, h = first[s], first[other]
            if (
                len(groups[other]) == len(group)
                and problem.device_type[k] == problem.device_type[h]
                and problem.memory_bytes[k] == problem.memory_bytes[h]
                and within[s] == within[other]
                and _same_rows(between, s, other)
            ):
                kinds.append(kind)
                break
        else:
            kinds.append(len(examples))
            examples.append(s)
    return [Server(tuple(group), kind) for group, kind in zip(groups, kinds, strict=True)]


def _same_rows(table: NDArray[np.int64], a: int, b: int) -> bool:
    """Tell whether swapping a and b leaves a square table as it is, its diagonal aside."""
    others = np.ones(len(table), dtype=bool)
    others[[a, b]] = False
    same = table[a, b] == table[b, a] and (table[a, others] == table[b, others]).all()
    return bool(same and (table[others, a] == table[others, b]).all())
