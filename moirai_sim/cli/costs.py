"""Commands on costs: profile, calibrate, predict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moirai_sim.cli.options import Json, NeededCluster, OptionalOut, Out, seconds, without_effect


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

    frame = run(models, device, backend=backend, budget_s=seconds(budget, "--budget"))
    metadata = frame.attrs["metadata"]
    write_profile(frame, out, metadata=metadata)
    print_profile(len(frame), out, metadata, as_json=as_json)


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


def profile_in_place(
    model: Annotated[str, typer.Argument(help="An .onnx file with its weights, or zoo:NAME.")],
    cluster: NeededCluster,
    out: Out,
    as_json: Json = False,
) -> None:
    """Time a model on the workers that would run it: kernels, parts and crossings."""
    from moirai_sim.clusters.reader import read_cluster
    from moirai_sim.console import print_json, print_table, print_text
    from moirai_sim.studies.in_place import profile_in_place as run

    times = run(model, read_cluster(cluster))
    times.write(out)
    if as_json:
        print_json(times.model_dump())
        return
    print_table(*times.table())
    print_text(f"{out}: give it to place, simulate and verify as --in-place")


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
    write_profile(frame, out, kind="links" if "collective" in frame else "operators", metadata=metadata)
    for line in report.lines():
        say(line)
    print_profile(len(frame), out, metadata, as_json=as_json)


def calibrate(
    out: Out,
    profiles: Annotated[list[Path] | None, typer.Argument(help="Profiles of operators and of links.")] = None,
    from_runs: Annotated[
        Path | None, typer.Option(help="Results of validate: correct its cost model by what was measured.")
    ] = None,
    adapt: Annotated[
        str | None, typer.Option(help="A cost model to sharpen by a few measurements of a device that it lacks.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Fit a cost model and show its held-out errors."""
    from moirai_sim.console import print_facts, print_json, print_table, print_text
    from moirai_sim.costs.calibrate import calibrate as run
    from moirai_sim.costs.card import known_errors

    if from_runs is not None:
        from moirai_sim.studies.feedback import calibrate_from_runs

        others = {f"profile {path}": path for path in profiles or ()} | {"--adapt": adapt}
        without_effect(others, "with --from-runs, which has its own")
        report = calibrate_from_runs(from_runs, out, seed=seed)
        if as_json:
            print_json(report)
        else:
            print_facts(report)
        return
    if adapt is None:
        card = run(profiles or [], out, seed=seed)
    else:
        from moirai_sim.costs.adapt import adapt as sharpen

        card = sharpen(profiles or [], adapt, out, seed=seed)
    if as_json:
        print_json(card)
        return
    rows = [row for row in card["splits"] if adapt is None or "left-out points" in row["split"]]
    if rows:
        print_table(list(rows[0]), (list(row.values()) for row in rows))
    print_text(known_errors(card))
    print_text(f"cost model: {out}")


def predict(
    operators: Annotated[Path, typer.Argument(help="A JSON Lines file; see 'schema operators'.")],
    cost_model: Annotated[str, typer.Option("--cost-model", help="A name of 'catalog cost-models' or a folder.")],
    device: Annotated[str, typer.Option(help="A name of 'catalog devices', a device of the model, or a YAML file.")],
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
    answer = model.predict([operator for _, operator in lines], read_device_type(device, cost_model=cost_model))
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
