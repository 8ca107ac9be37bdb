"""Who is who in a cluster file: every entry, group and server expanded to the names of its members."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moirai_sim.clusters.local import local_cores
from moirai_sim.clusters.schema import MAX_LINKS, MAX_MEMBERS
from moirai_sim.errors import did_you_mean
from moirai_sim.yaml_files import Location, YamlDocument, plain


def natural(name: str) -> tuple[str | int, ...]:
    """Sort key that puts gpu2 before gpu10; text and numbers alternate, so keys are comparable."""
    return tuple(int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name)))


@dataclass(frozen=True)
class Member:
    """One concrete device or switch, and the entry that it comes from."""

    name: str
    entry: Location
    number: int
    """Position within the entry's ``count``."""
    server: str


class Members:
    """Expands the entries of a cluster document, tolerant of entries that the schema refuses.

    Working on the plain document, before and whatever the schema says of it, lets a reader report unknown names and
    wrong quantities together. Every problem found is appended to ``problems``.
    """

    def __init__(self, document: YamlDocument, problems: list[str]) -> None:
        self._document = document
        self._problems = problems
        self._groups: dict[str, dict[str, None]] = {}
        self.devices: list[Member] = []
        self.switches: list[Member] = []
        root = plain(document.data)
        self._scopes: list[tuple[Location, Mapping[str, Any], list[str]]] = [((), root, [""])]
        for i, server in enumerate(_mappings(root.get("servers"))):
            if server:
                place: Location = ("servers", i)
                self._scopes.append((place, server, self._numbered(server, place, 1)))
        used: dict[str, Location] = {}
        for place, scope, instances in self._scopes:
            for key, found in (("devices", self.devices), ("switches", self.switches)):
                for i, entry in enumerate(_mappings(scope.get(key))):
                    self._expand(entry, (*place, key, i), scope, instances, found, used)

    def links(self) -> Iterator[tuple[Location, str, list[tuple[str, str]]]]:
        """Yield (entry, server instance, the pairs of ends that the entry joins) for every link entry.

        An entry of a server is yielded once an instance. Unknown ends and links of a device with itself are problems.
        """
        for place, scope, instances in self._scopes:
            for i, entry in enumerate(_mappings(scope.get("links"))):
                at: Location = (*place, "links", i)
                ends = entry.get("ends")
                if not isinstance(ends, list) or len(ends) != 2:
                    continue  # the schema reports it
                for instance in instances:
                    sides = [self._side(str(end), instance, (*at, "ends", j)) for j, end in enumerate(ends)]
                    first, second = sides
                    if first is None or second is None:
                        break  # equal servers have equal mistakes
                    if len(first) * len(second) * len(instances) > 2 * MAX_LINKS:
                        self._problem(at, f"stands for more than {MAX_LINKS} links; join the groups through a switch")
                        break
                    if ends[0] == ends[1]:
                        pairs = [(a, b) for k, a in enumerate(first) for b in first[k + 1 :]]
                    else:
                        pairs = [(a, b) for a in first for b in second if a != b]
                    if not pairs:
                        self._problem((*at, "ends"), f"joins '{ends[0]}' with itself; name two different ends")
                        break
                    yield at, instance, pairs

    def _expand(
        self,
        entry: Mapping[str, Any],
        at: Location,
        scope: Mapping[str, Any],
        instances: list[str],
        found: list[Member],
        used: dict[str, Location],
    ) -> None:
        name, server = entry.get("name"), scope.get("name") if instances != [""] else None
        if name is None:
            return
        numbered = self._numbered(entry, at, len(instances))
        for instance in instances:
            prefixes = dict.fromkeys((f"{server}.", f"{instance}.") if instance else ("",))
            for number, own in enumerate(numbered):
                full = f"{instance}.{own}" if instance else own
                if full in used:
                    where = self._document.place(used[full]).rpartition("/")[2]
                    self._problem((*at, "name"), f"'{full}' is the name of the entry at {where} too; names are unique")
                    return
                used[full] = at
                home = instance or str(entry.get("server", ""))
                found.append(Member(full, at, number, home))
                for prefix in prefixes:
                    for reference in dict.fromkeys((f"{prefix}{name}", f"{prefix}{own}")):
                        self._groups.setdefault(reference, {})[full] = None

    def _numbered(self, entry: Mapping[str, Any], at: Location, copies: int) -> list[str]:
        """Return NAME, or NAME0, NAME1, ... where the entry has a count."""
        name, count = str(entry.get("name", "")), entry.get("count")
        if count == "cores":
            count = len(local_cores())
        if not isinstance(count, int) or isinstance(count, bool) or count < 1 or count > MAX_MEMBERS:
            return [name]
        if count * copies > MAX_MEMBERS:
            self._problem((*at, "count"), f"makes more than {MAX_MEMBERS} members in all; lower a count")
            return [name]
        return [f"{name}{i}" for i in range(count)]

    def _side(self, end: str, instance: str, at: Location) -> list[str] | None:
        group = self._groups.get(f"{instance}.{end}" if instance else end)
        if group is None:
            prefix = f"{instance}." if instance else ""
            known = [name.removeprefix(prefix) for name in self._groups if name.startswith(prefix)]
            what = f"unknown end '{end}'; {did_you_mean(end, known[:64])}" if known else f"unknown end '{end}'"
            self._problem(at, what)
            return None
        return list(group)

    def _problem(self, at: Location, text: str) -> None:
        self._problems.append(f"{self._document.place(at)}: {'.'.join(map(str, at))}: {text}")


def _mappings(entries: object) -> list[Mapping[str, Any]]:
    """Return list entries as mappings, a bare name (of a switch) as its mapping, anything else as an empty one."""
    if not isinstance(entries, list):
        return []
    return [
        entry if isinstance(entry, dict) else {"name": str(entry)} if isinstance(entry, str | int) else {}
        for entry in entries
    ]
