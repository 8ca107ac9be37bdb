"""What there is: catalogs by kind, and JSON Schemas of the file formats."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from moirai_sim import catalog
from moirai_sim.errors import InputError, did_you_mean
from moirai_sim.units import format_bytes, format_count

if TYPE_CHECKING:
    from pydantic import BaseModel


def listing(kind: str) -> list[dict[str, Any]]:
    """Return one row an entry of ``policies``, ``devices``, ``topologies``, ``cost-models`` or ``models``.

    An entry that cannot be read is listed with its error, so that one bad file of a user does not hide the others.

    Raises
    ------
    InputError
        If there is no such kind.
    """
    lister = _LISTERS.get(kind)
    if lister is None:
        raise InputError(f"unknown catalog '{kind}'; {did_you_mean(kind, list(_LISTERS))}")
    names, describe = lister()
    rows = []
    for name in names:
        try:
            rows.append({"name": name, **describe(name)})
        except InputError as error:
            rows.append({"name": name, "about": f"cannot be used: {error.problems[0]}"})
    columns = dict.fromkeys(key for row in rows for key in row)
    return [{column: row.get(column, "") for column in columns} for row in rows]


_Lister = tuple[list[str], Callable[[str], dict[str, Any]]]


def _policies() -> _Lister:
    from moirai_sim.policies.registry import load_policy, policy_names

    def describe(name: str) -> dict[str, Any]:
        return {"about": (inspect.getdoc(type(load_policy(name))) or "").partition("\n")[0]}

    return policy_names(), describe


def _devices() -> _Lister:
    from moirai_sim.clusters.reader import device_names, read_device_type

    def describe(name: str) -> dict[str, Any]:
        sheet = read_device_type(name)
        peaks = ", ".join(f"{dtype} {format_count(rate)}FLOP/s" for dtype, rate in sheet.peak_flops.items())
        return {
            "kind": sheet.kind,
            "memory": format_bytes(sheet.memory_bytes),
            "bandwidth": f"{format_count(sheet.memory_bandwidth_bytes_per_s)}B/s",
            "peak": peaks,
            "about": sheet.source,
        }

    return device_names(), describe


def _topologies() -> _Lister:
    from moirai_sim.clusters.reader import read_cluster

    def describe(name: str) -> dict[str, Any]:
        cluster = read_cluster(name)
        types: dict[str, int] = {}
        for device in cluster.devices:
            types[device.type.name] = types.get(device.type.name, 0) + 1
        return {
            "devices": ", ".join(f"{count} x {kind}" for kind, count in types.items()),
            "links": len(cluster.links),
            "about": " ".join(cluster.source.split()),
        }

    return catalog.list_names("topologies"), describe


def _cost_models() -> _Lister:
    from moirai_sim.costs.card import known_errors

    def describe(name: str) -> dict[str, Any]:
        folder = catalog.find("cost-models", name)
        path = folder / ("card.json" if (folder / "card.json").is_file() else "links.json")
        try:
            card = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read ({error})") from error
        card = card.get("card", card) if isinstance(card, dict) else {}
        data = card.get("data") or card.get("sources") or ""
        about = data if isinstance(data, str) else ", ".join(map(str, data))
        hardware = card.get("hardware") or {}
        measured = ", ".join(hardware) if isinstance(hardware, dict) else str(hardware)
        return {"folder": str(folder), "about": about, "measured_on": measured, "errors": known_errors(card)}

    return catalog.list_names("cost-models"), describe


def _models() -> _Lister:
    from moirai_sim.graphs.zoo import zoo_names, zoo_parameters

    def describe(name: str) -> dict[str, Any]:
        return {"parameters": " ".join(f"{key}={value}" for key, value in zoo_parameters(name).items())}

    return [f"zoo:{name}" for name in zoo_names()], lambda name: describe(name.removeprefix("zoo:"))


_LISTERS: dict[str, Callable[[], _Lister]] = {
    "policies": _policies,
    "devices": _devices,
    "topologies": _topologies,
    "cost-models": _cost_models,
    "models": _models,
}


def json_schema(kind: str) -> dict[str, Any]:
    """Return the JSON Schema of a file format.

    Raises
    ------
    InputError
        If there is no such format.
    """
    from moirai_sim.clusters.schema import ClusterFile, DeviceFile
    from moirai_sim.operators_file import OperatorLine
    from moirai_sim.studies.study import StudyFile
    from moirai_sim.timeline_schema import TimelineFile

    models: dict[str, type[BaseModel]] = {
        "cluster": ClusterFile,
        "device": DeviceFile,
        "study": StudyFile,
        "timeline": TimelineFile,
        "operators": OperatorLine,
    }
    if kind not in models:
        raise InputError(f"unknown format '{kind}'; {did_you_mean(kind, list(models))}")
    schema = models[kind].model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
