"""What a benchmark answers: one `Row` a figure; and `curve`, which keeps how a figure grows as CSV and PNG."""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moirai_sim.files import write_whole

CURVES = Path(__file__).parent / "curves"


@dataclass(frozen=True)
class Row:
    """One figure against its target. ``met`` is None where it could not be measured; ``note`` then says why."""

    name: str
    value: float | None
    unit: str
    target: str | float | None
    met: bool | None
    note: str = ""


def data_folder() -> Path | None:
    """Return the folder of published data (``$MOIRAI_SIM_DATA``); None where it is not set or not there."""
    named = os.environ.get("MOIRAI_SIM_DATA", "")
    return Path(named) if named and Path(named).is_dir() else None


def without_data(name: str, unit: str, target: str) -> Row:
    """Return the row of a benchmark whose published data is not at hand."""
    return Row(name, None, unit, target, None, "set MOIRAI_SIM_DATA to the folder of the published data")


def fastest(work: Callable[[], object], *, repeats: int = 5, at_least_s: float = 0.2) -> float:
    """Return the shortest wall time of ``work``, seconds: the run least disturbed by others.

    Each repeat runs ``work`` often enough to last ``at_least_s`` and counts the mean of these runs.
    """
    started = time.perf_counter()
    work()
    loops = max(1, int(at_least_s / max(time.perf_counter() - started, 1e-9)))
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(loops):
            work()
        best = min(best, (time.perf_counter() - started) / loops)
    return best


def curve(name: str, columns: Sequence[str], points: Sequence[Sequence[float]]) -> None:
    """Write a growth curve as ``curves/NAME.csv`` and ``curves/NAME.png``.

    The first column is the size and the x axis; every further column is one line. Both axes are logarithmic.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([columns, *points])
    write_whole(CURVES / f"{name}.csv", text.getvalue())
    figure, axes = plt.subplots(figsize=(5, 3.5), constrained_layout=True)
    for index, label in enumerate(columns[1:], start=1):
        axes.loglog([point[0] for point in points], [point[index] for point in points], marker="o", label=label)
    axes.set_xlabel(columns[0])
    axes.set_title(name)
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150, metadata={"Software": None})
    plt.close(figure)
    write_whole(CURVES / f"{name}.png", picture.getvalue())
