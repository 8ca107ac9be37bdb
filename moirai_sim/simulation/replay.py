"""Compiled replay: every time of a placement, equal to the SimPy engine to the nanosecond.

The rules are those of ``docs/design.md``, "The meaning of a placement", for the networks ``none``, ``one-port`` and
``half-duplex``. Placements without order run by `list_scheduling`; with orders, starts are longest paths.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moirai_sim.compiled import kernel
from moirai_sim.errors import InputError
from moirai_sim.placement import transfer_edges
from moirai_sim.simulation.list_scheduling import NEVER, arrays_of, greedy, makespan, own, workspace_for
from moirai_sim.simulation.schedule import Schedule, operator_ready_ns, placement_from_schedule

if TYPE_CHECKING:
    from typing import TypeAlias

    from numpy.typing import NDArray

    from moirai_sim.placement import Placement
    from moirai_sim.problem import PlacementProblem

    Ints: TypeAlias = NDArray[np.int64]


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
    device = own(placement.device)
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
            makespan(arrays, work, device, NEVER)
        else:
            greedy(arrays, work, device, turn)
        start = work.operators["start"].copy()
        transfer_start = np.empty_like(leader)
        transfer_start[arrays.edges["index"]] = work.transfers["start"]
        transfer_start[leader != np.arange(len(leader))] = -1
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
