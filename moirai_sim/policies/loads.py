"""What a placement asks of each resource: loads of devices and ports, memory; and the best single device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moirai_sim.placement import transfer_edges
from moirai_sim.problem import UNLIMITED

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.problem import PlacementProblem


def device_loads_ns(problem: PlacementProblem, device: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the work that a request gives each device, [k] ns."""
    loads = np.zeros(problem.n_devices, dtype=np.int64)
    np.add.at(loads, device, problem.operator_ns[np.arange(len(device)), problem.device_type[device]])
    return loads


def port_loads_ns(problem: PlacementProblem, device: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the time for which a request keeps each device sending and receiving, two arrays [k] ns."""
    sending = np.zeros(problem.n_devices, dtype=np.int64)
    receiving = np.zeros(problem.n_devices, dtype=np.int64)
    leader = transfer_edges(problem, device)
    edges = np.flatnonzero(leader == np.arange(len(leader)))
    if len(edges):
        source, target = device[problem.edges[edges, 0]], device[problem.edges[edges, 1]]
        length = problem.transfer_ns[problem.edge_tensor[edges], problem.route_class[source, target]]
        np.add.at(sending, source, length)
        np.add.at(receiving, target, length)
    return sending, receiving


def resource_loads_ns(problem: PlacementProblem, device: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the work that a request gives each device and port, [resources] ns.

    Under ``none`` and ``fair`` only the devices count; what a fair network adds is up to the simulator.
    """
    loads = [device_loads_ns(problem, device)]
    if problem.network == "one-port":
        loads += port_loads_ns(problem, device)
    elif problem.network == "half-duplex":
        loads.append(np.add(*port_loads_ns(problem, device)))
    return np.concatenate(loads)


def period_ns(problem: PlacementProblem, device: NDArray[np.int64]) -> int:
    """Return the mean time between two finished requests of a saturated pipeline, rounded up, ns.

    It is the largest load of a device or port; where R placements take turns (``device`` is [R, n] instead of [n]), the
    largest sum of their loads, over R.
    """
    cycle = np.atleast_2d(device)
    total = np.sum([resource_loads_ns(problem, one) for one in cycle], axis=0)
    return -(-int(total.max(initial=0)) // len(cycle))


def fits(problem: PlacementProblem, device: NDArray[np.int64]) -> bool:
    """Tell whether a placement [n], or a cycle of them [R, n], respects supported devices, memory and co-location.

    A device holds the weights of an operator once, whichever placements of the cycle put it there.
    """
    cycle = np.atleast_2d(device)
    index = np.arange(problem.n_operators)
    if (problem.operator_ns[index, problem.device_type[cycle]] < 0).any():
        return False
    held, where = np.divmod(np.unique(index * problem.n_devices + cycle), problem.n_devices)
    used = np.zeros(problem.n_devices, dtype=np.int64)
    np.add.at(used, where, problem.weight_bytes[held])
    if (used > problem.memory_bytes).any():
        return False
    if problem.colocation is None:
        return True
    tied = np.flatnonzero(problem.colocation >= 0)
    home = np.full((len(cycle), int(problem.colocation.max(initial=-1)) + 1), -1, dtype=np.int64)
    home[:, problem.colocation[tied]] = cycle[:, tied]
    return bool((home[:, problem.colocation[tied]] == cycle[:, tied]).all())


def memory_binds(problem: PlacementProblem) -> bool:
    """Tell whether some device cannot hold the whole model, so that memory can forbid placements."""
    limited = problem.memory_bytes[problem.memory_bytes != UNLIMITED]
    return bool((limited < problem.weight_bytes.sum()).any())


def best_single_device(problem: PlacementProblem) -> tuple[int, int] | None:
    """Return the device on which the whole model runs fastest, and its time in ns; None if it fits nowhere."""
    best: tuple[int, int] | None = None
    total = np.where((problem.operator_ns < 0).any(axis=0), -1, np.maximum(problem.operator_ns, 0).sum(axis=0))
    holds = problem.memory_bytes >= problem.weight_bytes.sum()
    for k, kind in enumerate(problem.device_type.tolist()):
        if holds[k] and total[kind] >= 0 and (best is None or total[kind] < best[1]):
            best = (k, int(total[kind]))
    return best
