"""Improves a cost model from measured timelines, and says by how much on runs that it did not use.

A ``validate`` study knows what every part of every placement really took. The model's measured operators are scaled by
one factor a family, and its crossings by one factor, both fitted on one half of the placements; the error before and
after is that of the other half, simulated again with the new prices. One factor a family cannot memorise placements.
Factors of families follow the parts, and makespans hang on a few of them: they count as much as the makespans of that
half of the placements say.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moirai_sim.catalog import MODEL_FILES
from moirai_sim.clusters.reader import read_cluster
from moirai_sim.errors import InputError
from moirai_sim.files import folder_in_place_of, write_whole
from moirai_sim.progress import progress
from moirai_sim.studies.store import digest, read_folder

if TYPE_CHECKING:
    from moirai_sim.clusters.cluster import Cluster
    from moirai_sim.studies.in_place import Priced

_LINK_FACTORS = (0.35, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 2.8, 4.0)
_WEIGHTS = (0.0, 0.5, 1.0)
"""How much the factors of families count: they are raised to this power."""
_MIN_CASES = 6
_MIN_PARTS = 8
"""Families seen in fewer parts keep their prices."""


def calibrate_from_runs(folder: Path, out: Path, *, seed: int = 0) -> dict[str, Any]:
    """Fit corrections to a cost model on the runs of a ``validate`` study, and write the corrected model.

    Parameters
    ----------
    folder
        Results of ``validate`` on one cluster that it calibrated itself.
    out
        Folder of the new cost model.
    seed
        Chooses the half of the placements that is used.

    Returns
    -------
    dict
        ``factors`` by family as they count, ``link_factor``, ``cases`` and ``used``, and ``before`` and ``after``:
        median and mean absolute percentage error of the runs that were not used.

    Raises
    ------
    InputError
        If the folder holds no such study, or too few runs to keep half of them apart.
    """
    study, store = read_folder(folder)
    if study["kind"] == "validate" and not (folder / "summary.json").is_file():
        raise InputError(f"{folder}: the study has not finished; run the same validate command again")
    found = [result for result in store.read() if result["outcome"]["status"] == "measured"]
    clusters = sorted({result["key"]["cluster"] for result in found})
    whole = study["kind"] == "validate" and study.get("in_flight", 1) == 1 and study.get("calibrate") is not None
    if not whole or len(clusters) != 1:
        raise InputError(f"{folder}: needs a validate study of single requests that calibrated one cluster")
    calibrated = folder / "calibration" / read_cluster(clusters[0]).name / "model"
    if not calibrated.is_dir():
        raise InputError(f"{calibrated}: is not there; run the same validate command again")
    placements = sorted({result["key"]["placement"] for result in found}, key=lambda name: digest([seed, name]))
    half = set(placements[: len(placements) // 2])
    used = [result for result in found if result["key"]["placement"] in half]
    kept = [result for result in found if result["key"]["placement"] not in half]
    if min(len(used), len(kept)) < _MIN_CASES:
        raise InputError(f"{folder}: {len(found)} runs are too few to keep half of them apart; measure more placements")
    cluster = _priced(clusters[0], calibrated)
    full = _family_factors(used)
    sources = sorted({result["key"]["model"] for result in found})
    with folder_in_place_of(out, MODEL_FILES) as work:
        shutil.copytree(calibrated, work, dirs_exist_ok=True)

        def correct(weight: float, link_factor: float) -> dict[str, float]:
            factors = {family: factor**weight for family, factor in full.items()}
            _scale_operators(calibrated, work, sources, factors)
            _scale_in_place(calibrated, work, sources, factors, link_factor, cluster)
            _scale_links(calibrated, work, link_factor)
            return factors

        errors: dict[tuple[float, float], float] = {}
        with progress("from runs", len(_WEIGHTS) + len(_LINK_FACTORS) + 1) as step:

            def best(trials: Iterable[tuple[float, float]]) -> tuple[float, float]:
                for trial in trials:
                    if trial not in errors:
                        correct(*trial)
                        errors[trial] = float(np.mean(_errors(_priced(clusters[0], work), used, folder)))
                    step()
                return min(errors, key=lambda trial: (errors[trial], trial[0], abs(np.log(trial[1]))))

            weight, _ = best((weight, 1.0) for weight in _WEIGHTS)
            weight, link_factor = best((weight, factor) for factor in _LINK_FACTORS)
            factors = correct(weight, link_factor)
            before = _figures(_errors(cluster, kept, folder))
            after = _figures(_errors(_priced(clusters[0], work), kept, folder))
            step()
        report = {
            "factors": factors,
            "link_factor": link_factor,
            "cases": len(found),
            "used": len(used),
            "before": before,
            "after": after,
        }
        card = json.loads((work / "card.json").read_text(encoding="utf-8"))
        write_whole(work / "card.json", json.dumps(card | {"name": out.name, "from_runs": report}, indent=1) + "\n")
    return report


def _priced(name: str, model: Path) -> Cluster:
    from moirai_sim.studies.validate_prices import priced_by

    return priced_by(read_cluster(name), model.absolute())


def _family_factors(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return measured / predicted time by family: the median over runs, which a disturbed run cannot move far."""
    ratios: dict[str, list[float]] = defaultdict(list)
    parts: dict[str, int] = defaultdict(int)
    for result in results:
        for family, (predicted, measured, count) in result["outcome"]["families"].items():
            ratios[family].append(measured / predicted)
            parts[family] += count
    return {
        family: float(np.clip(np.median(values), 0.5, 2.0))
        for family, values in sorted(ratios.items())
        if parts[family] >= _MIN_PARTS
    }


def _scale_operators(plain: Path, model: Path, sources: Sequence[str], factors: Mapping[str, float]) -> None:
    from moirai_sim.costs.families import family
    from moirai_sim.costs.measured import FILE, key_hash
    from moirai_sim.graphs.fusion import fuse
    from moirai_sim.graphs.load import load_graph
    from moirai_sim.profiling.schema import operator_key

    table = json.loads((plain / FILE).read_text(encoding="utf-8"))
    factor_of = {}
    for source in sources:
        for kernel in fuse(load_graph(source), "onnxruntime").graph:
            kind = family(kernel.op_type, [tensor.shape for tensor in kernel.inputs], kernel.attributes)
            factor_of[key_hash(operator_key(kernel))] = factors.get(kind, 1.0)
    for times in table["devices"].values():
        for key, factor in factor_of.items():
            if key in times:
                times[key] = [value * factor for value in times[key]]
    write_whole(model / FILE, json.dumps(table, separators=(",", ":")) + "\n")


def _scale_in_place(
    plain: Path,
    model: Path,
    sources: Sequence[str],
    factors: Mapping[str, float],
    link_factor: float,
    cluster: Cluster,
) -> None:
    from moirai_sim.graphs.load import load_graph
    from moirai_sim.sources import build_problem
    from moirai_sim.studies.in_place import CrossingTimes, read_in_place
    from moirai_sim.studies.validate_prices import families, in_place_file

    def scaled(crossing: CrossingTimes) -> CrossingTimes:
        figures = crossing.model_dump()
        whole = {name: round(figures[name] * link_factor) for name in ("exchange_ns", "hand_over_ns")}
        return CrossingTimes(**whole, read_ns_per_byte=crossing.read_ns_per_byte * link_factor)

    for source in sources:
        graph = load_graph(source)
        kind = families(build_problem(graph, cluster), graph)
        times = read_in_place(in_place_file(plain, source))
        devices = [
            device.model_copy(
                update={
                    "operator_ns": {
                        name: round(ns * factors.get(kind[name], 1.0)) for name, ns in device.operator_ns.items()
                    },
                    "crossing": device.crossing and scaled(device.crossing),
                }
            )
            for device in times.devices
        ]
        times.model_copy(update={"devices": devices}).write(in_place_file(model, source))


def _scale_links(plain: Path, model: Path, factor: float) -> None:
    document = json.loads((plain / "links.json").read_text(encoding="utf-8"))
    for curve in document["curves"]:
        curve["time_s"] = [value * factor for value in curve["time_s"]]
    write_whole(model / "links.json", json.dumps(document) + "\n")


def _errors(cluster: Cluster, results: Sequence[Mapping[str, Any]], folder: Path) -> list[float]:
    """Return the absolute percentage error of each run, simulated again as it was placed and ordered."""
    from moirai_sim.graphs.load import load_graph
    from moirai_sim.placement import placement_from_timeline
    from moirai_sim.sources import build_problem
    from moirai_sim.studies.validate_prices import priced_as_kept
    from moirai_sim.timeline import read_timeline

    priced: dict[str, Priced] = {}
    errors = []
    for result in results:
        source = result["key"]["model"]
        if source not in priced:
            priced[source] = priced_as_kept(build_problem(load_graph(source), cluster), cluster, source)
        timeline = read_timeline(folder / "timelines" / f"{result['name']}-predicted.json")
        again = priced[source].predict(placement_from_timeline(priced[source].problem, timeline))
        errors.append(abs(again.makespan_ns / result["outcome"]["measured_ns"] - 1))
    return errors


def _figures(errors: Sequence[float]) -> dict[str, float]:
    return {"cases": len(errors), "median_ape": float(np.median(errors)), "mean_ape": float(np.mean(errors))}
