"""Commands on one placement: make it, simulate it, check it, measure it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moirai_sim.cli.options import (
    ClusterName,
    Fuse,
    InPlace,
    Json,
    MaxLatency,
    MaxPeriod,
    MemoryScale,
    MinThroughput,
    NeededCluster,
    NetworkName,
    NoMemory,
    OptionalOut,
    Out,
    PlacementFile,
    Source,
    limits,
    one_of,
    problem_of,
    seconds,
    without_effect,
)
from moirai_sim.errors import InputError, named

if TYPE_CHECKING:
    from moirai_sim.placement import Placement
    from moirai_sim.problem import PlacementProblem
    from moirai_sim.simulation.options import SimulationOptions
    from moirai_sim.studies.in_place import Priced
    from moirai_sim.timeline import Timeline


def place(
    source: Source,
    cluster: ClusterName = None,
    policy: Annotated[str, typer.Option(help="A name of 'catalog policies'.")] = "auto",
    objective: Annotated[str, typer.Option(help="latency or throughput.")] = "latency",
    max_latency: MaxLatency = None,
    max_period: MaxPeriod = None,
    min_throughput: MinThroughput = None,
    replicas: Annotated[
        int, typer.Option(min=1, help="Placements that may take turns in serving a stream (data parallelism).")
    ] = 1,
    network: NetworkName = None,
    no_memory: NoMemory = False,
    memory_scale: MemoryScale = None,
    fuse: Fuse = None,
    in_place: InPlace = None,
    time_limit: Annotated[str, typer.Option("--time-limit", help="For policies that search, e.g. 60 or 10min.")] = "60",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes or threads; default one a core.")] = None,
    out: OptionalOut = None,
    as_json: Json = False,
) -> None:
    """Place operators on devices.

    The file is a timeline. A proven bound of the objective and the best single device stand beside the answer.
    """
    from moirai_sim.clusters.local import local_cores
    from moirai_sim.console import print_json
    from moirai_sim.policies.base import Request
    from moirai_sim.policies.registry import load_policy
    from moirai_sim.policies.run import place as run

    if replicas > 1 and objective == "latency" and max_period is None and min_throughput is None:
        raise InputError(
            "--replicas: has no effect on latency alone; give --objective throughput or a limit on the period"
        )
    load_policy(policy)  # a misspelt name is reported before anything is read
    one_of(objective, ("latency", "throughput"), "--objective")
    limited = limits(max_latency, max_period, min_throughput)
    problem, _ = problem_of(
        source, cluster, network, no_memory=no_memory, memory_scale=memory_scale, fuse=fuse, in_place=in_place
    )
    request = Request(
        objective=objective,  # type: ignore[arg-type]  # checked above
        time_limit_s=seconds(time_limit, "--time-limit"),
        seed=seed,
        workers=workers or len(local_cores()),
        replicas=replicas,
        **limited,
    )
    timeline = run(problem, policy, request)
    if out is not None:
        timeline.write(out)
    if as_json:
        print_json(timeline.to_json())
    else:
        _print_timeline(timeline, problem, out)
    if timeline.status in ("infeasible", "limit", "error"):
        raise typer.Exit(3)


def simulate(
    source: Source,
    placement: PlacementFile,
    cluster: ClusterName = None,
    network: NetworkName = None,
    no_memory: NoMemory = False,
    memory_scale: MemoryScale = None,
    fuse: Fuse = None,
    in_place: InPlace = None,
    engine: Annotated[str, typer.Option(help="simpy or replay.")] = "simpy",
    out: OptionalOut = None,
    trace: Annotated[Path | None, typer.Option(help="Also write a Chrome trace, for ui.perfetto.dev.")] = None,
    gantt: Annotated[Path | None, typer.Option(help="Also draw a Gantt chart, as .html or .png.")] = None,
    parquet: Annotated[Path | None, typer.Option(help="Also write the spans as a Parquet table.")] = None,
    explained: Annotated[bool, typer.Option("--explain", help="Critical path, and what faster parts save.")] = False,
    streams: Annotated[int, typer.Option(min=1, help="Operators that a device runs at once.")] = 1,
    launch: Annotated[str, typer.Option(help="Time to launch an operator, e.g. '5 us'.")] = "0",
    launch_waits: Annotated[bool, typer.Option("--launch-waits", help="A device stands still at a launch.")] = False,
    copy_engines: Annotated[
        int | None, typer.Option(min=0, help="Transfers of a device at once; 0: it copies itself.")
    ] = None,
    spread: Annotated[float, typer.Option(min=0, help="Standard deviation of the logarithm of operator times.")] = 0.0,
    fault: Annotated[list[str] | None, typer.Option(help="RESOURCE@TIME fails; RESOURCE@TIME=SPEED slows.")] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="Simulate a stream of so many requests.")] = None,
    in_flight: Annotated[
        int | None, typer.Option(min=1, help="Requests of the stream that are under way at once; default 1.")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Or requests a second that arrive at random (Poisson).")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of random times.")] = 0,
    as_json: Json = False,
) -> None:
    """Simulate a placement."""
    import json
    from dataclasses import asdict, replace

    from moirai_sim.console import plain, print_facts, print_json, say
    from moirai_sim.evidence import cost_share, with_evidence
    from moirai_sim.files import write_whole
    from moirai_sim.placement import placement_from_timeline
    from moirai_sim.profiling.telemetry import ENGINES, versions
    from moirai_sim.simulation.engine import simulate as run
    from moirai_sim.simulation.options import SimulationOptions, parse_fault
    from moirai_sim.timeline import read_timeline
    from moirai_sim.units import parse_ns

    one_of(engine, ("simpy", "replay"), "--engine")
    if in_place is not None:
        without_effect(
            {"--rate": rate}, "with --in-place: devices slow each other by how busy they are; give --in-flight"
        )
    if requests is None:
        without_effect({"--in-flight": in_flight, "--rate": rate}, "without --requests")
    else:
        of_one = {"--trace": trace, "--gantt": gantt, "--parquet": parquet, "--explain": explained}
        without_effect({**of_one, "--engine": engine != "simpy"}, "on a stream (--requests)")
    if rate is not None:
        without_effect({"--in-flight": in_flight}, "with --rate, whose requests wait for no other")
    if gantt is not None:
        from moirai_sim.simulation.gantt import check_gantt

        check_gantt(gantt)
    with named("--launch"):
        launch_ns = parse_ns(launch)
    if not launch_ns:
        without_effect({"--launch-waits": launch_waits}, "without --launch")
    with named("--fault"):
        faults = tuple(parse_fault(text) for text in fault or ())
    options = SimulationOptions(
        streams=streams,
        launch_ns=launch_ns,
        asynchronous_launch=not launch_waits,
        copy_engines=copy_engines,
        spread=spread,
        faults=faults,
        seed=seed,
    )
    placed = read_timeline(placement)
    if not no_memory and memory_scale is None:
        no_memory, memory_scale = placed.memory
    problem, priced = problem_of(
        source, cluster, network, no_memory=no_memory, memory_scale=memory_scale, fuse=fuse, in_place=in_place
    )
    wanted = placement_from_timeline(problem, placed)
    if placed.network and placed.network != problem.network:
        say(f"{placement}: was made for the network '{placed.network}' and is simulated under '{problem.network}'")
    if priced is not None:
        problem, options = _as_measured(priced, wanted, options, requests, in_flight, placement)
    made_by = problem.facts | _placed_by(placement)
    made_by |= {"options": asdict(options), "versions": versions(ENGINES)}
    if requests is not None:
        from moirai_sim.simulation.workloads import poisson, serve

        arrivals = None if rate is None else poisson(rate, requests, seed)
        clients = (in_flight or 1) if rate is None else None
        service = serve(problem, wanted, arrivals=arrivals, in_flight=clients, requests=requests, options=options)
        stream = {"requests": requests, "in_flight": clients, "rate_per_s": rate}
        made_by |= {"cost_share": cost_share(problem, placed)}
        document = service.to_json() | {"provenance": made_by | stream}
        if out is not None:
            write_whole(out, json.dumps(plain(document), indent=1, allow_nan=False) + "\n")
        print_json(document) if as_json else print_facts(service.figures())
        return
    timeline = run(problem, wanted, engine=engine, options=options)  # type: ignore[arg-type]
    timeline = replace(timeline, policy=placed.policy, provenance=made_by | {"engine": engine})
    timeline = with_evidence(problem, timeline)
    if timeline.replicas and (explained or trace or gantt or parquet):
        say(f"{placement}: {len(timeline.cycle)} placements take turns; what is drawn and explained is the first")
    explanation = None
    if explained:
        from moirai_sim.simulation.explain import explain

        explanation = explain(problem, wanted, options=options)
    if trace is not None or parquet is not None:
        from moirai_sim.simulation.trace import write_parquet, write_trace

        if trace is not None:
            write_trace(timeline, trace, problem)
        if parquet is not None:
            write_parquet(timeline, parquet)
    if gantt is not None:
        from moirai_sim.simulation.gantt import write_gantt

        write_gantt(timeline, gantt, explanation)
    if out is not None:
        timeline.write(out)
    if as_json:
        from moirai_sim.summary import needs_of

        more = {} if explanation is None else {"explanation": explanation.to_json()}
        needs = {} if timeline.replicas else needs_of(problem, timeline)
        print_json(timeline.to_json() | needs | more)
        return
    _print_timeline(timeline, problem, out)
    if explanation is not None:
        typer.echo(explanation.text())


def verify(
    source: Source,
    file: Annotated[Path, typer.Argument(help="A timeline file.")],
    cluster: ClusterName = None,
    network: NetworkName = None,
    no_memory: NoMemory = False,
    memory_scale: MemoryScale = None,
    max_latency: MaxLatency = None,
    max_period: MaxPeriod = None,
    min_throughput: MinThroughput = None,
    fuse: Fuse = None,
    in_place: InPlace = None,
    as_json: Json = False,
) -> None:
    """Check a timeline independently.

    Lists every violation and exits 1 if there is one. The network, the memory, the fusions, and the limits on latency
    and period that the file says it was made for hold unless others are given.
    """
    from dataclasses import replace

    from moirai_sim.console import print_json, print_text
    from moirai_sim.timeline import read_timeline
    from moirai_sim.verify import verify as check

    limited = {
        key: value for key, value in limits(max_latency, max_period, min_throughput).items() if value is not None
    }
    timeline = replace(read_timeline(file), **limited)  # type: ignore[arg-type]
    if not no_memory and memory_scale is None:
        no_memory, memory_scale = timeline.memory
    problem, _ = problem_of(
        source,
        cluster,
        network or timeline.network or None,
        no_memory=no_memory,
        memory_scale=memory_scale,
        fuse=fuse or (None if in_place else timeline.fusion),
        in_place=in_place,
    )
    violations = check(problem, timeline)
    if as_json:
        print_json({"valid": not violations, "violations": violations, "network": problem.network})
    elif violations:
        for violation in violations:
            print_text(violation)
    else:
        print_text(f"right: {problem.n_operators} operators, {len(timeline.spans)} spans, network {problem.network}")
    raise typer.Exit(1 if violations else 0)


def measure(
    model: Annotated[str, typer.Argument(help="An .onnx file with its weights, or zoo:NAME.")],
    cluster: NeededCluster,
    placement: PlacementFile,
    out: Out,
    repeats: Annotated[int, typer.Option(min=3, help="Measured runs; the median one is kept.")] = 15,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster that has the devices.")] = None,
    as_json: Json = False,
) -> None:
    """Run a placement on real devices."""
    from dataclasses import replace

    from moirai_sim.clusters.reader import read_cluster
    from moirai_sim.console import print_json
    from moirai_sim.execution.measure import load_subject
    from moirai_sim.execution.measure import measure as run
    from moirai_sim.graphs.load import load_graph
    from moirai_sim.placement import placement_from_timeline
    from moirai_sim.sources import build_problem
    from moirai_sim.timeline import read_timeline

    placed = read_timeline(placement)
    operators = load_graph(model)
    given = read_cluster(cluster)
    problem = build_problem(operators, given)
    wanted = placement_from_timeline(problem, placed)
    if wanted.replicas:
        turns = len(wanted.cycle)
        raise InputError(f"{placement}: {turns} placements take turns in it; only one at a time can be measured")
    subject = load_subject(model, operators)
    if ray is None:
        timeline = run(subject, problem, wanted, repeats=repeats)
    else:
        from moirai_sim.execution.ray_workers import RayWorkers

        with RayWorkers(given, ray) as workers:
            timeline = run(subject, problem, wanted, workers=workers, repeats=repeats)
    timeline = replace(timeline, provenance={**timeline.provenance, **_placed_by(placement)})
    timeline.write(out)
    if as_json:
        print_json(timeline.to_json())
    else:
        _print_timeline(timeline, problem, out)


def _as_measured(
    priced: Priced,
    placement: Placement,
    options: SimulationOptions,
    requests: int | None,
    in_flight: int | None,
    file: Path,
) -> tuple[PlacementProblem, SimulationOptions]:
    """Return the problem as its devices run a placement, and the options with what parts and readers take."""
    from dataclasses import replace

    if placement.replicas:
        raise InputError(f"{file}: placements take turns in it; what they take in place was not measured")
    options = replace(
        options,
        part_ns=priced.options.part_ns,
        reader_share=priced.options.reader_share,
        in_order=priced.options.in_order,
    )
    if requests is None:
        return priced.as_run(placement), options
    return priced.as_streamed(placement, in_flight or 1, requests), options


def _print_timeline(timeline: Timeline, problem: PlacementProblem, out: Path | None) -> None:
    from moirai_sim.summary import print_timeline

    print_timeline(timeline, problem, out)


def _placed_by(placement: Path) -> dict[str, object]:
    """Return what a result says of the file that its placement is from."""
    from moirai_sim.files import sha256

    return {"placement": {"path": placement.name, "sha256": sha256(placement)}}
