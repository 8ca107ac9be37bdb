"""What a ``validate`` study knows before it measures: this machine's operators, parts and crossings, profiled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moirai_sim.files import write_whole
from moirai_sim.studies.in_place import priced_in_place, read_in_place, times_of, with_free_links
from moirai_sim.studies.runs import cluster_figures, source_digest
from moirai_sim.studies.store import digest

if TYPE_CHECKING:
    from moirai_sim.clusters.cluster import Cluster
    from moirai_sim.execution.cuts import InPlace
    from moirai_sim.graphs.operator import OperatorGraph
    from moirai_sim.problem import PlacementProblem
    from moirai_sim.studies.in_place import Priced
    from moirai_sim.studies.study import ValidateStudy

_NOTE = "made-from.json"
"""Beside a calibrated model: all that it depends on."""
_FEW_OPERATORS = 150
_FILLERS = ("light_squeezenet", "light_inception_v2")
"""Profiled too where the models of a study have too few operators."""


def model_source(model: str) -> str:
    """Return a model source; the light models inside the ``onnx`` package go by their bare names."""
    from moirai_sim.graphs.light import light_models

    return str(light_models().get(model, model))


def calibrated(cluster: Cluster, sources: Sequence[str], study: ValidateStudy, out: Path) -> Cluster:
    """Profile this machine's operators and links, and return the cluster priced by what was found.

    What an earlier, broken off run of the same study found is used again.
    """
    from moirai_sim.costs.calibrate import calibrate
    from moirai_sim.execution.backends import on_gpu
    from moirai_sim.execution.workers import device_cores
    from moirai_sim.profiling.links import profile_links
    from moirai_sim.profiling.operators import profile_operators
    from moirai_sim.profiling.schema import write_profile
    from moirai_sim.units import parse_ns

    folder = out / "calibration" / cluster.name
    model = (folder / "model").absolute()
    facts = {
        "models": [source_digest(source) for source in sources],
        "cluster": cluster_figures(cluster),
        "calibrate": study.calibrate,
        "seed": study.seed,
        "machine": machine(),
    }
    note = folder / _NOTE
    text = json.dumps(facts, indent=1, sort_keys=True) + "\n"
    if note.is_file() and note.read_text(encoding="utf-8") == text:
        return priced_by(cluster, model)
    profiles = [folder / "links.parquet"]
    links = profile_links(cluster)
    write_profile(links, profiles[0], kind="links", metadata=links.attrs["metadata"])
    # Cores of one machine are taken to be equal, and so are its GPUs of one type: one profile serves all.
    addresses: dict[tuple[str, int, str], str] = {}
    for device in cluster.devices:
        gpu = device.type.name if on_gpu(device) else ""
        cores = sorted(device_cores(device))[: device.threads]
        address = device.address if gpu else f"cpu:{cores[0]}-{cores[0] + len(cores) - 1}"
        addresses.setdefault((device.backend, device.threads, gpu), address)
    budget_s = parse_ns(str(study.calibrate)) / 1e9 / len(addresses)
    for (backend, threads, gpu), address in sorted(addresses.items()):
        operators = profile_operators(_enough(sources), address, backend=backend, budget_s=budget_s)
        profiles.append(folder / f"operators-{backend}-{threads}{gpu and '-'}{gpu}.parquet")
        write_profile(operators, profiles[-1], metadata=operators.attrs["metadata"])
    note.unlink(missing_ok=True)
    calibrate(profiles, model, name=f"{cluster.name}-here", seed=study.seed)
    write_whole(note, text)
    return priced_by(cluster, model)


def made_from(cluster: Cluster) -> str:
    """Return what the calibration of a cluster was made from, as text."""
    return (Path(str(cluster.link_model)).parent / _NOTE).read_text(encoding="utf-8")


def _enough(sources: Sequence[str]) -> list[str]:
    """Return the models, with some more where they have too few operators for a calibration to hold some out."""
    from moirai_sim.graphs.load import load_graph

    small = sum(len(load_graph(source).operators) for source in sources) < _FEW_OPERATORS
    return [
        *sources,
        *((model_source(model) for model in _FILLERS if model_source(model) not in sources) if small else ()),
    ]


def priced_by(cluster: Cluster, model: Path) -> Cluster:
    """Return a cluster whose operators and transfers are priced by a calibrated model."""
    return replace(
        with_free_links(cluster),
        devices=tuple(replace(device, cost_model=str(model)) for device in cluster.devices),
        link_model=str(model),
    )


def price_in_place(problem: PlacementProblem, cluster: Cluster, timed: InPlace, source: str) -> Priced:
    """Price the problem by the times of a model's operators and parts on the workers that run it.

    The times are kept beside the cost model, from which `priced_as_kept` reads them.
    """
    times = times_of(timed, problem, cluster, source)
    times.write(kept_in_place(cluster, source))
    return priced_in_place(problem, cluster, times)


def priced_as_kept(problem: PlacementProblem, cluster: Cluster, source: str) -> Priced:
    """Return a problem priced by what `price_in_place` kept."""
    return priced_in_place(problem, cluster, read_in_place(kept_in_place(cluster, source)))


def kept_in_place(cluster: Cluster, source: str) -> Path:
    """Return the `in_place_file` of a calibrated cluster."""
    return in_place_file(Path(str(cluster.link_model)), source)


def in_place_file(model: Path, source: str) -> Path:
    """Return where a cost model keeps the times of a model's operators in place."""
    return model / "in-place" / f"{digest(source_digest(source))[:24]}.json"


def families(problem: PlacementProblem, graph: OperatorGraph) -> dict[str, str]:
    """Return the family of every operator: that of the heaviest one of the kernel it belongs to."""
    from moirai_sim.costs.families import family

    kernel = kernel_of(problem)
    heaviest: dict[int, str] = {}
    for i, name in enumerate(problem.operators):
        best = heaviest.setdefault(int(kernel[i]), name)
        if graph[name].flops > graph[best].flops:
            heaviest[int(kernel[i])] = name
    main = {name: graph[heaviest[int(kernel[i])]] for i, name in enumerate(problem.operators)}
    return {name: family(one.op_type, [t.shape for t in one.inputs], one.attributes) for name, one in main.items()}


def kernel_of(problem: PlacementProblem) -> Any:  # noqa: ANN401 - an array
    """Return a representative operator of each operator's co-location group, [n]."""
    kernel = np.arange(problem.n_operators)
    if problem.colocation is not None:
        for group in range(int(problem.colocation.max()) + 1):
            members = np.flatnonzero(problem.colocation == group)
            kernel[members] = members[:1]
    return kernel


def machine() -> dict[str, Any]:
    """Return this machine and the versions on it."""
    from moirai_sim.profiling import telemetry

    return {"hardware": telemetry.hardware(), "versions": telemetry.versions()}
