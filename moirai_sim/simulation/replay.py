"""Compiled replay: the time of a placement by list scheduling, equal to the SimPy engine to the nanosecond.

The rules are those of ``docs/design.md``, "The meaning of a placement", for the networks ``none``, ``one-port`` and
``half-duplex``. `replay` answers with every start; `Evaluator` answers with makespans alone, tens of millions of
operators a second, for policies that try many placements. Compiled searches call `makespan` and `greedy` themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moirai_sim.compiled import kernel
from moirai_sim.errors import InputError
from moirai_sim.placement import transfer_edges
from moirai_sim.simulation.schedule import Schedule, operator_ready_ns, placement_from_schedule

if TYPE_CHECKING:
    from typing import TypeAlias

    from numpy.typing import NDArray

    from moirai_sim.placement import Placement
    from moirai_sim.problem import PlacementProblem

    Ints: TypeAlias = NDArray[np.int64]
    Indices: TypeAlias = NDArray[
        np.uint64
    ]  # unsigned: numba needs no look for negative indices, which count from the end

NEVER = np.iinfo(np.int64).max
_PORTS = {"none": 0, "one-port": 1, "half-duplex": 2}


class Arrays(NamedTuple):
    """A `PlacementProblem` as compiled code reads it. Edges stand by producer, then tensor, then edge index."""

    duration: Ints
    """[n, t] ns."""
    device_type: Indices
    """[k]."""
    out: Ints
    """[n + 1] start of each operator's out-edges in the arrays below."""
    edge: Ints
    """[m] index of the edge in the problem."""
    producer: Indices
    consumer: Indices
    tensor: Ints
    n_inputs: Ints
    """[n] number of in-edges."""
    topological: Indices
    """[n]."""
    route_class: Ints
    """[k, k]."""
    transfer: Ints
    """[q, c] ns."""
    ports: int
    """0: transfers never wait; 1: a send and a receive port a device; 2: one port for both."""


class Workspace(NamedTuple):
    """Memory that `greedy` uses; ``start`` [n] and ``transfer_start`` [m, as in `Arrays`] hold its answer."""

    start: Ints
    transfer_start: Ints
    """-1 where an edge needs no transfer or shares an earlier one."""
    transfer_end: Ints
    turn: Ints
    """[n] who goes first, lowest first: the upward rank, negated."""
    where: Indices
    """[n] the placement."""
    waiting: Ints
    """[n] inputs that are still to come."""
    arrival: Ints
    """[n] when the last input known so far is there."""
    known: Indices
    """[n] operators that become ready at this instant; from the end, those whose last input is on its way."""
    ready: Indices
    """[n] a heap a device of operators that can start, by turn."""
    segment: Ints
    """[k] where the heap of a device begins."""
    n_ready: Ints
    future: Indices
    """[n] one heap of operators whose last input is on its way, by arrival."""
    running: Indices
    """[k] operator."""
    running_end: Ints
    """[k] ns; NEVER for an idle device."""
    ended: Indices
    """[k] devices whose operators end at this instant."""
    send_free: Ints
    receive_free: Ints
    queued: Ints
    """[k] last tensor queued towards a device ..."""
    queued_by: Indices
    """[k] ... and the edge that stands for it."""
    queue: Indices
    """[m] edges whose transfers this round queues."""
    shared: Indices
    """[m] edges that share a transfer of this round."""
    shared_by: Indices


def arrays_of(problem: PlacementProblem) -> Arrays:
    """Return the problem for compiled code.

    Raises
    ------
    InputError
        If the network is ``fair``, whose transfers change speed on their way; simulate that with the SimPy engine.
    """
    if problem.network not in _PORTS:
        raise InputError(
            f"{problem.name}: the replay knows the networks {', '.join(_PORTS)}, not '{problem.network}'; "
            "use the engine 'simpy' or another network"
        )
    m = len(problem.edges)
    producer = problem.edges[:, 0] if m else np.zeros(0, dtype=np.int64)
    grouped = np.lexsort((np.arange(m), problem.edge_tensor, producer))
    edges = problem.edges[grouped].reshape(m, 2)
    return Arrays(
        duration=_own(problem.operator_ns),
        device_type=_own(problem.device_type).astype(np.uint64),
        out=_own(problem.successors[0]),
        edge=_own(grouped),
        producer=_own(edges[:, 0]).astype(np.uint64),
        consumer=_own(edges[:, 1]).astype(np.uint64),
        tensor=_own(problem.edge_tensor[grouped]),
        n_inputs=np.bincount(edges[:, 1], minlength=problem.n_operators).astype(np.int64),
        topological=_own(problem.topological_order).astype(np.uint64),
        route_class=_own(problem.route_class),
        transfer=_own(problem.transfer_ns),
        ports=_PORTS[problem.network],
    )


def workspace_for(arrays: Arrays) -> Workspace:
    """Return memory for `greedy` on a problem; one for each thread."""
    n, k, m = len(arrays.duration), len(arrays.device_type), len(arrays.edge)

    def ints(size: int) -> Ints:
        return np.zeros(size, dtype=np.int64)

    def indices(size: int) -> Indices:
        return np.zeros(size, dtype=np.uint64)

    return Workspace(
        start=ints(n), transfer_start=ints(m), transfer_end=ints(m), turn=ints(n), where=indices(n), waiting=ints(n),
        arrival=ints(n), known=indices(n), ready=indices(n), segment=ints(k), n_ready=ints(k), future=indices(n),
        running=indices(k), running_end=ints(k), ended=indices(k), send_free=ints(k), receive_free=ints(k),
        queued=ints(k), queued_by=indices(k), queue=indices(m), shared=indices(m), shared_by=indices(m),
    )  # fmt: skip


class Evaluator:
    """Makespans of greedy placements of one problem. Not for use by several threads at once.

    Parameters
    ----------
    problem
        Its network must be ``none``, ``one-port`` or ``half-duplex``.
    """

    def __init__(self, problem: PlacementProblem) -> None:
        self.arrays = arrays_of(problem)
        self.workspace = workspace_for(self.arrays)

    def makespan_ns(self, device: Ints, priority: Ints | None = None) -> int:
        """Return when the last operator ends, ns.

        Parameters
        ----------
        device
            [n] device of each operator; it must be able to run it, which is not checked.
        priority
            [n] who goes first, highest first; the upward rank where it is None.
        """
        if priority is None:
            return int(makespan(self.arrays, self.workspace, device))
        return int(greedy(self.arrays, self.workspace, device, -priority))

    def makespans_ns(self, devices: Ints) -> Ints:
        """Return the makespans, [b] ns, of b placements [b, n], each with its upward rank."""
        return np.asarray(_makespans(self.arrays, self.workspace, devices))


def replay(problem: PlacementProblem, placement: Placement, *, turn: Ints | None = None) -> Schedule:
    """Return when everything of a placement happens.

    Parameters
    ----------
    problem, placement
        What runs where, and in which order if the placement has one.
    turn
        [n] who goes first in a placement without order, lowest first, instead of the upward rank.

    Raises
    ------
    InputError
        If the network is ``fair``, an operator is placed where it cannot run, or the orders contradict the edges.
    """
    arrays = arrays_of(problem)
    device = _own(placement.device)
    duration = arrays.duration[np.arange(len(device)), arrays.device_type[device]]
    if (duration < 0).any():
        raise InputError(
            f"placement of '{problem.operators[i]}': '{problem.devices[device[i]]}' cannot run it; place it elsewhere"
            for i in np.flatnonzero(duration < 0)
        )
    leader = transfer_edges(problem, device)
    if placement.order is None:
        work = workspace_for(arrays)
        if turn is None:
            makespan(arrays, work, device)
        else:
            greedy(arrays, work, device, turn)
        start = work.start
        transfer_start = np.empty_like(leader)
        transfer_start[arrays.edge] = work.transfer_start
    else:
        start, transfer_start = _ordered(problem, placement, device, duration, leader)
    end = start + duration
    m = len(problem.edges)
    transfers = np.flatnonzero(leader == np.arange(m))
    transfer_ready, transfer_end = np.full(m, -1, dtype=np.int64), np.full(m, -1, dtype=np.int64)
    if len(transfers):
        producer, consumer = problem.edges[transfers].T
        route = problem.route_class[device[producer], device[consumer]]
        transfer_ready[transfers] = end[producer]
        transfer_end[transfers] = transfer_start[transfers] + problem.transfer_ns[problem.edge_tensor[transfers], route]
    return Schedule(
        operator_ready_ns=operator_ready_ns(problem, leader, end, transfer_end),
        operator_start_ns=start,
        operator_end_ns=end,
        transfer_ready_ns=transfer_ready,
        transfer_start_ns=transfer_start,
        transfer_end_ns=transfer_end,
    )


def with_all_orders(problem: PlacementProblem, placement: Placement) -> Placement:
    """Return ``placement`` with the order of its transfers too, as one replay finds it (not needed under ``fair``)."""
    if problem.network == "fair":
        return placement
    return placement_from_schedule(problem, placement, replay(problem, placement))


def _own(array: Ints) -> Ints:
    """Return a writable contiguous copy: read-only arrays would be another type to numba, compiled once more."""
    return np.array(array, dtype=np.int64, order="C")


def _ordered(
    problem: PlacementProblem,
    placement: Placement,
    device: Ints,
    duration: Ints,
    leader: Ints,
) -> tuple[Ints, Ints]:
    """Return the starts of operators [n] and transfers [m]: longest paths through edges and resources.

    Nodes are the n operators, then the transfers. An arc joins work that must end before other work starts.
    """
    n, m = problem.n_operators, len(problem.edges)
    order = np.asarray(placement.order)
    transfers = np.flatnonzero(leader == np.arange(m))
    node_of_edge = np.full(m, -1, dtype=np.int64)
    node_of_edge[transfers] = n + np.arange(len(transfers))
    producer, consumer = problem.edges[:, 0], problem.edges[:, 1]
    source, target = device[producer[transfers]], device[consumer[transfers]]
    position = order[producer[transfers]] if placement.transfer_order is None else placement.transfer_order[transfers]
    carried = leader >= 0
    arcs = [
        np.stack([producer[~carried], consumer[~carried]]),
        np.stack([producer[transfers], node_of_edge[transfers]]),
        np.stack([node_of_edge[leader[carried]], consumer[carried]]),
        _successions(device, order, np.arange(n)),
    ]
    nodes = n + np.arange(len(transfers))
    if problem.network == "one-port":
        arcs += [_successions(source, position, nodes), _successions(target, position, nodes)]
    elif problem.network == "half-duplex":
        both = np.concatenate([source, target])
        arcs.append(_successions(both, np.tile(position, 2), np.tile(nodes, 2)))
    before, after = np.concatenate(arcs, axis=1)
    route = problem.route_class[source, target]
    length = np.concatenate([duration, problem.transfer_ns[problem.edge_tensor[transfers], route]])
    grouped = np.argsort(before, kind="stable")
    out = np.zeros(len(length) + 1, dtype=np.int64)
    np.cumsum(np.bincount(before, minlength=len(length)), out=out[1:])
    start, done = _longest_paths(length, out, after[grouped])
    if done < len(length):
        raise InputError(
            f"placement: its orders contradict each other or the edges ({len(length) - done} of {len(length)} "
            "operators and transfers can never start); give orders that follow the edges, or none"
        )
    transfer_start = np.full(m, -1, dtype=np.int64)
    transfer_start[transfers] = start[n:]
    return start[:n], transfer_start


def _successions(resource: Ints, position: Ints, node: Ints) -> Ints:
    """Return arcs [2, a] from each node to the next one on the same resource, by position, then node."""
    by_turn = np.lexsort((node, position, resource))
    same = resource[by_turn][1:] == resource[by_turn][:-1]
    return np.stack([node[by_turn][:-1][same], node[by_turn][1:][same]])


@kernel
def _longest_paths(length: Ints, out: Ints, after: Ints) -> tuple[Ints, int]:
    waiting = np.zeros(len(length), np.int64)
    for node in after:
        waiting[node] += 1
    start = np.zeros(len(length), np.int64)
    todo = np.empty(len(length), np.int64)
    known = 0
    for node in range(len(length)):
        if waiting[node] == 0:
            todo[known] = node
            known += 1
    done = 0
    while done < known:
        node = todo[done]
        done += 1
        end = start[node] + length[node]
        for arc in range(out[node], out[node + 1]):
            other = after[arc]
            start[other] = max(start[other], end)
            waiting[other] -= 1
            if waiting[other] == 0:
                todo[known] = other
                known += 1
    return start, done


@kernel
def makespan(a: Arrays, w: Workspace, device: Ints) -> int:
    """Run a greedy placement by upward rank, left negated in ``w.turn``; return its makespan, ns."""
    out, consumer, tensor, topological = a.out, a.consumer, a.tensor, a.topological
    duration, device_type, transfer, route_class = a.duration, a.device_type, a.transfer, a.route_class
    turn, where = w.turn, w.where
    for operator in range(len(where)):
        where[operator] = device[operator]
    for position in range(len(topological) - 1, -1, -1):
        i = topological[position]
        source = where[i]
        longest = 0
        for e in range(out[i], out[i + np.uint64(1)]):
            j = consumer[e]
            length = -turn[j]
            if where[j] != source and tensor[e] >= 0:
                length += transfer[tensor[e], route_class[source, where[j]]]
            longest = max(longest, length)
        turn[i] = -(longest + duration[i, device_type[source]])
    return greedy(a, w, device, turn)


@kernel
def _makespans(a: Arrays, w: Workspace, devices: Ints) -> Ints:
    result = np.empty(len(devices), np.int64)
    for b in range(len(devices)):
        result[b] = makespan(a, w, devices[b])
    return result


@kernel
def greedy(a: Arrays, w: Workspace, device: Ints, turn: Ints) -> int:
    """Run a greedy placement by ``turn`` [n] (lower first, ties by index); return its makespan, ns.

    Fills ``w.start`` and ``w.transfer_start``. Its heaps are written out in place and its arrays are locals, because
    numba counts the references of every array that is passed on: with functions it runs ten times slower.
    """
    duration, device_type, out, edge, producer = a.duration, a.device_type, a.out, a.edge, a.producer
    consumer, tensor, transfer, route_class = a.consumer, a.tensor, a.transfer, a.route_class
    starts, transfer_start, transfer_end, where = w.start, w.transfer_start, w.transfer_end, w.where
    waiting, arrival, known, future, ready, n_ready = w.waiting, w.arrival, w.known, w.future, w.ready, w.n_ready
    segment, running, running_end, ended, send_free = w.segment, w.running, w.running_end, w.ended, w.send_free
    receive_free = w.receive_free if a.ports == 1 else send_free
    queued, queued_by, queue, shared, shared_by = w.queued, w.queued_by, w.queue, w.shared, w.shared_by
    contended, one = a.ports > 0, np.uint64(1)
    n, k = len(duration), len(device_type)
    n_known, n_ended, n_future, n_queue, n_shared, n_late = 0, 0, 0, 0, 0, 0
    now, last = 0, 0
    for device_index in range(k):
        segment[device_index] = n_ready[device_index] = send_free[device_index] = receive_free[device_index] = 0
        running_end[device_index], queued[device_index] = NEVER, -1
    for edge_index in range(len(transfer_start)):
        transfer_start[edge_index] = -1
    for operator in range(n):
        where[operator] = device[operator]
        segment[where[operator]] += 1
        waiting[operator] = a.n_inputs[operator]
        arrival[operator] = 0
        if waiting[operator] == 0:
            known[n_known] = operator
            n_known += 1
    begin = 0
    for device_index in range(k):
        size = segment[device_index]
        segment[device_index] = begin
        begin += size
    while True:
        for position in range(n_known):  # operators whose inputs are all there join the heap of their device
            i = known[position]
            base, hole = segment[where[i]], n_ready[where[i]]
            n_ready[where[i]] += 1
            while hole > 0:
                above = ready[base + ((hole - 1) >> 1)]
                if turn[above] < turn[i] or (turn[above] == turn[i] and above < i):
                    break
                ready[base + hole] = above
                hole = (hole - 1) >> 1
            ready[base + hole] = i
        for position in range(n_ended + n_known):  # idle devices start the first of their heap
            d = ended[position] if position < n_ended else where[known[position - n_ended]]
            if running_end[d] != NEVER or n_ready[d] == 0:
                continue
            base = segment[d]
            first = ready[base]
            n_ready[d] -= 1
            size, hole = n_ready[d], 0
            i = ready[base + size]
            while 2 * hole + 1 < size:
                child = 2 * hole + 1
                below = ready[base + child]
                if child + 1 < size:
                    other = ready[base + child + 1]
                    if turn[other] < turn[below] or (turn[other] == turn[below] and other < below):
                        child += 1
                        below = other
                if turn[i] < turn[below] or (turn[i] == turn[below] and i < below):
                    break
                ready[base + hole] = below
                hole = child
            ready[base + hole] = i
            running[d], starts[first] = first, now
            running_end[d] = now + duration[first, device_type[d]]
        gap = n_queue  # transfers that became ready together go by turn of the consumer, then edge (shell sort)
        while gap > 1:
            gap = 1 if gap < 5 else (gap * 5 - 1) // 11
            for position in range(gap, n_queue):
                e, hole = queue[position], position
                while hole >= gap:
                    f = queue[hole - gap]
                    before, after = turn[consumer[f]], turn[consumer[e]]
                    if before < after or (before == after and edge[f] < edge[e]):
                        break
                    queue[hole] = f
                    hole -= gap
                queue[hole] = e
        for position in range(n_queue + n_shared + n_late):
            if position < n_queue:
                e = queue[position]
                j = consumer[e]
                source, target = where[producer[e]], where[j]
                start = now
                if contended:
                    start = max(now, send_free[source], receive_free[target])
                end = start + transfer[tensor[e], route_class[source, target]]
                send_free[source] = end
                receive_free[target] = end
                transfer_start[e], transfer_end[e] = start, end
                arrival[j] = max(arrival[j], end)
                waiting[j] -= 1
            elif position < n_queue + n_shared:
                j = consumer[shared[position - n_queue]]
                arrival[j] = max(arrival[j], transfer_end[shared_by[position - n_queue]])
                waiting[j] -= 1
            else:
                j = known[n - 1 - (position - n_queue - n_shared)]
            if waiting[j] > 0:
                continue
            hole = n_future  # its last input is on its way: it joins the heap of those to come
            n_future += 1
            while hole > 0:
                above = future[(hole - 1) >> 1]
                if arrival[above] <= arrival[j]:
                    break
                future[hole] = above
                hole = (hole - 1) >> 1
            future[hole] = j
        now = arrival[future[0]] if n_future > 0 else NEVER
        n_known, n_ended, n_queue, n_shared, n_late = 0, 0, 0, 0, 0
        for device_index in range(k):
            if running_end[device_index] < now:
                now = running_end[device_index]
                n_ended = 0
            if running_end[device_index] == now:
                ended[n_ended] = device_index
                n_ended += 1
        if now == NEVER:
            return last
        while n_future > 0 and arrival[future[0]] == now:
            known[n_known] = future[0]
            n_known += 1
            n_future -= 1
            i, hole = future[n_future], 0
            while 2 * hole + 1 < n_future:
                child = 2 * hole + 1
                if child + 1 < n_future and arrival[future[child + 1]] < arrival[future[child]]:
                    child += 1
                if arrival[i] <= arrival[future[child]]:
                    break
                future[hole] = future[child]
                hole = child
            future[hole] = i
        for position in range(n_ended):  # book the operators that end
            d = ended[position]
            running_end[d] = NEVER
            last = now
            i = running[d]
            for e in range(out[i], out[i + one]):
                j = consumer[e]
                target = where[j]
                if target == d or tensor[e] < 0:
                    arrival[j] = max(arrival[j], now)
                    waiting[j] -= 1
                    if waiting[j] == 0 and arrival[j] == now:
                        known[n_known] = j
                        n_known += 1
                    elif waiting[j] == 0:  # a transfer to it is on its way: kept at the other end of the same array
                        n_late += 1
                        known[n - n_late] = j
                elif queued[target] == tensor[e]:
                    shared[n_shared], shared_by[n_shared] = e, queued_by[target]
                    n_shared += 1
                else:
                    queued[target], queued_by[target] = tensor[e], e
                    queue[n_queue] = e
                    n_queue += 1
