"""Predicted against measured: the study that says how far the simulator can be trusted on this machine.

Operators are profiled one by one and links by themselves; no placement is seen before it is predicted. Only the time of
each whole model in a plain session enters the calibration (the operators are scaled to add up to it), so placements on
one device are easier than the others: ``split_median_ape`` leaves them out.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import moirai_sim
from moirai_sim.errors import InputError, MoiraiError
from moirai_sim.evidence import cost_share
from moirai_sim.execution.measure import nearest_run, typical_ns, undisturbed
from moirai_sim.files import write_whole
from moirai_sim.studies.in_place import emulated, in_place_on, priced_as_it_is
from moirai_sim.studies.runs import cluster_digest, failed, forget, source_digest
from moirai_sim.studies.store import Store, digest
from moirai_sim.studies.study import ValidateStudy, read_study
from moirai_sim.studies.validate_prices import (
    calibrated,
    families,
    kept_in_place,
    kernel_of,
    machine,
    made_from,
    model_source,
    price_in_place,
)
from moirai_sim.studies.validate_summary import PERCENTILES, cases_of, summarise

if TYPE_CHECKING:
    from moirai_sim.clusters.cluster import Cluster
    from moirai_sim.execution.cuts import InPlace
    from moirai_sim.execution.measure import Loaded, Run, Timed
    from moirai_sim.execution.workers import Workers
    from moirai_sim.placement import Placement
    from moirai_sim.simulation.workloads import Service
    from moirai_sim.studies.in_place import Priced
    from moirai_sim.timeline import Span, Timeline

_MORE_ROUNDS, _LAST_ROUNDS = 3, 8
"""Rounds at most, as a multiple of those asked for, until a placement has so many undisturbed ones, or any at all."""
_LOADS = 2
"""How often a placement is loaded: where its memory lies makes a percent or two, which runs of one load never show."""
_RESAMPLES = 200
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
    latency_ns: dict[str, float] = field(default_factory=dict)
    """Of a stream: percentiles of the time from a request's admission to its answer, by `PERCENTILES`."""
    also: tuple[str, ...] = ()
    """Other names of the same placement."""


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

    forget()
    study = read_study(study_path, "validate")
    if not isinstance(study, ValidateStudy):
        raise InputError(f"{study_path}: kind: must be 'validate'")
    clusters = {name: read_cluster(name) for name in study.clusters}
    _check(clusters, study)
    sources = list(dict.fromkeys(model_source(model) for model in study.models))
    store = Store(out)
    store.open(study.model_dump(mode="json"))
    (out / "summary.json").unlink(missing_ok=True)  # until this study has its own
    names = []
    for cluster_name, plain in clusters.items():
        cluster = calibrated(plain, sources, study, out) if study.calibrate else plain
        names += _run_cluster(cluster_name, cluster, sources, study, store)
    names = list(dict.fromkeys(names))  # two files of the same content are one model
    store.ask(names)
    results = list(store.read(names))
    summary = summarise(results, study.seed) | {"machine": machine()}
    write_whole(out / "summary.json", json.dumps(summary, indent=1, sort_keys=True) + "\n")
    failures = sum(result["outcome"]["status"] == "error" for result in results)
    return {"summary": summary, "cases": cases_of(results), "failed": failures}


def _check(clusters: Mapping[str, Cluster], study: ValidateStudy) -> None:
    """Refuse what cannot be measured here before anything of an earlier study in the folder is touched.

    Raises
    ------
    InputError
        With everything that is wrong.
    """
    from moirai_sim.execution.workers import check_runnable

    problems: list[str] = []
    for cluster in clusters.values():
        try:
            check_runnable(cluster)
        except InputError as error:
            problems += error.problems
        if study.calibrate and len(cluster.devices) < 2:
            problems.append(f"cluster '{cluster.name}': calibration times tensors between devices; name two at least")
    names = [cluster.name for cluster in clusters.values()]
    problems += [
        f"clusters: two are called '{name}'; give each a name of its own"
        for name in sorted({name for name in names if names.count(name) > 1})
    ]
    if problems:
        raise InputError(problems)


def _run_cluster(name: str, cluster: Cluster, sources: Sequence[str], study: ValidateStudy, store: Store) -> list[str]:
    """Measure all models on one cluster; return the names of the results."""
    from moirai_sim.execution.workers import Workers
    from moirai_sim.progress import progress

    names: list[str] = []
    workers = Workers(cluster)
    try:
        with progress(f"validate on {name}", len(sources)) as step:
            for source in sources:
                if not workers.processes:  # a failure ends all workers
                    workers = Workers(cluster)
                names += _run_model(source, name, cluster, workers, study, store)
                step()
    finally:
        workers.close()
    return names


def _run_model(
    source: str, cluster_name: str, cluster: Cluster, workers: Workers, study: ValidateStudy, store: Store
) -> list[str]:
    from moirai_sim.execution.cuts import ROUNDS
    from moirai_sim.execution.measure import load, load_subject
    from moirai_sim.graphs.load import load_graph
    from moirai_sim.sources import build_problem
    from moirai_sim.units import parse_ns

    fixed = {
        "model": source,
        "cluster": cluster_name,
        "repeats": study.repeats,
        "patience": study.patience,
        "budget": study.budget,
        "in_flight": study.in_flight,
        "seed": study.seed,
        "calibrate": study.calibrate,
        "time_limit_s": study.time_limit_s,
        "version": moirai_sim.__version__,
    }
    marks = fixed | {
        "model": source_digest(source),
        "cluster": made_from(cluster) if study.calibrate else cluster_digest(cluster_name),
        "machine": machine(),
        "placements": _asked_for(study),
    }
    done = store.folder / "done" / f"{digest(marks)[:24]}.json"
    if done.is_file():
        names: list[str] = json.loads(done.read_text(encoding="utf-8"))
        # Another study in this folder may have calibrated anew since.
        if all(map(store.has, names)) and (not study.calibrate or kept_in_place(cluster, source).is_file()):
            return names
        done.unlink()
    graph = load_graph(source)
    problem = build_problem(graph, cluster)
    priced = by_profile = priced_as_it_is(problem, cluster)
    outcomes: dict[str, dict[str, Any]] = {}
    timelines: dict[str, Timeline] = {}
    candidates: list[Candidate] = []
    refused: dict[str, dict[str, Any]] = {}
    failure: dict[str, Any] = {}
    patience_s = parse_ns(study.patience) / 1e9 if study.in_flight == 1 else 0.0
    try:
        subject = load_subject(source, graph)
        in_place = in_place_on(workers, subject, problem, cluster, patience_s) if study.calibrate else None
        if in_place is not None:
            for _ in range(ROUNDS):
                in_place.round()
            priced = price_in_place(problem, cluster, in_place, source)
            problem = priced.problem
            in_place.forget()
        family = families(problem, graph)
        candidates, refused = _candidates(priced, study)
        foreseen_ns = {
            c.name: {
                "before": c.predicted_ns,
                "profile": _predicted(by_profile, study, c.name, c.placement).predicted_ns,
            }
            for c in candidates
        }
        weights = sum(operator.weight_bytes for operator in graph)
        size = max(1, int(_HELD_BYTES // max(weights * _LOADS, 1)))
        measured: dict[str, Measured] = {}
        give_up = time.monotonic() + (parse_ns(study.budget) / 1e9 if study.budget else math.inf)
        for start in range(0, len(candidates), size):
            batch = candidates[start : start + size]
            loaded = {
                c.name: [load(workers, subject, problem, c.placement, in_flight=study.in_flight) for _ in range(_LOADS)]
                for c in batch
            }
            measured |= _interleaved(loaded, study, in_place, patience_s, give_up)
            for one in itertools.chain.from_iterable(loaded.values()):
                one.close()
        if in_place is not None:
            # The placements were chosen by older prices; what is predicted is the machine as it was while they ran.
            priced = price_in_place(problem, cluster, in_place, source)
            alike = in_place.alike()
            measured = {name: found.only(alike) for name, found in measured.items()}
            in_place.close()
            candidates = [_predicted(priced, study, c.name, c.placement, c.also) for c in candidates]
        for candidate in candidates:
            found = measured[candidate.name]
            outcome, middle = _outcome(priced, candidate, found, patience_s > 0, family, study.seed)
            outcomes[candidate.name] = outcome | {"foreseen_ns": foreseen_ns[candidate.name]}
            timelines[candidate.name] = replace(middle, policy=candidate.name, network=problem.network)
    except Exception as error:  # noqa: BLE001 - one model must not end a study of many
        workers.close()  # with all that they hold; the next model has new ones
        failure = failed(error)
        if not candidates:
            try:
                candidates, refused = _candidates(priced, study)
            except Exception:  # noqa: BLE001 - the first one says why
                refused = {"all": failure}
    predicted = {candidate.name: candidate.predicted for candidate in candidates}
    outcomes = {name: outcomes.get(name, failure) for name in predicted}
    outcomes |= refused
    names = []
    for name, outcome in outcomes.items():
        names.append(digest(marks | {"placement": name})[:24])
        store.write(names[-1], fixed | {"placement": name}, outcome, 0.0)
        for kind, known in (("predicted", predicted), ("measured", timelines)):
            if name in known:
                known[name].write(store.folder / "timelines" / f"{names[-1]}-{kind}.json")
    if not failure:
        write_whole(done, json.dumps(names) + "\n")
    return names


def _asked_for(study: ValidateStudy) -> list[Any]:
    return [study.policies, study.random_placements, study.bad_placements]


def _candidates(priced: Priced, study: ValidateStudy) -> tuple[list[Candidate], dict[str, dict[str, Any]]]:
    """Return the placements of a model, each once, and the outcomes of policies that gave none.

    They are those of the policies, random ones, and bad ones made by rule. Random ones put runs of operators on one
    device: from a few long runs to a device drawn for each kernel, so that they differ in more than luck.
    """
    from moirai_sim.placement import Placement, placement_from_timeline
    from moirai_sim.policies.base import Request
    from moirai_sim.policies.run import place
    from moirai_sim.simulation.engine import simulate

    problem = priced.problem
    found: dict[Any, Candidate] = {}
    refused: dict[str, dict[str, Any]] = {}

    def add(name: str, timeline: Timeline) -> None:
        placement = placement_from_timeline(problem, timeline)
        free = placement.order is None or len(set(placement.device.tolist())) == 1
        order = None if free else tuple(np.asarray(placement.order).tolist())
        same = tuple(placement.device.tolist()), order  # on one device everything is one part, whatever the order
        if same in found:
            found[same] = replace(found[same], also=(*found[same].also, name))
        else:
            found[same] = _predicted(priced, study, name, placement)

    for policy in study.policies:
        try:
            timeline = place(problem, policy, Request(time_limit_s=study.time_limit_s, seed=study.seed))
        except MoiraiError as error:
            refused[policy] = {"status": "error", "error": str(error)}
            continue
        if timeline.spans:
            add(policy, timeline)
        else:
            reason = timeline.provenance.get("reason", "no placement found")
            refused[policy] = {"status": timeline.status, "reason": str(reason)}
    kernel = kernel_of(problem)
    position = np.empty(problem.n_operators, dtype=np.int64)
    position[problem.topological_order] = np.arange(problem.n_operators)
    for number in range(study.random_placements):
        rng = np.random.default_rng((study.seed, number))
        length = problem.n_operators ** rng.random()  # of a run, in operators: its logarithm is uniform
        runs = ((position + rng.random() * length) // length).astype(np.int64)
        device = rng.integers(0, problem.n_devices, problem.n_operators + 2)[runs]
        add(f"random-{number + 1}", simulate(problem, Placement(device[kernel])))
    for number in range(1, study.bad_placements + 1):  # each kernel by itself is how a model is timed in place
        device = (position >> number)[kernel] % problem.n_devices
        add(f"alternate-{2**number}", simulate(problem, Placement(device)))
    return list(found.values()), refused


def _predicted(
    priced: Priced, study: ValidateStudy, name: str, placement: Placement, also: tuple[str, ...] = ()
) -> Candidate:
    """Return a placement with what is predicted of it."""
    predicted = priced.predict(placement, name)
    if study.in_flight == 1:
        return Candidate(name, placement, predicted, predicted.makespan_ns, also=also)
    stream = priced.predict_stream(placement, study.in_flight, _requests(study))
    latency_ns = {label: stream.percentile_ns(share) for label, share in PERCENTILES.items()}
    return Candidate(name, placement, predicted, round(1e9 / stream.throughput_per_s), latency_ns, also)


def _requests(study: ValidateStudy) -> int:
    """Return the length of a stream: long enough that filling and draining do not show."""
    return 10 * study.in_flight


@dataclass(frozen=True)
class Round:
    """Runs of a placement right after each other."""

    load: int
    """Which of its loads ran."""
    timed_before: int
    """How often the model had been timed in place by then."""
    times: list[Timed]
    """Makespans, or for a stream the mean time between two answers."""
    timeline: Timeline
    """Of the run that took the most usual time; for a stream, of its first request."""
    latency_ns: list[int] = field(default_factory=list)
    """Of a stream's requests."""


@dataclass(frozen=True)
class Measured:
    """What a placement took."""

    rounds: list[Round] = field(default_factory=list)
    alike: float = 1.0
    """The share of all rounds that is left."""

    def undisturbed(self) -> int:
        """Return the number of rounds in which nothing disturbed one of the runs, as if all loads had the fewest."""
        return _LOADS * min(sum(map(undisturbed, own)) for own in self.loads)

    @property
    def loads(self) -> list[list[list[Timed]]]:
        """The rounds of each load."""
        return [[one.times for one in self.rounds if one.load == load] for load in range(_LOADS)]

    def typical_ns(self, *, quiet: bool) -> float:
        """Return what the placement takes: like all times, the median over rounds, which a slow spell cannot move."""
        return typical_ns([one.times for one in self.rounds], quiet=quiet)

    def only(self, alike: Sequence[bool]) -> Measured:
        """Return the rounds before and after which the model, timed in place, was `alike`; all where there are none."""
        left = [one for one in self.rounds if all(alike[max(one.timed_before - 1, 0) : one.timed_before + 1])]
        return Measured(left or self.rounds, len(left) / max(len(self.rounds), 1))


def _interleaved(
    loaded: dict[str, list[Loaded]], study: ValidateStudy, in_place: InPlace | None, patience_s: float, give_up: float
) -> dict[str, Measured]:
    """Run every placement once a round, a burst of requests each time, until each has been left alone often enough.

    Its loads take turns.
    Placements that were disturbed have more rounds than the others, so that quiet moments are used wherever they come;
    none begins after ``give_up``, seconds of the monotonic clock, but those that every placement has.
    The model's operators are timed before each round and after the last, beside streams each time: a machine that is
    slow for a while is so for both.
    """
    found = {name: Measured() for name in loaded}
    for one in itertools.chain.from_iterable(loaded.values()):
        one.run()
        one.check()
    for number in range(study.repeats * (_LAST_ROUNDS if patience_s else 1)):
        if number >= study.repeats and time.monotonic() > give_up:
            break
        wanted = study.repeats if number < study.repeats * _MORE_ROUNDS else 1
        due = [name for name in loaded if number < study.repeats or found[name].undisturbed() < wanted]
        if due and in_place is not None and study.in_flight == 1:
            in_place.round()
        for name in due:
            one = loaded[name][number % _LOADS]
            if in_place is not None and study.in_flight > 1:
                in_place.round()
            timed_before = 0 if in_place is None else in_place.count
            latency_ns: list[int] = []
            if study.in_flight == 1:
                runs = one.run_hot(patience_s=patience_s)
                times = [run.timed for run in runs]
                run = nearest_run(runs, typical_ns([times]))
            else:
                run = one.run_stream(_requests(study))
                stream = served(run, study.in_flight)
                latency_ns = stream.latency_ns.tolist()
                times = [(round(1e9 / stream.throughput_per_s), run.disturbed)]
            timeline = one.timeline(run.origin, run.records)
            found[name].rounds.append(Round(number % _LOADS, timed_before, times, timeline, latency_ns))
    if in_place is not None:
        in_place.round()
    return found


def served(run: Run, in_flight: int) -> Service:
    """Return what the requests of a measured stream experienced.

    One is admitted, and its latency begins, when the one ``in_flight`` before it was answered. Those that were admitted
    at the start are the warm-up.
    """
    from moirai_sim.simulation.workloads import Service

    ends: dict[int, int] = {}
    for record in run.records.values():
        for request, _, _, _, end in record.runs:
            ends[request] = max(ends.get(request, 0), end)
    done = np.array([end for _, end in sorted(ends.items())], dtype=np.int64)
    arrival = np.concatenate([np.full(in_flight, run.origin, dtype=np.int64), done[:-in_flight]])
    return Service(arrival, done, in_flight)


def _outcome(
    priced: Priced, candidate: Candidate, found: Measured, quiet: bool, family: dict[str, str], seed: int
) -> tuple[dict[str, Any], Timeline]:
    """Return what is kept of a case, and the timeline of the run that took about what it takes."""
    rounds = [one.times for one in found.rounds]
    took = [round(typical_ns([times], quiet=quiet)) for times in rounds]
    measured = found.typical_ns(quiet=quiet)
    middle = found.rounds[int(np.argmin([abs(ns - measured) for ns in took]))].timeline
    rng = np.random.default_rng(seed)
    n = len(rounds)
    resampled = ([rounds[i] for i in rng.integers(0, n, n)] for _ in range(_RESAMPLES))
    drawn = [typical_ns(times, quiet=quiet) for times in resampled]
    low, high = np.quantile([*drawn, measured], [0.05, 0.95])
    over_network = priced.problem.cluster is not None and emulated(priced.problem.cluster)
    outcome = {
        "status": "measured",
        "also": list(candidate.also),
        "predicted_ns": candidate.predicted_ns,
        "measured_ns": round(measured),
        "low_ns": math.floor(min(low, measured)),
        "high_ns": math.ceil(max(high, measured)),
        "repeats_ns": took,
        "halves_ns": [round(typical_ns(own or rounds, quiet=quiet)) for own in found.loads],
        "disturbed": 1 - found.alike * float(np.mean([undisturbed(times) for times in rounds])),
        "devices_used": len(set(middle.placement.values())),
        "parts": sum(span.kind == "operator" for span in middle.spans),
        "transfers": sum(span.kind == "transfer" for span in middle.spans),
        "families": _by_family(candidate.predicted, middle, family),
        "links": _by_link(candidate.predicted, middle) if over_network and not candidate.latency_ns else {},
        "cost_share": cost_share(priced.problem, candidate.predicted),
    }
    latency_ns = [ns for one in found.rounds for ns in one.latency_ns]
    if latency_ns:
        outcome["latency_ns"] = {
            name: [candidate.latency_ns[name], float(np.percentile(latency_ns, share))]
            for name, share in PERCENTILES.items()
        }
    return outcome, middle


def _by_family(predicted: Timeline, measured: Timeline, family: dict[str, str]) -> dict[str, list[float]]:
    """Return predicted ns, measured ns and parts by family; a part's time is shared out as it was predicted.

    Both hold all that happens while an operator occupies its device: starting a part, reading what crossed, what
    other devices slow.
    """
    operator_ns = {span.name: span.end_ns - span.start_ns for span in predicted.spans if span.kind == "operator"}
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


def _by_link(predicted: Timeline, measured: Timeline) -> dict[str, list[float]]:
    """Return predicted ns, measured ns and transfers by link, of those that a device stood still for.

    From the end of the operator that writes to the start of the part that reads. Not for tensors in shared memory:
    there a message is a token, and what a crossing costs is spent by its reader, in the families.
    """
    transfer_ns = {
        (span.producer, span.target): span.end_ns - span.ready_ns for span in predicted.spans if span.kind == "transfer"
    }
    read: dict[tuple[str, str], list[Span]] = {}
    for span in measured.spans:
        for name in span.consumers:
            read.setdefault((name, span.target), []).append(span)
    free: dict[str, int] = {}
    sums: dict[str, list[float]] = {}
    for part in sorted((span for span in measured.spans if span.kind == "operator"), key=lambda span: span.start_ns):
        awaited = itertools.chain.from_iterable(read.get((name, part.resource), ()) for name in part.operators)
        last = max(awaited, key=lambda span: span.start_ns, default=None)
        known = last is not None and (last.producer, last.target) in transfer_ns
        if last is not None and known and last.start_ns >= free.get(part.resource, 0):
            row = sums.setdefault(last.resource, [0.0, 0.0, 0])
            row[0] += transfer_ns[last.producer, last.target]
            row[1] += part.start_ns - last.start_ns
            row[2] += 1
        free[part.resource] = part.end_ns
    return sums
