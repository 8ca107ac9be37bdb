"""Run benchmarks and print one row a figure: ``python benchmarks/run.py [NAME...] [--json]``."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.row import Row  # noqa: E402 - found only once the repository is on the path


def discover(*, log: Callable[[str], None]) -> dict[str, Callable[[], Row]]:
    """Return every benchmark by name, from the ``BENCHMARKS`` of all modules ``bench_*.py``.

    A module that cannot be imported (a library is missing) is reported and left out; the others still run.
    """
    found: dict[str, Callable[[], Row]] = {}
    for path in sorted(HERE.glob("bench_*.py")):
        try:
            module = importlib.import_module(f"benchmarks.{path.stem}")
        except ImportError as error:
            log(f"{path.name}: left out, because it cannot be imported: {error}")
            continue
        twice = sorted(found.keys() & module.BENCHMARKS.keys())
        if twice:
            raise SystemExit(f"{path.name}: {', '.join(twice)}: another module has a benchmark of this name")
        found |= module.BENCHMARKS
    return found


def measure(name: str, benchmark: Callable[[], Row]) -> Row:
    """Run one benchmark; one that fails gives a row that says so, and the others still run."""
    try:
        return benchmark()
    except Exception as error:  # noqa: BLE001 - a benchmark may fail in any way; its row says how
        return Row(name, None, "", "", False, f"failed: {type(error).__name__}: {error}")


def main() -> int:
    """Run the benchmarks named on the command line, or all; return 1 where one misses its target, 2 on wrong use."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run (all by default)")
    parser.add_argument("--json", action="store_true", help="print one JSON document: a list of rows")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    arguments = parser.parse_args()

    def log(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    benchmarks = discover(log=log)
    if arguments.list:
        print("\n".join(benchmarks))
        return 0
    unknown = [name for name in arguments.names if name not in benchmarks]
    if unknown:
        log(f"unknown benchmark: {', '.join(unknown)}; known: {', '.join(benchmarks)}")
        return 2
    rows = []
    if not arguments.json:
        print(f"{'name':<18} {'value':>14} {'unit':<22} {'target':<26} met")
    for name in arguments.names or benchmarks:
        started = time.perf_counter()
        row = measure(name, benchmarks[name])
        rows.append(row)
        log(f"{name}: {time.perf_counter() - started:.1f} s")
        if not arguments.json:
            value = "-" if row.value is None else f"{row.value:,.6g}"
            met = {True: "yes", False: "NO", None: "-"}[row.met]
            print(f"{row.name:<18} {value:>14} {row.unit:<22} {row.target!s:<26} {met}", flush=True)
            if row.note:
                print(f"    {row.note}", flush=True)
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    return 1 if any(row.met is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
