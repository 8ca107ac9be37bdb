"""Files written whole or not at all, and hashes of what a result depends on."""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import suppress
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
