"""PlacementProblem: the hub. What runs (integer costs), where it can run, and what it costs to move a tensor.

Every policy, the simulator, the replay and ``verify`` read this one object. It is made by ``moirai_sim.sources`` from a
model, a cluster and cost models, or by ``moirai_sim.instances`` from a published instance.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from moirai_sim.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.clusters.cluster import Cluster
    from moirai_sim.evidence import Evidence

Network = Literal["none", "one-port", "half-duplex", "fair"]
"""How transfers contend; see ``docs/design.md``, "The meaning of a placement"."""

NETWORKS: tuple[str, ...] = get_args(Network)
UNSUPPORTED = -1
"""Entry of ``operator_ns`` for an operator that a device type cannot run."""
UNLIMITED = np.iinfo(np.int64).max
"""Entry of ``memory_bytes`` for a device without a memory limit."""


@dataclass(frozen=True, eq=False)
class PlacementProblem:
    """Operators with costs, devices, and the tensors between operators.

    Shapes use n operators, t device types, k devices, m edges, q tensors, c route classes. Arrays are read-only.

    A *tensor* has one producer and any number of consumers; it is sent at most once to each device that consumes it.
    Published instances that charge every edge give every edge a tensor of its own, so one rule serves both.
    A *route class* is a set of ordered device pairs between which every tensor takes the same time.
    """

    name: str
    operators: tuple[str, ...]
    """[n] unique names."""
    operator_ns: NDArray[np.int64]
    """[n, t] duration of an operator on a device type, ns; UNSUPPORTED where it cannot run."""
    weight_bytes: NDArray[np.int64]
    """[n] bytes (see `memory_unit`) an operator occupies on its device for as long as the placement lasts."""
    devices: tuple[str, ...]
    """[k] unique names."""
    device_type: NDArray[np.int64]
    """[k] column of ``operator_ns``."""
    memory_bytes: NDArray[np.int64]
    """[k] capacity for weights, in the same unit; UNLIMITED where there is none."""
    edges: NDArray[np.int64]
    """[m, 2] (producer, consumer), sorted by producer, consumer, tensor."""
    edge_tensor: NDArray[np.int64]
    """[m] the tensor an edge carries; -1 for an edge that only orders."""
    tensor_bytes: NDArray[np.int64]
    """[q] size of a tensor; -1 where an instance gives times only."""
    route_class: NDArray[np.int64]
    """[k, k] class of the ordered pair (source, target); -1 on the diagonal."""
    transfer_ns: NDArray[np.int64]
    """[q, c] duration of a tensor over a route of that class, alone on the network, ns."""
    network: Network = "one-port"
    evidence: Evidence | None = None
    """How sure ``operator_ns`` is; None where the times are exact by definition."""
    colocation: NDArray[np.int64] | None = None
    """[n] operators of equal group share a device; -1 for no group. None where there are no groups."""
    cluster: Cluster | None = None
    """The links behind ``route_class``: what the network model ``fair`` needs. None for published instances."""
    provenance: dict[str, object] = field(default_factory=dict)
    """Where the numbers come from: files, hashes, models, scales applied."""

    def __post_init__(self) -> None:
        """Check shapes and ranges, and freeze the arrays.

        Raises
        ------
        InputError
            With every inconsistency found.
        """
        n, m, k = len(self.operators), len(self.edges), len(self.devices)
        problems = []
        shapes = {
            "operator_ns": (self.operator_ns.ndim == 2 and len(self.operator_ns) == n),
            "evidence": self.evidence is None or self.evidence.low_ns.shape == self.operator_ns.shape,
            "weight_bytes": self.weight_bytes.shape == (n,),
            "device_type": self.device_type.shape == (k,),
            "memory_bytes": self.memory_bytes.shape == (k,),
            "edges": m == 0 or self.edges.shape == (m, 2),
            "edge_tensor": self.edge_tensor.shape == (m,),
            "route_class": self.route_class.shape == (k, k),
            "transfer_ns": self.transfer_ns.ndim == 2 and len(self.transfer_ns) == len(self.tensor_bytes),
            "colocation": self.colocation is None or self.colocation.shape == (n,),
        }
        problems += [f"{self.name}: {what} has the wrong shape" for what, good in shapes.items() if not good]
        if self.network not in NETWORKS:
            problems.append(f"{self.name}: unknown network '{self.network}'; {did_you_mean(self.network, NETWORKS)}")
        for what, names in (("operator", self.operators), ("device", self.devices)):
            if len(set(names)) != len(names):
                problems.append(f"{self.name}: two {what}s share a name; give every {what} its own")
        if not k:
            problems.append(f"{self.name}: there is no device; name at least one")
        if problems:
            raise InputError(problems)
        if n and (self.operator_ns.max(axis=1) < 0).any():
            stuck = [self.operators[i] for i in np.flatnonzero(self.operator_ns.max(axis=1) < 0)]
            problems.append(f"{self.name}: no device type can run {', '.join(stuck[:5])}")
        if m and (self.edges.min() < 0 or self.edges.max() >= n):
            problems.append(f"{self.name}: an edge names an operator that does not exist")
        if problems:
            raise InputError(problems)
        for array in (
            self.operator_ns, self.weight_bytes, self.device_type, self.memory_bytes, self.edges, self.edge_tensor,
            self.tensor_bytes, self.route_class, self.transfer_ns,
        ):  # fmt: skip
            array.setflags(write=False)
        if len(self.topological_order) != n:
            raise InputError(f"{self.name}: the operators form a cycle; a network must be acyclic")

    @property
    def n_operators(self) -> int:
        """Number of operators, n."""
        return len(self.operators)

    @property
    def n_devices(self) -> int:
        """Number of devices, k."""
        return len(self.devices)

    @property
    def memory_unit(self) -> str:
        """Unit of ``weight_bytes`` and ``memory_bytes``: "bytes", or "bits" as in the table of a Moirai instance."""
        return str(self.provenance.get("memory_unit", "bytes"))

    @cached_property
    def device_ns(self) -> NDArray[np.int64]:
        """[n, k] duration of an operator on a device. Large: for many devices index ``operator_ns`` instead."""
        return np.asarray(self.operator_ns[:, self.device_type])

    @cached_property
    def successors(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """CSR (indptr [n+1], edge ids [m]): the edges out of each operator, in edge order."""
        return _csr(self.edges[:, 0], self.n_operators)

    @cached_property
    def predecessors(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """CSR (indptr [n+1], edge ids [m]): the edges into each operator, in edge order."""
        return _csr(self.edges[:, 1], self.n_operators)

    @property
    def topological_order(self) -> NDArray[np.int64]:
        """[n] operators, each after all its producers; level by level, smaller index first (Kahn).

        Shorter than n only where the edges form a cycle, which the constructor refuses.
        """
        return self._levels[0]

    @property
    def width(self) -> int:
        """Operators in the largest level of `topological_order`: about so many can be ready at once."""
        return self._levels[1]

    @cached_property
    def _levels(self) -> tuple[NDArray[np.int64], int]:
        n = self.n_operators
        indptr, out = self.successors
        targets = self.edges[out, 1]
        waiting = np.bincount(self.edges[:, 1], minlength=n) if len(self.edges) else np.zeros(n, dtype=np.int64)
        level = np.flatnonzero(waiting == 0)
        order = []
        while len(level):
            order.append(level)
            reached = np.concatenate([targets[indptr[i] : indptr[i + 1]] for i in level])
            np.subtract.at(waiting, reached, 1)
            level = np.unique(reached[waiting[reached] == 0])
        found = np.concatenate(order).astype(np.int64) if order else np.zeros(0, dtype=np.int64)
        return found, max(map(len, order), default=0)

    def transfer_time_ns(self, tensor: int, source: int, target: int) -> int:
        """Return the time of one tensor between two devices with nothing else on the network, ns."""
        return 0 if source == target else int(self.transfer_ns[tensor, self.route_class[source, target]])

    @property
    def facts(self) -> dict[str, object]:
        """What a result says of the problem that it answers: where it comes from."""
        return {"problem": {"name": self.name, **self.provenance}}

    def with_operator_ns(self, operator_ns: NDArray[np.int64]) -> PlacementProblem:
        """Return the same problem with other times, each as sure as the one before, relative to itself."""
        sure = None if self.evidence is None else self.evidence.scaled(self.operator_ns, operator_ns)
        return replace(self, operator_ns=operator_ns, evidence=sure)

    def with_network(self, network: Network) -> PlacementProblem:
        """Return the same problem under another network model."""
        return replace(self, network=network)

    def without_memory(self) -> PlacementProblem:
        """Return the same problem with unlimited memory."""
        return replace(self, memory_bytes=np.full(self.n_devices, UNLIMITED, dtype=np.int64))

    def with_memory_scale(self, factor: float) -> PlacementProblem:
        """Return the same problem where every device holds ``factor`` times the total weight bytes of the model."""
        exact = Fraction(str(factor)) * int(self.weight_bytes.sum())  # as it is written: 0.29 of 100 is 29
        capacity = min(int(exact), UNLIMITED // 2)
        return replace(
            self,
            memory_bytes=np.full(self.n_devices, capacity, dtype=np.int64),
            provenance=self.provenance | {"memory_scale": factor},
        )


def _csr(keys: NDArray[np.int64], n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    indptr = np.zeros(n + 1, dtype=np.int64)
    np.cumsum(np.bincount(keys, minlength=n), out=indptr[1:])
    return indptr, np.argsort(keys, kind="stable").astype(np.int64)
