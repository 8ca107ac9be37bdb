"""Files written whole or not at all, and hashes of what a result depends on."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from moirai_sim.errors import InputError


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader or a killed process never sees half of it.

    Raises
    ------
    InputError
        If the folder does not exist or cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # a device or a pipe, such as /dev/null
            path.write_bytes(data)
            return
        path = path.resolve()  # a link stays one
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
    finally:
        if temporary is not None:
            with suppress(FileNotFoundError):
                temporary.unlink()


@contextmanager
def folder_in_place_of(out: Path, marks: Collection[str], inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """Give an empty folder that becomes ``out`` when the context ends well, and of which else nothing is left.

    Parameters
    ----------
    out
        May hold what an earlier run made, which is replaced.
    marks
        Names of files; a folder with one of them is such a result.
    inputs
        Files that are read and must not be lost, other than those that an earlier run left.

    Raises
    ------
    InputError
        If ``out`` holds anything else, or cannot be written.
    """
    place = out.resolve()
    if place.exists() and not place.is_dir():
        raise InputError(f"{out}: is a file; name a folder")
    held = {path.name for path in place.iterdir()} if place.is_dir() else set()
    if held and (not held & set(marks) or place == Path.cwd() or any(one.resolve().parent == place for one in inputs)):
        raise InputError(f"{out}: holds other files, which would be replaced; name a folder of its own")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}."))
        old = work.with_name(f"{work.name}.old")
        try:
            yield work
            work.chmod(0o755)
            if place.exists():
                place.rename(old)
            work.rename(place)
        finally:
            shutil.rmtree(work, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); choose another place") from error


def refuse_constant(constant: str) -> None:
    """Refuse the NaN and Infinity that Python's JSON reader lets through: its ``parse_constant``.

    Raises
    ------
    ValueError
        Always.
    """
    raise ValueError(f"{constant} is no JSON number")


def sha256(path: Path) -> str:
    """Return the hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
