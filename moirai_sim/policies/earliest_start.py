"""Earliest task first with memory, compiled: the inner loop of m-ETF, m-SCT and GETF.

Of all ready operators and the devices that may take them, the pair with the earliest start goes next. Tensors are kept
at the receiver, and each transfer is booked at once on the ports that the network has, first come, first served.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moirai_sim.compiled import kernel
from moirai_sim.placement import Placement
from moirai_sim.policies.groups import Groups, groups_of, no_room
from moirai_sim.policies.ranks import mean_operator_ns, mean_transfer_ns, upward_ranks
from moirai_sim.simulation.list_scheduling import NEVER
from moirai_sim.simulation.replay import with_all_orders

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.problem import PlacementProblem

    Ints = NDArray[np.int64]


def earliest_start_schedule(
    problem: PlacementProblem, *, may_run: NDArray[np.bool_] | None = None, favourite: Ints | None = None
) -> Placement:
    """Return the placement of earliest task first; its devices keep the order in which operators were given to them.

    Parameters
    ----------
    problem
        Its network decides which ports transfers wait for.
    may_run
        [n, k] devices an operator is kept to, as long as one of them has memory for it; None for all.
    favourite
        [n] consumer for which a device that just ran an operator waits, unless another operator is urgent: its
        inputs could be on any device by then. -1 for none.

    Notes
    -----
    Ties of equal start go to the higher upward rank over mean times, then to the smaller operator, then device.
    """
    n, k = problem.n_operators, problem.n_devices
    rank = upward_ranks(problem, mean_operator_ns(problem), mean_transfer_ns(problem))
    by_rank = np.empty(n, dtype=np.int64)
    by_rank[np.lexsort((np.arange(n), -rank))] = np.arange(n)
    pairs = problem.route_class[~np.eye(k, dtype=bool)]
    slowest = (
        problem.transfer_ns[:, np.unique(pairs)].max(axis=1, initial=0) if len(pairs) else problem.tensor_bytes * 0
    )
    ports = {"none": 0, "half-duplex": 2}.get(problem.network, 1)
    device, order = _schedule(
        by_rank, np.ones((n, k), dtype=np.bool_) if may_run is None else may_run,
        np.full(n, -1, dtype=np.int64) if favourite is None else favourite,
        problem.operator_ns, problem.device_type, problem.memory_bytes, problem.edges.reshape(-1, 2),
        problem.edge_tensor, *problem.predecessors, *problem.successors, problem.route_class, problem.transfer_ns,
        slowest, groups_of(problem), ports,
    )  # fmt: skip
    if len(device) and device.min() < 0:
        return no_room("no device has enough memory left for some operator")
    return with_all_orders(problem, Placement(device=device, order=order))


@kernel
def _schedule(
    by_rank: Ints,
    may_run: NDArray[np.bool_],
    favourite: Ints,
    duration: Ints,
    device_type: Ints,
    memory: Ints,
    edges: Ints,
    edge_tensor: Ints,
    in_ptr: Ints,
    in_edges: Ints,
    out_ptr: Ints,
    out_edges: Ints,
    route_class: Ints,
    transfer: Ints,
    slowest: Ints,
    groups: Groups,
    ports: int,
) -> tuple[Ints, Ints]:
    """Return the device and the position of each operator, [n]; devices of -1 where one found no memory."""
    n, k = len(duration), len(device_type)
    device, order, end = np.full(n, -1), np.full(n, -1), np.zeros(n, np.int64)
    waiting = np.empty(n, np.int64)
    inputs_there = np.empty((n, k), np.int64)  # of ready operators, by device, as the ports stood at that time
    anywhere = np.zeros(n, np.int64)  # when its inputs could be on any device: from then on it is urgent
    arrived = np.full((len(transfer), k), -1)
    device_free, last_run = np.zeros(k, np.int64), np.full(k, -1)
    send_free = np.zeros(k, np.int64)
    receive_free = np.zeros(k, np.int64) if ports == 1 else send_free
    free, home = memory.copy(), np.full(len(groups.weight), -1)
    ready = np.empty(n, np.int64)
    n_ready = 0
    for i in range(n):
        waiting[i] = in_ptr[i + 1] - in_ptr[i]
        if waiting[i] == 0:
            ready[n_ready] = i
            n_ready += 1
            inputs_there[i] = 0
    for turn in range(n):
        best_start, best_slot, best_device = NEVER, -1, -1
        for slot in range(n_ready):
            i = ready[slot]
            g = groups.of[i]
            found = False
            for kept_to in (True, False):
                for d in range(k):
                    if home[g] >= 0:
                        if home[g] != d:
                            continue
                    elif free[d] < groups.weight[g] or not groups.can_run[g, device_type[d]]:
                        continue
                    if kept_to and home[g] < 0 and not may_run[i, d]:
                        continue
                    found = True
                    start = max(device_free[d], inputs_there[i, d])
                    if last_run[d] >= 0:
                        awaited = favourite[last_run[d]]
                        if awaited >= 0 and awaited != i and device[awaited] < 0:
                            start = max(start, anywhere[i])
                    if start < best_start or (
                        start == best_start and best_slot >= 0 and by_rank[i] < by_rank[ready[best_slot]]
                    ):
                        best_start, best_slot, best_device = start, slot, d
                if found:
                    break
            if not found:
                return device, order
        i, d = ready[best_slot], best_device
        n_ready -= 1
        ready[best_slot] = ready[n_ready]
        g = groups.of[i]
        if home[g] < 0:
            home[g] = d
            free[d] -= groups.weight[g]
        start = best_start
        for position in range(in_ptr[i], in_ptr[i + 1]):
            e = in_edges[position]
            source, tensor = device[edges[e, 0]], edge_tensor[e]
            if source == d or tensor < 0:
                continue
            if arrived[tensor, d] < 0:
                length = transfer[tensor, route_class[source, d]]
                begin = end[edges[e, 0]]
                if ports > 0:
                    begin = max(begin, send_free[source], receive_free[d])
                    send_free[source] = begin + length
                    receive_free[d] = begin + length
                arrived[tensor, d] = begin + length
            start = max(start, arrived[tensor, d])
        device[i], order[i], end[i] = d, turn, start + duration[i, device_type[d]]
        device_free[d], last_run[d] = end[i], i
        for position in range(out_ptr[i], out_ptr[i + 1]):
            j = edges[out_edges[position], 1]
            waiting[j] -= 1
            if waiting[j] > 0:
                continue
            ready[n_ready] = j
            n_ready += 1
            inputs_there[j] = 0
            for incoming in range(in_ptr[j], in_ptr[j + 1]):
                e = in_edges[incoming]
                source, tensor, ended = device[edges[e, 0]], edge_tensor[e], end[edges[e, 0]]
                anywhere[j] = max(anywhere[j], ended + (slowest[tensor] if tensor >= 0 else 0))
                for other in range(k):
                    there = ended
                    if source != other and tensor >= 0:
                        there = arrived[tensor, other]
                        if there < 0:
                            begin = max(ended, send_free[source], receive_free[other]) if ports > 0 else ended
                            there = begin + transfer[tensor, route_class[source, other]]
                    inputs_there[j, other] = max(inputs_there[j, other], there)
    return device, order
