"""Commands on many runs: validate, evaluate, what-if, and the report of any of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from moirai_sim.cli.options import Json, Out, Study, without_effect

Jobs = Annotated[int | None, typer.Option(min=1, help="Worker processes; default one a core.")]
Ray = Annotated[str | None, typer.Option(help="Address of a Ray cluster, 'auto' for one that runs here.")]
Retry = Annotated[bool, typer.Option("--retry-failed", help="Run failed runs again.")]
_ERRORS_SHOWN = 3


def validate(study: Study, out: Out, as_json: Json = False) -> None:
    """Compare predicted and measured times over models."""
    from moirai_sim.console import print_json, print_validation
    from moirai_sim.studies.validate import validate as run

    summary = run(study, out)
    if as_json:
        print_json(summary)
    else:
        print_validation(summary)
    _leave(summary["failed"], out)


def evaluate(
    study: Study, out: Out, jobs: Jobs = None, ray: Ray = None, retry_failed: Retry = False, as_json: Json = False
) -> None:
    """Run policies x models x clusters, resumable."""
    from moirai_sim.console import print_study
    from moirai_sim.studies.evaluate import evaluate as run

    _jobs_or_ray(jobs, ray)
    summary = run(study, out, jobs=jobs, ray=ray, retry_failed=retry_failed)
    print_study(summary, as_json=as_json)
    _leave(summary["failed"], out)


def whatif(
    study: Study, out: Out, jobs: Jobs = None, ray: Ray = None, retry_failed: Retry = False, as_json: Json = False
) -> None:
    """Try overrides of one cluster, in scenarios."""
    from moirai_sim.console import print_study, print_text
    from moirai_sim.studies.sizes import sentence
    from moirai_sim.studies.whatif import whatif as run

    _jobs_or_ray(jobs, ray)
    summary = run(study, out, jobs=jobs, ray=ray, retry_failed=retry_failed)
    answers = {} if as_json else summary.pop("sizes", {})
    print_study(summary, as_json=as_json)
    for model, answer in answers.items():
        print_text(f"{model}: {sentence(answer)}")
    _leave(summary["failed"], out)


def _leave(failed: int, out: Path) -> None:
    """End with code 0, or where runs failed with 1 and the most frequent reasons."""
    from moirai_sim.console import say
    from moirai_sim.studies.store import Store

    if failed:
        errors = Counter(result["outcome"].get("error") for result in Store(out).read())
        del errors[None]
        for error, runs in errors.most_common(_ERRORS_SHOWN):
            say(f"{error} ({runs} of {failed} failures)")
        if len(errors) > _ERRORS_SHOWN:
            say(f"and {len(errors) - _ERRORS_SHOWN} other errors; 'moirai-sim report {out}' shows all")
    raise typer.Exit(1 if failed else 0)


def _jobs_or_ray(jobs: int | None, ray: str | None) -> None:
    if ray is not None:
        without_effect({"--jobs": jobs}, "with --ray, whose cluster says how many runs it takes at once")


def report(
    folder: Annotated[Path, typer.Argument(help="Results of validate, evaluate or whatif.")],
    out: Out,
    pictures: Annotated[
        Path | None, typer.Option(help="Folder for the pictures as files (extra 'figures', and Chrome).")
    ] = None,
    picture_format: Annotated[
        str | None, typer.Option("--format", help="Of the pictures: pdf (default), png or svg.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a study's results in one HTML file, and the pictures as files for a paper."""
    from moirai_sim.console import print_facts, print_json
    from moirai_sim.studies.pictures import check_pictures, write_pictures
    from moirai_sim.studies.report import report as run

    file_format = picture_format or "pdf"
    if pictures is None:
        without_effect({"--format": picture_format}, "without --pictures")
    else:
        check_pictures(file_format)
    built = run(folder, out)
    facts: dict[str, object] = {"title": built.title, **dict(built.cards), "report": str(out)}
    if pictures is not None:
        files = write_pictures(built, pictures, file_format)
        facts["pictures"] = [str(file) for file in files] if as_json else f"{len(files)} in {pictures}"
    if as_json:
        print_json(facts)
    else:
        print_facts(facts)
