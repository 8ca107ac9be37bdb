"""Memory over time, and energy: what every device holds while a timeline runs, its peak, and where it does not fit.

A device holds its weights from the start to the end; the output of an operator from the operator's start until its last
reader on the device, or its last transfer away, has ended; a tensor from another device from the start of its transfer
until its last reader has ended. What is freed at an instant is free for what starts at that instant. Tensors whose
bytes an instance does not tell count as 0.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moirai_sim.problem import UNLIMITED
from moirai_sim.units import format_bytes, format_ns

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moirai_sim.clusters.cluster import Cluster
    from moirai_sim.problem import PlacementProblem
    from moirai_sim.timeline import Span, Timeline


@dataclass(frozen=True)
class OutOfMemory:
    """The first moment at which a device would need more than it has."""

    device: str
    name: str
    """The operator or transfer whose start asks for too much; "weights" where they alone do not fit."""
    at_ns: int
    needed_bytes: int
    capacity_bytes: int

    def __str__(self) -> str:
        """Say it for people."""
        return (
            f"out of memory: '{self.name}' needs device '{self.device}' to hold {format_bytes(self.needed_bytes)} of "
            f"{format_bytes(self.capacity_bytes)} at {format_ns(self.at_ns)}"
        )


@dataclass(frozen=True)
class MemoryUse:
    """Answer of `memory_use`."""

    curve: dict[str, list[tuple[int, int]]]
    """Device to (ns, bytes held from then on), in ascending order of time."""
    peak_bytes: dict[str, int]
    out_of_memory: OutOfMemory | None
    """The earliest failure of any device; None where everything fits."""


def memory_use(problem: PlacementProblem, timeline: Timeline) -> MemoryUse:
    """Return what each device holds over the time of a timeline of ``problem``."""
    changes = _changes(problem, timeline)
    unit = 8 if problem.memory_unit == "bits" else 1
    curve: dict[str, list[tuple[int, int]]] = {}
    peak: dict[str, int] = {}
    failures: list[OutOfMemory] = []
    weights: dict[str, int] = defaultdict(int)
    for name, size in zip(problem.operators, problem.weight_bytes.tolist(), strict=True):
        weights[timeline.placement[name]] += size
    for device, capacity in zip(problem.devices, problem.memory_bytes.tolist(), strict=True):
        held = most = weights[device] // unit
        capacity = capacity if capacity == UNLIMITED else capacity // unit
        if capacity != UNLIMITED and held > capacity:
            failures.append(OutOfMemory(device, "weights", 0, held, capacity))
        points = [(0, held)]
        failed = held > capacity
        for when, _, size, name in sorted(changes[device]):
            held += size
            most = max(most, held)
            if points[-1][0] == when:
                points[-1] = (when, held)
            else:
                points.append((when, held))
            if held > capacity and not failed and capacity != UNLIMITED:
                failed = True
                failures.append(OutOfMemory(device, name, when, held, capacity))
        curve[device], peak[device] = points, most
    first = min(failures, key=lambda failure: failure.at_ns, default=None)
    return MemoryUse(curve, peak, first)


def _changes(problem: PlacementProblem, timeline: Timeline) -> dict[str, list[tuple[int, int, int, str]]]:
    """Return (time, turn, bytes, name) by device; at one time turn 0 frees, 1 takes, 2 frees what was taken then."""
    runs = {span.name: span for span in timeline.spans if span.kind == "operator"}
    moves: dict[tuple[str, str], list[Span]] = defaultdict(list)
    for span in timeline.spans:
        if span.kind == "transfer":
            for consumer in span.consumers:
                moves[span.producer, consumer].append(span)
    readers: dict[int, list[int]] = defaultdict(list)
    producer = np.full(len(problem.tensor_bytes), -1, dtype=np.int64)
    for (i, j), tensor in zip(problem.edges.tolist(), problem.edge_tensor.tolist(), strict=True):
        if tensor >= 0:
            readers[tensor].append(j)
            producer[tensor] = i
    changes: dict[str, list[tuple[int, int, int, str]]] = defaultdict(list)

    def hold(device: str, begin: int, end: int, size: int, name: str) -> None:
        changes[device].append((begin, 1, size, name))
        changes[device].append((end, 2 if end == begin else 0, -size, name))

    taken: set[int] = set()
    for tensor in sorted(readers):
        size = int(problem.tensor_bytes[tensor])
        i = problem.operators[int(producer[tensor])]
        if size <= 0 or i not in runs or any(problem.operators[j] not in runs for j in readers[tensor]):
            continue  # of a measured part of several operators, only the last is known by name
        end = runs[i].end_ns
        home = timeline.placement[i]
        away: dict[str, tuple[Span, int]] = {}
        for j in readers[tensor]:
            name = problem.operators[j]
            device = timeline.placement[name]
            read = runs[name].end_ns
            if device == home:
                end = max(end, read)
                continue
            if device in away:  # the same transfer, read once more
                away[device] = (away[device][0], max(read, away[device][1]))
                continue
            fitting = [
                move
                for move in moves[i, name]
                if move.target == device and move.bytes in (None, size) and id(move) not in taken
            ]
            if fitting:
                away[device] = (fitting[0], read)
                taken.add(id(fitting[0]))
        for device, (move, read) in away.items():
            hold(device, move.start_ns, read, size, move.name)
            end = max(end, move.end_ns)
        hold(home, runs[i].start_ns, end, size, i)
    return changes


def energy_joules(cluster: Cluster | None, busy_ns: Mapping[str, int], length_ns: int) -> dict[str, float | None]:
    """Return the energy of each device, J; None where its type tells no idle and peak power.

    A device draws its idle power all the time and the difference to its peak power while it computes: an upper bound
    for operators that do not keep the whole device busy.

    Parameters
    ----------
    cluster
        With the data sheets of the devices; None, as for a published instance, tells nothing.
    busy_ns
        How long each device computes.
    length_ns
        How long they are powered.
    """
    energy: dict[str, float | None] = {}
    for name, busy in busy_ns.items():
        sheet = None if cluster is None else cluster.device[name].type
        if sheet is None or sheet.idle_watts is None or sheet.peak_watts is None:
            energy[name] = None
        else:
            energy[name] = (sheet.idle_watts * length_ns + (sheet.peak_watts - sheet.idle_watts) * busy) / 1e9
    return energy
