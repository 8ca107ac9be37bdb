"""Fixtures that several kinds of tests share."""

import sys
from dataclasses import dataclass

import pytest


def pytest_collection_modifyitems(items):
    """Everything under tests/measured/ times real runs, and is run apart from the rest."""
    for item in items:
        if "measured" in item.path.parts:
            item.add_marker(pytest.mark.measured)


@dataclass
class Answer:
    """What a command line call did."""

    code: int
    out: str
    err: str

    @property
    def errors(self):
        """The lines on standard error that report an error."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


@pytest.fixture
def cli(monkeypatch, capsys):
    """Call the command line in this process, as the entry point does."""
    from moirai_sim.cli import main

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["moirai-sim", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as leaving:
            main()
        captured = capsys.readouterr()
        return Answer(int(leaving.value.code or 0), captured.out, captured.err)

    return call
