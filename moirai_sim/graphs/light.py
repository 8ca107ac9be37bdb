"""Real networks that are on every machine where moirai-sim is: those that ship inside the ``onnx`` package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def light_models() -> dict[str, Path]:
    """Return the real networks that ship inside the ``onnx`` package, by name; their weights are constants."""
    folder = Path(str(files("onnx"))) / "backend" / "test" / "data" / "light"
    return {path.stem: path for path in sorted(folder.glob("light_*.onnx"))}
