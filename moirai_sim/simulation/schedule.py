"""Schedule: when everything of a placement happens, as arrays; and its conversion to a `Timeline`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from moirai_sim.placement import Placement, transfer_edges
from moirai_sim.timeline import Span, Timeline

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from moirai_sim.problem import PlacementProblem


@dataclass(frozen=True, eq=False)
class Schedule:
    """Times of a placement's operators, [n], and transfers, [m] by edge, in ns.

    A transfer stands at the first edge that needs it (see `placement.transfer_edges`); other edges hold -1.
    """

    operator_ready_ns: NDArray[np.int64]
    """When the last input was there."""
    operator_start_ns: NDArray[np.int64]
    operator_end_ns: NDArray[np.int64]
    transfer_ready_ns: NDArray[np.int64]
    """When the producer ended."""
    transfer_start_ns: NDArray[np.int64]
    transfer_end_ns: NDArray[np.int64]

    @property
    def makespan_ns(self) -> int:
        """When the last operator ends; a transfer always ends before its consumer starts."""
        return int(self.operator_end_ns.max(initial=0))


def operator_ready_ns(
    problem: PlacementProblem,
    leader: NDArray[np.int64],
    operator_end_ns: NDArray[np.int64],
    transfer_end_ns: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Return when the last input of each operator is there, [n] ns, given when producers and transfers end.

    ``leader`` is `placement.transfer_edges`: the edge that stands for the transfer of each edge, -1 for none.
    """
    ready = np.zeros(problem.n_operators, dtype=np.int64)
    if len(problem.edges):
        arrival = np.where(leader >= 0, transfer_end_ns[leader], operator_end_ns[problem.edges[:, 0]])
        np.maximum.at(ready, problem.edges[:, 1], arrival)
    return ready


def timeline_from_schedule(
    problem: PlacementProblem, placement: Placement, schedule: Schedule, *, policy: str = ""
) -> Timeline:
    """Return the timeline of a schedule: spans by start, end, operators before transfers, and index.

    Bound, status and provenance are those of the placement; a transfer is called ``producer->consumer``, with ``+N``
    where N further operators on the target device share it.
    """
    device = placement.device
    leader = transfer_edges(problem, device)
    edges = np.flatnonzero(leader == np.arange(len(leader)))
    sharing: dict[int, list[int]] = {int(edge): [] for edge in edges}
    for edge in np.flatnonzero(leader >= 0).tolist():
        consumer = int(problem.edges[edge, 1])
        readers = sharing[int(leader[edge])]
        if consumer not in readers[-1:]:  # parallel edges of one tensor stand side by side
            readers.append(consumer)
    spans = _operator_spans(problem, device, schedule)
    spans += [_transfer_span(problem, device, schedule, edge, readers) for edge, readers in sharing.items()]
    n = problem.n_operators
    start = np.concatenate([schedule.operator_start_ns, schedule.transfer_start_ns[edges]])
    end = np.concatenate([schedule.operator_end_ns, schedule.transfer_end_ns[edges]])
    chronological = np.lexsort((np.arange(n + len(edges)), end, start))
    return Timeline(
        status=placement.status,
        policy=policy,
        network=problem.network,
        makespan_ns=schedule.makespan_ns,
        placement=_device_names(problem, device),
        spans=[spans[index] for index in chronological.tolist()],
        lower_bound_ns=placement.lower_bound_ns,
        provenance=placement.provenance,
    )


def placement_from_schedule(problem: PlacementProblem, placement: Placement, schedule: Schedule) -> Placement:
    """Return ``placement`` with the orders of ``schedule``, so that an ordered replay starts nothing later."""
    n = problem.n_operators
    topological = np.empty(n, dtype=np.int64)
    topological[problem.topological_order] = np.arange(n)
    edges = np.flatnonzero(schedule.transfer_start_ns >= 0)
    producer = problem.edges[edges, 0] if len(edges) else edges
    start = np.concatenate([schedule.operator_start_ns, schedule.transfer_start_ns[edges]])
    end = np.concatenate([schedule.operator_end_ns, schedule.transfer_end_ns[edges]])
    ready = np.concatenate([schedule.operator_ready_ns, schedule.transfer_ready_ns[edges]])
    depth = np.concatenate([topological, topological[producer]])
    is_transfer = np.arange(n + len(edges)) >= n
    # At one instant work without length goes first, by ready time; then a producer before its transfers and consumers.
    position = np.empty(n + len(edges), dtype=np.int64)
    position[np.lexsort((is_transfer, depth, ready, end, start))] = np.arange(n + len(edges))
    transfer_order = np.full(len(problem.edges), -1, dtype=np.int64)
    transfer_order[edges] = position[n:]
    return replace(placement, order=position[:n], transfer_order=transfer_order)


def _device_names(problem: PlacementProblem, device: NDArray[np.int64]) -> Mapping[str, str]:
    return {name: problem.devices[k] for name, k in zip(problem.operators, device.tolist(), strict=True)}


def _operator_spans(problem: PlacementProblem, device: NDArray[np.int64], schedule: Schedule) -> list[Span]:
    return [
        Span(
            kind="operator",
            name=name,
            resource=problem.devices[k],
            ready_ns=ready,
            start_ns=start,
            end_ns=end,
        )
        for name, k, ready, start, end in zip(
            problem.operators,
            device.tolist(),
            schedule.operator_ready_ns.tolist(),
            schedule.operator_start_ns.tolist(),
            schedule.operator_end_ns.tolist(),
            strict=True,
        )
    ]


def _transfer_span(
    problem: PlacementProblem, device: NDArray[np.int64], schedule: Schedule, edge: int, readers: list[int]
) -> Span:
    producer = int(problem.edges[edge, 0])
    consumers = tuple(problem.operators[j] for j in readers)
    source, target = problem.devices[device[producer]], problem.devices[device[readers[0]]]
    size = int(problem.tensor_bytes[problem.edge_tensor[edge]])
    further = f"+{len(consumers) - 1}" if len(consumers) > 1 else ""
    return Span(
        kind="transfer",
        name=f"{problem.operators[producer]}->{consumers[0]}{further}",
        resource=f"{source}->{target}",
        ready_ns=int(schedule.transfer_ready_ns[edge]),
        start_ns=int(schedule.transfer_start_ns[edge]),
        end_ns=int(schedule.transfer_end_ns[edge]),
        producer=problem.operators[producer],
        consumers=consumers,
        source=source,
        target=target,
        bytes=size if size >= 0 else None,
    )
