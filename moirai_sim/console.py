"""What commands print: one JSON document, or plain text and tables for people. Messages go to standard error."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_NUMBER = re.compile(r"-|[-+]?[\d.,]+(e[-+]?\d+)?( ?[A-Za-z%/]{1,6})?")
"""A number with or without a unit, or the mark of a missing one."""


def print_json(document: object) -> None:
    """Write one JSON document to standard output; what is no number in JSON becomes null."""
    sys.stdout.write(json.dumps(plain(document), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def print_text(text: str = "") -> None:
    """Write a line to standard output."""
    sys.stdout.write(text + "\n")


def say(text: str) -> None:
    """Write a message to standard error."""
    sys.stderr.write(text + "\n")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write aligned columns; those that hold numbers only are aligned to the right."""
    lines = [[_text(cell) for cell in row] for row in rows]
    widths = [max([len(title), *(len(line[i]) for line in lines)]) for i, title in enumerate(columns)]
    numeric = [bool(lines) and all(_NUMBER.fullmatch(line[i]) for line in lines) for i in range(len(columns))]
    for line in [list(columns), ["-" * width for width in widths], *lines]:
        cells = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        )
        print_text("  ".join(cells).rstrip())


def print_facts(facts: Mapping[str, object]) -> None:
    """Write one ``name  value`` line for each fact that is known, then its lists of records as tables, each named."""
    known = {name: value for name, value in facts.items() if value is not None}
    nested = {name: value for name, value in known.items() if isinstance(value, Mapping) or _are_records(value)}
    lines = {name: _text(value) for name, value in known.items() if name not in nested}
    width = max(map(len, lines), default=0)
    for name, line in lines.items():
        print_text(f"{name.ljust(width)}  {line}")
    for name, value in nested.items():
        print_text(f"\n{name}:")
        if isinstance(value, Mapping):
            print_facts(value)
        elif isinstance(value, list):
            cells = {key: cell for record in value for key, cell in record.items()}  # failed records hold less
            columns = [key for key, cell in cells.items() if not isinstance(cell, dict | list)]
            print_table(columns, ([record.get(column) for column in columns] for record in value))


def _are_records(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _text(cell: object) -> str:
    if cell is None:
        return "-"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def plain(value: Any) -> Any:  # noqa: ANN401 - whatever a command's result holds
    """Return a result as what JSON can hold: numpy numbers and arrays, paths and NaN among it."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def print_profile(rows: int, out: Path, metadata: object, *, as_json: bool) -> None:
    """Write where a profile lies and how many rows it has."""
    if as_json:
        print_json({"profile": out, "rows": rows, "metadata": metadata})
    else:
        print_facts({"profile": out, "rows": rows})


def print_study(summary: Mapping[str, Any], *, as_json: bool) -> None:
    """Write the counts of a study's runs."""
    if as_json:
        print_json(summary)
    else:
        print_facts(summary)


def print_validation(summary: Mapping[str, Any]) -> None:
    """Write the cases of a ``validate`` study as a table, and its figures."""
    print_facts({"cases": summary["cases"]})
    print_text()
    print_facts(summary["summary"])
