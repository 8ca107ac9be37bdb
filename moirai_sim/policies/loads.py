"""What a placement asks of each resource: loads of devices, ports and links, memory; and the best single device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moirai_sim.clusters.routes import Links
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
    tensor, source, target = _transfers(problem, device)
    length = problem.transfer_ns[tensor, problem.route_class[source, target]]
    np.add.at(sending, source, length)
    np.add.at(receiving, target, length)
    return sending, receiving


def link_loads_ns(problem: PlacementProblem, device: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the time for which what a request sends would fill each direction of each link of the cluster, [l] ns.

    However its rates are shared, a link needs so long for a request: the loads of a ``fair`` network.
    """
    if problem.cluster is None:
        return np.zeros(0, dtype=np.int64)
    links = Links(problem.cluster)
    tensor, source, target = _transfers(problem, device)
    size = np.maximum(problem.tensor_bytes[tensor], 0)
    pairs, which = np.unique(source * problem.n_devices + target, return_inverse=True)
    carried = np.zeros(len(links.capacity))
    for pair, total in zip(pairs.tolist(), np.bincount(which, size).tolist(), strict=True):
        one, other = divmod(pair, problem.n_devices)
        carried[links.between(problem.devices[one], problem.devices[other])[0]] += total
    return np.ceil(carried / links.capacity).astype(np.int64)


def _transfers(problem: PlacementProblem, device: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
    """Return tensor, source and target of each transfer, three arrays of indices."""
    leader = transfer_edges(problem, device)
    edges = np.flatnonzero(leader == np.arange(len(leader)))
    return problem.edge_tensor[edges], device[problem.edges[edges, 0]], device[problem.edges[edges, 1]]


def resource_loads_ns(problem: PlacementProblem, device: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the work that a request gives each device, and each port or link of the network, [resources] ns."""
    loads = [device_loads_ns(problem, device)]
    if problem.network == "one-port":
        loads += port_loads_ns(problem, device)
    elif problem.network == "half-duplex":
        loads.append(np.add(*port_loads_ns(problem, device)))
    elif problem.network == "fair":
        loads.append(link_loads_ns(problem, device))
    return np.concatenate(loads)


def period_ns(problem: PlacementProblem, device: NDArray[np.int64]) -> int:
    """Return the mean time between two finished requests of a saturated pipeline, rounded up, ns.

    It is the largest load of a device, port or link; where R placements take turns (``device`` is [R, n] instead of
    [n]), the largest sum of their loads, over R.
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
