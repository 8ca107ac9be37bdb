"""Run a whole experiment and write its tables: ``python experiments/run.py moirai`` or ``diviml``.

Its studies go into one results folder, ``out/NAME``, where runs that are there are kept: a broken off run goes on
where it was. Then `summarise` writes ``results.csv`` and ``results.md`` of all of them beside the studies.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import yaml
from summarise import summarise

from moirai_sim.studies.evaluate import evaluate
from moirai_sim.studies.store import Store

HERE = Path(__file__).parent
NEEDS = {"placeto": "torch"}
"""Policies of which a study needs a package beyond the core."""


def parts(experiment: Path) -> list[Path]:
    """Return the studies of an experiment but for its smoke size; say which are left out for want of a package."""
    found = []
    for path in sorted(experiment.glob("*.yaml")):
        study = yaml.safe_load(path.read_text(encoding="utf-8"))
        if study.get("kind") != "evaluate" or path.stem == "smoke":
            continue
        missing = [NEEDS[p] for p in study["policies"] if p in NEEDS and importlib.util.find_spec(NEEDS[p]) is None]
        if missing:
            print(f"{path.name}: left out, needs the extra '{missing[0]}'", flush=True)
        else:
            found.append(path)
    return found


def run(studies: Sequence[Path], out: Path, jobs: int | None = None) -> None:
    """Evaluate studies into one folder, to which the runs of all of them belong then."""
    store = Store(out)
    names: set[str] = set()
    for path in studies:
        summary = evaluate(path, out, jobs=jobs)
        print(f"{path.name}: {summary['runs']} runs, {summary['failed']} failed", flush=True)
        names |= store.names_asked() or set()
    store.ask(names)  # each study asked for its own alone


def main() -> None:
    """Run one experiment."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("experiment", choices=("moirai", "diviml"))
    parser.add_argument("-o", "--out", type=Path, help="results folder [default: out/EXPERIMENT]")
    parser.add_argument("--jobs", type=int, help="worker processes [default: one a core]")
    chosen = parser.parse_args()
    out = chosen.out or Path("out", chosen.experiment)
    run(parts(HERE / chosen.experiment), out, chosen.jobs)
    summarise(out, HERE / chosen.experiment)


if __name__ == "__main__":
    main()
