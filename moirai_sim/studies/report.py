"""One self-contained HTML file from any results folder: tables that sort, interactive pictures, provenance."""

from __future__ import annotations

from pathlib import Path

from moirai_sim.files import write_whole
from moirai_sim.studies import evaluate_report, validate_report, whatif_report
from moirai_sim.studies.page import Report, render
from moirai_sim.studies.store import read_folder


def report(folder: Path, out: Path) -> Report:
    """Write the report of a results folder and return what it shows.

    Raises
    ------
    InputError
        If the folder holds no study, or ``out`` cannot be written.
    """
    study, store = read_folder(folder)
    build = {
        "evaluate": evaluate_report.build,
        "whatif": whatif_report.build,
        "validate": validate_report.build,
    }[study["kind"]]
    built = build(study, store)
    write_whole(out, render(built))
    return built
