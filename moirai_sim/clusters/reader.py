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


def read_device_type(
    name: str | Path, *, beside: Path | None = None, cost_model: str | Path | None = None
) -> DeviceType:
    """Return a device type of the catalog, of a YAML file, or ``local-core`` for a core of this machine.

    A cost model knows the devices that it was fitted to. One that its user profiled goes before the catalog's of that
    name: it has the limits that were measured, with the data sheet's it would be another device. One of published
    measurements comes after the catalog's, which is as new and may be the user's own.

    Parameters
    ----------
    name
        Of the catalog or the cost model, or a path.
    beside
        A file that names the device: a relative path is looked for next to it first.
    cost_model
        Name or folder of the model that will price it.

    Raises
    ------
    InputError
        With every problem of the file.
    """
    if name == LOCAL_CORE and LOCAL_CORE not in entries("devices"):
        return local_core()
    if isinstance(name, str) and "/" not in name and not name.endswith((".yaml", ".yml")):
        known = device_names()
        own: Mapping[str, DeviceType] = {}
        profiled: frozenset[str] = frozenset()
        if cost_model is not None:
            from moirai_sim.costs.catalog_model import own_devices

            own, profiled = own_devices(cost_model)
        if name in own and (name in profiled or name not in known):
            return own[name]
        if name not in known:
            raise InputError(f"unknown device type '{name}'; {did_you_mean(name, sorted({*known, *own}))}")
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
    models = _models(document, problems)
    types = _device_types(document, models, problems)
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


def _device_types(
    document: YamlDocument, models: Mapping[str, str], problems: list[str]
) -> dict[tuple[str, str | None], DeviceType]:
    """Return the device types that the document names, by name and cost model; problems of their files are its own."""
    types: dict[tuple[str, str | None], DeviceType] = {}
    tried = set()
    for at, entry in _device_entries(document):
        name, model = entry.get("device"), entry.get("cost_model")
        key = (name, model if isinstance(model, str) else None)
        if not isinstance(name, str) or key in tried:
            continue
        tried.add(key)
        try:
            types[name, key[1]] = read_device_type(name, beside=document.path, cost_model=models.get(key[1] or ""))
        except InputError as error:
            problems += [f"{document.place((*at, 'device'))}: {problem}" for problem in error.problems]
    return types


def _models(document: YamlDocument, problems: list[str]) -> dict[str, str]:
    """Return the cost and link models that the document names: as named, or as a path where they lie beside it."""
    named: dict[str, Location] = {}
    for at, entry in _device_entries(document):
        if isinstance(entry.get("cost_model"), str):
            named.setdefault(entry["cost_model"], (*at, "cost_model"))
    link_model = document.data.get("link_model")
    if isinstance(link_model, str):
        named.setdefault(link_model, ("link_model",))
    models = {}
    for name, at in named.items():
        if name in list_names("cost-models") or (name == "roofline" and at != ("link_model",)):
            models[name] = name
            continue
        try:
            models[name] = str(find("cost-models", name, beside=document.path))
        except InputError as error:
            problems += [f"{document.place(at)}: {problem}" for problem in error.problems]
    return models


def _device_entries(document: YamlDocument) -> Iterator[tuple[Location, Mapping[str, Any]]]:
    """Yield the place and content of every device entry, of servers too."""
    root = plain(document.data)
    servers = enumerate(_list(root.get("servers")))
    scopes: list[tuple[Location, Any]] = [((), root), *((("servers", i), server) for i, server in servers)]
    for place, scope in scopes:
        for i, entry in enumerate(_list(scope.get("devices")) if isinstance(scope, dict) else []):
            if isinstance(entry, dict):
                yield (*place, "devices", i), entry


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _entry(form: ClusterFile, at: Location) -> Any:  # noqa: ANN401 - the entry of a list of any of the forms
    """Return the form at a location such as ("servers", 0, "devices", 2)."""
    node: Any = form
    for key in at:
        node = node[key] if isinstance(key, int) else getattr(node, key)
    return node


def _device(
    entry: DeviceEntry, types: Mapping[tuple[str, str | None], DeviceType], models: Mapping[str, str], member: Member
) -> Device:
    kind = types[entry.device, entry.cost_model]
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
    sheets = [asdict(device.type) for device in cluster.devices]
    types: dict[str, Any] = {}
    for sheet in sheets:
        types.setdefault(sheet["name"], sheet)
    devices = [
        vars(device)
        | {"type": sheet["name"] if types[sheet["name"]] == sheet else sheet}  # a cost model may know it by another
        | {"cost_model": Path(device.cost_model or "").name}  # not where it lies
        for device, sheet in zip(cluster.devices, sheets, strict=True)
    ]
    links = [vars(link) for link in cluster.links]
    content = [types, devices, links, cluster.switches, Path(cluster.link_model or "").name]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
