"""List scheduling, compiled: who runs when in a greedy placement, tens of millions of operators a second.

The rules are those of ``docs/design.md``, "The meaning of a placement", for the networks ``none``, ``one-port`` and
``half-duplex``. `Evaluator` answers Python with makespans; compiled searches call `makespan` and `greedy` themselves.

What is known of an operator, or a device, stands together in one record of 64 bytes: one line of cache, and one
address that the machine keeps in a register, where an array a field needs a dozen. Indices are unsigned, because numba
looks whether signed ones are negative; and numba makes a float of unsigned and signed, so constants are unsigned too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moirai_sim.compiled import kernel
from moirai_sim.errors import InputError

if TYPE_CHECKING:
    from typing import TypeAlias

    from numpy.typing import NDArray

    from moirai_sim.problem import PlacementProblem

    Ints: TypeAlias = NDArray[np.int64]
    Indices: TypeAlias = NDArray[np.uint64]
    Records: TypeAlias = NDArray[Any]

NEVER = np.iinfo(np.int64).max
ZERO, ONE, TWO, FIVE, ELEVEN = (np.uint64(number) for number in (0, 1, 2, 5, 11))
_PORTS = {"none": 0, "one-port": 1, "half-duplex": 2}
_I, _U = np.int64, np.uint64

EDGE = np.dtype([("consumer", _U), ("producer", _U), ("row", _U), ("index", _I)])
"""``row``: where the tensor's times begin in `Arrays.transfer`; ``index``: of the edge in the problem."""

OPERATOR = np.dtype(
    [
        ("turn", _I),  # who goes first, lowest first: the upward rank, negated
        ("arrival", _I),  # when the last input known so far is there
        ("duration", _I),  # on the device it is placed on
        ("start", _I),  # the answer
        ("waiting", _I),  # inputs that are still to come
        ("where", _U),  # the placement
        ("out", _U),  # its edges, from here ...
        ("out_end", _U),  # ... up to here
    ]
)

DEVICE = np.dtype(
    [
        ("running_end", _I),  # NEVER while it is idle
        ("running", _U),
        ("ready", _U),  # where the heap of its operators that can start begins
        ("n_ready", _U),
        ("send_free", _I),
        ("receive_free", _I),
        ("queued", _U),  # the last tensor queued towards it, as a row ...
        ("queued_by", _U),  # ... and the edge that stands for it
    ]
)

TRANSFER = np.dtype([("start", _I), ("end", _I)])


class Arrays(NamedTuple):
    """A `PlacementProblem` as compiled code reads it."""

    duration: Ints
    """[n, t] ns."""
    device_type: Indices
    """[k]."""
    edges: Records
    """[m] `EDGE` by producer, then tensor, then edge index."""
    n_inputs: Ints
    """[n] number of in-edges."""
    topological: Indices
    """[n]."""
    route: Indices
    """[k * k] class of each pair of devices; c from a device to itself."""
    transfer: Ints
    """[(q + 1) * (c + 1)] ns; 0 in the last column, of what stays on a device, and the last row, of bare order."""
    silent: np.uint64
    """Row of edges that only order."""
    ports: int
    """0: transfers never wait; 1: a send and a receive port a device; 2: one port for both."""


class Workspace(NamedTuple):
    """Memory that `greedy` uses; ``operators["start"]`` and ``transfers["start"]`` hold its answer."""

    operators: Records
    """[n] `OPERATOR`."""
    devices: Records
    """[k] `DEVICE`."""
    transfers: Records
    """[m] `TRANSFER`, as ``edges``; untouched where an edge needs none or shares an earlier one."""
    known: Indices
    """[n] operators that become ready at this instant; from the end, those whose last input is on its way."""
    ready: Indices
    """[n] a heap a device of operators that can start, by turn."""
    future: Indices
    """[n] one heap of operators whose last input is on its way, by arrival."""
    ended: Indices
    """[k] devices whose operators end at this instant."""
    queue: Indices
    """[m] edges whose transfers this round queues."""
    shared: Indices
    """[m] edges that share a transfer of this round ..."""
    shared_by: Indices
    """[m] ... and the edge that stands for it."""


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
    m, (q, c) = len(problem.edges), problem.transfer_ns.shape
    producer = problem.edges[:, 0] if m else np.zeros(0, dtype=np.int64)
    grouped = np.lexsort((np.arange(m), problem.edge_tensor, producer))
    tensor = problem.edge_tensor[grouped]
    edges = np.zeros(m, EDGE)
    edges["producer"], edges["consumer"] = problem.edges[grouped].reshape(m, 2).T
    edges["row"] = np.where(tensor < 0, q, tensor) * (c + 1)
    edges["index"] = grouped
    return Arrays(
        duration=own(problem.operator_ns),
        device_type=own(problem.device_type).astype(np.uint64),
        edges=edges,
        n_inputs=np.bincount(edges["consumer"].astype(np.int64), minlength=problem.n_operators).astype(np.int64),
        topological=own(problem.topological_order).astype(np.uint64),
        route=np.where(problem.route_class < 0, c, problem.route_class).astype(np.uint64).reshape(-1),
        transfer=own(np.pad(problem.transfer_ns, ((0, 1), (0, 1)))).reshape(-1),
        silent=np.uint64(q * (c + 1)),
        ports=_PORTS[problem.network],
    )


def workspace_for(arrays: Arrays) -> Workspace:
    """Return memory for `greedy` on a problem; one for each thread."""
    n, k, m = len(arrays.duration), len(arrays.device_type), len(arrays.edges)
    operators = np.zeros(n, OPERATOR)
    degree = np.bincount(arrays.edges["producer"].astype(np.int64), minlength=n)
    operators["out_end"] = np.cumsum(degree)
    operators["out"] = np.cumsum(degree) - degree

    def indices(size: int) -> Indices:
        return np.zeros(size, dtype=np.uint64)

    return Workspace(
        operators=operators, devices=np.zeros(k, DEVICE), transfers=np.zeros(m, TRANSFER), known=indices(n),
        ready=indices(n), future=indices(n), ended=indices(k), queue=indices(m), shared=indices(m),
        shared_by=indices(m),
    )  # fmt: skip


def own(array: Ints) -> Ints:
    """Return a writable contiguous copy: read-only arrays would be another type to numba, compiled once more."""
    return np.array(array, dtype=np.int64, order="C")


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
            return int(makespan(self.arrays, self.workspace, device, NEVER))
        return int(greedy(self.arrays, self.workspace, device, -priority))

    def makespans_ns(self, devices: Ints) -> Ints:
        """Return the makespans, [b] ns, of b placements [b, n], each with its upward rank."""
        return np.asarray(_makespans(self.arrays, self.workspace, devices))


@kernel
def _makespans(a: Arrays, w: Workspace, devices: Ints) -> Ints:
    result = np.empty(len(devices), np.int64)
    for b in range(len(devices)):
        result[b] = makespan(a, w, devices[b], NEVER)
    return result


@kernel
def makespan(a: Arrays, w: Workspace, device: Ints, limit: int) -> int:
    """Run a greedy placement by upward rank; return its makespan, ns.

    Once it is clear that the makespan is above ``limit``, the run ends with a lower bound of it that is above, too:
    what starts now cannot end sooner than its rank from now.
    """
    operators, edges, transfer, route = w.operators, a.edges, a.transfer, a.route
    k = np.uint64(len(w.devices))
    for position in range(len(a.topological) - 1, -1, -1):
        i = a.topological[position]
        source = np.uint64(device[i])
        operator = operators[i]
        longest = 0
        for e in range(operator.out, operator.out_end):
            edge = edges[e]
            consumer = operators[edge.consumer]
            longest = max(longest, transfer[edge.row + route[source * k + consumer.where]] - consumer.turn)
        operator.where = source
        operator.duration = a.duration[i, a.device_type[source]]
        operator.turn = -(longest + operator.duration)
        operator.waiting = a.n_inputs[i]
        operator.arrival = 0
    return _run(a, w, limit)


@kernel
def greedy(a: Arrays, w: Workspace, device: Ints, turn: Ints) -> int:
    """Run a greedy placement by ``turn`` [n] (lower first, ties by index); return its makespan, ns."""
    operators = w.operators
    for i in range(len(operators)):
        operator = operators[i]
        operator.where = np.uint64(device[i])
        operator.duration = a.duration[i, a.device_type[operator.where]]
        operator.turn = turn[i]
        operator.waiting = a.n_inputs[i]
        operator.arrival = 0
    return _run(a, w, NEVER)


@kernel
def _run(a: Arrays, w: Workspace, limit: int) -> int:
    """Run what stands in ``w.operators``. Its heaps are written out in place: calls would count references."""
    operators, devices, edges, transfers = w.operators, w.devices, a.edges, w.transfers
    transfer, route, silent, ports = a.transfer, a.route, a.silent, a.ports
    known, future, ready, ended = w.known, w.future, w.ready, w.ended
    queue, shared, shared_by = w.queue, w.shared, w.shared_by
    n, k = np.uint64(len(operators)), np.uint64(len(devices))
    n_known, n_ended, n_future, n_queue, n_shared, n_late = ZERO, ZERO, ZERO, ZERO, ZERO, ZERO
    now, last = 0, 0
    for d in range(k):
        devices[d].ready = ZERO
        devices[d].n_ready = ZERO
        devices[d].send_free = 0
        devices[d].receive_free = 0
        devices[d].running_end = NEVER
        devices[d].queued = silent
    for i in range(n):
        devices[operators[i].where].ready += ONE
        if operators[i].waiting == 0:
            known[n_known] = i
            n_known += ONE
    begin = ZERO
    for d in range(k):
        size = devices[d].ready
        devices[d].ready = begin
        begin += size
    while True:
        for position in range(n_known):  # operators whose inputs are all there join the heap of their device
            i = known[position]
            device = devices[operators[i].where]
            base, hole, turn = device.ready, device.n_ready, operators[i].turn
            device.n_ready = hole + ONE
            while hole > ZERO:
                up = (hole - ONE) >> ONE
                above = ready[base + up]
                other = operators[above].turn
                if other < turn or (other == turn and above < i):
                    break
                ready[base + hole] = above
                hole = up
            ready[base + hole] = i
        for position in range(n_ended + n_known):  # idle devices start the first of their heap
            d = ended[position] if position < n_ended else operators[known[position - n_ended]].where
            device = devices[d]
            size = device.n_ready
            if device.running_end != NEVER or size == ZERO:
                continue
            base = device.ready
            first = ready[base]
            size -= ONE
            device.n_ready = size
            if size > ZERO:
                hole = ZERO
                i = ready[base + size]
                turn = operators[i].turn
                while TWO * hole + ONE < size:
                    child = TWO * hole + ONE
                    below = ready[base + child]
                    if child + ONE < size:
                        other = ready[base + child + ONE]
                        one, two = operators[other].turn, operators[below].turn
                        if one < two or (one == two and other < below):
                            child += ONE
                            below = other
                    two = operators[below].turn
                    if turn < two or (turn == two and i < below):
                        break
                    ready[base + hole] = below
                    hole = child
                ready[base + hole] = i
            operator = operators[first]
            if now - operator.turn > limit:
                return int(now - operator.turn)
            device.running = first
            operator.start = now
            device.running_end = now + operator.duration
        gap = n_queue  # transfers that became ready together go by turn of the consumer, then edge (shell sort)
        while gap > ONE:
            gap = ONE if gap < FIVE else (gap * FIVE - ONE) // ELEVEN
            for position in range(gap, n_queue):
                e, hole = queue[position], position
                after = operators[edges[e].consumer].turn
                while hole >= gap:
                    f = queue[hole - gap]
                    before = operators[edges[f].consumer].turn
                    if before < after or (before == after and edges[f].index < edges[e].index):
                        break
                    queue[hole] = f
                    hole -= gap
                queue[hole] = e
        for position in range(n_queue + n_shared + n_late):
            if position < n_queue:
                e = queue[position]
                edge = edges[e]
                j = edge.consumer
                consumer = operators[j]
                source, target = operators[edge.producer].where, consumer.where
                start = now
                if ports == 1:
                    start = max(now, devices[source].send_free, devices[target].receive_free)
                elif ports == 2:
                    start = max(now, devices[source].send_free, devices[target].send_free)
                end = start + transfer[edge.row + route[source * k + target]]
                devices[source].send_free = end
                if ports == 1:
                    devices[target].receive_free = end
                else:
                    devices[target].send_free = end
                transfers[e].start = start
                transfers[e].end = end
                consumer.arrival = max(consumer.arrival, end)
                consumer.waiting -= 1
            elif position < n_queue + n_shared:
                j = edges[shared[position - n_queue]].consumer
                consumer = operators[j]
                consumer.arrival = max(consumer.arrival, transfers[shared_by[position - n_queue]].end)
                consumer.waiting -= 1
            else:
                j = known[n - ONE - (position - n_queue - n_shared)]
            if operators[j].waiting > 0:
                continue
            hole = n_future  # its last input is on its way: it joins the heap of those to come
            n_future += ONE
            when = operators[j].arrival
            while hole > ZERO:
                up = (hole - ONE) >> ONE
                above = future[up]
                if operators[above].arrival <= when:
                    break
                future[hole] = above
                hole = up
            future[hole] = j
        now = operators[future[ZERO]].arrival if n_future > ZERO else NEVER
        n_known, n_ended, n_queue, n_shared, n_late = ZERO, ZERO, ZERO, ZERO, ZERO
        for d in range(k):
            when = devices[d].running_end
            if when < now:
                now = when
                n_ended = ZERO
            if when == now:
                ended[n_ended] = d
                n_ended += ONE
        if now == NEVER:
            return last
        while n_future > ZERO and operators[future[ZERO]].arrival == now:
            known[n_known] = future[ZERO]
            n_known += ONE
            n_future -= ONE
            i, hole = future[n_future], ZERO
            when = operators[i].arrival
            while TWO * hole + ONE < n_future:
                child = TWO * hole + ONE
                if child + ONE < n_future and operators[future[child + ONE]].arrival < operators[future[child]].arrival:
                    child += ONE
                if when <= operators[future[child]].arrival:
                    break
                future[hole] = future[child]
                hole = child
            future[hole] = i
        for position in range(n_ended):  # book the operators that end
            d = ended[position]
            device = devices[d]
            device.running_end = NEVER
            last = now
            operator = operators[device.running]
            for e in range(operator.out, operator.out_end):
                edge = edges[e]
                j = edge.consumer
                consumer = operators[j]
                if consumer.where == d or edge.row == silent:
                    consumer.arrival = max(consumer.arrival, now)
                    left = consumer.waiting - 1
                    consumer.waiting = left
                    if left == 0:
                        if consumer.arrival == now:
                            known[n_known] = j
                            n_known += ONE
                        else:  # a transfer to it is on its way: kept at the other end of the same array
                            n_late += ONE
                            known[n - n_late] = j
                else:
                    target = devices[consumer.where]
                    if target.queued == edge.row:
                        shared[n_shared] = e
                        shared_by[n_shared] = target.queued_by
                        n_shared += ONE
                    else:
                        target.queued = edge.row
                        target.queued_by = e
                        queue[n_queue] = e
                        n_queue += ONE
