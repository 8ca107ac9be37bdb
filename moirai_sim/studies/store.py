"""Results folder of a study: one result one file, named by the hash of all that determines it.

``results/HASH.json`` holds only what the inputs determine, so an interrupted and resumed study ends with the same bytes
as an undisturbed one. Wall-clock seconds are measurements; they lie beside it in ``seconds/HASH.json``. Results of an
earlier study in the folder stay, to be used again; ``asked.json`` names those that belong to the study as it is now.
Studies that share a folder do so one after the other: `ask` for the results of all of them once the last has run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from moirai_sim.errors import InputError
from moirai_sim.files import write_whole

FORMAT = "moirai-sim/result@1"


def canonical(document: object) -> str:
    """Return JSON text that is equal for equal content: sorted keys, no spaces."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"))


def digest(document: object) -> str:
    """Return the SHA-256 of the canonical JSON of a document, hex."""
    return hashlib.sha256(canonical(document).encode()).hexdigest()


class Store:
    """The results in one folder, and which of them belong to its study."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results = folder / "results"
        self.seconds = folder / "seconds"
        self.asked = folder / "asked.json"

    def open(self, study: Mapping[str, Any]) -> None:
        """Create the folder for a study, or check that it already holds results of a study of this kind.

        Raises
        ------
        InputError
            If the folder cannot be made, holds another kind of study, or its ``study.json`` is damaged.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be a results folder ({error.strerror}); name another") from error
        self.check(study["kind"])
        for folder in (self.results, self.seconds):
            for left in folder.glob(".*.json.*"):  # half-written when a run was killed
                left.unlink()
        self.asked.unlink(missing_ok=True)
        write_whole(self.folder / "study.json", json.dumps(study, indent=1, sort_keys=True) + "\n")

    def check(self, kind: str) -> None:
        """Check that the folder holds no study of another kind.

        Raises
        ------
        InputError
            If it does, or its ``study.json`` is damaged.
        """
        path = self.folder / "study.json"
        found = _read_study(path)["kind"] if path.exists() else kind
        if found != kind:
            raise InputError(f"{self.folder}: holds a study of kind '{found}', not '{kind}'; name another")

    def ask(self, names: Collection[str]) -> None:
        """Note that these results, which need not be there yet, belong to the study; `read` leaves out others then."""
        write_whole(self.asked, json.dumps(sorted({*names, *(self.names_asked() or ())})) + "\n")

    def names_asked(self) -> set[str] | None:
        """Return the names of the results that belong to the study; None where that was never noted."""
        return set(json.loads(self.asked.read_text(encoding="utf-8"))) if self.asked.is_file() else None

    def has(self, name: str, *, failed_too: bool = True) -> bool:
        """Tell whether a result is there; ``failed_too=False`` does not count failures, so that they run again."""
        path = self.results / f"{name}.json"
        if not path.exists():
            return False
        return failed_too or json.loads(path.read_text(encoding="utf-8"))["outcome"]["status"] != "error"

    def write(self, name: str, key: Mapping[str, Any], outcome: Mapping[str, Any], seconds: float) -> None:
        """Write one result. The seconds go first, so that a result that is there is complete."""
        write_whole(self.seconds / f"{name}.json", canonical({"seconds": seconds}) + "\n")
        document = {"format": FORMAT, "key": key, "outcome": outcome}
        write_whole(self.results / f"{name}.json", json.dumps(document, indent=1, sort_keys=True) + "\n")

    def read(self, names: list[str] | None = None) -> Iterator[dict[str, Any]]:
        """Iterate over results, each ``{"name", "key", "outcome", "seconds"}``; one is in memory at a time.

        Without names, over all that are there and were asked for.
        """
        if names is None:
            asked = self.names_asked()
            names = [path.stem for path in sorted(self.results.glob("*.json")) if asked is None or path.stem in asked]
        for path in map(self._path, names):
            document = json.loads(path.read_text(encoding="utf-8"))
            beside = self.seconds / path.name
            seconds = json.loads(beside.read_text(encoding="utf-8"))["seconds"] if beside.exists() else None
            yield {"name": path.stem, "key": document["key"], "outcome": document["outcome"], "seconds": seconds}

    def _path(self, name: str) -> Path:
        return self.results / f"{name}.json"


def read_folder(folder: Path) -> tuple[dict[str, Any], Store]:
    """Return the study document and the store of a results folder.

    Raises
    ------
    InputError
        If the folder holds no study, or its ``study.json`` is damaged.
    """
    path = folder / "study.json"
    if not path.is_file():
        raise InputError(
            f"{folder}: no study.json; give the folder that evaluate, whatif, validate or quickstart wrote"
        )
    return _read_study(path), Store(folder)


_KINDS = ("evaluate", "whatif", "validate")


def _read_study(path: Path) -> dict[str, Any]:
    try:
        study: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if study["kind"] not in _KINDS:
            raise InputError(f"{path}: no study is of kind {study['kind']!r}; run the study again in another folder")
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: is damaged ({error!r}); run the study again in another folder") from error
    return study
