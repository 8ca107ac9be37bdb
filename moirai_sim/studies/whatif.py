"""What-if: one base cluster, named overrides of its YAML, and scenarios that combine them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import moirai_sim
from moirai_sim.errors import InputError, named
from moirai_sim.progress import progress
from moirai_sim.simulation.memory import energy_joules
from moirai_sim.studies import runs
from moirai_sim.studies.overrides import changed_cluster
from moirai_sim.studies.parallel import Key, end_processes, run_all
from moirai_sim.studies.prices import Parts, check_prices, parts, price_eur
from moirai_sim.studies.sizes import MAX_SIZES, Counts, answer_of, search
from moirai_sim.studies.store import Store, digest
from moirai_sim.studies.study import MOST_VALUES, Range, WhatIfStudy, read_study

if TYPE_CHECKING:
    from moirai_sim.clusters.cluster import Cluster
    from moirai_sim.policies.base import Objective, Request
    from moirai_sim.problem import PlacementProblem
    from moirai_sim.timeline import Timeline

BASE = "base"
SIZES, ANSWER = "sizes", "sizes: answer"
"""Scenarios of the search for a size: its variants, and its answer."""
Changes = dict[str, Any]
"""Dotted key of the cluster's YAML -> value."""


def expand(study: WhatIfStudy) -> list[tuple[str, Changes]]:
    """Return every variant as (scenario, changes): the base first, then each scenario in the order of the file.

    An override whose keys have several values stands for all their combinations; overrides of one scenario combine the
    same way, later ones over earlier ones.

    Raises
    ------
    InputError
        If a scenario bears a name of our own, or an override has no value.
    """
    scenarios = study.scenarios or {name: [name] for name in study.overrides}
    problems = [
        f"scenario '{scenario}': the study itself has results of this name; choose another"
        for scenario in scenarios
        if scenario in (BASE, SIZES, ANSWER)
    ]
    problems += [
        f"override '{name}': '{key}' has no value; give at least one, and a range from the smallest to the largest"
        for name, changes in study.overrides.items()
        for key, value in changes.items()
        if not _values(value)
    ]
    choices = {
        scenario: {key: _values(value) for name in names for key, value in study.overrides[name].items()}
        for scenario, names in scenarios.items()
    }
    if sum(math.prod(map(len, values.values())) for values in choices.values()) > MOST_VALUES:
        problems.append(f"overrides: more than {MOST_VALUES:,} variants; give fewer values")
    if problems:
        raise InputError(problems)
    variants: list[tuple[str, Changes]] = [(BASE, {})]
    variants += [
        (scenario, dict(zip(values, combination, strict=True)))
        for scenario, values in choices.items()
        for combination in itertools.product(*values.values())
    ]
    return variants


def _values(value: object) -> list[Any]:
    if isinstance(value, Range):
        return list(value.values())
    return list(value) if isinstance(value, list) else [value]


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
    runs.forget()
    _graph.cache_clear()
    _base_timeline.cache_clear()
    changed_cluster(study.cluster, {})  # what is wrong with that file is told with its own place
    with named(str(study_path)):
        variants = expand(study)
        clusters = _read_clusters(study, [changes for _, changes in variants])
        sizes = list_sizes(study) if study.sizes else {}
        check_prices(study.prices, [cluster.parts for cluster in [*clusters, *sizes.values()]])
    common = _common(study)
    by_name: dict[str, Key] = {}
    for (scenario, changes), cluster in zip(variants, clusters, strict=True):
        for model in study.models:
            key = {"model": model, "scenario": scenario, "overrides": changes, **common}
            by_name[_name(key, cluster, clusters[0])] = key  # the placement of the base is tried on each
    store = Store(out)
    store.open(study.model_dump(mode="json", by_alias=True))

    def run(keys: Mapping[str, Key], name: str) -> dict[str, Any]:
        return run_all(run_variant, keys, store, name=name, jobs=jobs, ray=ray, retry_failed=retry_failed)

    try:
        summary = run(by_name, study.name)
        for model in study.models if sizes else ():
            _search_sizes(study, model, sizes, store, run, summary)
    finally:
        end_processes()
    return summary


@dataclass(frozen=True)
class _Read:
    """What of a variant's cluster the parent keeps."""

    figures: str
    """Hash of everything that a result can depend on."""
    parts: Parts
    devices: int


def _read_clusters(study: WhatIfStudy, variants: Sequence[Changes]) -> list[_Read]:
    problems: dict[str, str] = {}
    found = []
    with progress("clusters", total=len(variants)) as advance:
        for changes in variants:
            try:
                cluster = changed_cluster(study.cluster, changes)
                found.append(_Read(runs.digest_of(cluster), parts(cluster), len(cluster.devices)))
            except InputError as error:
                listed = ", ".join(f"{key} = {value}" for key, value in changes.items())
                for problem in error.problems:
                    problems.setdefault(problem, f"override {listed}: {problem}")
            advance()
    if problems:
        raise InputError(problems.values())
    return found


def list_sizes(study: WhatIfStudy) -> dict[Counts, _Read]:
    """Return the cluster of every combination of counts, but for none of anything where nothing else is there.

    Raises
    ------
    InputError
        If there are too many, one of them makes a wrong cluster, or none is left.
    """
    choices = list(_wanted_sizes(study).values())
    total = math.prod(map(len, choices))
    if total > MAX_SIZES:
        raise InputError(f"sizes: {total:,} combinations are more than {MAX_SIZES:,}; take fewer numbers of each")
    sizes = list(itertools.product(*choices))
    nothing = (0,) * len(choices)
    if nothing in sizes and _is_empty(study, dict.fromkeys(study.sizes, 0)):
        sizes.remove(nothing)
    if not sizes:
        raise InputError("sizes: every combination leaves the cluster without a device; give a number above 0")
    changes = [dict(zip(study.sizes, counts, strict=True)) for counts in sizes]
    return dict(zip(sizes, _read_clusters(study, changes), strict=True))


def _is_empty(study: WhatIfStudy, changes: Changes) -> bool:
    """Tell whether changes that take devices away leave a cluster that cannot be read: one without a device."""
    try:
        changed_cluster(study.cluster, changes)
    except InputError:
        return True
    return False


def _wanted_sizes(study: WhatIfStudy) -> dict[str, list[int]]:
    return {name: sorted(set(_values(value))) for name, value in study.sizes.items()}


def _search_sizes(
    study: WhatIfStudy,
    model: str,
    sizes: Mapping[Counts, _Read],
    store: Store,
    run: Callable[[Mapping[str, Key], str], dict[str, Any]],
    summary: dict[str, Any],
) -> None:
    """Search the sizes for one model; keep every outcome and the answer as results, and count them in ``summary``."""
    common = _common(study)

    def ask(what: str, wanted: list[Counts]) -> dict[Counts, Mapping[str, Any]]:
        names: dict[Counts, str] = {}
        keys: dict[str, Key] = {}
        for counts in wanted:
            changes = dict(zip(study.sizes, counts, strict=True))
            key = {"model": model, "scenario": SIZES, "overrides": changes, "ask": what, **common}
            names[counts] = _name(key, sizes[counts])
            keys[names[counts]] = key
        done = run(keys, f"{study.name}: {what}")
        for figure in ("runs", "failed", "resumed"):
            summary[figure] += done[figure]
        outcomes = {result["name"]: result["outcome"] for result in store.read(list(keys))}
        return {counts: outcomes[name] for counts, name in names.items()}

    prices = {counts: price_eur(size.parts, study.prices) for counts, size in sizes.items()}
    if None in prices.values():
        prices = dict.fromkeys(sizes)
    devices = {counts: size.devices for counts, size in sizes.items()}
    order = sorted(sizes, key=lambda counts: (prices[counts] or 0.0, devices[counts], counts))
    answer = answer_of(list(study.sizes), search(order, common["target_ns"], ask), prices, devices, str(study.target))
    wanted = {"sizes": study.model_dump(mode="json", by_alias=True)["sizes"], "prices": study.prices}
    key = {"model": model, "scenario": ANSWER, "overrides": {}, **wanted, **common}
    name = _name(key, *sizes.values())
    store.ask([name])
    store.write(name, key, answer, 0.0)
    summary.setdefault("sizes", {})[model] = {name: answer[name] for name in answer if name != "findings"}


def _common(study: WhatIfStudy) -> dict[str, Any]:
    """Return what all keys of a study share."""
    from moirai_sim.units import parse_ns

    return {
        "cluster": study.cluster,
        "policy": study.policy,
        "network": study.network,
        "objective": study.objective,
        "seed": study.seed,
        "time_limit_s": study.time_limit_s,
        "target_ns": None if study.target is None else parse_ns(study.target),
        "version": moirai_sim.__version__,
    }


def _name(key: Key, *clusters: _Read) -> str:
    """Return the hash that names a result: its key with files and the cluster replaced by their content."""
    content = {"model": runs.source_digest(key["model"]), "cluster": [cluster.figures for cluster in clusters]}
    return digest({**key, **content})[:24]


@lru_cache(maxsize=2)
def _graph(model: str) -> Any:  # noqa: ANN401 - an OperatorGraph, imported late
    from moirai_sim.graphs.load import load_graph

    return load_graph(model)


def _problem(model: str, cluster: Cluster, network: str | None) -> PlacementProblem:
    from moirai_sim.sources import build_problem, load_problem, recognise

    if recognise(model) == "pipedream":
        return load_problem(model, cluster, network=network)
    return build_problem(_graph(model), cluster, network=network or "fair")  # read once for all variants


def run_variant(key: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """Place one variant; a failure is an outcome with its error.

    A variant whose lower bound already misses the target is not placed: its status is ``pruned``.
    """
    return runs.guarded(lambda: _place_variant(key))


def _place_variant(key: Mapping[str, Any]) -> dict[str, Any]:
    from moirai_sim.evidence import log_spread
    from moirai_sim.policies.base import Request
    from moirai_sim.policies.bounds import lower_bound_ns
    from moirai_sim.policies.run import place

    cluster = changed_cluster(key["cluster"], key["overrides"])
    problem = _problem(key["model"], cluster, key["network"])
    facts: dict[str, Any] = {"parts": parts(cluster), "devices": problem.n_devices}
    if key["scenario"] == SIZES and sum(problem.weight_bytes.tolist()) > sum(problem.memory_bytes.tolist()):
        return facts | {"status": "pruned", "reason": "memory"}
    if key["target_ns"] is not None and key["scenario"] != BASE:  # all others are compared with the base
        bound = lower_bound_ns(problem, key["objective"])
        if bound > key["target_ns"]:
            return facts | {"status": "pruned", "reason": "bound", "lower_bound_ns": bound}
        if key.get("ask") == "bound":
            return facts | {"status": "bounded", "lower_bound_ns": bound}
    request = Request(objective=key["objective"], time_limit_s=key["time_limit_s"], seed=key["seed"])
    timeline = place(problem, key["policy"], request)
    figures = runs.outcome(problem, timeline) | {"held_ns": _held_ns(key, problem, request)}
    energy = None
    if timeline.spans:
        each = energy_joules(cluster, figures["busy_ns"], timeline.objective_ns).values()
        known = [joules for joules in each if joules is not None]
        energy = sum(known) if known and len(known) == len(each) else None
        figures["log_spread"] = log_spread(problem, timeline)
    return figures | facts | {"energy_j": energy}


def _held_ns(key: Mapping[str, Any], problem: PlacementProblem, request: Request) -> int | None:
    """Return the objective of the base's placement on a variant; None where it cannot stand there."""
    from moirai_sim.placement import placement_from_timeline
    from moirai_sim.policies.loads import fits
    from moirai_sim.policies.run import time_placement

    if key["scenario"] in (BASE, SIZES):
        return None
    named = ("model", "cluster", "policy", "network", "objective", "seed", "time_limit_s")
    base = _base_timeline(*(key[name] for name in named))
    if not base.spans or not set(base.placement.values()) <= set(problem.devices):
        return None
    placement = placement_from_timeline(problem, base)
    return time_placement(problem, placement, request).objective_ns if fits(problem, placement.device) else None


@lru_cache(maxsize=4)
def _base_timeline(
    model: str, cluster: str, policy: str, network: str | None, objective: Objective, seed: int, time_limit_s: float
) -> Timeline:
    """Place the base once a worker, for all of its variants."""
    from moirai_sim.policies.base import Request
    from moirai_sim.policies.run import place

    problem = _problem(model, changed_cluster(cluster, {}), network)
    return place(problem, policy, Request(objective=objective, time_limit_s=time_limit_s, seed=seed))
