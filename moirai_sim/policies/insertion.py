"""Earliest finish with insertion: the inner loop of HEFT and CPOP, compiled.

Resources are the k devices and, where the network has them, their ports. The busy times of a resource are sorted,
merged intervals; a search for room starts at the instant that the inputs allow and takes the first gap that is long
enough. Intervals live in one pool, where a resource that outgrows its place moves to twice the room at the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moirai_sim.compiled import kernel
from moirai_sim.placement import Placement, transfer_edges
from moirai_sim.policies.groups import Groups, groups_of, no_room
from moirai_sim.simulation.list_scheduling import NEVER
from moirai_sim.simulation.schedule import Schedule, operator_ready_ns, placement_from_schedule

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.problem import PlacementProblem

    Ints = NDArray[np.int64]
    Int = int | np.signedinteger[Any]

_FIRST_ROOM = 4


class _Busy(NamedTuple):
    """Busy intervals of resources, in one pool."""

    begin: Ints
    end: Ints
    offset: Ints
    """[r] where the intervals of a resource stand in the pool."""
    room: Ints
    held: Ints
    used: Ints
    """[1] how much of the pool is given away."""


def insertion_schedule(problem: PlacementProblem, order: Ints, pinned: Ints, *, reserve_ports: bool) -> Placement:
    """Place operators one by one where they end first, ties by device, and return the placement with its order.

    Parameters
    ----------
    problem
        Its network decides which ports there are to reserve.
    order
        [n] operators, each after all its producers.
    pinned
        [n] device that an operator must take if it has the memory; -1 for any.
    reserve_ports
        Whether transfers take their turn on the ports, also with insertion. Without, transfers never wait while
        devices are chosen (classic HEFT), and the replay orders them.
    """
    groups = groups_of(problem)
    network = problem.network if reserve_ports else "none"
    ports = {"none": 0, "half-duplex": 1}.get(network, 2)  # of a device; a fair network is taken for one-port
    indptr, in_edges = problem.predecessors
    device, start, transfer_start = _schedule(
        np.ascontiguousarray(order), pinned, problem.operator_ns, problem.device_type, problem.memory_bytes,
        indptr, in_edges, problem.edges.reshape(-1, 2), problem.edge_tensor, problem.route_class, problem.transfer_ns,
        groups, ports,
    )  # fmt: skip
    if len(device) and device.min() < 0:
        return no_room("no device has enough memory left for some operator")
    placement = Placement(device=device)
    end = start + problem.operator_ns[np.arange(len(device)), problem.device_type[device]]
    leader = transfer_edges(problem, device)
    leads = leader == np.arange(len(leader))
    sent = np.full(len(leader), -1, dtype=np.int64)
    np.maximum.at(sent, leader[leader >= 0], transfer_start[leader >= 0])  # any sharing edge may have caused it
    arrival = np.full(len(leader), -1, dtype=np.int64)
    producer, consumer = problem.edges[leads].reshape(-1, 2).T
    route = problem.route_class[device[producer], device[consumer]]
    arrival[leads] = sent[leads] + problem.transfer_ns[problem.edge_tensor[leads], route]
    ready = np.full(len(leader), -1, dtype=np.int64)
    ready[leads] = end[producer]
    schedule = Schedule(operator_ready_ns(problem, leader, end, arrival), start, end, ready, sent, arrival)
    return placement_from_schedule(problem, placement, schedule)


@kernel
def _earliest(busy: _Busy, r: Int, ready: Int, length: Int) -> Int:
    """Return the first instant from ``ready`` on at which resource r has ``length`` free."""
    low, high = busy.offset[r], busy.offset[r] + busy.held[r]
    last = high
    while low < high:  # the first interval that ends after ready
        middle = (low + high) >> 1
        if busy.end[middle] <= ready:
            low = middle + 1
        else:
            high = middle
    while low < last and busy.begin[low] < ready + length:
        ready = max(ready, busy.end[low])
        low += 1
    return ready


@kernel
def _occupy(busy: _Busy, r: Int, start: Int, length: Int) -> None:
    """Note that resource r is busy from ``start`` on, merging with what it touches."""
    if length == 0:
        return
    end = start + length
    low, high = busy.offset[r], busy.offset[r] + busy.held[r]
    last = high
    while low < high:  # the first interval that begins at or after the new end
        middle = (low + high) >> 1
        if busy.begin[middle] < end:
            low = middle + 1
        else:
            high = middle
    touches_before = low > busy.offset[r] and busy.end[low - 1] == start
    touches_after = low < last and busy.begin[low] == end
    if touches_before and touches_after:
        busy.end[low - 1] = busy.end[low]
        for position in range(low, last - 1):
            busy.begin[position], busy.end[position] = busy.begin[position + 1], busy.end[position + 1]
        busy.held[r] -= 1
    elif touches_before:
        busy.end[low - 1] = end
    elif touches_after:
        busy.begin[low] = start
    else:
        if busy.held[r] == busy.room[r]:
            moved = busy.used[0]
            for position in range(busy.held[r]):
                busy.begin[moved + position] = busy.begin[busy.offset[r] + position]
                busy.end[moved + position] = busy.end[busy.offset[r] + position]
            low += moved - busy.offset[r]
            busy.offset[r] = moved
            busy.room[r] *= 2
            busy.used[0] += busy.room[r]
        for position in range(busy.offset[r] + busy.held[r], low, -1):
            busy.begin[position], busy.end[position] = busy.begin[position - 1], busy.end[position - 1]
        busy.begin[low], busy.end[low] = start, end
        busy.held[r] += 1


@kernel
def _send(busy: _Busy, source: Int, target: Int, ready: Int, length: Int, taken: Ints, n_taken: Int) -> Int:
    """Return when a transfer can hold ports ``source`` and ``target`` (-1: none), also beside ``taken``.

    ``taken`` are intervals, begin and end in turn, that the same operator already asks of port ``target``.
    """
    if source < 0:
        return ready
    while True:
        start = _earliest(busy, target, _earliest(busy, source, ready, length), length)
        for position in range(n_taken):
            if start < taken[2 * position + 1] and taken[2 * position] < start + length:
                start = taken[2 * position + 1]
        if start == ready:
            return start
        ready = start


@kernel
def _schedule(
    order: Ints,
    pinned: Ints,
    duration: Ints,
    device_type: Ints,
    memory: Ints,
    indptr: Ints,
    in_edges: Ints,
    edges: Ints,
    edge_tensor: Ints,
    route_class: Ints,
    transfer: Ints,
    groups: Groups,
    ports: int,
) -> tuple[Ints, Ints, Ints]:
    """Return devices [n], starts [n] and starts of transfers by the edge that caused them [m]."""
    n, k, m = len(order), len(device_type), len(edges)
    resources = k * (1 + ports)
    pool = 4 * (n + 2 * m * (ports > 0)) + resources * _FIRST_ROOM
    busy = _Busy(
        np.empty(pool, np.int64),
        np.empty(pool, np.int64),
        np.arange(resources) * _FIRST_ROOM,
        np.full(resources, _FIRST_ROOM),
        np.zeros(resources, np.int64),
        np.full(1, resources * _FIRST_ROOM),
    )
    device, start, end = np.full(n, -1), np.zeros(n, np.int64), np.zeros(n, np.int64)
    sent = np.full(m, -1)
    arrived = np.full((len(transfer), k), -1)  # when a tensor is on a device it was sent to
    free, home = memory.copy(), np.full(len(groups.weight), -1)
    widest = 0
    for i in range(n):
        widest = max(widest, indptr[i + 1] - indptr[i])
    inputs, taken = np.empty(widest, np.int64), np.empty(2 * widest, np.int64)
    for i in order:
        degree = 0  # inputs by the end of their producer: first ready, first sent
        for position in range(indptr[i], indptr[i + 1]):
            e, hole = in_edges[position], degree
            while hole > 0 and end[edges[inputs[hole - 1], 0]] > end[edges[e, 0]]:
                inputs[hole] = inputs[hole - 1]
                hole -= 1
            inputs[hole] = e
            degree += 1
        g = groups.of[i]
        only = home[g] if home[g] >= 0 else pinned[i]
        if only >= 0 and home[g] < 0 and (free[only] < groups.weight[g] or not groups.can_run[g, device_type[only]]):
            only = -1
        best, best_end = -1, NEVER
        best_start: Int = 0
        for attempt in range(k + 1):  # the last round sends the inputs to the chosen device
            d = attempt if attempt < k else best
            if attempt < k:
                if only >= 0 and d != only:
                    continue
                if home[g] < 0 and (free[d] < groups.weight[g] or not groups.can_run[g, device_type[d]]):
                    continue
            elif best < 0:
                return device, start, sent
            ready: Int = 0
            n_taken = 0
            for position in range(degree):
                e = inputs[position]
                source, tensor = device[edges[e, 0]], edge_tensor[e]
                when = end[edges[e, 0]]
                if source != d and tensor >= 0:
                    if arrived[tensor, d] >= 0:
                        when = arrived[tensor, d]
                    else:
                        length = transfer[tensor, route_class[source, d]]
                        send = k + source if ports > 0 else -1
                        receive = k * ports + d
                        begin = _send(busy, send, receive, when, length, taken, n_taken)
                        when = begin + length
                        if attempt == k:
                            sent[e], arrived[tensor, d] = begin, when
                            if ports > 0:
                                _occupy(busy, send, begin, length)
                                _occupy(busy, receive, begin, length)
                        elif ports > 0:
                            taken[2 * n_taken], taken[2 * n_taken + 1] = begin, when
                            n_taken += 1
                ready = max(ready, when)
            length = duration[i, device_type[d]]
            begin = _earliest(busy, d, ready, length)
            if attempt < k and begin + length < best_end:
                best, best_end, best_start = d, begin + length, begin
        if home[g] < 0:
            home[g] = best
            free[best] -= groups.weight[g]
        device[i], start[i], end[i] = best, best_start, best_end
        _occupy(busy, best, best_start, best_end - best_start)
    return device, start, sent
