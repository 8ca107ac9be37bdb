"""The optimum of a tiny problem by trying everything: what exact policies and bounds are held against.

Shares no code with them. Every placement is tried, and for each every order in which operators and transfers can be
appended to their resources; the schedules so found include an optimal one (semi-active schedules are dominant).
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from moirai_sim.clusters.routes import route
from moirai_sim.problem import UNLIMITED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moirai_sim.clusters.cluster import Cluster
    from moirai_sim.problem import PlacementProblem

Resources = tuple[tuple[str, int], ...]
Devices = tuple[int, ...]


def optimal_makespan_ns(problem: PlacementProblem) -> int | None:
    """Return the least makespan over all placements and orders, ns; None where nothing fits.

    Meant for up to six operators on three devices; the time grows faster than exponentially.
    """
    best: int | None = None
    for device in itertools.product(range(problem.n_devices), repeat=problem.n_operators):
        if _allowed(problem, device):
            best = _best_order(problem, device, best)
    return best


def optimal_period_ns(problem: PlacementProblem, *, replicas: int = 1, max_latency_ns: int | None = None) -> int | None:
    """Return the least period of up to ``replicas`` placements that take turns, ns; None if none fits.

    The period is the largest load of a device, port or link in R requests, over R, rounded up.

    Parameters
    ----------
    max_latency_ns
        A request that is alone may take this long on any of the placements, in its best order.
    """
    best: int | None = None
    for cycle in _cycles(problem, replicas):
        if best is None or _period(problem, cycle) < best:
            quick = max_latency_ns is None or all(_latency(problem, one) <= max_latency_ns for one in set(cycle))
            best = _period(problem, cycle) if quick else best
    return best


def optimal_latency_ns(problem: PlacementProblem, *, replicas: int = 1, max_period_ns: int) -> int | None:
    """Return the least latency over all cycles of placements whose period is at most ``max_period_ns``; None if none.

    The latency of a cycle is that of its slowest placement, each in its best order.
    """
    values = [
        max(_latency(problem, one) for one in set(cycle))
        for cycle in _cycles(problem, replicas)
        if _period(problem, cycle) <= max_period_ns
    ]
    return min(values, default=None)


def _cycles(problem: PlacementProblem, replicas: int) -> Iterator[tuple[Devices, ...]]:
    """Yield every cycle of up to ``replicas`` allowed placements whose weights fit together, in one order each."""
    every = itertools.product(range(problem.n_devices), repeat=problem.n_operators)
    allowed = [device for device in every if _allowed(problem, device)]
    for turns in range(1, replicas + 1):
        for cycle in itertools.combinations_with_replacement(allowed, turns):
            if _fits(problem, cycle):
                yield cycle


def _period(problem: PlacementProblem, cycle: tuple[Devices, ...]) -> int:
    total: dict[tuple[str, int], int] = defaultdict(int)
    for device in cycle:
        for resource, load in _loads(problem, device).items():
            total[resource] += load
    return -(-max(total.values(), default=0) // len(cycle))


_latencies: WeakKeyDictionary[PlacementProblem, dict[Devices, int]] = WeakKeyDictionary()


def _latency(problem: PlacementProblem, device: Devices) -> int:
    known = _latencies.setdefault(problem, {})
    if device not in known:
        known[device] = _best_order(problem, device, None) or 0
    return known[device]


def _allowed(problem: PlacementProblem, device: Devices) -> bool:
    homes: dict[int, int] = {}
    for i, k in enumerate(device):
        if problem.operator_ns[i, problem.device_type[k]] < 0:
            return False
        if problem.colocation is not None and problem.colocation[i] >= 0:
            group = int(problem.colocation[i])
            if homes.setdefault(group, k) != k:
                return False
    return _fits(problem, (device,))


def _fits(problem: PlacementProblem, cycle: tuple[Devices, ...]) -> bool:
    used: dict[int, int] = defaultdict(int)
    for i, k in {(i, k) for device in cycle for i, k in enumerate(device)}:
        used[k] += int(problem.weight_bytes[i])
    limits = problem.memory_bytes.tolist()
    return all(limits[k] == UNLIMITED or size <= limits[k] for k, size in used.items())


def _jobs(problem: PlacementProblem, device: tuple[int, ...]) -> tuple[list[int], list[Resources], list[set[int]]]:
    """Return length, resources and predecessors of all work: the operators, then the transfers."""
    length = [int(problem.operator_ns[i, problem.device_type[k]]) for i, k in enumerate(device)]
    resources: list[Resources] = [(("device", k),) for k in device]
    before: list[set[int]] = [set() for _ in device]
    transfers: dict[tuple[int, int], int] = {}
    for (i, j), tensor in zip(problem.edges.tolist(), problem.edge_tensor.tolist(), strict=True):
        source, target = device[i], device[j]
        if tensor < 0 or source == target:
            before[j].add(i)
            continue
        if (tensor, target) not in transfers:
            transfers[tensor, target] = len(length)
            length.append(problem.transfer_time_ns(tensor, source, target))
            before.append({i})
            resources.append(_ports(problem.network, source, target))
        before[j].add(transfers[tensor, target])
    return length, resources, before


def _ports(network: str, source: int, target: int) -> Resources:
    if network == "one-port":
        return (("send", source), ("receive", target))
    if network == "half-duplex":
        return (("port", source), ("port", target))
    return ()


def _loads(problem: PlacementProblem, device: tuple[int, ...]) -> dict[tuple[str, int], int]:
    length, resources, _ = _jobs(problem, device)
    loads: dict[tuple[str, int], int] = defaultdict(int)
    for time, used in zip(length, resources, strict=True):
        for resource in used:
            loads[resource] += time
    if problem.network == "fair" and problem.cluster is not None:
        loads |= _link_loads(problem, problem.cluster, device)
    return loads


def _link_loads(problem: PlacementProblem, cluster: Cluster, device: tuple[int, ...]) -> dict[tuple[str, int], int]:
    """Return how long each direction of each link needs for the bytes of a request, rounded up."""
    carried: dict[tuple[str, int], int] = defaultdict(int)
    crossing = {
        (tensor, device[i], device[j])
        for (i, j), tensor in zip(problem.edges.tolist(), problem.edge_tensor.tolist(), strict=True)
        if tensor >= 0 and device[i] != device[j]
    }
    for tensor, source, target in crossing:
        way = route(cluster, problem.devices[source], problem.devices[target])
        for name, begin in zip(way.links, way.nodes[:-1], strict=True):
            link = cluster.link[name]
            backwards = int(link.duplex == "full" and link.ends[0] != begin)
            carried[name, backwards] += int(problem.tensor_bytes[tensor])
    return {key: math.ceil(size / (cluster.link[key[0]].bandwidth_bytes_per_s / 1e9)) for key, size in carried.items()}


def _best_order(problem: PlacementProblem, device: tuple[int, ...], best: int | None) -> int | None:
    """Return the smaller of ``best`` and the least makespan of one placement over all orders."""
    length, resources, before = _jobs(problem, device)
    seen: set[tuple[object, ...]] = set()

    def extend(ends: dict[int, int], free: dict[tuple[str, int], int], best: int | None) -> int | None:
        latest = max(ends.values(), default=0)
        if best is not None and latest >= best:
            return best
        if len(ends) == len(length):
            return latest
        state = (tuple(sorted(ends.items())), tuple(sorted(free.items())))
        if state in seen:
            return best
        seen.add(state)
        for job in range(len(length)):
            if job in ends or any(other not in ends for other in before[job]):
                continue
            start = max(
                [ends[other] for other in before[job]] + [free.get(resource, 0) for resource in resources[job]],
                default=0,
            )
            end = start + length[job]
            best = extend({**ends, job: end}, {**free, **dict.fromkeys(resources[job], end)}, best)
        return best

    return extend({}, {}, best)
