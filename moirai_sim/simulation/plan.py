"""Plan: a placement made ready to run. Who tells whom, which transfers there are, and who goes first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from moirai_sim.errors import InputError
from moirai_sim.placement import transfer_edges
from moirai_sim.problem import UNSUPPORTED
from moirai_sim.simulation.options import DEFAULT, SimulationOptions

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.placement import Placement
    from moirai_sim.problem import PlacementProblem


@dataclass(frozen=True, eq=False)
class Plan:
    """Operators and transfers of one placement as plain lists, which interpreted code reads fastest.

    Operators are numbered by priority: 0 goes first where several could start. Transfers are numbered in the order in
    which those that become ready at one instant are queued. ``operator`` and ``edge`` lead back to the problem.
    """

    problem: PlacementProblem
    placement: Placement
    operator: NDArray[np.int64]
    """[n] index of the operator in the problem."""
    edge: NDArray[np.int64]
    """[q] edge of the problem that stands for the transfer."""
    device: list[int]
    """[n] where the operator runs."""
    duration: list[int]
    """[n] ns."""
    inputs: list[int]
    """[n] how many edges must deliver before the operator is ready."""
    tells: list[list[int]]
    """[n] operators that read without a transfer (once an edge)."""
    sends: list[list[int]]
    """[n] transfers that start when the operator ends."""
    source: list[int]
    """[q] device that sends."""
    target: list[int]
    """[q] device that receives."""
    transfer: list[int]
    """[q] time alone on the network, ns."""
    readers: list[list[int]]
    """[q] operators that the transfer serves (once an edge)."""
    strict: bool = False
    """Devices and ports serve their work in the order of the numbers, and nothing overtakes."""
    entries: list[list[int]] = field(default_factory=list)
    """Operators without inputs, of each replica."""
    exits: list[int] = field(default_factory=list)
    """Number of operators without readers, of each replica: when all of them have ended, the request is done."""
    stride: int = 0
    """Numbers of transfers a request, at least q: launches of operators are numbered after the transfers."""


def make_plan(
    problem: PlacementProblem,
    placement: Placement,
    *,
    strict: bool = True,
    options: SimulationOptions = DEFAULT,
) -> Plan:
    """Return the plan of a placement; see ``docs/design.md``, "The meaning of a placement".

    Parameters
    ----------
    strict
        Whether the orders of the placement, if it has any, are binding; else they are priorities.
    options
        Launches of operators are part of the plan.

    Raises
    ------
    InputError
        If the placement cannot run.
    """
    wrong = _unsupported(problem, placement)
    if wrong:
        raise InputError(wrong)
    device = np.asarray(placement.device, dtype=np.int64)
    n, m = problem.n_operators, len(problem.edges)
    duration = problem.operator_ns[np.arange(n), problem.device_type[device]]
    producer, consumer = (problem.edges[:, 0], problem.edges[:, 1]) if m else (np.zeros(0, np.int64),) * 2
    leader = transfer_edges(problem, device)
    alone = np.zeros(m, dtype=np.int64)
    crossing = np.flatnonzero(leader >= 0)
    alone[crossing] = problem.transfer_ns[
        problem.edge_tensor[crossing], problem.route_class[device[producer[crossing]], device[consumer[crossing]]]
    ]
    edge = np.flatnonzero(leader == np.arange(m))
    part_ns = np.broadcast_to(np.asarray(options.part_ns, dtype=np.int64), problem.n_devices)
    if part_ns.any():
        alone = np.where(leader >= 0, np.maximum(alone - options.transfer_part_ns, 0), 0)
    if options.reader_share:
        read = np.rint(alone * options.reader_share).astype(np.int64)
        alone -= read
        duration = duration + np.bincount(consumer[edge], read[edge], minlength=n).astype(np.int64)
    if placement.order is None:
        rank = upward_rank(problem, duration, alone)
        operator = np.lexsort((np.arange(n), -rank))
        edge = edge[np.lexsort((edge, -rank[consumer[edge]]))]
    else:
        operator = np.argsort(placement.order, kind="stable")
        turn = placement.order[producer] if placement.transfer_order is None else placement.transfer_order
        edge = edge[np.lexsort((edge, turn[edge]))]
    if part_ns.any():
        duration = duration + part_ns[device] * part_heads(problem, device, operator)
    number = np.empty(n, dtype=np.int64)
    number[operator] = np.arange(n)
    transfer_number = np.full(m, -1, dtype=np.int64)
    transfer_number[edge] = np.arange(len(edge))
    direct = np.flatnonzero(leader < 0)
    tells = _lists(number[producer[direct]], number[consumer[direct]], n)
    inputs = np.bincount(number[consumer], minlength=n)
    entries = np.flatnonzero(inputs == 0).tolist()
    readers = _lists(transfer_number[leader[crossing]], number[consumer[crossing]], len(edge))
    if options.launch_ns and options.asynchronous_launch:
        inputs = inputs + 1  # the launch
        readers += [[i] for i in range(n)]
        entries = []
    elif options.launch_ns:
        duration = duration + options.launch_ns
    return Plan(
        problem=problem,
        placement=placement,
        operator=operator,
        edge=edge,
        device=device[operator].tolist(),
        duration=duration[operator].tolist(),
        inputs=inputs.tolist(),
        tells=tells,
        sends=_lists(number[producer[edge]], transfer_number[edge], n),
        source=device[producer[edge]].tolist(),
        target=device[consumer[edge]].tolist(),
        transfer=alone[edge].tolist(),
        readers=readers,
        strict=strict and placement.order is not None,
        entries=[entries],
        exits=[int((np.bincount(number[producer], minlength=n) == 0).sum())],
        stride=len(readers),
    )


def part_heads(problem: PlacementProblem, device: NDArray[np.int64], order: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which operators begin a part, [n]: what a device runs in one call of its backend.

    A part begins with an operator that needs a tensor of another device for which no earlier part waited, and after an
    operator that another device waits for. Operators that take no time (those inside of a fused kernel) begin none.

    Parameters
    ----------
    device
        [n] where each operator runs.
    order
        [n] all operators in the order in which they run.
    """
    n = problem.n_operators
    producer, consumer = (
        (problem.edges[:, 0], problem.edges[:, 1]) if len(problem.edges) else (np.zeros(0, np.int64),) * 2
    )
    crosses = device[producer] != device[consumer]
    sends = np.zeros(n, dtype=bool)
    sends[producer[crosses]] = True
    awaited: list[list[int]] = [[] for _ in range(n)]
    leader = transfer_edges(problem, device)
    for e in np.flatnonzero(crosses).tolist():
        awaited[int(consumer[e])].append(int(leader[e]))
    takes_time = (problem.operator_ns[np.arange(n), problem.device_type[device]] > 0).tolist()
    heads = np.zeros(n, dtype=bool)
    arrived: set[int] = set()
    fresh = [False] * problem.n_devices  # a part has begun, and nobody waits for what it has written so far
    waits = [False] * problem.n_devices
    for i in order.tolist():
        k = int(device[i])
        new = [e for e in awaited[i] if e not in arrived]
        arrived.update(new)
        waits[k] |= bool(new)
        if takes_time[i]:
            heads[i] = waits[k] or not fresh[k]
            fresh[k], waits[k] = True, False
        if sends[i]:
            fresh[k] = False
    return heads


def join_plans(plans: Sequence[Plan]) -> Plan:
    """Return one plan with a replica for each of ``plans``, all of one problem; a request runs in one of them."""
    if len(plans) == 1:
        return plans[0]
    launches = [len(plan.readers) > len(plan.edge) for plan in plans]
    operators = np.cumsum([0, *(len(plan.device) for plan in plans)]).tolist()
    transfers = np.cumsum([0, *(len(plan.edge) for plan in plans)]).tolist()

    def shifted(lists: Iterable[list[int]], by: int) -> list[list[int]]:
        return [[value + by for value in values] for values in lists]

    def joined(name: str) -> list[int]:
        return [value for plan in plans for value in getattr(plan, name)]

    both = list(zip(plans, operators, transfers, strict=False))
    readers = [r for plan, o, _ in both for r in shifted(plan.readers[: len(plan.edge)], o)]
    if any(launches):
        readers += [[i] for i in range(operators[-1])]
    return Plan(
        problem=plans[0].problem,
        placement=plans[0].placement,
        operator=np.concatenate([plan.operator for plan in plans]),
        edge=np.concatenate([plan.edge for plan in plans]),
        device=joined("device"),
        duration=joined("duration"),
        inputs=joined("inputs"),
        tells=[t for plan, o, _ in both for t in shifted(plan.tells, o)],
        sends=[t for plan, _, q in both for t in shifted(plan.sends, q)],
        source=joined("source"),
        target=joined("target"),
        transfer=joined("transfer"),
        readers=readers,
        entries=[e for plan, o, _ in both for e in shifted(plan.entries, o)],
        exits=joined("exits"),
        stride=len(readers),
    )


def upward_rank(problem: PlacementProblem, duration: NDArray[np.int64], alone: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the longest way from the start of each operator to the end, [n] ns, on a given placement.

    Parameters
    ----------
    duration
        [n] time of each operator where it is placed.
    alone
        [m] time of the transfer that each edge needs, 0 where it needs none.
    """
    indptr, out = (array.tolist() for array in problem.successors)
    consumer, way = problem.edges[:, 1].tolist() if len(problem.edges) else [], alone.tolist()
    rank = duration.tolist()
    for i in reversed(problem.topological_order.tolist()):
        longest = 0
        for e in out[indptr[i] : indptr[i + 1]]:
            through = way[e] + rank[consumer[e]]
            if through > longest:
                longest = through
        rank[i] += longest
    return np.asarray(rank, dtype=np.int64)


def _unsupported(problem: PlacementProblem, placement: Placement) -> list[str]:
    """Return one line for every reason why a placement cannot run at all."""
    device = np.asarray(placement.device)
    if device.shape != (problem.n_operators,):
        return [f"placement: has {device.size} devices for {problem.n_operators} operators; place every operator"]
    if problem.n_operators and (device.min() < 0 or device.max() >= problem.n_devices):
        return [f"placement: a device index is outside 0..{problem.n_devices - 1}"]
    bad = np.flatnonzero(problem.operator_ns[np.arange(len(device)), problem.device_type[device]] == UNSUPPORTED)
    return [
        f"placement of '{problem.operators[i]}': '{problem.devices[device[i]]}' cannot run it; choose another device"
        for i in bad[:20].tolist()
    ]


def _lists(keys: NDArray[np.int64], values: NDArray[np.int64], n: int) -> list[list[int]]:
    """Group values by key, [n] lists, each in the given order."""
    order = np.argsort(keys, kind="stable")
    bounds = np.zeros(n + 1, dtype=np.int64)
    np.cumsum(np.bincount(keys, minlength=n), out=bounds[1:])
    flat = values[order].tolist()
    return [flat[a:b] for a, b in pairwise(bounds.tolist())]
