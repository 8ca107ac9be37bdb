"""What the user names -> PlacementProblem: a model priced on a cluster, or a published instance as it is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moirai_sim.catalog import find
from moirai_sim.clusters.routes import route, route_classes
from moirai_sim.errors import InputError, did_you_mean
from moirai_sim.evidence import Evidence
from moirai_sim.files import sha256
from moirai_sim.problem import NETWORKS, UNSUPPORTED, Network, PlacementProblem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from moirai_sim.clusters.cluster import Cluster, Device, DeviceType
    from moirai_sim.costs.links import LinkModel
    from moirai_sim.graphs.operator import Operator, OperatorGraph
    from moirai_sim.instances.pipedream import PipedreamGraph

ROOFLINE = "roofline"
"""The cost model of devices that name none."""
NO_FUSION = "none"
"""Value of ``fuse`` that prices every operator as a kernel of its own."""
WITH_DEVICES = ("moirai", "dnn-partitioning")
"""Kinds of published instances that bring their own devices and costs."""


def load_problem(
    source: str | Path,
    cluster: Cluster | None = None,
    *,
    network: str | None = None,
    memory: bool = True,
    memory_scale: float | None = None,
    fuse: str | None = None,
) -> PlacementProblem:
    """Return the problem that a source stands for.

    Parameters
    ----------
    source
        An ``.onnx`` file, ``zoo:NAME``, or a published instance (Moirai's table, dnn-partitioning's JSON, PipeDream's
        ``graph.txt``), recognised by its content.
    cluster
        Where it runs. Needed for models and PipeDream graphs; Moirai's and dnn-partitioning's bring their devices.
    network
        How transfers contend; None takes ``fair`` for clusters and ``one-port`` for instances.
    memory
        False lifts all memory limits.
    memory_scale
        Gives every device this multiple of the model's total weight bytes.
    fuse
        As in `build_problem`.

    Raises
    ------
    InputError
        If the source cannot be read, or does not go together with the other arguments.
    """
    if not memory and memory_scale is not None:
        raise InputError("memory cannot be both scaled and lifted; give one of the two")
    if memory_scale is not None and not 0 < memory_scale < float("inf"):
        raise InputError(f"memory scale {memory_scale}: must be above 0, e.g. 0.4")
    kind = recognise(source)
    check_fusion(source, kind, fuse)
    if kind in WITH_DEVICES:
        if cluster is not None:
            raise InputError(f"{source}: brings its own devices and costs; leave out the cluster")
        problem = _instance(Path(source), kind)
    elif cluster is None:
        raise InputError(f"{source}: needs devices to run on; name a cluster, see 'moirai-sim catalog topologies'")
    elif kind == "pipedream":
        from moirai_sim.instances.pipedream import read_pipedream

        problem = _pipedream_problem(read_pipedream(Path(source)), cluster)
    else:
        from moirai_sim.graphs.load import load_graph

        problem = build_problem(load_graph(str(source)), cluster, fuse=fuse)
    if network is not None:
        problem = problem.with_network(_network(network, problem))
    if not memory:
        unlimited = problem.without_memory()
        problem = replace(unlimited, provenance=unlimited.provenance | {"memory": "unlimited"})
    return problem if memory_scale is None else problem.with_memory_scale(memory_scale)


def recognise(source: str | Path) -> str:
    """Return what a source is: "model", "moirai", "dnn-partitioning" or "pipedream", told by its content.

    Raises
    ------
    InputError
        If a file that must exist does not.
    """
    from moirai_sim.instances.pipedream import FIRST_LINE

    path = Path(source)
    if str(source).startswith("zoo:") or (not path.exists() and "?" in str(source)):
        return "model"
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise InputError(
            f"{source}: cannot read it ({error.strerror}); give an .onnx file, a published instance or zoo:NAME"
        ) from error
    if head.startswith((b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", b"PK\x03\x04")):
        return "moirai"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        return "dnn-partitioning"
    if any(FIRST_LINE.match(line) for line in head.decode("utf-8", errors="replace").splitlines()):
        return "pipedream"
    return "model"


def check_fusion(source: str | Path, kind: str, fuse: str | None) -> None:
    """Refuse a backend for a source that `recognise` calls a published instance: nothing of it is fused.

    Raises
    ------
    InputError
        If a backend is named.
    """
    if kind != "model" and fuse is not None:
        raise InputError(f"{source}: brings the costs of its operators, and nothing of it is fused; leave out --fuse")


def brings_devices(source: str | Path) -> bool:
    """Tell whether a source is a published instance with devices of its own; what cannot be read is not."""
    try:
        return recognise(source) in WITH_DEVICES
    except InputError:
        return False


def build_problem(
    graph: OperatorGraph, cluster: Cluster, *, network: str = "fair", fuse: str | None = None
) -> PlacementProblem:
    """Price a model on a cluster.

    Operators stay the user's own. Where the backend fuses several into one kernel, its whole cost stands at the last
    of them (which waits for all inputs of the kernel), the others cost nothing, and co-location ties them together.

    Parameters
    ----------
    graph
        What runs.
    cluster
        Where. Devices with a ``cost_model`` are priced by it, others by the roofline of their data sheet; transfers
        by the cluster's ``link_model`` or the figures of its links.
    network
        How transfers contend.
    fuse
        The backend whose fusions apply; None takes ONNX Runtime where any device has it, since the others then run what
        it made of the model, else that of the devices (none where they differ); "none" fuses nothing.

    Raises
    ------
    InputError
        If the graph is empty, or a cost model cannot be found.
    """
    operators = list(graph)
    if not operators:
        raise InputError(f"{graph.name}: the model has no operators that cost anything; there is nothing to place")
    index = {operator.name: i for i, operator in enumerate(operators)}
    backend = fuse or _common_backend(cluster)
    kernels = _kernels(graph, backend)
    last = np.array([max(index[name] for name in members) for _, members in kernels], dtype=np.int64)
    colocation = np.full(len(operators), -1, dtype=np.int64)
    groups = [members for _, members in kernels if len(members) > 1]
    for group, members in enumerate(groups):
        colocation[[index[name] for name in members]] = group

    columns = _Columns.of(cluster)
    prices = [_price(kind, [kernel for kernel, _ in kernels], model) for kind, model in columns.kinds]
    tables = []
    for part in range(3):
        table = np.zeros((len(operators), len(prices)), dtype=np.int64)
        table[last] = np.stack([price.ns[part] for price in prices], axis=1)
        for column, price in enumerate(prices):  # the members of an unsupported kernel are unsupported with it
            for kernel in np.flatnonzero(price.ns[0] == UNSUPPORTED):
                table[[index[name] for name in kernels[kernel][1]], column] = UNSUPPORTED
        tables.append(table)
    source = np.zeros(tables[0].shape, dtype=np.uint8)
    source[last] = np.stack([price.source for price in prices], axis=1)

    edges, sizes = _edges(graph, index)
    devices = cluster.devices
    route_class, transfer_ns, link_source = transfer_table(cluster, sizes)
    return PlacementProblem(
        name=graph.name,
        operators=tuple(index),
        operator_ns=tables[0],
        weight_bytes=np.array([operator.weight_bytes for operator in operators], dtype=np.int64),
        devices=tuple(device.name for device in devices),
        device_type=columns.of_device,
        memory_bytes=_memory(cluster),
        edges=np.ascontiguousarray(edges[:, :2]),
        edge_tensor=np.ascontiguousarray(edges[:, 2]),
        tensor_bytes=sizes,
        route_class=route_class,
        transfer_ns=transfer_ns,
        network=_network(network, None),
        evidence=Evidence(tables[1], tables[2], source),
        colocation=colocation if groups else None,
        cluster=cluster,
        provenance={
            "model": dict(graph.source),
            "cluster": dict(cluster.provenance),
            "cost_models": {model or ROOFLINE: _card_hash(model) for _, model in columns.kinds},
            "links": link_source,
            "fusion": backend,
        },
    )


def transfer_table(cluster: Cluster, sizes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], str]:
    """Return route classes [k, k], transfer times [q, classes] in ns, and where the times come from.

    ``sizes`` [q] are the bytes of the tensors. Times are of a tensor alone on the network. The cluster's link model
    gives those between devices that it was measured on, and of copies between CPU and GPU; the links' figures the rest,
    which the last value names.

    Raises
    ------
    InputError
        If the link model knows no transfer between any devices of the cluster.
    """
    route_class, classes, examples = route_classes(cluster)
    columns: list[NDArray[np.int64]] = []
    unknown: list[str] = []
    if cluster.link_model is None:
        columns = [ns - np.floor_divide(-sizes * 1e9, rate).astype(np.int64) for ns, rate in classes]
        source = "data sheet"
    else:
        from moirai_sim.costs.links import load_link_model

        model = load_link_model(find("cost-models", cluster.link_model))
        if model.by_device:
            route_class, examples = _by_kind(cluster, route_class)
        for a, b in examples:
            one, other = cluster.devices[a], cluster.devices[b]
            way = route(cluster, one.name, other.name)
            known = _measured_as(model, one, other)
            if known is None:
                across = " of another server" if one.server != other.server else ""
                unknown.append(f"{one.type.name} to {other.type.name}{across}")
                columns.append(np.array([way.transfer_ns(int(size)) for size in sizes], dtype=np.int64))
            else:
                columns.append(model.transfer_ns(sizes, way, **known))
        if unknown and len(unknown) == len(columns):
            raise InputError(
                f"cluster '{cluster.name}': link model '{model.name}' knows no transfer between its devices "
                f"({', '.join(sorted(set(unknown)))}); it has {model.contents()}; "
                "leave out link_model, or name one that does"
            )
        source = cluster.link_model + (f"; data sheet: {', '.join(sorted(set(unknown)))}" if unknown else "")
    table = np.stack(columns, axis=1) if columns else np.zeros((len(sizes), 0), dtype=np.int64)
    return route_class, table, source


def _measured_as(model: LinkModel, one: Device, other: Device) -> dict[str, Any] | None:
    """Return what `LinkModel.transfer_ns` takes for transfers between two devices; None where none was measured."""
    from moirai_sim.costs.links import COPIES

    nodes = 1 if one.server == other.server else 2
    kinds = one.type.kind, other.type.kind
    if kinds in COPIES and nodes == 1:
        copy, gpu = COPIES[kinds], (one if kinds[0] == "gpu" else other).type.name
        if model.serves(gpu, copy):
            return {"collective": copy, "device": gpu}
    kind = one.type.name if one.type.name == other.type.name else ""
    if model.serves(kind, nodes=nodes):
        return {"device": kind, "nodes": nodes}
    return {} if model.serves("") else None  # without device types: measured over the very links of its cluster


def _by_kind(cluster: Cluster, route_class: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[tuple[int, int]]]:
    """Split route classes [k, k] by the types of both ends and whether a server holds both; return a pair of each."""
    devices = cluster.devices
    types = np.unique([device.type.name for device in devices], return_inverse=True)[1]
    servers = np.unique([device.server for device in devices], return_inverse=True)[1]
    split = (route_class * (types.max() + 1) + types[:, None]) * (types.max() + 1) + types
    split = np.where(route_class < 0, -1, 2 * split + (servers[:, None] == servers))
    found, first, inverse = np.unique(split, return_index=True, return_inverse=True)
    skip = int(found[0] < 0)
    pairs = [divmod(int(at), len(devices)) for at in first[skip:]]
    return inverse.reshape(split.shape).astype(np.int64) - skip, pairs


@dataclass(frozen=True)
class _Columns:
    """Which devices are priced alike: those of one device type, cost model, backend and number of threads."""

    kinds: list[tuple[DeviceType, str | None]]
    of_device: NDArray[np.int64]

    @classmethod
    def of(cls, cluster: Cluster) -> _Columns:
        position: dict[tuple[object, ...], int] = {}
        kinds: list[tuple[DeviceType, str | None]] = []
        column = []
        for device in cluster.devices:
            key = (repr(device.type), device.cost_model, device.backend, device.threads)
            if key not in position:
                position[key] = len(kinds)
                kinds.append((device.type, device.cost_model))
            column.append(position[key])
        return cls(kinds, np.array(column, dtype=np.int64))


@dataclass(frozen=True)
class _Price:
    """Times of all kernels on one device type."""

    ns: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
    """Median, low and high; UNSUPPORTED where a kernel cannot run."""
    source: NDArray[np.uint8]
    """What the time of each rests on: position in `moirai_sim.costs.model.SOURCES`."""


def _price(kind: DeviceType, kernels: Sequence[Operator], name: str | None) -> _Price:
    from moirai_sim.costs.catalog_model import load_cost_model

    prediction = load_cost_model(name or ROOFLINE).predict(kernels, kind)

    def rounded(seconds: NDArray[np.float64]) -> NDArray[np.int64]:
        runs = np.isfinite(prediction.latency_s)
        return np.where(runs, np.rint(np.where(runs, seconds, 0.0) * 1e9), UNSUPPORTED).astype(np.int64)

    return _Price(
        ns=(rounded(prediction.latency_s), rounded(prediction.low_s), rounded(prediction.high_s)),
        source=prediction.sources(),
    )


def _card_hash(model: str | None) -> str | None:
    return None if model in (None, ROOFLINE) else sha256(find("cost-models", str(model)) / "card.json")


def _common_backend(cluster: Cluster) -> str:
    backends = {device.backend for device in cluster.devices}
    if "onnxruntime" in backends:
        return "onnxruntime"
    return backends.pop() if len(backends) == 1 else NO_FUSION


def _kernels(graph: OperatorGraph, backend: str) -> list[tuple[Operator, tuple[str, ...]]]:
    """Return every kernel that runs with the names of the operators it stands for."""
    if backend == NO_FUSION:
        return [(operator, (operator.name,)) for operator in graph]
    from moirai_sim.graphs.fusion import fuse

    fused = fuse(graph, backend)
    return [(kernel, tuple(fused.members.get(kernel.name, (kernel.name,)))) for kernel in fused.graph]


def _edges(graph: OperatorGraph, index: dict[str, int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (producer, consumer, tensor) rows [m, 3], sorted, and the bytes of the tensors [q]."""
    tensor: dict[tuple[int, str], int] = {}
    sizes: list[int] = []
    rows: list[tuple[int, int, int]] = []
    for producer, consumer, tensors in graph.edges():
        i, j = index[producer], index[consumer]
        if not tensors:
            rows.append((i, j, -1))
        for item in tensors:
            key = (i, item.name)
            if key not in tensor:
                tensor[key] = len(sizes)
                sizes.append(item.bytes)
            rows.append((i, j, tensor[key]))
    rows.sort()
    return np.array(rows, dtype=np.int64).reshape(-1, 3), np.array(sizes, dtype=np.int64)


def _memory(cluster: Cluster) -> NDArray[np.int64]:
    def granted(device: Device) -> int:
        return device.type.memory_bytes if device.memory_bytes is None else device.memory_bytes

    return np.array([granted(device) for device in cluster.devices], dtype=np.int64)


def _instance(path: Path, kind: str) -> PlacementProblem:
    if kind == "moirai":
        from moirai_sim.instances.moirai_xls import read_moirai_xls

        return read_moirai_xls(path)
    from moirai_sim.instances.dnn_partitioning import read_dnn_partitioning

    return read_dnn_partitioning(path).problem()


def _pipedream_problem(graph: PipedreamGraph, cluster: Cluster) -> PlacementProblem:
    """Place profiled layers on a cluster. The profile knows one GPU type, so all devices take its times."""
    edges = np.array(graph.edges, dtype=np.int64).reshape(-1, 2)
    producers, tensor = np.unique(edges[:, 0], return_inverse=True)
    sizes = np.array(graph.activation_bytes, dtype=np.int64)[producers]
    route_class, transfer_ns, link_source = transfer_table(cluster, sizes)
    return PlacementProblem(
        name=graph.name,
        operators=graph.layers,
        operator_ns=np.array(graph.forward_ns, dtype=np.int64)[:, None],
        weight_bytes=np.array(graph.parameter_bytes, dtype=np.int64),
        devices=tuple(device.name for device in cluster.devices),
        device_type=np.zeros(len(cluster.devices), dtype=np.int64),
        memory_bytes=_memory(cluster),
        edges=edges,
        edge_tensor=tensor.reshape(-1).astype(np.int64),
        tensor_bytes=sizes,
        route_class=route_class,
        transfer_ns=transfer_ns,
        network="fair",
        cluster=cluster,
        provenance={
            **graph.provenance,
            "cluster": dict(cluster.provenance),
            "links": link_source,
            "note": "all devices take the layer times of the one GPU type that was profiled",
        },
    )


def _network(name: str, problem: PlacementProblem | None) -> Network:
    for known in NETWORKS:
        if name == known:
            if name == "fair" and problem is not None and problem.cluster is None:
                raise InputError(f"network 'fair': '{problem.name}' has no links to share; choose another network")
            return known  # type: ignore[return-value]
    raise InputError(f"unknown network '{name}'; {did_you_mean(name, NETWORKS)}")
