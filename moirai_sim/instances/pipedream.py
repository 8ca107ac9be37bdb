"""Profiled layer graphs of PipeDream (SOSP 2019): forward time, activation and parameter bytes of each layer.

``graph.txt`` holds a line for each layer, ``node4 -- Conv2d(...) -- forward_compute_time=1.2, ...``, with times in ms
and sizes in bytes, and an indented line for each edge, ``node3 -- node4``. All times are from one type of GPU.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from moirai_sim.errors import InputError
from moirai_sim.files import sha256

FIRST_LINE = re.compile(r"^\s*\S+ -- .* -- .*forward_compute_time=")
"""What tells such a file from others."""
_NODE = re.compile(r"^(?P<id>\S+) -- (?P<what>.*) -- (?P<fields>[^-]*forward_compute_time=.*)$")
_EDGE = re.compile(r"^\s+(\S+) -- (\S+)\s*$")
_FIELD = re.compile(r"(\w+)=(\[[^\]]*\]|[^,\s]+)")


@dataclass(frozen=True)
class PipedreamGraph:
    """Layers of a network with their measured times, without devices. Shapes use n layers."""

    name: str
    layers: tuple[str, ...]
    """[n] unique names, in the order of their numbers."""
    descriptions: tuple[str, ...]
    forward_ns: tuple[int, ...]
    activation_bytes: tuple[int, ...]
    parameter_bytes: tuple[int, ...]
    edges: tuple[tuple[int, int], ...]
    """(producer, consumer), sorted."""
    provenance: dict[str, object]


def read_pipedream(path: Path) -> PipedreamGraph:
    """Read a ``graph.txt``. Several activations of a layer (``[1.0; 2.0]``) add up to one tensor.

    Raises
    ------
    InputError
        With every line that cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read it ({error})") from error
    problems: list[str] = []
    rows: dict[str, tuple[str, tuple[int, int, int]]] = {}
    joins: list[tuple[int, str, str]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if edge := _EDGE.match(line):
            joins.append((number, edge[1], edge[2]))
        elif node := _NODE.match(line.strip()):
            if node["id"] in rows:
                problems.append(f"{path}:{number}: layer '{node['id']}' stands twice; give it one line")
            rows[node["id"]] = (node["what"], _figures(node["fields"], f"{path}:{number}", problems))
        else:
            problems.append(f"{path}:{number}: neither a layer nor an edge: {line.strip()[:60]!r}; see the format")
    for number, *ends in joins:
        problems += [
            f"{path}:{number}: there is no layer '{end}'; name one of the file" for end in ends if end not in rows
        ]
    if not rows:
        problems.append(f"{path}: there is no layer; list at least one")
    if problems:
        raise InputError(problems)

    layers = sorted(rows, key=lambda name: (len(name), name))
    index = {name: i for i, name in enumerate(layers)}
    return PipedreamGraph(
        name=path.parent.name or path.stem,
        layers=tuple(layers),
        descriptions=tuple(rows[name][0] for name in layers),
        forward_ns=tuple(rows[name][1][0] for name in layers),
        activation_bytes=tuple(rows[name][1][1] for name in layers),
        parameter_bytes=tuple(rows[name][1][2] for name in layers),
        edges=tuple(sorted({(index[a], index[b]) for _, a, b in joins})),
        provenance={"format": "PipeDream graph", "file": path.name, "sha256": sha256(path)},
    )


def _figures(text: str, place: str, problems: list[str]) -> tuple[int, int, int]:
    """Return forward ns, activation bytes and parameter bytes."""
    found = {match[1]: match[2] for match in _FIELD.finditer(text)}
    values = []
    for key, scale in (("forward_compute_time", 1e6), ("activation_size", 1), ("parameter_size", 1)):
        try:
            value = sum(float(part) for part in found[key].strip("[]").split(";"))
        except (KeyError, ValueError):
            value = math.nan
        if not 0 <= value * scale < 2**62:
            problems.append(f"{place}: {key} must be a number of at least 0, read {found.get(key)!r}")
            value = 0.0
        values.append(round(value * scale))
    return values[0], values[1], values[2]
