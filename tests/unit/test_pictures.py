"""Pictures of a report as files: drawn by a real browser, refused clearly without one."""

import shutil

import plotly.graph_objects as go
import pytest

from moirai_sim.errors import InputError
from moirai_sim.studies.page import Report, Section
from moirai_sim.studies.pictures import write_pictures

CHROME = any(shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))


@pytest.fixture
def report():
    bars = go.Figure(go.Bar(x=["heft", "milp"], y=[3, 2]))
    sections = [Section("Policies"), Section("Time: by policy", picture=bars), Section("Gap", picture=bars)]
    return Report("pair", "", (), sections)


@pytest.mark.skipif(not CHROME, reason="needs Chrome or Chromium on the PATH")
@pytest.mark.parametrize(("file_format", "magic"), [("pdf", b"%PDF"), ("png", b"\x89PNG"), ("svg", b"<svg")])
def test_every_picture_becomes_a_file(report, tmp_path, file_format, magic):
    files = write_pictures(report, tmp_path / "out", file_format)
    assert [file.name for file in files] == [f"02-time-by-policy.{file_format}", f"03-gap.{file_format}"]
    assert all(file.read_bytes().startswith(magic) for file in files)


def test_an_unknown_format_is_refused(report, tmp_path):
    with pytest.raises(InputError, match="choose one of pdf, png, svg"):
        write_pictures(report, tmp_path / "out", "bmp")


def test_without_chrome_the_error_says_so_and_nothing_is_written(report, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "no-browser"))
    with pytest.raises(InputError, match="need Chrome"):
        write_pictures(report, tmp_path / "out")
    assert not (tmp_path / "out").exists()
