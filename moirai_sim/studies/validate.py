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
from moirai_sim.studies.runs import cluster_figures, source_digest
from moirai_sim.studies.store import Store, digest
from moirai_sim.studies.study import ValidateStudy, read_study
from moirai_sim.studies.validate_prices import (
    Priced,
    calibrated,
    device_model,
    families,
    kernel_of,
    machine,
    model_source,
    price_in_place,
    types_of,
)
from moirai_sim.studies.validate_summary import case_of, interval, summarise

if TYPE_CHECKING:
    from moirai_sim.clusters.cluster import Cluster
    from moirai_sim.execution.cuts import InPlace
    from moirai_sim.execution.measure import Loaded
    from moirai_sim.execution.workers import Workers
    from moirai_sim.placement import Placement
    from moirai_sim.problem import PlacementProblem
    from moirai_sim.timeline import Span, Timeline

_HELD_BYTES = 3 * 2**30
"""Weights that the workers hold at once; placements of larger models are measured in several batches."""


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
    sources = [model_source(model) for model in study.models]
    store = Store(out)
    store.open(study.model_dump(mode="json"))
    names = []
    for cluster_name, plain in clusters.items():
        cluster = calibrated(plain, sources, study, out) if study.calibrate else plain
        names += _run_cluster(cluster_name, cluster, sources, study, store)
    store.keep(names)
    results = list(store.read(names))
    summary = summarise(results, study.seed) | {"machine": machine()}
    write_whole(out / "summary.json", json.dumps(summary, indent=1, sort_keys=True) + "\n")
    failed = [result for result in results if result["outcome"]["status"] != "measured"]
    return {"summary": summary, "cases": [case_of(result) for result in results], "failed": len(failed)}


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
    from moirai_sim.execution.cuts import ROUNDS, InPlace
    from moirai_sim.execution.measure import UNDISTURBED, load, load_subject
    from moirai_sim.graphs.load import load_graph
    from moirai_sim.sources import build_problem

    fixed = {
        "model": source,
        "cluster": cluster_name,
        "repeats": study.repeats,
        "in_flight": study.in_flight,
        "seed": study.seed,
        "calibrate": study.calibrate,
        "time_limit_s": study.time_limit_s,
        "version": moirai_sim.__version__,
    }
    marks = fixed | {"model": source_digest(source), "cluster": cluster_figures(cluster)}
    done = store.folder / "done" / f"{digest(marks | {'placements': _asked_for(study)})[:24]}.json"
    if done.is_file():
        return list(json.loads(done.read_text(encoding="utf-8")))
    graph = load_graph(source)
    problem = build_problem(graph, cluster)
    priced = Priced(problem, device_model(cluster, 0))
    outcomes: dict[str, dict[str, Any]] = {}
    timelines: dict[str, Timeline] = {}
    candidates: list[Candidate] = []
    failure: dict[str, Any] = {}
    try:
        subject = load_subject(source, graph)
        in_place = InPlace(workers, subject, types_of(problem)) if study.calibrate else None
        if in_place is not None:
            for _ in range(ROUNDS):
                in_place.round()
            priced = price_in_place(problem, cluster, in_place, source)
            problem = priced.problem
            in_place.forget()
        family = families(problem, graph)
        candidates = list(_candidates(priced, study))
        weights = sum(operator.weight_bytes for operator in graph)
        size = max(1, int(_HELD_BYTES // max(weights, 1)))
        runs: dict[str, list[tuple[int, Timeline, float]]] = {}
        for start in range(0, len(candidates), size):
            batch = candidates[start : start + size]
            loaded = {c.name: load(workers, subject, problem, c.placement, in_flight=study.in_flight) for c in batch}
            runs |= _interleaved(loaded, study, in_place)
            for one in loaded.values():
                one.close()
        if in_place is not None:
            # The placements were chosen by older prices; what is predicted is the machine as it was while they ran.
            priced = price_in_place(problem, cluster, in_place, source)
            in_place.close()
            candidates = [_predicted(priced, study, c.name, c.placement) for c in candidates]
        for candidate in candidates:
            own = sorted(runs[candidate.name], key=lambda run: run[0])
            middle = own[len(own) // 2][1]
            timelines[candidate.name] = replace(middle, policy=candidate.name, network=problem.network)
            took = [ns for ns, _, _ in runs[candidate.name]]
            disturbed = float(np.mean([share > UNDISTURBED for _, _, share in runs[candidate.name]]))
            outcome = _outcome(priced.problem, candidate, middle, took, family, study.seed)
            outcomes[candidate.name] = outcome | {"disturbed": disturbed}
    except MoiraiError as error:
        failure = {"status": "error", "error": str(error), "kind": type(error).__name__}
        candidates = candidates or list(_candidates(priced, study))
    names = []
    for candidate in candidates:
        key = fixed | {"placement": candidate.name}
        name = digest(marks | {"placement": candidate.name})[:24]
        store.write(name, key, outcomes.get(candidate.name, failure), 0.0)
        candidate.predicted.write(store.folder / "timelines" / f"{name}-predicted.json")
        if candidate.name in timelines:
            timelines[candidate.name].write(store.folder / "timelines" / f"{name}-measured.json")
        names.append(name)
    if not failure:
        write_whole(done, json.dumps(names) + "\n")
    return names


def _asked_for(study: ValidateStudy) -> list[Any]:
    return [study.policies, study.random_placements, study.bad_placements]


def _candidates(priced: Priced, study: ValidateStudy) -> Iterator[Candidate]:
    """Iterate over the placements of a model: of the policies, random ones, and bad ones made by rule."""
    from moirai_sim.placement import Placement, placement_from_timeline
    from moirai_sim.policies.base import Request
    from moirai_sim.policies.run import place
    from moirai_sim.simulation.engine import simulate

    problem = priced.problem

    def candidate(name: str, timeline: Timeline) -> Candidate:
        return _predicted(priced, study, name, placement_from_timeline(problem, timeline))

    def simulated(name: str, device: Any) -> Candidate:  # noqa: ANN401 - an array
        return candidate(name, simulate(problem, Placement(device), policy=name))

    for policy in study.policies:
        timeline = place(problem, policy, Request(time_limit_s=study.time_limit_s, seed=study.seed))
        if timeline.spans:
            yield candidate(policy, timeline)
    kernel = kernel_of(problem)
    for number in range(study.random_placements):
        rng = np.random.default_rng((study.seed, number))
        yield simulated(f"random-{number + 1}", rng.integers(0, problem.n_devices, problem.n_operators)[kernel])
    position = np.empty(problem.n_operators, dtype=np.int64)
    position[problem.topological_order] = np.arange(problem.n_operators)
    for number in range(study.bad_placements):
        yield simulated(f"alternate-{2**number}", (position >> number)[kernel] % problem.n_devices)


def _predicted(priced: Priced, study: ValidateStudy, name: str, placement: Placement) -> Candidate:
    """Return a placement with what is predicted of it."""
    predicted = priced.predict(placement, name)
    if study.in_flight == 1:
        return Candidate(name, placement, predicted, predicted.makespan_ns)
    return Candidate(name, placement, predicted, priced.predict_period_ns(placement, study.in_flight, _requests(study)))


def _requests(study: ValidateStudy) -> int:
    """Return the length of a stream: long enough that filling and draining do not show."""
    return 10 * study.in_flight


def _interleaved(
    loaded: dict[str, Loaded], study: ValidateStudy, in_place: InPlace | None
) -> dict[str, list[tuple[int, Timeline, float]]]:
    """Run every placement once a round: a burst of requests, of which the first, that warms the caches, does not count.

    The model's operators are timed in each round too: a machine that is slow for a while is so for both.

    Returns
    -------
    dict
        A list of (ns, timeline, share disturbed) a placement: makespans, or for streams the mean time between two
        answers after a tenth of the requests, with the timeline of the first request.
    """
    runs: dict[str, list[tuple[int, Timeline, float]]] = {name: [] for name in loaded}
    for number in range(study.repeats + 1):
        if number and in_place is not None:
            in_place.round()
        for name, one in loaded.items():
            if not number:
                one.run()
                one.check()
            elif study.in_flight == 1:
                burst = sorted(one.run_hot(), key=lambda run: run.makespan_ns)
                run = burst[len(burst) // 2]
                timeline = one.timeline(run.origin, run.records)
                runs[name].append((run.makespan_ns, timeline, run.disturbed))
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
