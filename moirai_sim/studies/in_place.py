"""A model timed on the workers that would run it, kept in a file, and what is predicted of its placements by that.

A cost model says what an operator takes by itself. Cut up and run, a model also pays for parts, for tensors that cross
devices and for caches that are cold, each by its own kernels: `moirai_sim.execution.cuts` times that, this module keeps
and plays it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moirai_sim.errors import InputError
from moirai_sim.evidence import Evidence
from moirai_sim.files import write_whole
from moirai_sim.studies.runs import source_digest
from moirai_sim.studies.store import digest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from moirai_sim.clusters.cluster import Cluster, Device
    from moirai_sim.execution.cuts import InPlace
    from moirai_sim.execution.measure import Subject
    from moirai_sim.execution.workers import Workers
    from moirai_sim.placement import Placement
    from moirai_sim.problem import PlacementProblem
    from moirai_sim.simulation.options import SimulationOptions
    from moirai_sim.simulation.workloads import Service
    from moirai_sim.timeline import Timeline

_READER_SHARE = 0.9
"""Share of a crossing through shared memory that its reader spends: the message is a token in a pipe, the rest is one
more call of the backend and data that lie in the cache of another core. Chosen on the models of the quickstart."""
_SHARED_CORE = 2.0
"""Two workers on one core, which its scheduler shares out evenly."""
_FREE_BANDWIDTH = 1e12
"""Of a hand-over in shared memory: the calibrated time is all there is, nothing is shared."""

_Nanoseconds = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CrossingTimes(_Strict):
    """What a tensor costs that another device has written: `moirai_sim.execution.cuts.Crossing`."""

    exchange_ns: _Nanoseconds
    hand_over_ns: _Nanoseconds
    read_ns_per_byte: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class CarryingTimes(_Strict):
    """What it costs a core to send and to receive over a network: `moirai_sim.execution.carrying.Carrying`."""

    send_ns_per_byte: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    receive_ns_per_byte: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class DeviceTimes(_Strict):
    """Times of a model on devices of one kind: `moirai_sim.execution.cuts.Cuts`."""

    type: str
    """Name of the device type."""
    backend: str
    threads: int
    operator_ns: dict[str, _Nanoseconds]
    whole_ns: _Nanoseconds
    part_ns: _Nanoseconds
    split_share: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    split_parts: Annotated[int, Field(ge=1)]
    cold_ns: _Nanoseconds
    crossing: CrossingTimes | None
    """None where tensors cross a network."""

    @property
    def kind(self) -> tuple[str, str, int]:
        """What devices have in common that take these times."""
        return self.type, self.backend, self.threads


class InPlaceTimes(_Strict):
    """Times of a model on the workers of a cluster."""

    format: Literal["moirai-sim/in-place@1"] = "moirai-sim/in-place@1"
    model: str
    """What `source_digest` says of it."""
    cpu: str
    """Of the machine, as its maker spells it."""
    versions: dict[str, str]
    """Of what timed it."""
    contention: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    """How much longer operators take for each other device that computes."""
    devices: list[DeviceTimes]
    carrying: CarryingTimes | None = None
    """None where no network lies between the devices, or it was not timed."""

    def table(self) -> tuple[list[str], list[list[object]]]:
        """Return the times by kind of device, with headings: all but those of operators."""
        head = ["device", "backend", "threads", "whole_ms", "part_us", "split_share", "cold_us"]
        head += ["hand_over_us", "read_us_per_MB"]
        rows: list[list[object]] = []
        for one in self.devices:
            row = [*one.kind, one.whole_ns / 1e6, one.part_ns / 1e3, one.split_share, one.cold_ns / 1e3]
            crossing = one.crossing
            row += ["-", "-"] if crossing is None else [crossing.hand_over_ns / 1e3, crossing.read_ns_per_byte * 1e3]
            rows.append(row)
        return head, rows

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        write_whole(path, json.dumps(self.model_dump()) + "\n")


def read_in_place(path: Path) -> InPlaceTimes:
    """Return what `InPlaceTimes.write` wrote.

    Raises
    ------
    InputError
        With everything that is wrong with it.
    """
    try:
        return InPlaceTimes.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"{path}: cannot read it ({error.strerror}); 'moirai-sim profile in-place' makes such a file"
        ) from error
    except ValidationError as error:
        raise InputError(
            f"{path}: {'.'.join(map(str, one['loc'])) or 'content'}: {one['msg']}; time the model in place again"
            for one in error.errors()
        ) from error


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
    """[devices] by how much longer operators take where a device runs many parts."""
    split_parts: tuple[int, ...]
    """[devices] how many those are."""
    core: tuple[int, ...]
    """[devices] a number of the core; equal where devices share one."""
    carrying_ns_per_byte: tuple[float, float] = (0.0, 0.0)
    """What a core spends on each byte that a device on it sends, and receives."""

    def as_run(self, placement: Placement) -> PlacementProblem:
        """Return the problem with the times that operators take in a placement, one request after the other."""
        from moirai_sim.simulation.corrections import carried, contended, overlap, rested, split

        problem = split(self.problem, placement, self.split_share, self.split_parts)
        share = overlap(problem, placement, options=self.options)
        problem = contended(problem, placement, share, self.contention)
        if any(self.carrying_ns_per_byte):
            problem = carried(problem, placement, self.core, *self.carrying_ns_per_byte, options=self.options)
        return rested(problem, placement, self.cold_ns, options=self.options)

    def as_streamed(self, placement: Placement, in_flight: int, requests: int) -> PlacementProblem:
        """Return the problem with the times that operators take in a placement, so many requests under way at once."""
        from moirai_sim.simulation.corrections import contended, split
        from moirai_sim.simulation.workloads import serve

        problem = split(self.problem, placement, self.split_share, self.split_parts)
        service = serve(problem, placement, in_flight=in_flight, requests=requests, options=self.options)
        busy = np.array(list(service.device_busy.values()))
        share = np.broadcast_to(busy, (problem.n_operators, len(busy)))
        return contended(problem, placement, share, self.contention)

    def predict(self, placement: Placement, policy: str = "") -> Timeline:
        """Return the timeline of one request among others that follow each other."""
        from moirai_sim.simulation.engine import simulate

        return simulate(self.as_run(placement), placement, options=self.options, policy=policy)

    def predict_stream(self, placement: Placement, in_flight: int, requests: int) -> Service:
        """Return what a stream of requests experiences, so many under way at once."""
        from moirai_sim.simulation.workloads import serve

        problem = self.as_streamed(placement, in_flight, requests)
        return serve(problem, placement, in_flight=in_flight, requests=requests, options=self.options)


def priced_as_it_is(problem: PlacementProblem, cluster: Cluster) -> Priced:
    """Return a problem with its own prices, and how the devices of a measured cluster differ from plain ones."""
    nothing = (0,) * problem.n_devices
    return Priced(problem, _options(cluster), _contention(cluster, 1.0), nothing, nothing, nothing, _cores(cluster))


def with_free_links(cluster: Cluster) -> Cluster:
    """Return a cluster whose links in one machine are memory: what a crossing takes is all there is, nothing is shared.

    Emulated links keep their rates, since flows do share them.
    """
    if emulated(cluster):
        return cluster
    links = (replace(link, latency_ns=0, bandwidth_bytes_per_s=_FREE_BANDWIDTH) for link in cluster.links)
    return replace(cluster, links=tuple(links))


def emulated(cluster: Cluster) -> bool:
    """Tell whether some workers of a cluster lie in network namespaces."""
    from moirai_sim.execution.workers import is_emulated

    return any(map(is_emulated, cluster.devices))


def profile_in_place(source: str, cluster: Cluster) -> InPlaceTimes:
    """Time a model on the workers of a cluster.

    Raises
    ------
    InputError
        If a device is not on this machine, or the model cannot be run.
    ExecutionError
        If a worker fails.
    """
    from moirai_sim.execution.cuts import ROUNDS
    from moirai_sim.execution.measure import PATIENCE_S, load_subject
    from moirai_sim.execution.workers import Workers
    from moirai_sim.graphs.load import load_graph
    from moirai_sim.progress import progress
    from moirai_sim.sources import build_problem

    graph = load_graph(source)
    problem = build_problem(graph, with_free_links(cluster))
    subject = load_subject(source, graph)
    with Workers(cluster) as workers, progress("in place", ROUNDS + 1) as step:
        timed = in_place_on(workers, subject, problem, cluster, PATIENCE_S)
        step()
        for _ in range(ROUNDS):
            timed.round()
            step()
        return times_of(timed, problem, cluster, source)


def in_place_on(
    workers: Workers, subject: Subject, problem: PlacementProblem, cluster: Cluster, patience_s: float
) -> InPlace:
    """Return what times a model on the workers that run it: on one device of each type, and across devices."""
    from moirai_sim.execution.cuts import InPlace

    types = _types_of(problem)
    kind = {name: types[column] for name, column in zip(problem.devices, problem.device_type.tolist(), strict=True)}
    return InPlace(workers, subject, kind, patience_s=patience_s, network=emulated(cluster))


def times_of(timed: InPlace, problem: PlacementProblem, cluster: Cluster, source: str) -> InPlaceTimes:
    """Return what was found on the workers of a cluster."""
    from moirai_sim.profiling.telemetry import cpu_model, versions

    devices = []
    for name in _types_of(problem):
        type_, backend, threads = _kind(cluster.device[name])
        found = asdict(timed.cuts(name))
        devices.append(DeviceTimes(type=type_, backend=backend, threads=threads, **found))
    return InPlaceTimes(
        model=source_digest(source),
        cpu=cpu_model(),
        versions=versions(),
        contention=timed.contention(),
        devices=devices,
        carrying=None if (cost := timed.carrying()) is None else CarryingTimes(**cost._asdict()),
    )


def _types_of(problem: PlacementProblem) -> list[str]:
    """Return a device of each type, in the order of the columns of the problem's times."""
    columns = problem.device_type.tolist()
    return [problem.devices[columns.index(column)] for column in sorted(set(columns))]


def _kind(device: Device) -> tuple[str, str, int]:
    return device.type.name, device.backend, device.threads


def load_in_place(
    source: str,
    cluster: Cluster | None,
    path: Path,
    *,
    network: str | None = None,
    memory: bool = True,
    memory_scale: float | None = None,
) -> Priced:
    """Return a model on a cluster, priced by what it took there; the other arguments are those of `load_problem`.

    Raises
    ------
    InputError
        If the file is wrong, or of another model, machine or cluster.
    """
    from moirai_sim.profiling.telemetry import cpu_model
    from moirai_sim.sources import load_problem, recognise

    times = read_in_place(path)
    if cluster is None or recognise(source) != "model":
        raise InputError(f"{path}: prices a model on the cluster that it was timed on; name both")
    problems = []
    if times.model != source_digest(source):
        problems.append(f"{path}: is of another model than {source}, or of other sizes of it")
    if times.cpu != cpu_model():
        problems.append(f"{path}: was made on '{times.cpu}', this machine is a '{cpu_model()}'")
    known = {device.kind for device in times.devices}
    lacking = sorted({kind for kind in map(_kind, cluster.devices) if kind not in known})
    problems += [
        f"{path}: holds no times on {type_} by {backend} with {threads} threads" for type_, backend, threads in lacking
    ]
    if not lacking and any((device.crossing is None) != emulated(cluster) for device in times.devices):
        ways = ("through shared memory", "over a network")
        was, now = ways[::-1] if not emulated(cluster) else ways
        problems.append(f"{path}: was made where tensors cross {was}; here they cross {now}")
    if problems:
        raise InputError(f"{problem}; run 'moirai-sim profile in-place' for this one" for problem in problems)
    where = with_free_links(cluster)
    problem = load_problem(source, where, network=network, memory=memory, memory_scale=memory_scale)
    strangers = sorted({name for device in times.devices for name in device.operator_ns} - {*problem.operators})
    if strangers:
        raise InputError(
            f"{path}: times operator '{strangers[0]}', which the model lacks; time the model in place again"
        )
    return priced_in_place(problem, where, times)


def priced_in_place(problem: PlacementProblem, cluster: Cluster, times: InPlaceTimes) -> Priced:
    """Return a problem with the times that its operators took in the model, and how its devices differ from plain ones.

    A crossing costs what its reader needed, and the part that it begins.
    """
    by_kind = {device.kind: device for device in times.devices}
    types = [by_kind[_kind(cluster.device[name])] for name in _types_of(problem)]
    position = {name: i for i, name in enumerate(problem.operators)}
    operator_ns = np.minimum(problem.operator_ns, 0)  # what a type cannot run stays so
    for column, found in enumerate(types):
        for name, ns in found.operator_ns.items():
            operator_ns[position[name], column] = ns
    each = [types[column] for column in problem.device_type.tolist()]
    part_ns = tuple(found.part_ns for found in each)
    options, carry = _options(cluster, part_ns), times.carrying
    made_of: dict[str, object] = {"in_place": digest(times.model_dump()), "cost_models": {}}
    crossing = [found.crossing for found in types if found.crossing is not None]
    if len(crossing) == len(types):
        problem, share = _with_crossings(problem, crossing)
        made_of["links"] = "in place"
        exchange = [crossing[column].exchange_ns for column in problem.device_type.tolist()]
        options = replace(
            options,
            reader_share=share,
            part_ns=tuple(ns + more for ns, more in zip(part_ns, exchange, strict=True)),
        )
    known = replace(
        problem,
        operator_ns=operator_ns,
        evidence=Evidence(operator_ns, operator_ns, np.zeros(operator_ns.shape, dtype=np.uint8)),
        transfer_ns=problem.transfer_ns + options.transfer_part_ns,
        provenance={**problem.provenance, **made_of},
    )
    return Priced(
        known,
        options,
        _contention(cluster, times.contention),
        cold_ns=tuple(found.cold_ns for found in each),
        split_share=tuple(found.split_share for found in each),
        split_parts=tuple(found.split_parts for found in each),
        core=_cores(cluster),
        carrying_ns_per_byte=(carry.send_ns_per_byte, carry.receive_ns_per_byte) if carry else (0.0, 0.0),
    )


def _options(cluster: Cluster, part_ns: tuple[int, ...] = ()) -> SimulationOptions:
    from moirai_sim.simulation.options import SimulationOptions

    network = emulated(cluster)  # with one connection from each worker to each other one
    return SimulationOptions(in_order=network, reader_share=0.0 if network else _READER_SHARE, part_ns=part_ns or 0)


def _cores(cluster: Cluster) -> tuple[int, ...]:
    """Return a number of the core of each device: the first device on it."""
    from moirai_sim.execution.workers import shared_cores

    core = list(range(len(cluster.devices)))
    for one, other in shared_cores(cluster):
        core[max(one, other)] = min(core[max(one, other)], min(one, other))
    return tuple(core)


def _contention(cluster: Cluster, factor: float) -> NDArray[np.float64]:
    """Return [devices, devices] how devices slow each other: by this factor, or by two where they share a core."""
    from moirai_sim.execution.workers import shared_cores

    found = np.full((len(cluster.devices),) * 2, factor)
    for pair in shared_cores(cluster):
        found[pair] = _SHARED_CORE
    np.fill_diagonal(found, 1.0)
    return found


def _with_crossings(problem: PlacementProblem, crossing: Sequence[CrossingTimes]) -> tuple[PlacementProblem, float]:
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
