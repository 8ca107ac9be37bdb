"""Instances of Tarnawski et al., "Efficient Algorithms for Device Placement of DNN Graph Operators" (NeurIPS 2020).

A JSON file lists nodes with a time on an accelerator (``fpgaLatency``) and on a CPU (``cpuLatency``), both in ms, a
``size`` in bytes and a ``colorClass`` whose members share a device; and edges with a ``cost`` in ms. Devices are
``maxFPGAs`` equal accelerators of ``maxSizePerFPGA`` bytes and ``maxCPUs`` CPUs without a limit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moirai_sim.errors import InputError
from moirai_sim.files import sha256
from moirai_sim.problem import UNLIMITED, UNSUPPORTED, PlacementProblem

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT = "dnn-partitioning"
"""``problem.provenance["format"]`` of these instances: it tells policies to apply the published cost rules."""
MOST_MS = 1e9
"""Longest time of an instance, eleven days: sums of thousands of them are still whole nanoseconds."""


@dataclass(frozen=True, eq=False)
class DnnPartitioningInstance:
    """A published instance with its own cost rules. Shapes use n operators and m edges.

    The published rules, for whoever evaluates by them: data leaves an accelerator through host memory, so a tensor
    costs ``producer_cost_ns`` once to get *out* of an accelerator if anything outside reads it, and once to get *into*
    every other accelerator that reads it; CPUs read host memory for free. Pieces (the operators of one device) are
    contiguous: no path leaves one and comes back. The load of an accelerator is its compute time plus what it sends
    plus what it receives; the throughput objective is the largest load.
    """

    name: str
    operators: tuple[str, ...]
    accelerator_ns: NDArray[np.int64]
    """[n] time on an accelerator; UNSUPPORTED where it cannot run there."""
    cpu_ns: NDArray[np.int64]
    """[n] time on a CPU."""
    weight_bytes: NDArray[np.int64]
    """[n]"""
    colocation: NDArray[np.int64]
    """[n] operators of equal class share a device; -1 for none."""
    edges: NDArray[np.int64]
    """[m, 2] (producer, consumer), sorted."""
    producer_cost_ns: NDArray[np.int64]
    """[n] cost of an operator's output each time it crosses; the largest of its edges where a file has several."""
    producer_bytes: NDArray[np.int64]
    """[n] size of an operator's output, likewise."""
    accelerators: int
    cpus: int
    accelerator_memory_bytes: int
    provenance: Mapping[str, object]

    def problem(self) -> PlacementProblem:
        """Return the instance as a placement problem, under the semantics that all policies share.

        Devices are ``acc0``, ... and ``cpu0``, ... A tensor has one producer and all its readers; it takes twice the
        published cost between accelerators (out, then in), once between an accelerator and a CPU, nothing between
        CPUs, and is sent once to each device that reads it. The network is ``one-port``.
        """
        a, c = self.accelerators, self.cpus
        is_cpu = np.arange(a + c) >= a
        route_class = np.where(is_cpu[:, None] & is_cpu, 2, np.where(is_cpu[:, None] | is_cpu, 1, 0)).astype(np.int64)
        np.fill_diagonal(route_class, -1)
        producers, tensor = np.unique(self.edges[:, 0], return_inverse=True)
        cost = self.producer_cost_ns[producers]
        return PlacementProblem(
            name=self.name,
            operators=self.operators,
            operator_ns=np.stack([self.accelerator_ns, self.cpu_ns], axis=1),
            weight_bytes=self.weight_bytes,
            devices=(*(f"acc{i}" for i in range(a)), *(f"cpu{i}" for i in range(c))),
            device_type=is_cpu.astype(np.int64),
            memory_bytes=np.where(is_cpu, UNLIMITED, self.accelerator_memory_bytes).astype(np.int64),
            edges=self.edges,
            edge_tensor=tensor.astype(np.int64).reshape(-1),
            tensor_bytes=self.producer_bytes[producers],
            route_class=route_class,
            transfer_ns=np.stack([2 * cost, cost, np.zeros_like(cost)], axis=1),
            network="one-port",
            colocation=self.colocation if (self.colocation >= 0).any() else None,
            provenance=dict(self.provenance),
        )


def read_dnn_partitioning(path: Path) -> DnnPartitioningInstance:
    """Read an instance; operators are called by ``name`` where names are unique, by ``name#id`` elsewhere.

    Raises
    ------
    InputError
        With every field that is missing or wrong.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}:{error.colno}: not JSON ({error.msg}); repair it here") from error
    except (OSError, ValueError, RecursionError) as error:  # a whole number of thousands of digits is a ValueError
        raise InputError(f"{path}: cannot read it ({error})") from error
    if not isinstance(document, dict) or not all(isinstance(document.get(key), list) for key in ("nodes", "edges")):
        raise InputError(f'{path}: not a dnn-partitioning instance; it needs lists "nodes" and "edges"')
    fields = _Fields(str(path))
    nodes, edges = document["nodes"], document["edges"]
    ids = [fields.whole(node, "id", f"nodes[{i}]") for i, node in enumerate(nodes)]
    index = {node: i for i, node in enumerate(ids)}
    if len(index) < len(ids):
        fields.problems.append(f"{path}: two nodes share an id; ids are unique")
    n = len(nodes)
    cost, size = np.zeros(n), np.zeros(n)
    pairs = set()
    for e, edge in enumerate(edges):
        place = f"edges[{e}]"
        i, j = (index.get(fields.whole(edge, key, place), -1) for key in ("sourceId", "destId"))
        if min(i, j) < 0:
            fields.problems.append(f"{path}: {place}: names a node that does not exist; give ids of nodes")
            continue
        pairs.add((i, j))
        cost[i] = max(cost[i], fields.number(edge, "cost", place, most=MOST_MS))
        size[i] = max(size[i], fields.number(edge, "size", place, default=0.0))
    times = {
        key: np.array([fields.number(node, key, f"nodes[{i}]", most=most) for i, node in enumerate(nodes)])
        for key, most in (("fpgaLatency", MOST_MS), ("cpuLatency", MOST_MS), ("size", 2.0**53))
    }
    limits = {key: fields.whole(document, key, "the document") for key in ("maxFPGAs", "maxCPUs")}
    memory = fields.number(document, "maxSizePerFPGA", "the document", most=1e18)
    names = [str(node.get("name", ids[i])) if isinstance(node, dict) else "" for i, node in enumerate(nodes)]
    fields.problems += [
        f"{path}: nodes[{i}]: colorClass: must be a number or a text, read {node['colorClass']!r}"
        for i, node in enumerate(nodes)
        if isinstance(node, dict) and isinstance(node.get("colorClass"), (list, dict))
    ]
    if not n:
        fields.problems.append(f"{path}: there is no node; list at least one")
    if any(isinstance(node, dict) and node.get("isBackwardNode") for node in nodes):  # contiguous apart, loads added
        fields.problems.append(f"{path}: a training graph (isBackwardNode), which has rules of its own; use inference")
    if sum(limits.values()) < 1 or max(limits.values()) > 10_000:
        fields.problems.append(f"{path}: maxFPGAs and maxCPUs must name between 1 and 10000 devices")
    if fields.problems:
        raise InputError(fields.problems)

    repeated = len(set(names)) < n
    colours: dict[object, int] = {}
    accelerated = np.array([bool(node.get("supportedOnFpga", True)) for node in nodes])
    return DnnPartitioningInstance(
        name=path.stem,
        operators=tuple(f"{name}#{ids[i]}" if repeated else name for i, name in enumerate(names)),
        accelerator_ns=np.where(accelerated, _ns(times["fpgaLatency"]), UNSUPPORTED),
        cpu_ns=_ns(times["cpuLatency"]),
        weight_bytes=np.rint(times["size"]).astype(np.int64),
        colocation=np.array(
            [
                -1 if node.get("colorClass") is None else colours.setdefault(node["colorClass"], len(colours))
                for node in nodes
            ],
            dtype=np.int64,
        ),
        edges=np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2),
        producer_cost_ns=_ns(cost),
        producer_bytes=np.rint(size).astype(np.int64),
        accelerators=limits["maxFPGAs"],
        cpus=limits["maxCPUs"],
        accelerator_memory_bytes=round(memory),
        provenance={"format": FORMAT, "file": path.name, "sha256": sha256(path)},
    )


def _ns(milliseconds: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.rint(milliseconds * 1e6).astype(np.int64)


class _Fields:
    """Reads typed fields of JSON objects and collects what is wrong with them."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.problems: list[str] = []

    def number(
        self,
        entry: Any,  # noqa: ANN401
        key: str,
        place: str,
        *,
        default: float | None = None,
        most: float = 2.0**53,
    ) -> float:
        value = entry.get(key, default) if isinstance(entry, dict) else None
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not 0 <= value <= most:  # type: ignore[operator]
            what = f"a number between 0 and {most:.3g}"
            self.problems.append(f'{self.path}: {place}: "{key}" must be {what}, read {str(value)[:40]}')
            return 0.0
        return float(value)  # type: ignore[arg-type]

    def whole(self, entry: Any, key: str, place: str) -> int:  # noqa: ANN401
        value = entry.get(key) if isinstance(entry, dict) else None
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            self.problems.append(f'{self.path}: {place}: "{key}" must be a whole number of at least 0, read {value!r}')
            return -1
        return value
