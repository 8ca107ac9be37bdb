"""Readers of published measurements: each data set in its own layout becomes a profile.

`import_published` is the door; every row that cannot be used is counted and named in the `Report`, none is dropped in
silence.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moirai_sim.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

KINDS = ("neusight", "aiconfigurator", "vidur")


@dataclass
class Report:
    """What became of the rows that a reader met."""

    source: str
    """Citation and licence of the data set."""
    files: int = 0
    read: int = 0
    """Rows met in all files."""
    kept: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    """Rows left out, by reason."""
    examples: dict[str, str] = field(default_factory=dict)
    """For each reason the first row it struck, as ``file:line``."""
    other_files: dict[str, int] = field(default_factory=dict)
    """Files of the data set that hold something else, by what that is; their rows are not counted in ``read``."""

    def count(self, frame: pd.DataFrame) -> None:
        """Count a file and its rows."""
        self.files += 1
        self.read += len(frame)

    def refuse(self, reason: str, rows: int, example: str) -> None:
        """Count rows that are left out."""
        if rows:
            self.refused[reason] = self.refused.get(reason, 0) + rows
            self.examples.setdefault(reason, example)

    def lines(self) -> list[str]:
        """Return the report for people."""
        text = [f"{self.kept:,} of {self.read:,} rows from {self.files} files ({self.source})"]
        text += [f"left out {n:,}: {reason} (first: {self.examples[reason]})" for reason, n in self.refused.items()]
        return text + [f"{n} files not read: {what}" for what, n in self.other_files.items()]


def import_published(kind: str, path: Path) -> tuple[pd.DataFrame, Report]:
    """Read published measurements into a profile.

    Parameters
    ----------
    kind
        ``neusight`` (operator sweeps), ``aiconfigurator`` (GEMM, attention, mixture of experts; collectives, a profile
        of links, from a folder of nothing else) or ``vidur`` (point-to-point and all-reduce times, a profile of links).
    path
        A file or a folder, searched through, in the layout of the data set.

    Returns
    -------
    The profile (columns of `moirai_sim.profiling.schema`; ``LINK_COLUMNS`` for links) and the report.

    Raises
    ------
    InputError
        If nothing of that kind is found, or a file misses columns.
    """
    if kind not in KINDS:
        raise InputError(f"unknown data set '{kind}'; {did_you_mean(kind, KINDS)}")
    if not path.exists():
        raise InputError(f"{path}: does not exist; give a file or a folder of {kind} data")
    reader = importlib.import_module(f"moirai_sim.profiling.published.{kind}")
    frame: pd.DataFrame
    report: Report
    frame, report = reader.read(path)
    report.kept = len(frame)
    if frame.empty:
        why = "; ".join(report.lines()[1:]) or f"no file in the layout of {kind} was found"
        raise InputError(f"{path}: no usable row; {why}")
    return frame, report
