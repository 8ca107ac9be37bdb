"""YAML -> Cluster and DeviceType, with every problem reported at once, each with file:line:column."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import networkx as nx

from moirai_sim.catalog import entries, find, list_names
from moirai_sim.clusters.cluster import Cluster, Device, DeviceType, Link
from moirai_sim.clusters.local import LOCAL_CORE, TORCH_SUFFIX, local_core, local_cores
from moirai_sim.clusters.names import Member, Members, natural
from moirai_sim.clusters.schema import ClusterFile, DeviceEntry, DeviceFile, LinkEntry
from moirai_sim.errors import InputError, did_you_mean
from moirai_sim.yaml_files import Location, YamlDocument, plain


def read_device_type(name: str | Path, *, beside: Path | None = None) -> DeviceType:
    """Return a device type of the catalog, of a YAML file, or ``local-core`` for a core of this machine.

    Raises
    ------
    InputError
        With every problem of the file.
    """
    if name == LOCAL_CORE and LOCAL_CORE not in entries("devices"):
        return local_core()
    if isinstance(name, str) and "/" not in name and not name.endswith((".yaml", ".yml")):
        known = device_names()
        if name not in known:
            raise InputError(f"unknown device type '{name}'; {did_you_mean(name, known)}")
    sheet = YamlDocument(find("devices", name, beside=beside)).validate(DeviceFile)
    return DeviceType(
        name=sheet.name,
        kind=sheet.kind,
        memory_bytes=sheet.memory,
        memory_bandwidth_bytes_per_s=sheet.memory_bandwidth,
        peak_flops=dict(sorted(sheet.peak_flops.items())),
        compute_units=sheet.compute_units,
        clock_hz=sheet.clock,
        l2_cache_bytes=sheet.l2_cache,
        idle_watts=sheet.idle_power,
        peak_watts=sheet.peak_power,
        price_eur=sheet.price_eur,
        source=sheet.source,
    )


def device_names() -> list[str]:
    """Return the names of all device types, this machine's core among them."""
    return sorted({*list_names("devices"), LOCAL_CORE})


def read_cluster(source: str | Path) -> Cluster:
    """Return a cluster of the catalog or of a YAML file.

    Raises
    ------
    InputError
        With every problem of the file: unknown and missing keys, quantities, names that are unknown or used twice,
        links that join the same ends, and devices that no link reaches.
    """
    return cluster_from_document(YamlDocument(find("topologies", source)))


def cluster_from_document(document: YamlDocument) -> Cluster:
    """Return the cluster that a parsed document describes; a what-if study changes the document before.

    Devices, switches and links are sorted by name, so that results do not depend on the order of the YAML.

    Raises
    ------
    InputError
        As `read_cluster`.
    """
    problems: list[str] = []
    form = None
    try:
        form = document.validate(ClusterFile)
    except InputError as error:
        problems += error.problems
    types = _device_types(document, problems)
    models = _models(document, problems)
    members = Members(document, problems)
    joined = list(members.links())
    if not members.devices and not problems:
        problems.append(f"{document.place(())}: devices: there is no device; list at least one")
    if problems or form is None:
        raise InputError(problems)

    links = [link for at, instance, pairs in joined for link in _links(_entry(form, at), instance, pairs)]
    cluster = Cluster(
        name=form.name,
        devices=tuple(
            _device(_entry(form, member.entry), types, models, member)
            for member in sorted(members.devices, key=lambda member: natural(member.name))
        ),
        links=tuple(sorted(links, key=lambda link: natural(link.name))),
        switches=tuple(sorted((member.name for member in members.switches), key=natural)),
        link_model=models.get(form.link_model or ""),
        source=form.source,
    )
    problems += _parallel(document, cluster) or _same_names(document, cluster) or _unreached(document, cluster)
    if problems:
        raise InputError(problems)
    return replace(cluster, provenance={"cluster": cluster.name, "sha256": _digest(cluster)})


def _device_types(document: YamlDocument, problems: list[str]) -> dict[str, DeviceType]:
    """Return the device types that the document names; problems of their files are the document's."""
    types: dict[str, DeviceType] = {}
    for name, at in _named(document, "device").items():
        try:
            types[name] = read_device_type(name, beside=document.path)
        except InputError as error:
            problems += [f"{document.place(at)}: {problem}" for problem in error.problems]
    return types


def _models(document: YamlDocument, problems: list[str]) -> dict[str, str]:
    """Return the cost and link models that the document names: as named, or as a path where they lie beside it."""
    named = _named(document, "cost_model")
    link_model = document.data.get("link_model")
    if isinstance(link_model, str):
        named[link_model] = ("link_model",)
    models = {}
    for name, at in named.items():
        if name in ("roofline", *list_names("cost-models")):
            models[name] = name
            continue
        try:
            models[name] = str(find("cost-models", name, beside=document.path))
        except InputError as error:
            problems += [f"{document.place(at)}: {problem}" for problem in error.problems]
    return models


def _named(document: YamlDocument, key: str) -> dict[str, Location]:
    """Return every text that device entries give for a key, and where it stands first."""
    found: dict[str, Location] = {}
    root = plain(document.data)
    servers = enumerate(_list(root.get("servers")))
    scopes: list[tuple[Location, Any]] = [((), root), *((("servers", i), server) for i, server in servers)]
    for place, scope in scopes:
        for i, entry in enumerate(_list(scope.get("devices")) if isinstance(scope, dict) else []):
            name = entry.get(key) if isinstance(entry, dict) else None
            if isinstance(name, str):
                found.setdefault(name, (*place, "devices", i, key))
    return found


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _entry(form: ClusterFile, at: Location) -> Any:  # noqa: ANN401 - the entry of a list of any of the forms
    """Return the form at a location such as ("servers", 0, "devices", 2)."""
    node: Any = form
    for key in at:
        node = node[key] if isinstance(key, int) else getattr(node, key)
    return node


def _device(entry: DeviceEntry, types: Mapping[str, DeviceType], models: Mapping[str, str], member: Member) -> Device:
    kind = types[entry.device]
    if kind.name == LOCAL_CORE and entry.backend == "torch":
        kind = replace(kind, name=LOCAL_CORE + TORCH_SUFFIX)
    if entry.address is not None:
        address = entry.address.replace("{i}", str(member.number))
    elif kind.kind == "gpu":
        address = f"cuda:{member.number}"
    else:
        first = member.number * entry.threads
        core = local_cores()[member.number] if entry.count == "cores" else first
        address = f"cpu:{core}" if entry.threads == 1 else f"cpu:{first}-{first + entry.threads - 1}"
    return Device(
        name=member.name,
        type=kind,
        cost_model=models.get(entry.cost_model or ""),
        backend=entry.backend,
        address=address,
        threads=entry.threads,
        server=member.server,
        memory_bytes=entry.memory,
    )


def _links(entry: LinkEntry, instance: str, pairs: list[tuple[str, str]]) -> Iterator[Link]:
    for number, pair in enumerate(pairs):
        ends = tuple(sorted(pair, key=natural))
        own = "--".join(ends)
        if entry.name is not None:
            own = (f"{instance}." if instance else "") + entry.name + (str(number) if len(pairs) > 1 else "")
        yield Link(
            name=own,
            ends=(ends[0], ends[1]),
            bandwidth_bytes_per_s=entry.bandwidth,
            latency_ns=entry.latency,
            duplex=entry.duplex,
            price_eur=entry.price_eur,
        )


def _parallel(document: YamlDocument, cluster: Cluster) -> list[str]:
    try:
        _ = cluster.graph
    except InputError as error:
        return [f"{document.place(('links',))}: links: {problem}" for problem in error.problems]
    return []


def _same_names(document: YamlDocument, cluster: Cluster) -> list[str]:
    times = Counter(link.name for link in cluster.links)
    return [
        f"{document.place(('links',))}: links: {n} links are called '{name}'; give each a name of its own"
        for name, n in times.items()
        if n > 1
    ]


def _unreached(document: YamlDocument, cluster: Cluster) -> list[str]:
    """Every device must reach every other one."""
    devices = {device.name for device in cluster.devices}
    parts = [sorted(part & devices, key=natural) for part in nx.connected_components(cluster.graph)]
    parts = sorted((part for part in parts if part), key=lambda part: (-len(part), natural(part[0])))
    return [
        f"{document.place(('links',))}: links: no link joins {', '.join(part[:4])}{' ...' if len(part) > 4 else ''} "
        f"with {parts[0][0]}; add one, or a switch between them"
        for part in parts[1:]
    ]


def _digest(cluster: Cluster) -> str:
    """Return a hash of all that the cluster says, whatever the order in which its file says it."""
    types = {device.type.name: asdict(device.type) for device in cluster.devices}
    devices = [
        vars(device) | {"type": device.type.name, "cost_model": Path(device.cost_model or "").name}  # not where it lies
        for device in cluster.devices
    ]
    links = [vars(link) for link in cluster.links]
    content = [types, devices, links, cluster.switches, Path(cluster.link_model or "").name]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
