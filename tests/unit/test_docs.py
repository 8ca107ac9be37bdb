"""Every code block of the documentation runs: ``bash`` and ``python`` as they stand, files where the text says so."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("**/*.md")), ROOT / "README.md"]
BLOCK = re.compile(r"(?:Save as `(?P<file>[\w.-]+)`:\n\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)


def _runs(page):
    return any(match["language"] in ("bash", "python") for match in BLOCK.finditer(page.read_text()))


@pytest.mark.parametrize("page", [p for p in PAGES if _runs(p)], ids=lambda page: page.stem)
def test_every_code_block_runs(page, tmp_path):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for match in BLOCK.finditer(page.read_text()):
        if match["file"]:
            (tmp_path / match["file"]).write_text(match["code"])
            continue
        command = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}.get(match["language"])
        if command is None:
            continue
        done = subprocess.run(
            [*command, match["code"]], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, f"{page.name}: {match['code']}\n{done.stdout}\n{done.stderr}"


def test_documentation_names_only_commands_that_exist():
    command = Path(sys.executable).with_name("moirai-sim")
    listing = subprocess.run([command, "--help"], capture_output=True, text=True, check=True).stdout
    named = {name for page in PAGES for name in re.findall(r"^moirai-sim ([a-z]+)", page.read_text(), re.M)}
    missing = sorted(name for name in named if not re.search(rf"\b{name}\b", listing))
    assert named
    assert missing == []
