"""Models from what a user names, an ONNX file or one of the zoo: a graph to price, or the model itself to run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from moirai_sim.errors import InputError

if TYPE_CHECKING:
    import onnx

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

    path, query = split_source(text)
    return read_onnx(path, dimensions=_sizes(query, text))


def load_model(source: str | Path) -> onnx.ModelProto:
    """Read a model with its weights, as it can be run: symbolic dimensions have the sizes that the source gives them.

    Parameters
    ----------
    source
        As in `load_graph`; weights that are not in the file lie beside it.

    Raises
    ------
    InputError
        If the model or its weights cannot be read.
    """
    text = str(source)
    if text.startswith(ZOO_PREFIX):
        from moirai_sim.graphs.zoo import zoo_model

        return zoo_model(text.removeprefix(ZOO_PREFIX))
    from onnx.external_data_helper import load_external_data_for_model

    from moirai_sim.graphs.onnx_reader import load_onnx
    from moirai_sim.graphs.onnx_types import check_dimensions

    path, query = split_source(text)
    sizes = _sizes(query, text)
    model = load_onnx(path)
    check_dimensions(model, sizes, text)
    try:
        load_external_data_for_model(model, str(path.parent))
    except Exception as error:  # missing, cut short, outside the folder: each a type of its own
        raise InputError(
            f"{text}: weights in other files cannot be read ({error}); put them beside the model, whole"
        ) from error
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in sizes:
                dimension.dim_value = sizes[dimension.dim_param]
    return model


def split_source(source: str | Path) -> tuple[Path, str]:
    """Return the file that a source names, and the sizes behind it (``batch=8``); empty where it gives none."""
    path, question, query = str(source).partition("?")
    return (Path(path), query) if question and not Path(source).exists() else (Path(source), "")


def model_names(sources: Iterable[str]) -> dict[str, str]:
    """Return a short name for each source that no other of them has.

    A zoo model keeps its own. A file goes by its stem: with the sizes behind it, and with as many of the folders before
    it, as are needed to tell it from the others.
    """
    known = {source: list(dict.fromkeys(_names(source))) for source in sources}
    uses = Counter(name for names in known.values() for name in names)
    return {source: next((name for name in names if uses[name] == 1), source) for source, names in known.items()}


def _names(source: str) -> Iterator[str]:
    """Iterate over what a source can be called, the shortest first."""
    if not source.startswith(ZOO_PREFIX):
        path, query = split_source(source)
        parts = path.with_suffix("").parts
        yield parts[-1]
        for count in range(1, len(parts) + 1):
            yield PurePath(*parts[-count:]).as_posix() + (f"?{query}" if query else "")
    yield source


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
        if not (key and equals and value.isdecimal() and value.isascii() and len(value) < 19) or key in values:
            raise InputError(f"{place}: cannot read '{item}'; write each once as name=number, separated by '&'")
        values[key] = int(value)
    return values
