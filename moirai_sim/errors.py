"""The errors a user can meet, each with the exit code of the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class MoiraiError(Exception):
    """Base of every error that moirai-sim raises on purpose."""

    exit_code = 4


class CheckError(MoiraiError):
    """A check that the user asked for found something wrong (exit code 1)."""

    exit_code = 1


class ExecutionError(MoiraiError):
    """A run on real devices failed: a worker died, hangs, or has no memory (exit code 1)."""

    exit_code = 1


class InputError(MoiraiError):
    """The user's input is wrong: says where, what was read, and how to repair it (exit code 2).

    Parameters
    ----------
    problems
        One line each, in the form ``place: what is wrong; how to repair it``. All of them are reported at once.
    """

    exit_code = 2

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class InternalError(MoiraiError):
    """A bug of ours: a result that our own checks refuse (exit code 4)."""

    exit_code = 4


@contextmanager
def named(place: str) -> Iterator[None]:
    """Begin every problem that is found meanwhile with its place: an option, or a file."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {problem}" for problem in error.problems) from error


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return a suggestion for a misspelt word, then all known ones; made to end an error message."""
    return f"{nearest(word, known)}known: {', '.join(known)}"


def nearest(word: str, known: Sequence[str]) -> str:
    """Return a suggestion for a misspelt word, with a space behind it; empty where none is near."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean '{close[0]}'? " if close else ""
