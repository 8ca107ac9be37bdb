"""What a ``validate`` study knows before it measures: this machine's operators, parts and crossings, profiled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moirai_sim.errors import InputError
from moirai_sim.files import write_whole
from moirai_sim.studies.runs import cluster_figures, source_digest
from moirai_sim.studies.store import digest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.clusters.cluster import Cluster
    from moirai_sim.execution.cuts import Crossing, InPlace
    from moirai_sim.execution.measure import Subject
    from moirai_sim.execution.workers import Workers
    from moirai_sim.graphs.operator import OperatorGraph
    from moirai_sim.placement import Placement
    from moirai_sim.problem import PlacementProblem
    from moirai_sim.simulation.options import SimulationOptions
    from moirai_sim.simulation.workloads import Service
    from moirai_sim.studies.study import ValidateStudy
    from moirai_sim.timeline import Timeline

_NOTE = "made-from.json"
"""Beside a calibrated model: all that it depends on."""
_FEW_OPERATORS = 150
_FILLERS = ("light_squeezenet", "light_inception_v2")
"""Profiled too where the models of a study have too few operators."""
READER_SHARE = 0.9
"""Share of a crossing through shared memory that its reader spends: the message is a token in a pipe, the rest is one
more call of the backend and data that lie in the cache of another core. Chosen on the models of the quickstart."""
_SHARED_CORE = 2.0
"""Two workers on one core, which its scheduler shares out evenly."""
_FREE_BANDWIDTH = 1e12
"""Of a hand-over in shared memory: the calibrated time is all there is, nothing is shared."""


@dataclass(frozen=True)
class Priced:
    """A problem and the devices that it runs on, as they were measured."""

    problem: PlacementProblem
    options: SimulationOptions
    contention: NDArray[np.float64]
    """[devices, devices] time of an operator on one device while the other computes, over its time alone."""
    cold_ns: tuple[int, ...]
    """[devices] what a start costs after a long wait."""
    split_share: tuple[float, ...]
    """[devices] by how much longer operators take where a device runs several parts."""

    def predict(self, placement: Placement, policy: str = "") -> Timeline:
        """Return the timeline of one request among others that follow each other."""
        from moirai_sim.simulation.corrections import contended, overlap, rested, split
        from moirai_sim.simulation.engine import simulate

        problem = split(self.problem, placement, self.split_share)
        share = overlap(problem, placement, options=self.options)
        problem = contended(problem, placement, share, self.contention)
        problem = rested(problem, placement, self.cold_ns, options=self.options)
        return simulate(problem, placement, options=self.options, policy=policy)

    def predict_stream(self, placement: Placement, in_flight: int, requests: int) -> Service:
        """Return what a stream of requests experiences, so many under way at once."""
        from moirai_sim.simulation.corrections import contended, split
        from moirai_sim.simulation.workloads import serve

        def stream(problem: PlacementProblem) -> Service:
            return serve(problem, placement, in_flight=in_flight, requests=requests, options=self.options)

        problem = split(self.problem, placement, self.split_share)
        busy = np.array(list(stream(problem).device_busy.values()))
        share = np.broadcast_to(busy, (problem.n_operators, len(busy)))
        return stream(contended(problem, placement, share, self.contention))


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
    note.unlink(missing_ok=True)
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


def priced_as_it_is(problem: PlacementProblem, cluster: Cluster) -> Priced:
    """Return a problem with its own prices, and how the devices of a measured cluster differ from plain ones."""
    nothing = (0,) * problem.n_devices
    return Priced(problem, _options(cluster), _contention(cluster, 1.0), nothing, nothing)


def _options(cluster: Cluster, part_ns: tuple[int, ...] = ()) -> SimulationOptions:
    from moirai_sim.simulation.options import SimulationOptions

    return SimulationOptions(reader_share=0.0 if _emulated(cluster) else READER_SHARE, part_ns=part_ns or 0)


def _contention(cluster: Cluster, factor: float) -> NDArray[np.float64]:
    """Return [devices, devices] how devices slow each other: by this factor, or by two where they share a core."""
    from moirai_sim.execution.workers import shared_cores

    found = np.full((len(cluster.devices),) * 2, factor)
    for pair in shared_cores(cluster):
        found[pair] = _SHARED_CORE
    np.fill_diagonal(found, 1.0)
    return found


def _emulated(cluster: Cluster) -> bool:
    from moirai_sim.execution.workers import EMULATED

    return any(device.address.startswith(EMULATED) for device in cluster.devices)


def in_place_on(
    workers: Workers, subject: Subject, problem: PlacementProblem, cluster: Cluster, patience_s: float
) -> InPlace:
    """Return what times a model on the workers that run it: on one device of each type, and across devices."""
    from moirai_sim.execution.cuts import InPlace

    types = _types_of(problem)
    kind = {name: types[column] for name, column in zip(problem.devices, problem.device_type.tolist(), strict=True)}
    return InPlace(workers, subject, kind, patience_s=patience_s, crossing=not _emulated(cluster))


def _types_of(problem: PlacementProblem) -> list[str]:
    """Return a device of each type, in the order of the columns of the problem's times."""
    columns = problem.device_type.tolist()
    return [problem.devices[columns.index(column)] for column in sorted(set(columns))]


def price_in_place(problem: PlacementProblem, cluster: Cluster, in_place: InPlace, source: str) -> Priced:
    """Price the problem by the times of a model's operators and parts on the workers that run it.

    The times are kept beside the cost model, from which `priced_in_place` reads them.
    """
    types = [in_place.cuts(name) for name in _types_of(problem)]
    document = {
        "contention": in_place.contention(),
        "operator_ns": [dict(cuts.operator_ns) for cuts in types],
        "part_ns": [cuts.part_ns for cuts in types],
        "cold_ns": [cuts.cold_ns for cuts in types],
        "split_share": [cuts.split_share for cuts in types],
        "crossing": [None if cuts.crossing is None else asdict(cuts.crossing) for cuts in types],
    }
    write_whole(kept_in_place(cluster, source), json.dumps(document) + "\n")
    return priced_in_place(problem, cluster, source)


def kept_in_place(cluster: Cluster, source: str) -> Path:
    """Return the `in_place_file` of a calibrated cluster."""
    return in_place_file(Path(str(cluster.link_model)), source)


def in_place_file(model: Path, source: str) -> Path:
    """Return where a cost model keeps the times of a model's operators in place."""
    return model / "in-place" / f"{digest(source_digest(source))[:24]}.json"


def read_in_place(path: Path) -> dict[str, Any]:
    """Return what `price_in_place` kept.

    Raises
    ------
    InputError
        If an earlier version wrote it.
    """
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if "crossing" not in document:
        raise InputError(f"{path}: holds no price of crossings; an earlier version wrote it, so run validate again")
    return document


def priced_in_place(problem: PlacementProblem, cluster: Cluster, source: str) -> Priced:
    """Return a problem with the times that its operators took in the model, and how its devices differ from plain ones.

    A crossing costs what a chain of kernels showed, and the part that it begins in this model: its kernels and weights
    are cold then, too. The chain's own parts, of little else than calls, are counted twice: some 3 us.
    """
    from moirai_sim.execution.cuts import Crossing

    document = read_in_place(kept_in_place(cluster, source))
    position = {name: i for i, name in enumerate(problem.operators)}
    operator_ns = np.minimum(problem.operator_ns, 0)  # what a type cannot run stays so
    for column, times in enumerate(document["operator_ns"]):
        for name, ns in times.items():
            operator_ns[position[name], column] = ns
    part_ns, cold_ns, split_share = (
        tuple(document[figure][column] for column in problem.device_type.tolist())
        for figure in ("part_ns", "cold_ns", "split_share")
    )
    options = _options(cluster, part_ns)
    if None not in document["crossing"]:
        crossing = [Crossing(**known) for known in document["crossing"]]
        problem, share = _with_crossings(problem, crossing)
        columns = problem.device_type.tolist()
        part_ns = tuple(ns + crossing[column].exchange_ns for ns, column in zip(part_ns, columns, strict=True))
        options = replace(options, reader_share=share, part_ns=part_ns)
    known = replace(
        problem,
        operator_ns=operator_ns,
        operator_low_ns=operator_ns,
        operator_high_ns=operator_ns,
        transfer_ns=problem.transfer_ns + options.transfer_part_ns,
        cost_share={"measured": 1.0},
    )
    return Priced(known, options, _contention(cluster, document["contention"]), cold_ns, split_share)


def _with_crossings(problem: PlacementProblem, crossing: Sequence[Crossing]) -> tuple[PlacementProblem, float]:
    """Return a problem whose tensors cost what they cost readers of each device type, and what share is their reading.

    The share is one for all tensors: a reader begins later or takes longer, and the critical path holds both.
    """
    types = problem.device_type[None, :]
    classes = problem.route_class * len(crossing) + types  # a class for each type of the target, too
    size = np.maximum(problem.tensor_bytes, 0)[:, None]
    hand_over = np.array([one.hand_over_ns for one in crossing], dtype=np.float64)
    read = size * np.array([one.read_ns_per_byte for one in crossing])
    transfer_ns = np.tile(np.rint(hand_over + read).astype(np.int64), (1, problem.transfer_ns.shape[1]))
    route_class = np.where(problem.route_class < 0, -1, classes)
    share = float(read.sum()) / max(float((hand_over + read).sum()), 1.0)
    return replace(problem, route_class=route_class, transfer_ns=transfer_ns), share


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
    return {name: family(one.op_type, [tensor.shape for tensor in one.inputs]) for name, one in main.items()}


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
