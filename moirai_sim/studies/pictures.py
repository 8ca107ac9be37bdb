"""The pictures of a report as files for papers: the same figures, drawn by Chrome through kaleido."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from moirai_sim.errors import InputError
from moirai_sim.files import write_whole

if TYPE_CHECKING:
    from moirai_sim.studies.page import Report

FORMATS = ("pdf", "png", "svg")
WIDTH = 900
"""Pixels; a PNG has twice as many."""


def check_pictures(file_format: str) -> None:
    """Refuse a format that `write_pictures` cannot write, before work is done for it.

    Raises
    ------
    InputError
        If the format is unknown, or kaleido (extra ``figures``) is missing.
    """
    if file_format not in FORMATS:
        raise InputError(f"pictures: unknown format '{file_format}'; choose one of {', '.join(FORMATS)}")
    if find_spec("kaleido") is None:
        raise InputError("pictures need kaleido; install it with: pip install 'moirai-sim[figures]'")


def write_pictures(report: Report, folder: Path, file_format: str = "pdf") -> list[Path]:
    """Write every picture of a report into a folder, named by place and title, and return the files.

    Parameters
    ----------
    file_format
        ``pdf`` and ``svg`` are vectors, ``png`` is for slides.

    Raises
    ------
    InputError
        As `check_pictures`, or if Chrome is missing.
    """
    check_pictures(file_format)
    from plotly.graph_objects import Figure
    from plotly.io import write_images

    drawn = [(i, section) for i, section in enumerate(report.sections, start=1) if section.picture is not None]
    figures = [Figure(section.picture).update_layout(template="plotly_white") for _, section in drawn]
    names = [f"{i:02d}-{_slug(section.title)}.{file_format}" for i, section in drawn]
    with TemporaryDirectory() as scratch:
        files = [Path(scratch, name) for name in names]
        try:
            write_images(
                fig=figures, file=files, format=file_format, width=WIDTH,
                height=[section.height for _, section in drawn], scale=2 if file_format == "png" else 1,
            )  # fmt: skip
        except RuntimeError as error:  # what plotly makes of kaleido's own error
            cure = "install one, or fetch one with: plotly_get_chrome"
            raise InputError(f"pictures need Chrome or Chromium, and none could be started; {cure}") from error
        for name, file in zip(names, files, strict=True):
            write_whole(folder / name, file.read_bytes())
    return [folder / name for name in names]


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
