"""The optimum of a tiny problem by trying everything: what exact policies and bounds are held against.

Shares no code with them. Every placement is tried, and for each every order in which operators and transfers can be
appended to their resources; the schedules so found include an optimal one (semi-active schedules are dominant).
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import TYPE_CHECKING

from moirai_sim.problem import UNLIMITED

if TYPE_CHECKING:
    from moirai_sim.problem import PlacementProblem

Resources = tuple[tuple[str, int], ...]


def optimal_makespan_ns(problem: PlacementProblem) -> int | None:
    """Return the least makespan over all placements and orders, ns; None where nothing fits.

    Meant for up to six operators on three devices; the time grows faster than exponentially.
    """
    best: int | None = None
    for device in itertools.product(range(problem.n_devices), repeat=problem.n_operators):
        if _allowed(problem, device):
            best = _best_order(problem, device, best)
    return best


def optimal_period_ns(problem: PlacementProblem) -> int | None:
    """Return the least largest load of a device or port over all placements without replicas, ns; None if none fits."""
    values = [
        max(_loads(problem, device).values(), default=0)
        for device in itertools.product(range(problem.n_devices), repeat=problem.n_operators)
        if _allowed(problem, device)
    ]
    return min(values, default=None)


def _allowed(problem: PlacementProblem, device: tuple[int, ...]) -> bool:
    used: dict[int, int] = defaultdict(int)
    homes: dict[int, int] = {}
    for i, k in enumerate(device):
        if problem.operator_ns[i, problem.device_type[k]] < 0:
            return False
        used[k] += int(problem.weight_bytes[i])
        if problem.colocation is not None and problem.colocation[i] >= 0:
            group = int(problem.colocation[i])
            if homes.setdefault(group, k) != k:
                return False
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
    return loads


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
