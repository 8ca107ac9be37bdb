"""Batch evaluation of policies: many runs in parallel, resumable, on one machine or on a Ray cluster."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import moirai_sim
from moirai_sim.errors import InputError, named
from moirai_sim.sources import brings_devices
from moirai_sim.studies import runs
from moirai_sim.studies.parallel import end_processes, run_all
from moirai_sim.studies.store import Store, digest
from moirai_sim.studies.study import EvaluateStudy, read_study

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def expand(study: EvaluateStudy) -> list[dict[str, Any]]:
    """Return the key of every run of a study, in the order of the study file.

    The key holds everything that determines the outcome, so equal keys have equal results. A published instance that
    brings its own devices runs on the cluster null alone, every other model on the named clusters alone.

    Raises
    ------
    InputError
        If a model has no cluster to run on, or nothing is left to run.
    """
    axes = (
        study.models,
        study.clusters,
        study.networks,
        study.memory_scales,
        study.objectives,
        study.policies,
        study.seeds,
        study.replicas,
        study.max_latencies,
        study.min_throughputs,
    )
    own_devices = {model: brings_devices(model) for model in study.models}
    problems = [
        f"{model}: brings its own devices and costs; add null to the clusters"
        for model, own in own_devices.items()
        if own and None not in study.clusters
    ] + [
        f"{model}: needs devices to run on; name a cluster, see 'moirai-sim catalog topologies'"
        for model, own in own_devices.items()
        if not own and study.clusters == [None]
    ]
    keys = [
        key for key in _keys(study, itertools.product(*axes)) if own_devices[key["model"]] == (key["cluster"] is None)
    ]
    if not keys and not problems:
        problems = [f"{study.name}: nothing to run: include and exclude leave no combination"]
    if problems:
        raise InputError(problems)
    return keys


def _keys(study: EvaluateStudy, combinations: Iterator[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    for model, cluster, network, memory_scale, objective, policy, seed, *stream in combinations:
        where = {"model": model, "cluster": cluster, "policy": policy, "network": network, "objective": objective}
        if not any(rule.matches(**where) for rule in study.include):
            continue
        if any(rule.matches(**where) for rule in study.exclude):
            continue
        asked = zip(("replicas", "max_latency", "min_throughput"), stream, strict=True)
        yield where | {
            **{key: value for key, value in asked if value not in (None, 1)},  # keys without them keep their hashes
            "memory_scale": memory_scale,
            "seed": seed,
            "time_limit_s": study.time_limit_s,
            "version": moirai_sim.__version__,
        }


def run_name(key: dict[str, Any], own: Mapping[str, Any] = MappingProxyType({})) -> str:
    """Return the hash that names a run: its key with files and clusters replaced by their content, and its ``own``."""
    content = {"model": runs.source_digest(key["model"]), "cluster": runs.cluster_digest(key["cluster"])}
    return digest({**key, **content, **own})[:24]


def evaluate(
    study_path: Path, out: Path, *, jobs: int | None = None, ray: str | None = None, retry_failed: bool = False
) -> dict[str, Any]:
    """Run a study of kind ``evaluate`` and return its summary.

    Results that are already in ``out`` are kept, so a killed study goes on where it was.

    Parameters
    ----------
    study_path
        The study file.
    out
        The results folder.
    jobs
        Worker processes; None takes one a core.
    ray
        Address of a Ray cluster ("auto" for one that runs here); None stays on this machine.
    retry_failed
        Run failed runs again.

    Raises
    ------
    InputError
        If the study is wrong; nothing is written then.
    """
    runs.forget()
    study = read_study(study_path, "evaluate")
    if not isinstance(study, EvaluateStudy):
        raise TypeError(f"read_study returned {type(study).__name__}")
    with named(str(study_path)):
        keys = expand(study)
    by_name: dict[str, dict[str, Any]] = {}
    for key in keys:
        name = run_name(key)
        if by_name.get(name, key) != key:  # a second file with the same content is a run of its own
            name = run_name(key, own={"model_file": key["model"], "cluster_file": key["cluster"]})
        by_name[name] = key
    store = Store(out)
    store.open(study.model_dump(mode="json", by_alias=True))
    try:
        return run_all(runs.run, by_name, store, name=study.name, jobs=jobs, ray=ray, retry_failed=retry_failed)
    finally:
        end_processes()
