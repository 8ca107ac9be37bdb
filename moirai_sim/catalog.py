"""Finds shipped and user data by name: clusters, device types and cost models.

A user adds an entry by adding a file under ``$MOIRAI_SIM_HOME`` (default ``~/.config/moirai-sim``), laid out as the
shipped folders are: ``topologies/NAME.yaml``, ``topologies/devices/NAME.yaml``, ``cost_models/NAME/``. A user's entry
takes precedence over a shipped one of the same name.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from moirai_sim.errors import InputError, did_you_mean

Kind = Literal["topologies", "devices", "cost-models"]

_FOLDERS: dict[Kind, str] = {"topologies": "topologies", "devices": "topologies/devices", "cost-models": "cost_models"}
_PACKAGE = Path(__file__).resolve().parent
MODEL_FILES = ("card.json", "links.json")
"""A folder with one of them is a cost model."""


def user_folder() -> Path:
    """Return the folder of the user's own entries; it need not exist."""
    return Path(os.environ.get("MOIRAI_SIM_HOME") or "~/.config/moirai-sim").expanduser()


def shipped_folder() -> Path:
    """Return the folder of the shipped entries: inside an installed package, or the root of a checkout."""
    packed = _PACKAGE / "_catalog"
    return packed if packed.is_dir() else _PACKAGE.parent


def entries(kind: Kind) -> dict[str, Path]:
    """Return every entry of a kind by name, in order of names."""
    found: dict[str, Path] = {}
    for root in (shipped_folder(), user_folder()):
        folder = root / _FOLDERS[kind]
        if kind == "cost-models":
            found |= {path.name: path for path in folder.glob("*") if _is_model(path)}
        else:
            found |= {path.stem: path for path in folder.glob("*.yaml")}
    return dict(sorted(found.items()))


def list_names(kind: Kind) -> list[str]:
    """Return the names of every entry of a kind, sorted."""
    return list(entries(kind))


def find(kind: Kind, name: str | Path, *, beside: Path | None = None) -> Path:
    """Return the file (folder, for cost models) of an entry.

    Parameters
    ----------
    kind
        What is looked for.
    name
        The name of an entry, or a path to one that lies elsewhere.
    beside
        A file that names the entry: a relative path is looked for next to it first.

    Raises
    ------
    InputError
        If there is none, with the known names.
    """
    text = str(name)
    path = Path(text).expanduser()
    candidates = [path] if path.is_absolute() or beside is None else [beside.parent / path, path]
    is_path = "/" in text or os.sep in text or path.suffix in (".yaml", ".yml")
    for candidate in candidates:
        if (is_path and candidate.exists()) or (kind == "cost-models" and _is_model(candidate)):
            return candidate
    if is_path:
        raise InputError(f"{text}: there is no such file; give a path that exists or a name of 'catalog {kind}'")
    known = entries(kind)
    if text not in known:
        raise InputError(f"{text}: unknown name in 'catalog {kind}'; {did_you_mean(text, list(known))}")
    return known[text]


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in MODEL_FILES)
