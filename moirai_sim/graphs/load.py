"""A graph from what a user names: an ONNX file or a model of the zoo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moirai_sim.errors import InputError

if TYPE_CHECKING:
    from moirai_sim.graphs.operator import OperatorGraph

ZOO_PREFIX = "zoo:"


def load_graph(source: str | Path) -> OperatorGraph:
    """Read a graph.

    Parameters
    ----------
    source
        Path of an ``.onnx`` file, with sizes of its symbolic dimensions where it has any (``model.onnx?batch=8``), or
        ``zoo:NAME?param=value&param=value``, e.g. ``zoo:gpt3-1.3b?batch=1&seq=1024``.

    Raises
    ------
    InputError
        If the source does not exist or cannot be read; see `moirai_sim.graphs.onnx_reader.read_onnx`.
    """
    text = str(source)
    if text.startswith(ZOO_PREFIX):
        from moirai_sim.graphs.onnx_reader import read_model
        from moirai_sim.graphs.zoo import zoo_model

        name = text.removeprefix(ZOO_PREFIX)
        return read_model(zoo_model(name), name=name, place=text, source={"zoo": name})
    from moirai_sim.graphs.onnx_reader import read_onnx

    path, question, query = text.partition("?")
    if Path(text).exists() or not question:
        return read_onnx(Path(text))
    return read_onnx(Path(path), dimensions=_sizes(query, text))


def _sizes(query: str, place: str) -> dict[str, int]:
    """Parse ``a=1&b=2`` into whole numbers of at least 0.

    Raises
    ------
    InputError
        If an item is not of this form, or comes twice.
    """
    values: dict[str, int] = {}
    for item in filter(None, query.split("&")):
        key, equals, value = item.partition("=")
        if not (key and equals and value.isdecimal() and value.isascii()) or key in values:
            raise InputError(f"{place}: cannot read '{item}'; write each once as name=number, separated by '&'")
        values[key] = int(value)
    return values
