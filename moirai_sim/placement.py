"""Placement: what every policy answers. Which device runs each operator, and in which order."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from moirai_sim.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from moirai_sim.problem import PlacementProblem
    from moirai_sim.timeline import Timeline

Status = Literal["optimal", "feasible", "infeasible", "limit", "error", "measured"]
"""``optimal`` is proven; ``limit`` stopped without an answer; ``measured`` is a timeline that really ran."""
UNANSWERED: tuple[Status, ...] = ("infeasible", "limit", "error")
"""Statuses of an answer that places nothing."""
_SHOWN = 8
"""Names that an error lists."""


@dataclass(frozen=True, eq=False)
class Placement:
    """Devices of the operators, and optionally the order in which each resource serves its work.

    Without orders the placement runs greedily: a free device takes its ready operator of the highest upward rank, and
    ports serve transfers in the order in which they become ready. With orders every device and port serves its work
    strictly in that order, which is what reproduces an exact solution to the nanosecond.

    A stream of requests may be served by a cycle of placements that take turns: this one and its ``replicas``.
    """

    device: NDArray[np.int64]
    """[n] index into ``problem.devices``."""
    order: NDArray[np.int64] | None = None
    """[n] position of each operator in one global order; every device runs its operators by increasing position."""
    transfer_order: NDArray[np.int64] | None = None
    """[m] position of the transfer that an edge stands for, on the same scale as ``order``; -1 where the edge causes no
    transfer or shares the transfer of an earlier edge."""
    status: Status = "feasible"
    lower_bound_ns: int = 0
    """A proven lower bound of the objective over all placements; 0 where nothing was proven."""
    provenance: dict[str, object] = field(default_factory=dict)
    """How the answer was found: solver, iterations, sizes, anything needed to make it again."""
    replicas: tuple[Placement, ...] = ()
    """The further placements of a cycle of R: request j of a stream runs by number j mod R, this one being number 0.
    They are plain, and may repeat each other. A device holds the weights of whatever any of them puts there."""

    @property
    def cycle(self) -> tuple[Placement, ...]:
        """Every placement that takes turns, this one first."""
        return (replace(self, replicas=()), *self.replicas) if self.replicas else (self,)

    @property
    def devices(self) -> NDArray[np.int64]:
        """[R, n] the devices of every placement of the cycle."""
        return np.stack([self.device, *(replica.device for replica in self.replicas)])


def transfer_edges(problem: PlacementProblem, device: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the edge that stands for each transfer of a placement, [m]; -1 where an edge needs none.

    An edge whose two operators sit on different devices needs a transfer of its tensor. The first such edge (in edge
    order) of a tensor and a target device stands for it; later ones share it.
    """
    producer, consumer = problem.edges[:, 0], problem.edges[:, 1]
    target = device[consumer]
    crossing = np.flatnonzero((problem.edge_tensor >= 0) & (device[producer] != target))
    key = problem.edge_tensor[crossing] * problem.n_devices + target[crossing]
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    leader = np.full(len(problem.edges), -1, dtype=np.int64)
    leader[crossing] = crossing[first][inverse]
    return leader


def _some(names: Sequence[str]) -> str:
    """Return the first names of a list, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(f"'{name}'" for name in names[:_SHOWN]) + more


def placement_from_timeline(problem: PlacementProblem, timeline: Timeline) -> Placement:
    """Read devices and orders back from a timeline, replicas too, so that the simulator can run the same again.

    Raises
    ------
    InputError
        If the timeline misses operators or names operators or devices that the problem does not have.
    """
    if timeline.replicas:
        first, *others = (placement_from_timeline(problem, replace(one, replicas=())) for one in timeline.cycle)
        return replace(first, replicas=tuple(others))
    operator_index = {name: i for i, name in enumerate(problem.operators)}
    device_index = {name: i for i, name in enumerate(problem.devices)}
    device = np.full(problem.n_operators, -1, dtype=np.int64)
    strangers: list[str] = []
    elsewhere: dict[str, list[str]] = {}
    for name, where in timeline.placement.items():
        if name not in operator_index:
            strangers.append(name)
        elif where not in device_index:
            elsewhere.setdefault(where, []).append(name)
        else:
            device[operator_index[name]] = device_index[where]
    problems = []
    if strangers:
        problems.append(f"placement: unknown operator {_some(strangers)}; the model has no operator of this name")
    problems += [
        f"placement of {_some(names)}: unknown device '{where}'; {did_you_mean(where, problem.devices[:16])}"
        for where, names in elsewhere.items()
    ]
    missing = [problem.operators[i] for i in np.flatnonzero(device < 0)]
    if missing and not problems:
        problems.append(f"placement: no device for {_some(missing)}; place every operator")
    if problems:
        raise InputError(problems)

    topological = np.empty(problem.n_operators, dtype=np.int64)
    topological[problem.topological_order] = np.arange(problem.n_operators)
    leader = transfer_edges(problem, device)
    readers: dict[int, set[int]] = {}
    for e in np.flatnonzero(leader >= 0).tolist():
        readers.setdefault(int(leader[e]), set()).add(int(problem.edges[e, 1]))
    # Several tensors may go the same way: their transfers are handed out in the order of the spans.
    waiting: dict[tuple[int, frozenset[int]], list[int]] = {}
    for edge, consumers in readers.items():
        waiting.setdefault((int(problem.edges[edge, 0]), frozenset(consumers)), []).append(edge)
    events: list[tuple[int, int, int, int, int]] = []  # start, end, topological position, is transfer, index
    seen = np.zeros(problem.n_operators, dtype=bool)
    for span in timeline.spans:
        if span.kind == "operator" and not span.operators and span.name in operator_index:
            i = operator_index[span.name]
            seen[i] = True
            events.append((span.start_ns, span.end_ns, int(topological[i]), 0, i))
        elif span.kind == "transfer" and span.producer in operator_index and span.consumers:
            i = operator_index[span.producer]
            same_way = waiting.get((i, frozenset(operator_index.get(name, -1) for name in span.consumers)), [])
            if same_way:
                fitting = [e for e in same_way if problem.tensor_bytes[problem.edge_tensor[e]] == span.bytes]
                edge = (fitting or same_way)[0]
                same_way.remove(edge)
                events.append((span.start_ns, span.end_ns, int(topological[i]), 1, edge))
    transfers = int((leader == np.arange(len(leader))).sum())
    whole = bool(seen.all()) and len({e[4] for e in events if e[3]}) == transfers
    if not whole:  # a bare placement, or a measured timeline whose spans cover several operators
        return Placement(device=device, provenance={"policy": timeline.policy})
    order = np.full(problem.n_operators, -1, dtype=np.int64)
    transfer_order = np.full(len(problem.edges), -1, dtype=np.int64)
    for position, (_, _, _, is_transfer, index) in enumerate(sorted(events)):
        (transfer_order if is_transfer else order)[index] = position
    return Placement(device=device, order=order, transfer_order=transfer_order, provenance={"policy": timeline.policy})
