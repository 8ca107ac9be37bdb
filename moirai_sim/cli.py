"""The command line: one thin function a command. Every heavy import waits inside the command that needs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moirai_sim.errors import InputError, InternalError, MoiraiError

if TYPE_CHECKING:
    from moirai_sim.problem import PlacementProblem
    from moirai_sim.timeline import Timeline

app = typer.Typer(
    name="moirai-sim",
    help="Which device should run which operator of my network, how fast will it be, and how sure are we?",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
profile = typer.Typer(help="Measure operators and links, or read published measurements.", no_args_is_help=True)
app.add_typer(profile, name="profile")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Source = Annotated[str, typer.Argument(help="An .onnx file, zoo:NAME, or a published instance.")]
ClusterName = Annotated[str | None, typer.Option("--cluster", help="A name of 'catalog topologies' or a YAML file.")]
NeededCluster = Annotated[str, typer.Option("--cluster", help="A name of 'catalog topologies' or a YAML file.")]
NetworkName = Annotated[str | None, typer.Option("--network", help="none, one-port, half-duplex or fair.")]
NoMemory = Annotated[bool, typer.Option("--no-memory", help="Lift all memory limits.")]
MemoryScale = Annotated[
    float | None, typer.Option("--memory-scale", help="Give every device this multiple of the model's weights.")
]
Fuse = Annotated[str | None, typer.Option("--fuse", help="Backend whose fusions apply; 'none' fuses nothing.")]
PlacementFile = Annotated[Path, typer.Option("--placement", help="A timeline file, e.g. of 'place'.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="Where to write the result.")]
OptionalOut = Annotated[Path | None, typer.Option("-o", "--out", help="Where to write the result.")]
Study = Annotated[Path, typer.Argument(help="A study file; see 'schema study'.")]


def main() -> None:
    """Run the command line and exit: 0 done, 1 a check failed, 2 wrong input, 3 no answer, 4 our bug."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    usage_error: type[Exception] = typer.BadParameter.__bases__[0]
    try:
        sys.exit(app(args=arguments, prog_name="moirai-sim", standalone_mode=False) or 0)
    except MoiraiError as error:
        if debug:
            raise
        for problem in getattr(error, "problems", None) or [str(error)]:
            sys.stderr.write(f"error: {problem}\n")
        sys.exit(error.exit_code)
    except usage_error as error:
        text = error.format_message()  # type: ignore[attr-defined]
        help_alone = text.startswith("Usage:")  # a bare `moirai-sim` or `moirai-sim profile`
        sys.stderr.write(text + "\n" if help_alone else f"error: {text}; see moirai-sim --help\n")
        sys.exit(InputError.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("stopped; finished results are kept, nothing is half-written\n")
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has left, as in `... | head`
        sys.exit(0)
    except Exception as error:
        if debug:
            raise
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        sys.stderr.write(f"error: a bug of moirai-sim: {what}; run it again with --debug and please report it\n")
        sys.exit(InternalError.exit_code)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    """Say which device should run which operator of a network, how fast it will be, and how sure that is."""


@app.command()
def quickstart(out: Out = Path("out/quickstart"), as_json: Json = False) -> None:
    """Run the whole loop here: profile, calibrate, place, simulate, measure, compare."""
    from moirai_sim.console import print_json, print_text, print_validation
    from moirai_sim.studies.quickstart import quickstart as run

    summary = run(out)
    if as_json:
        print_json(summary)
    else:
        print_validation(summary)
        print_text(f"report: {summary['report']}")
    raise typer.Exit(1 if summary.get("failed") else 0)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show versions, solvers, devices, and what is missing."""
    from moirai_sim.console import print_json
    from moirai_sim.doctor import examine, print_examination

    found = examine()
    if as_json:
        print_json(found)
    else:
        print_examination(found)
    raise typer.Exit(1 if found["broken"] else 0)


@app.command()
def catalog(
    kind: Annotated[str, typer.Argument(help="policies, devices, topologies, cost-models or models.")],
    as_json: Json = False,
) -> None:
    """List what is shipped and what the user added."""
    from moirai_sim.console import print_json, print_table
    from moirai_sim.listing import listing

    rows = listing(kind)
    if as_json:
        print_json(rows)
    elif rows:
        print_table(list(rows[0]), (list(row.values()) for row in rows))


@app.command()
def graph(
    source: Source,
    fuse: Annotated[str | None, typer.Option("--fuse", help="Also show what this backend fuses.")] = None,
    as_json: Json = False,
) -> None:
    """Show operators, FLOPs, bytes, memory; before and after fusion."""
    from moirai_sim.console import print_json
    from moirai_sim.summary import print_summary, summarise

    summary = summarise(source, fuse)
    if as_json:
        print_json(summary)
    else:
        print_summary(summary)


@app.command()
def predict(
    operators: Annotated[Path, typer.Argument(help="A JSON Lines file; see 'schema operators'.")],
    cost_model: Annotated[str, typer.Option("--cost-model", help="A name of 'catalog cost-models' or a folder.")],
    device: Annotated[str, typer.Option(help="A name of 'catalog devices' or a YAML file.")],
    out: OptionalOut = None,
    as_json: Json = False,
) -> None:
    """Price operators, each with a 90 % interval."""
    import json

    from moirai_sim.clusters.reader import read_device_type
    from moirai_sim.console import plain, print_json, print_text, say
    from moirai_sim.costs.card import known_errors
    from moirai_sim.costs.catalog_model import load_cost_model
    from moirai_sim.files import write_whole
    from moirai_sim.operators_file import read_operators

    lines = read_operators(operators)
    model = load_cost_model(cost_model)
    answer = model.predict([operator for _, operator in lines], read_device_type(device))
    say(f"{model.name}: {known_errors(model.card)}")
    columns = zip(answer.latency_s, answer.low_s, answer.high_s, answer.extrapolated, strict=True)
    keys = ("latency_s", "low_s", "high_s", "extrapolated")
    priced = [line | plain(dict(zip(keys, row, strict=True))) for (line, _), row in zip(lines, columns, strict=True)]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in priced)
    if out is not None:
        write_whole(out, text + "\n")
    if as_json:
        print_json(priced)
    elif out is None:
        print_text(text)


@app.command()
def place(
    source: Source,
    cluster: ClusterName = None,
    policy: Annotated[str, typer.Option(help="A name of 'catalog policies'.")] = "auto",
    objective: Annotated[str, typer.Option(help="latency or throughput.")] = "latency",
    network: NetworkName = None,
    no_memory: NoMemory = False,
    memory_scale: MemoryScale = None,
    fuse: Fuse = None,
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

    load_policy(policy)  # a misspelt name is reported before anything is read
    _one_of(objective, ("latency", "throughput"), "--objective")
    problem = _problem(source, cluster, network, no_memory=no_memory, memory_scale=memory_scale, fuse=fuse)
    request = Request(
        objective=objective,  # type: ignore[arg-type]  # checked above
        time_limit_s=_seconds(time_limit, "--time-limit"),
        seed=seed,
        workers=workers or len(local_cores()),
    )
    timeline = run(problem, policy, request)
    if out is not None:
        timeline.write(out)
    if as_json:
        print_json(timeline.to_json())
    else:
        _print_timeline(timeline, problem, out)
    if timeline.status in ("infeasible", "limit"):
        raise typer.Exit(3)


@app.command()
def simulate(
    source: Source,
    placement: PlacementFile,
    cluster: ClusterName = None,
    network: NetworkName = None,
    no_memory: NoMemory = False,
    memory_scale: MemoryScale = None,
    fuse: Fuse = None,
    engine: Annotated[str, typer.Option(help="simpy or replay.")] = "simpy",
    out: OptionalOut = None,
    trace: Annotated[Path | None, typer.Option(help="Also write a Chrome trace, for ui.perfetto.dev.")] = None,
    gantt: Annotated[Path | None, typer.Option(help="Also draw a Gantt chart, as .html or .png.")] = None,
    parquet: Annotated[Path | None, typer.Option(help="Also write the spans as a Parquet table.")] = None,
    explained: Annotated[bool, typer.Option("--explain", help="Critical path, and what faster parts save.")] = False,
    streams: Annotated[int, typer.Option(help="Operators that a device runs at once.")] = 1,
    launch: Annotated[str, typer.Option(help="Time to launch an operator, e.g. '5 us'.")] = "0",
    launch_waits: Annotated[bool, typer.Option("--launch-waits", help="A device stands still at a launch.")] = False,
    copy_engines: Annotated[
        int | None, typer.Option(help="Transfers of a device at once; 0: it copies itself.")
    ] = None,
    spread: Annotated[float, typer.Option(help="Standard deviation of the logarithm of operator times.")] = 0.0,
    fault: Annotated[list[str] | None, typer.Option(help="RESOURCE@TIME fails; RESOURCE@TIME=SPEED slows.")] = None,
    requests: Annotated[int | None, typer.Option(help="Simulate a stream of so many requests.")] = None,
    in_flight: Annotated[int, typer.Option(help="Requests of the stream that are under way at once.")] = 1,
    rate: Annotated[float | None, typer.Option(help="Or requests a second that arrive at random (Poisson).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of random times.")] = 0,
    as_json: Json = False,
) -> None:
    """Simulate a placement."""
    import json
    from dataclasses import replace

    from moirai_sim.console import print_facts, print_json
    from moirai_sim.files import write_whole
    from moirai_sim.placement import placement_from_timeline
    from moirai_sim.simulation.engine import simulate as run
    from moirai_sim.simulation.options import SimulationOptions, parse_fault
    from moirai_sim.timeline import read_timeline
    from moirai_sim.units import parse_ns

    _one_of(engine, ("simpy", "replay"), "--engine")
    options = SimulationOptions(
        streams=streams,
        launch_ns=parse_ns(launch),
        asynchronous_launch=not launch_waits,
        copy_engines=copy_engines,
        spread=spread,
        faults=tuple(parse_fault(text) for text in fault or ()),
        seed=seed,
    )
    placed = read_timeline(placement)
    problem = _problem(source, cluster, network, no_memory=no_memory, memory_scale=memory_scale, fuse=fuse)
    wanted = placement_from_timeline(problem, placed)
    if requests is not None:
        from moirai_sim.simulation.workloads import poisson, serve

        arrivals = None if rate is None else poisson(rate, requests, seed)
        clients = in_flight if rate is None else None
        service = serve(problem, wanted, arrivals=arrivals, in_flight=clients, requests=requests, options=options)
        if out is not None:
            write_whole(out, json.dumps(service.to_json(), indent=1) + "\n")
        print_json(service.to_json()) if as_json else print_facts(service.figures())
        return
    timeline = replace(run(problem, wanted, engine=engine, options=options), policy=placed.policy)  # type: ignore[arg-type]
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
        path = {} if explanation is None else {"explanation": explanation.to_json()}
        print_json(timeline.to_json() | path)
        return
    _print_timeline(timeline, problem, out)
    if explanation is not None:
        typer.echo(explanation.text())


@app.command()
def verify(
    source: Source,
    file: Annotated[Path, typer.Argument(help="A timeline file.")],
    cluster: ClusterName = None,
    network: NetworkName = None,
    no_memory: NoMemory = False,
    memory_scale: MemoryScale = None,
    fuse: Fuse = None,
    as_json: Json = False,
) -> None:
    """Check a timeline independently.

    Lists every violation and exits 1 if there is one. The network and the memory limits that the file says it was made
    for hold unless others are given.
    """
    from moirai_sim.console import print_json, print_text
    from moirai_sim.timeline import read_timeline
    from moirai_sim.verify import verify as check

    timeline = read_timeline(file)
    if not no_memory and memory_scale is None:
        no_memory, memory_scale = timeline.memory
    problem = _problem(
        source, cluster, network or timeline.network or None, no_memory=no_memory, memory_scale=memory_scale, fuse=fuse
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


@app.command()
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
    subject = load_subject(model, operators)
    if ray is None:
        timeline = run(subject, problem, wanted, repeats=repeats)
    else:
        from moirai_sim.execution.ray_workers import RayWorkers

        with RayWorkers(given, ray) as workers:
            timeline = run(subject, problem, wanted, workers=workers, repeats=repeats)
    timeline.write(out)
    if as_json:
        print_json(timeline.to_json())
    else:
        _print_timeline(timeline, problem, out)


@app.command()
def validate(study: Study, out: Out, as_json: Json = False) -> None:
    """Compare predicted and measured times over models."""
    from moirai_sim.console import print_json, print_validation
    from moirai_sim.studies.validate import validate as run

    summary = run(study, out)
    if as_json:
        print_json(summary)
    else:
        print_validation(summary)
    raise typer.Exit(1 if summary.get("failed") else 0)


Jobs = Annotated[int | None, typer.Option(min=1, help="Worker processes; default one a core.")]
Ray = Annotated[str | None, typer.Option(help="Address of a Ray cluster, 'auto' for one that runs here.")]
Retry = Annotated[bool, typer.Option("--retry-failed", help="Run failed runs again.")]


@app.command()
def evaluate(
    study: Study, out: Out, jobs: Jobs = None, ray: Ray = None, retry_failed: Retry = False, as_json: Json = False
) -> None:
    """Run policies x models x clusters, resumable."""
    from moirai_sim.console import print_study
    from moirai_sim.studies.evaluate import evaluate as run

    summary = run(study, out, jobs=jobs, ray=ray, retry_failed=retry_failed)
    print_study(summary, as_json=as_json)
    raise typer.Exit(1 if summary["failed"] else 0)


@app.command()
def whatif(
    study: Study, out: Out, jobs: Jobs = None, ray: Ray = None, retry_failed: Retry = False, as_json: Json = False
) -> None:
    """Try overrides of one cluster, in scenarios."""
    from moirai_sim.console import print_study
    from moirai_sim.studies.whatif import whatif as run

    summary = run(study, out, jobs=jobs, ray=ray, retry_failed=retry_failed)
    print_study(summary, as_json=as_json)
    raise typer.Exit(1 if summary["failed"] else 0)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Results of validate, evaluate or whatif.")],
    out: Out,
    as_json: Json = False,
) -> None:
    """Show a study's results in one HTML file."""
    from moirai_sim.console import print_facts, print_json
    from moirai_sim.studies.report import report as run

    built = run(folder, out)
    facts = {"title": built.title, **dict(built.cards), "report": str(out)}
    if as_json:
        print_json(facts)
    else:
        print_facts(facts)


@app.command()
def schema(kind: Annotated[str, typer.Argument(help="cluster, device, study, timeline or operators.")]) -> None:
    """Print the JSON Schema of a file format."""
    from moirai_sim.console import print_json
    from moirai_sim.listing import json_schema

    print_json(json_schema(kind))


@profile.command("operators")
def profile_operators(
    models: Annotated[list[str], typer.Argument(help=".onnx files or zoo:NAME.")],
    out: Out,
    device: Annotated[str, typer.Option(help="cpu:CORE, cpu:FIRST-LAST or cuda:INDEX.")] = "cpu:0",
    backend: Annotated[str, typer.Option(help="onnxruntime or torch.")] = "onnxruntime",
    budget: Annotated[str, typer.Option(help="Time to spend on repeats.")] = "60s",
    as_json: Json = False,
) -> None:
    """Time operators on real hardware."""
    from moirai_sim.console import print_profile
    from moirai_sim.profiling.operators import profile_operators as run
    from moirai_sim.profiling.schema import write_profile

    frame = run(models, device, backend=backend, budget_s=_seconds(budget, "--budget"))
    metadata = frame.attrs["metadata"]
    write_profile(frame, out, metadata=metadata)
    print_profile(len(frame), out, metadata, as_json=as_json)


@profile.command("links")
def profile_links(cluster: NeededCluster, out: Out, as_json: Json = False) -> None:
    """Time transfers between real devices."""
    from moirai_sim.clusters.reader import read_cluster
    from moirai_sim.console import print_profile
    from moirai_sim.profiling.links import profile_links as run
    from moirai_sim.profiling.schema import write_profile

    frame = run(read_cluster(cluster))
    metadata = frame.attrs["metadata"]
    write_profile(frame, out, kind="links", metadata=metadata)
    print_profile(len(frame), out, metadata, as_json=as_json)


@profile.command("import")
def profile_import(
    data_set: Annotated[str, typer.Argument(help="neusight, aiconfigurator or vidur.")],
    path: Annotated[Path, typer.Argument(help="A file or folder in the layout of the data set.")],
    out: Out,
    as_json: Json = False,
) -> None:
    """Read published measurements."""
    from dataclasses import asdict

    from moirai_sim.console import print_profile, say
    from moirai_sim.profiling.published import import_published
    from moirai_sim.profiling.schema import write_profile

    frame, report = import_published(data_set, path)
    metadata = asdict(report)
    write_profile(frame, out, kind="links" if data_set == "vidur" else "operators", metadata=metadata)
    for line in report.lines():
        say(line)
    print_profile(len(frame), out, metadata, as_json=as_json)


@app.command()
def calibrate(
    out: Out,
    profiles: Annotated[list[Path] | None, typer.Argument(help="Profiles of operators and of links.")] = None,
    from_runs: Annotated[
        Path | None, typer.Option(help="Results of validate: correct its cost model by what was measured.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Fit a cost model and show its held-out errors."""
    from moirai_sim.console import print_facts, print_json, print_table, print_text
    from moirai_sim.costs.calibrate import calibrate as run

    if from_runs is not None:
        from moirai_sim.studies.feedback import calibrate_from_runs

        report = calibrate_from_runs(from_runs, out, seed=seed)
        if as_json:
            print_json(report)
        else:
            print_facts(report)
        return
    card = run(profiles or [], out, seed=seed)
    if as_json:
        print_json(card)
        return
    rows = card["splits"]
    if rows:
        print_table(list(rows[0]), (list(row.values()) for row in rows))
    print_text(f"cost model: {out}")


def _problem(
    source: str,
    cluster: str | None,
    network: str | None,
    *,
    no_memory: bool,
    memory_scale: float | None,
    fuse: str | None,
) -> PlacementProblem:
    from moirai_sim.clusters.reader import read_cluster
    from moirai_sim.sources import load_problem

    where = None if cluster is None else read_cluster(cluster)
    return load_problem(source, where, network=network, memory=not no_memory, memory_scale=memory_scale, fuse=fuse)


def _seconds(text: str, option: str) -> float:
    """Return a time given as bare seconds or with a unit."""
    from moirai_sim.units import parse_ns

    try:
        seconds = parse_ns(text if text.strip()[-1:].isalpha() else f"{text} s") / 1e9
    except InputError as error:
        raise InputError(f"{option}: {error}") from error
    if not seconds > 0:
        raise InputError(f"{option}: must be above zero, read {text!r}")
    return seconds


def _one_of(value: str, known: tuple[str, ...], option: str) -> None:
    from moirai_sim.errors import did_you_mean

    if value not in known:
        raise InputError(f"{option}: unknown value '{value}'; {did_you_mean(value, known)}")


def _print_timeline(timeline: Timeline, problem: PlacementProblem, out: Path | None) -> None:
    from moirai_sim.summary import print_timeline

    print_timeline(timeline, problem, out)
