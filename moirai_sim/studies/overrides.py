"""A cluster with some keys of its YAML replaced: what every variant of a what-if runs on."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

from moirai_sim.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from moirai_sim.clusters.cluster import Cluster
    from moirai_sim.yaml_files import YamlDocument


def changed_cluster(source: str, changes: Mapping[str, Any]) -> Cluster:
    """Return a cluster of the catalog or a file with dotted keys of its YAML replaced.

    In a list, the ``name`` of an entry or its number stands for its place: ``devices.gpu.count``, ``links.0.latency``.
    A ``count`` of 0 takes the entry away, and with it the links that end there.

    Raises
    ------
    InputError
        If a key leads nowhere, or the changed cluster is wrong.
    """
    from moirai_sim.clusters.reader import cluster_from_document

    document = _document(source)
    document.data = copy.deepcopy(document.data)
    problems: list[str] = []
    for dotted, value in changes.items():
        try:
            _assign(document.data, dotted, value)
        except InputError as error:
            problems += [f"override '{dotted}' of cluster '{source}': {problem}" for problem in error.problems]
    if problems:
        raise InputError(problems)
    _take_away(document.data)
    return cluster_from_document(document)


def _document(source: str) -> YamlDocument:
    from moirai_sim import catalog
    from moirai_sim.yaml_files import YamlDocument

    return YamlDocument(catalog.find("topologies", source))


def _assign(data: MutableMapping[str, Any], dotted: str, value: object) -> None:
    *parents, last = _keys(data, dotted)
    node: Any = data
    for key in parents:
        node = node[key]
    node[last] = value


def _take_away(data: MutableMapping[str, Any]) -> None:
    """Remove the entries whose count is 0, and the links that end at one of them; the reader refuses malformed ones."""
    scopes = [("", data), *((f"{server.get('name')}.", server) for server in _mappings(data, "servers"))]
    gone, kept = [], []
    for prefix, scope in scopes:
        for part in ("devices", "switches", "servers"):
            for entry in _mappings(scope, part):
                name = f"{prefix}{entry.get('name')}"
                if entry.get("count") == 0 and "name" in entry:
                    scope[part].remove(entry)
                    gone.append(name)
                else:
                    kept.append(name)
    for prefix, scope in scopes:
        for link in _mappings(scope, "links"):
            ends = link.get("ends")
            ends = ends if isinstance(ends, list) else []
            if any(_is_gone(f"{prefix}{end}", gone, kept) for end in ends):
                scope["links"].remove(link)


def _mappings(scope: Mapping[str, Any], part: str) -> list[MutableMapping[str, Any]]:
    """Return the entries of a list of the document that are mappings."""
    entries = scope.get(part)
    found = entries if isinstance(entries, list) else []
    return [entry for entry in found if isinstance(entry, MutableMapping)]


def _is_gone(end: str, gone: Sequence[str], kept: Sequence[str]) -> bool:
    """Tell whether the end of a link belongs to an entry that is gone, and to none beside it of a longer name."""
    return any(
        _belongs(end, name)
        and not any(
            len(other) > len(name) and other.count(".") == name.count(".") and _belongs(end, other) for other in kept
        )
        for name in gone
    )


def _belongs(end: str, name: str) -> bool:
    """Tell whether the end of a link is a member of an entry, numbered or not, or lies in it."""
    parts, names = end.split("."), name.split(".")
    return len(parts) >= len(names) and all(
        part.startswith(own) and (part[len(own) :] or "0").isdigit() for part, own in zip(parts, names, strict=False)
    )


def _keys(data: MutableMapping[str, Any], dotted: str) -> Iterator[str | int]:
    """Translate a dotted key into the keys and indices of the document; the last key of a mapping may be new."""
    node: Any = data
    parts = dotted.split(".")
    for depth, part in enumerate(parts):
        if isinstance(node, Sequence) and not isinstance(node, str):
            names = [
                str(entry.get("name", i)) if isinstance(entry, Mapping) else str(i) for i, entry in enumerate(node)
            ]
            index = names.index(part) if part in names else int(part) if part.isdigit() else -1
            if not 0 <= index < len(node):
                raise InputError(f"no entry '{part}' in '{'.'.join(parts[:depth])}'; {did_you_mean(part, names)}")
            yield index
            node = node[index]
        elif isinstance(node, Mapping) and (part in node or depth == len(parts) - 1):
            yield part
            node = node.get(part)
        else:
            known = list(node) if isinstance(node, Mapping) else []
            raise InputError(f"no key '{part}' in '{'.'.join(parts[:depth])}'; {did_you_mean(part, known)}")
