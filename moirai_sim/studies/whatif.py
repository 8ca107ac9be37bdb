"""What-if: one base cluster, named overrides of its YAML, and scenarios that combine them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import moirai_sim
from moirai_sim.errors import InputError, did_you_mean
from moirai_sim.studies import runs
from moirai_sim.studies.parallel import run_all
from moirai_sim.studies.store import Store, digest
from moirai_sim.studies.study import Range, WhatIfStudy, read_study

if TYPE_CHECKING:
    from moirai_sim.clusters.cluster import Cluster
    from moirai_sim.yaml_files import YamlDocument

BASE = "base"
Changes = dict[str, Any]
"""Dotted key of the cluster's YAML -> value."""


def expand(study: WhatIfStudy) -> list[tuple[str, Changes]]:
    """Return every variant as (scenario, changes): the base first, then each scenario in the order of the file.

    An override whose keys have several values stands for all their combinations; overrides of one scenario combine the
    same way, later ones over earlier ones.

    Raises
    ------
    InputError
        If a scenario names an override that does not exist.
    """
    problems = [
        f"scenario '{scenario}': unknown override '{name}'; {did_you_mean(name, list(study.overrides))}"
        for scenario, names in study.scenarios.items()
        for name in names
        if name not in study.overrides
    ]
    if problems:
        raise InputError(problems)
    scenarios = study.scenarios or {name: [name] for name in study.overrides}
    variants: list[tuple[str, Changes]] = [(BASE, {})]
    for scenario, names in scenarios.items():
        choices: dict[str, list[Any]] = {}
        for name in names:
            choices |= {key: _values(value) for key, value in study.overrides[name].items()}
        variants += [
            (scenario, dict(zip(choices, values, strict=True))) for values in itertools.product(*choices.values())
        ]
    return variants


def _values(value: object) -> list[Any]:
    if isinstance(value, Range):
        return list(value.values())
    return list(value) if isinstance(value, list) else [value]


def changed_cluster(source: str, changes: Mapping[str, Any]) -> Cluster:
    """Return a cluster of the catalog or a file with dotted keys of its YAML replaced.

    In a list, the ``name`` of an entry or its number stands for its place: ``devices.gpu.count``, ``links.0.latency``.

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


def whatif(
    study_path: Path, out: Path, *, jobs: int | None = None, ray: str | None = None, retry_failed: bool = False
) -> dict[str, Any]:
    """Run a study of kind ``whatif`` and return its summary; results already in ``out`` are kept.

    Parameters are those of ``moirai_sim.studies.evaluate.evaluate``.

    Raises
    ------
    InputError
        If the study is wrong, or an override leads to a wrong cluster; nothing is written then.
    """
    study = read_study(study_path, "whatif")
    if not isinstance(study, WhatIfStudy):
        raise TypeError(f"read_study returned {type(study).__name__}")
    named = _named_keys(study)
    store = Store(out)
    store.open(study.model_dump(mode="json", by_alias=True))
    return run_all(run_variant, named, store, name=study.name, jobs=jobs, ray=ray, retry_failed=retry_failed)


def _named_keys(study: WhatIfStudy) -> dict[str, dict[str, Any]]:
    from moirai_sim.units import parse_ns

    problems: list[str] = []
    named: dict[str, dict[str, Any]] = {}
    common = {
        "cluster": study.cluster,
        "policy": study.policy,
        "network": study.network,
        "objective": study.objective,
        "seed": study.seed,
        "time_limit_s": study.time_limit_s,
        "target_ns": None if study.target is None else parse_ns(study.target),
        "version": moirai_sim.__version__,
    }
    for scenario, changes in expand(study):
        try:
            figures = runs.cluster_figures(changed_cluster(study.cluster, changes))
        except InputError as error:
            problems += error.problems
            continue
        for model in study.models:
            key = {"model": model, "scenario": scenario, "overrides": changes, **common}
            named[digest([key, runs.source_digest(model), figures])[:24]] = key
    if problems:
        raise InputError(sorted(set(problems)))
    return named


@lru_cache(maxsize=2)
def _graph(model: str) -> Any:  # noqa: ANN401 - an OperatorGraph, imported late
    from moirai_sim.graphs.load import load_graph

    return load_graph(model)


def run_variant(key: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """Place one variant; a failure is an outcome with its error.

    A variant whose lower bound already misses the target is not placed: its status is ``pruned``.
    """
    return runs.guarded(lambda: _place_variant(key))


def _place_variant(key: Mapping[str, Any]) -> dict[str, Any]:
    from moirai_sim.policies.base import Request
    from moirai_sim.policies.bounds import lower_bound_ns
    from moirai_sim.policies.run import place
    from moirai_sim.sources import build_problem
    from moirai_sim.studies.uncertainty import log_spread

    cluster = changed_cluster(key["cluster"], key["overrides"])
    problem = build_problem(_graph(key["model"]), cluster, network=key["network"] or "fair")
    facts: dict[str, Any] = {"price_eur": price_eur(cluster), "devices": problem.n_devices}
    if key["target_ns"] is not None and key["scenario"] != BASE:  # all others are compared with the base
        bound = lower_bound_ns(problem, key["objective"])
        if bound > key["target_ns"]:
            return facts | {"status": "pruned", "lower_bound_ns": bound}
    request = Request(objective=key["objective"], time_limit_s=key["time_limit_s"], seed=key["seed"])
    timeline = place(problem, key["policy"], request)
    figures = runs.outcome(problem, timeline)
    energy = None
    if timeline.spans:
        energy = energy_j(cluster, figures["busy_ns"], timeline.objective_ns)
        figures["log_spread"] = log_spread(problem, timeline)
    return figures | facts | {"energy_j": energy}


def price_eur(cluster: Cluster) -> float | None:
    """Return the price of all devices and links, or None where one has none."""
    prices = [device.type.price_eur for device in cluster.devices] + [link.price_eur or 0.0 for link in cluster.links]
    known = [price for price in prices if price is not None]
    return float(sum(known)) if len(known) == len(prices) else None


def energy_j(cluster: Cluster, busy_ns: Mapping[str, int], length_ns: int) -> float | None:
    """Return the energy of one request, J: idle power all the time, peak power while a device works.

    An upper estimate from data sheets (source "data sheet"); None where a device's powers are unknown.
    """
    total = 0.0
    for device in cluster.devices:
        if device.type.idle_watts is None or device.type.peak_watts is None or device.name not in busy_ns:
            return None
        busy = busy_ns[device.name]
        total += device.type.idle_watts * length_ns + (device.type.peak_watts - device.type.idle_watts) * busy
    return total / 1e9
