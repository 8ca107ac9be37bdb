"""Commands that say what there is: this machine, the catalog, file formats, a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moirai_sim.cli.options import Json, Out, Source


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


def schema(
    kind: Annotated[str, typer.Argument(help="cluster, device, study, timeline or operators.")],
    as_json: Json = False,  # accepted everywhere; a schema is JSON without it
) -> None:
    """Print the JSON Schema of a file format."""
    from moirai_sim.console import print_json
    from moirai_sim.listing import json_schema

    print_json(json_schema(kind))


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
