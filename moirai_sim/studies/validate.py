"""Predicted against measured: the study that says how far the simulator can be trusted on this machine.

Operators are profiled one by one and links by themselves; no placement is seen before it is predicted. Only the time of
each whole model in a plain session enters the calibration (the operators are scaled to add up to it), so placements on
one device are easier than the others: ``split_median_ape`` leaves them out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import moirai_sim
from moirai_sim.errors import InputError, MoiraiError
from moirai_sim.files import write_whole
from moirai_sim.studies.runs import source_digest
from moirai_sim.studies.store import Store, digest
from moirai_sim.studies.study import ValidateStudy, read_study
from moirai_sim.studies.validate_summary import case_of, interval, summarise

if TYPE_CHECKING:
    import pandas as pd

    from moirai_sim.clusters.cluster import Cluster
    from moirai_sim.execution.measure import Loaded
    from moirai_sim.execution.workers import Workers
    from moirai_sim.graphs.operator import OperatorGraph
    from moirai_sim.placement import Placement
    from moirai_sim.problem import PlacementProblem
    from moirai_sim.simulation.options import SimulationOptions
    from moirai_sim.timeline import Span, Timeline

_HELD_BYTES = 3 * 2**30
"""Weights that the workers hold at once; placements of larger models are measured in several batches."""
_LINKS = 4
"""Pairs of devices whose crossings are timed; those of one machine are taken to be equal."""
READER_SHARE = 0.9
"""Share of a crossing through shared memory that its reader spends: the message is a token in a pipe, the rest is one
more call of the backend and data that lie in the cache of another core. Chosen on the models of the quickstart."""
_FREE_BANDWIDTH = 1e12
"""Of a hand-over in shared memory: the calibrated time is all there is, nothing is shared."""


@dataclass(frozen=True)
class Candidate:
    """A placement to be measured, with its prediction."""

    name: str
    placement: Placement
    predicted: Timeline
    """Of one request."""
    predicted_ns: int
    """The makespan; for a stream the time between two answers."""


def validate(study_path: Path, out: Path) -> dict[str, Any]:
    """Run a study of kind ``validate``.

    Parameters
    ----------
    study_path
        The study file.
    out
        The results folder; one result a case, both timelines of each, and ``summary.json``.

    Returns
    -------
    dict
        ``summary`` (the figures of docs/reference), ``cases`` (one object a case) and ``failed``, their number.

    Raises
    ------
    InputError
        If the study is wrong or needs devices that are not here.
    """
    from moirai_sim.clusters.reader import read_cluster
    from moirai_sim.execution.workers import device_cores

    study = read_study(study_path, "validate")
    if not isinstance(study, ValidateStudy):
        raise InputError(f"{study_path}: kind: must be 'validate'")
    clusters = {name: read_cluster(name) for name in study.clusters}
    for cluster in clusters.values():
        for device in cluster.devices:
            device_cores(device)
    sources = [_source(model) for model in study.models]
    store = Store(out)
    store.open(study.model_dump(mode="json"))
    names = []
    for cluster_name, plain in clusters.items():
        cluster = _calibrated(plain, sources, study, out) if study.calibrate else plain
        names += _run_cluster(cluster_name, cluster, sources, study, store)
    results = list(store.read(names))
    summary = summarise(results, study.seed) | {"machine": _machine()}
    write_whole(out / "summary.json", json.dumps(summary, indent=1, sort_keys=True) + "\n")
    failed = [result for result in results if result["outcome"]["status"] != "measured"]
    return {"summary": summary, "cases": [case_of(result) for result in results], "failed": len(failed)}


def _source(model: str) -> str:
    """Return a model source; the light models inside the ``onnx`` package go by their bare names."""
    from moirai_sim.graphs.light import light_models

    return str(light_models().get(model, model))


def _calibrated(cluster: Cluster, sources: Sequence[str], study: ValidateStudy, out: Path) -> Cluster:
    """Profile this machine's operators and links, and return the cluster priced by what was found."""
    from moirai_sim.costs.calibrate import calibrate
    from moirai_sim.profiling.operators import profile_operators
    from moirai_sim.profiling.schema import write_profile
    from moirai_sim.units import parse_ns

    folder = out / "calibration" / cluster.name
    profiles = [folder / "links.parquet"]
    write_profile(_crossings(cluster), profiles[0], kind="links", metadata=_machine())
    addresses: dict[int, str] = {}  # by threads: cores of one machine are taken to be equal, so one profile serves all
    for device in cluster.devices:
        addresses.setdefault(device.threads, f"cpu:{device.address.partition(':')[2]}")
    budget_s = parse_ns(str(study.calibrate)) / 1e9 / len(addresses)
    for threads, address in sorted(addresses.items()):
        operators = profile_operators(sources, address, budget_s=budget_s)
        profiles.append(folder / f"operators-{threads}.parquet")
        write_profile(operators, profiles[-1], metadata=operators.attrs["metadata"])
    model = (folder / "model").absolute()
    calibrate(profiles, model, name=f"{cluster.name}-here", seed=study.seed)
    return priced_by(cluster, model)


def priced_by(cluster: Cluster, model: Path) -> Cluster:
    """Return a cluster whose operators and transfers are priced by a calibrated model.

    Links in one machine are memory: what a crossing takes is all there is, and nothing is shared. Emulated links keep
    their rates, since flows do share them.
    """
    links = cluster.links
    if not _emulated(cluster):
        links = tuple(replace(link, latency_ns=0, bandwidth_bytes_per_s=_FREE_BANDWIDTH) for link in links)
    return replace(
        cluster,
        devices=tuple(replace(device, cost_model=str(model)) for device in cluster.devices),
        links=links,
        link_model=str(model),
    )


def device_model(cluster: Cluster) -> SimulationOptions:
    """Return how the devices of a measured cluster differ from plain ones: who spends the time of a crossing."""
    from moirai_sim.simulation.options import SimulationOptions

    return SimulationOptions(reader_share=0.0 if _emulated(cluster) else READER_SHARE)


def _emulated(cluster: Cluster) -> bool:
    from moirai_sim.execution.workers import EMULATED

    return any(device.address.startswith(EMULATED) for device in cluster.devices)


def _crossings(cluster: Cluster) -> pd.DataFrame:
    """Return a profile of links: what crossing costs between neighbours, on the workers that will run placements."""
    import itertools

    import pandas as pd

    from moirai_sim.execution.hops import time_hops
    from moirai_sim.execution.workers import Workers
    from moirai_sim.profiling.schema import statistics

    rows = []
    with Workers(cluster) as workers:
        for source, target in list(itertools.pairwise(workers.names))[:_LINKS]:
            for hop in time_hops(workers, source, target):
                pair = {"source_device": source, "target_device": target, "bytes": hop.bytes}
                fixed = {"collective": "send", "participants": 2, "source": "measured"}
                rows.append(pair | fixed | statistics(hop.times_s))
    return pd.DataFrame(rows)


def _run_cluster(name: str, cluster: Cluster, sources: Sequence[str], study: ValidateStudy, store: Store) -> list[str]:
    """Measure all models on one cluster; return the names of the results."""
    from moirai_sim.execution.workers import Workers
    from moirai_sim.progress import progress

    names: list[str] = []
    workers = Workers(cluster)
    try:
        with progress(f"validate on {name}", len(sources)) as step:
            for source in sources:
                if not workers.processes:  # a failed run ends all workers
                    workers = Workers(cluster)
                names += _run_model(source, name, cluster, workers, study, store)
                step()
    finally:
        workers.close()
    return names


def _run_model(
    source: str, cluster_name: str, cluster: Cluster, workers: Workers, study: ValidateStudy, store: Store
) -> list[str]:
    from moirai_sim.execution.measure import UNDISTURBED, load, load_subject
    from moirai_sim.graphs.load import load_graph
    from moirai_sim.sources import build_problem

    graph = load_graph(source)
    problem = build_problem(graph, cluster)
    family = _families(problem, graph)
    candidates = list(_candidates(problem, study, device_model(cluster)))
    weights = sum(operator.weight_bytes for operator in graph)
    size = max(1, int(_HELD_BYTES // max(weights, 1)))
    keys = {
        candidate.name: {
            "model": source,
            "cluster": cluster_name,
            "placement": candidate.name,
            "repeats": study.repeats,
            "in_flight": study.in_flight,
            "seed": study.seed,
            "version": moirai_sim.__version__,
        }
        for candidate in candidates
    }
    names = {name: digest(key | {"model": source_digest(source)})[:24] for name, key in keys.items()}
    outcomes: dict[str, dict[str, Any]] = {}
    timelines: dict[str, Timeline] = {}
    try:
        subject = load_subject(source, graph)
        for start in range(0, len(candidates), size):
            batch = candidates[start : start + size]
            loaded = {c.name: load(workers, subject, problem, c.placement, in_flight=study.in_flight) for c in batch}
            runs = _interleaved(loaded, study)
            for candidate in batch:
                own = sorted(runs[candidate.name], key=lambda run: run[0])
                middle = own[len(own) // 2][1]
                timelines[candidate.name] = replace(middle, policy=candidate.name, network=problem.network)
                took = [ns for ns, _, _ in runs[candidate.name]]
                disturbed = float(np.mean([share > UNDISTURBED for _, _, share in runs[candidate.name]]))
                outcome = _outcome(problem, candidate, middle, took, family, study.seed)
                outcomes[candidate.name] = outcome | {"disturbed": disturbed}
            for one in loaded.values():
                one.close()
    except MoiraiError as error:
        failure = {"status": "error", "error": str(error), "kind": type(error).__name__}
        outcomes = {candidate.name: outcomes.get(candidate.name, failure) for candidate in candidates}
    for candidate in candidates:
        name = names[candidate.name]
        store.write(name, keys[candidate.name], outcomes[candidate.name], 0.0)
        candidate.predicted.write(store.folder / "timelines" / f"{name}-predicted.json")
        if candidate.name in timelines:
            timelines[candidate.name].write(store.folder / "timelines" / f"{name}-measured.json")
    return list(names.values())


def _candidates(problem: PlacementProblem, study: ValidateStudy, options: SimulationOptions) -> Iterator[Candidate]:
    """Iterate over the placements of a model: of the policies, random ones, and bad ones made by rule."""
    from moirai_sim.placement import Placement, placement_from_timeline
    from moirai_sim.policies.base import Request
    from moirai_sim.policies.run import place
    from moirai_sim.simulation.engine import simulate
    from moirai_sim.simulation.workloads import serve

    def candidate(name: str, timeline: Timeline) -> Candidate:
        placement = placement_from_timeline(problem, timeline)
        if study.in_flight == 1:
            predicted = simulate(problem, placement, options=options, policy=name)
            return Candidate(name, placement, predicted, predicted.makespan_ns)
        stream = serve(problem, placement, in_flight=study.in_flight, requests=_requests(study), options=options)
        return Candidate(name, placement, timeline, round(1e9 / stream.throughput_per_s))

    def simulated(name: str, device: Any) -> Candidate:  # noqa: ANN401 - an array
        return candidate(name, simulate(problem, Placement(device), policy=name))

    for policy in study.policies:
        timeline = place(problem, policy, Request(time_limit_s=study.time_limit_s, seed=study.seed))
        if timeline.spans:
            yield candidate(policy, timeline)
    kernel = _kernel_of(problem)
    for number in range(study.random_placements):
        rng = np.random.default_rng((study.seed, number))
        yield simulated(f"random-{number + 1}", rng.integers(0, problem.n_devices, problem.n_operators)[kernel])
    position = np.empty(problem.n_operators, dtype=np.int64)
    position[problem.topological_order] = np.arange(problem.n_operators)
    for number in range(study.bad_placements):
        yield simulated(f"alternate-{2**number}", (position >> number)[kernel] % problem.n_devices)


def _kernel_of(problem: PlacementProblem) -> Any:  # noqa: ANN401 - an array
    """Return a representative operator of each operator's co-location group, [n]."""
    kernel = np.arange(problem.n_operators)
    if problem.colocation is not None:
        for group in range(int(problem.colocation.max()) + 1):
            members = np.flatnonzero(problem.colocation == group)
            kernel[members] = members[:1]
    return kernel


def _requests(study: ValidateStudy) -> int:
    """Return the length of a stream: long enough that filling and draining do not show."""
    return 10 * study.in_flight


def _interleaved(loaded: dict[str, Loaded], study: ValidateStudy) -> dict[str, list[tuple[int, Timeline, float]]]:
    """Run every placement once a round; each measured run follows one that warms the caches and is thrown away.

    Returns
    -------
    dict
        A list of (ns, timeline, share disturbed) a placement: makespans, or for streams the mean time between two
        answers after a tenth of the requests, with the timeline of the first request.
    """
    runs: dict[str, list[tuple[int, Timeline, float]]] = {name: [] for name in loaded}
    for number in range(study.repeats + 1):
        for name, one in loaded.items():
            one.run()
            if not number:
                one.check()
            elif study.in_flight == 1:
                run = one.run_undisturbed()
                timeline = one.timeline(run.origin, run.records)
                runs[name].append((timeline.makespan_ns, timeline, run.disturbed))
            else:
                requests = _requests(study)
                run = one.run_undisturbed([0] * requests, limit_s=300.0)
                ends = np.zeros(requests, dtype=np.int64)
                for record in run.records.values():
                    for request, _, _, _, end in record.runs:
                        ends[request] = max(ends[request], end)
                ends.sort()
                warm = requests // 10
                period = int((ends[-1] - ends[warm - 1]) / (requests - warm))
                runs[name].append((period, one.timeline(run.origin, run.records), run.disturbed))
    return runs


def _outcome(
    problem: PlacementProblem,
    candidate: Candidate,
    middle: Timeline,
    took: list[int],
    family: dict[str, str],
    seed: int,
) -> dict[str, Any]:
    low, high = interval(took, seed)
    halves = [float(np.median(took[i::2])) for i in (0, 1)]
    transfers = [span for span in middle.spans if span.kind == "transfer"]
    return {
        "status": "measured",
        "predicted_ns": candidate.predicted_ns,
        "measured_ns": int(np.median(took)),
        "low_ns": low,
        "high_ns": high,
        "repeats_ns": took,
        "noise_ape": abs(halves[0] - halves[1]) / max(halves[1], 1.0),
        "devices_used": len(set(middle.placement.values())),
        "parts": sum(span.kind == "operator" for span in middle.spans),
        "transfers": len(transfers),
        "families": _by_family(problem, candidate.placement, middle, family),
        "links": _by_link(candidate.predicted, transfers),
        "cost_share": dict(problem.cost_share),
    }


def _families(problem: PlacementProblem, graph: OperatorGraph) -> dict[str, str]:
    """Return the family of every operator: that of the heaviest one of the kernel it belongs to."""
    from moirai_sim.costs.families import family

    kernel = _kernel_of(problem)
    heaviest: dict[int, str] = {}
    for i, name in enumerate(problem.operators):
        best = heaviest.setdefault(int(kernel[i]), name)
        if graph[name].flops > graph[best].flops:
            heaviest[int(kernel[i])] = name
    main = {name: graph[heaviest[int(kernel[i])]] for i, name in enumerate(problem.operators)}
    return {name: family(one.op_type, [tensor.shape for tensor in one.inputs]) for name, one in main.items()}


def _by_family(
    problem: PlacementProblem, placement: Placement, measured: Timeline, family: dict[str, str]
) -> dict[str, list[float]]:
    """Return predicted ns, measured ns and parts by family; a part's time is shared out as it was predicted."""
    operator_ns = {
        name: int(problem.operator_ns[i, problem.device_type[k]])
        for i, (name, k) in enumerate(zip(problem.operators, placement.device, strict=True))
    }
    sums: dict[str, list[float]] = {}
    for span in measured.spans:
        total = sum(operator_ns[name] for name in span.operators)
        for name in span.operators:
            if operator_ns[name]:
                row = sums.setdefault(family[name], [0.0, 0.0, 0])
                row[0] += operator_ns[name]
                row[1] += (span.end_ns - span.start_ns) * operator_ns[name] / total
                row[2] += 1
    return sums


def _by_link(predicted: Timeline, transfers: Sequence[Span]) -> dict[str, list[float]]:
    """Return predicted ns, measured ns and transfers by link.

    What a crossing costs beyond the message itself (a cold cache at the reader) shows in the families, not here.
    """
    expected = {(s.producer, s.target): s.end_ns - s.start_ns for s in predicted.spans if s.kind == "transfer"}
    sums: dict[str, list[float]] = {}
    for span in transfers:
        row = sums.setdefault(span.resource, [0.0, 0.0, 0])
        row[0] += expected.get((span.producer, span.target), 0)
        row[1] += span.end_ns - span.start_ns
        row[2] += 1
    return sums


def _machine() -> dict[str, Any]:
    from moirai_sim.profiling import telemetry

    return {"hardware": telemetry.hardware(), "versions": telemetry.versions()}
