"""One run of a study: a key that says all that determines it, and the outcome of placing it."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import lru_cache
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from moirai_sim.errors import MoiraiError
from moirai_sim.studies.store import digest
from moirai_sim.units import parse_ns, parse_period_ns

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from moirai_sim.clusters.cluster import Cluster
    from moirai_sim.problem import PlacementProblem
    from moirai_sim.timeline import Timeline


@lru_cache(maxsize=256)
def source_digest(source: str) -> str:
    """Return what a model source stands for: the hash of a file's content and the sizes behind it, or a zoo model."""
    from moirai_sim.files import sha256
    from moirai_sim.graphs.load import split_source

    path, query = split_source(source)
    return f"{sha256(path)}?{query}".removesuffix("?") if path.is_file() else source


@lru_cache(maxsize=64)
def cluster_digest(name: str | None) -> str | None:
    """Return the hash of a cluster of the catalog or a file: see `digest_of`."""
    from moirai_sim.clusters.reader import read_cluster

    return None if name is None else digest_of(read_cluster(name))


def digest_of(cluster: Cluster) -> str:
    """Return the hash of a cluster's figures and of the cost models that its devices and links name."""
    models = [device.cost_model for device in cluster.devices] + [cluster.link_model]
    return digest([cluster_figures(cluster), [model and model_files(model) for model in models]])


@lru_cache(maxsize=64)
def model_files(model: str) -> list[tuple[str, str]]:
    """Return name and hash of every file of a cost model; ``roofline`` has none."""
    from moirai_sim import catalog
    from moirai_sim.files import sha256

    if model == "roofline":
        return []
    folder = catalog.find("cost-models", model)
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [(path.relative_to(folder).as_posix(), sha256(path)) for path in paths]


def cluster_figures(cluster: Cluster) -> list[str]:
    """Return everything in a cluster that a result can depend on, as text; of cost models their names alone."""
    devices = (replace(device, cost_model=_bare(device.cost_model)) for device in cluster.devices)
    return [*map(repr, devices), *map(repr, cluster.links), *cluster.switches, str(_bare(cluster.link_model))]


def _bare(cost_model: str | None) -> str | None:
    return cost_model and PurePath(cost_model).name  # where it lies says nothing of what is in it


@lru_cache(maxsize=4)
def load(model: str, cluster: str | None, network: str | None, memory_scale: float | None) -> PlacementProblem:
    """Return the problem of a run; runs that differ in policy, seed or objective alone share it."""
    from moirai_sim.clusters.reader import read_cluster
    from moirai_sim.sources import load_problem

    where = None if cluster is None else read_cluster(cluster)
    return load_problem(model, where, network=network, memory_scale=memory_scale)


def forget() -> None:
    """Forget what earlier studies of this process read: files may have changed since."""
    for cached in (source_digest, cluster_digest, model_files, load):
        cached.cache_clear()


def outcome(problem: PlacementProblem, timeline: Timeline) -> dict[str, Any]:
    """Return the figures of a timeline that the inputs determine (no wall-clock time).

    Where R placements take turns, transfers, bytes and busy times are those of R requests.
    """
    busy: dict[str, int] = dict.fromkeys(problem.devices, 0)
    sent = transfers = 0
    for span in (span for one in timeline.cycle for span in one.spans):
        if span.kind == "operator":
            busy[span.resource] += span.end_ns - span.start_ns
        else:
            transfers += 1
            sent += span.bytes or 0
    used = len({device for one in timeline.cycle for device in one.placement.values()})
    stream = {} if len(timeline.cycle) == 1 else {"replicas": len(timeline.cycle), "latency_ns": timeline.latency_ns}
    if "reason" in timeline.provenance:
        stream["reason"] = timeline.provenance["reason"]
    return {
        "status": timeline.status,
        "makespan_ns": timeline.makespan_ns,
        "period_ns": timeline.period_ns,
        "objective_ns": timeline.objective_ns,
        **stream,
        "lower_bound_ns": timeline.lower_bound_ns,
        "gap": timeline.gap,
        "network": problem.network,
        "operators": problem.n_operators,
        "devices": problem.n_devices,
        "devices_used": used,
        "transfers": transfers,
        "bytes_sent": sent,
        "busy_ns": busy if len(busy) <= 64 else {},
        "cost_share": timeline.provenance.get("cost_share", {}),
    }


def run(key: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """Place one run; return its outcome and the seconds it took. A failure is an outcome with its error."""
    return guarded(lambda: _place(key))


def _place(key: Mapping[str, Any]) -> dict[str, Any]:
    from moirai_sim.policies.base import Request
    from moirai_sim.policies.run import place

    problem = load(key["model"], key["cluster"], key["network"], key["memory_scale"])
    latency, rate = key.get("max_latency"), key.get("min_throughput")
    request = Request(
        objective=key["objective"],
        time_limit_s=key["time_limit_s"],
        seed=key["seed"],
        replicas=key.get("replicas", 1),
        max_latency_ns=None if latency is None else parse_ns(latency),
        max_period_ns=None if rate is None else parse_period_ns(rate),
    )
    return outcome(problem, place(problem, key["policy"], request))


def guarded(work: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], float]:
    """Return the outcome of some work, or its failure as an outcome, and the seconds it took."""
    started = time.perf_counter()
    try:
        found = work()
    except Exception as error:  # noqa: BLE001 - one broken run must not end a study of thousands
        found = failed(error)
    return found, time.perf_counter() - started


def failed(error: Exception) -> dict[str, Any]:
    """Return a failure as an outcome; what is no error of ours is a bug of ours."""
    if isinstance(error, MoiraiError):
        return {"status": "error", "error": str(error), "kind": type(error).__name__}
    return {"status": "error", "error": f"{type(error).__name__}: {error}", "kind": "InternalError"}
