"""The zoo: parametric models as ONNX graphs without stored weights.

Every family is one file whose ``MODELS`` maps a name to a function of keyword parameters (``batch``, ``seq``, ...) that
returns an ``onnx.ModelProto``.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import networkx as nx

from moirai_sim.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from onnx import ModelProto

_FAMILIES = (
    "gpt", "bert", "llama", "vit", "swin", "alphafold", "resnet", "inception", "yolo", "unet", "randomly_wired",
)  # fmt: skip


@cache
def _models() -> dict[str, Callable[..., ModelProto]]:
    found: dict[str, Callable[..., ModelProto]] = {}
    for family in _FAMILIES:
        found |= importlib.import_module(f"{__name__}.{family}").MODELS
    return found


def zoo_names() -> list[str]:
    """Return the names of all models."""
    return sorted(_models())


def zoo_parameters(name: str) -> dict[str, int | str]:
    """Return the parameters that a query may set, whole numbers and words, with their default values."""
    parameters = inspect.signature(_model(name)).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if type(parameter.default) in (int, str)}


def zoo_model(name: str) -> ModelProto:
    """Build a model.

    Parameters
    ----------
    name
        A name of `zoo_names`, with parameters if wanted: ``gpt3-1.3b?batch=4&seq=1024&dtype=float16``.

    Raises
    ------
    InputError
        If the name or a parameter is unknown, or a value does not fit the model.
    """
    values = _values(name)
    name = name.partition("?")[0]
    try:
        return _model(name)(**values)
    except (ValueError, KeyError, ZeroDivisionError, IndexError, nx.NetworkXException) as error:
        given = "&".join(f"{key}={value}" for key, value in values.items())
        defaults = zoo_parameters(name)
        raise InputError(f"zoo:{name}: cannot be built with {given} ({error}); defaults: {defaults}") from error


def check_zoo(name: str) -> None:
    """Refuse a name that `zoo_model` could not read, without building anything.

    Raises
    ------
    InputError
        If the name or a parameter is unknown, or a value is no number.
    """
    _values(name)


def _values(name: str) -> dict[str, int | str]:
    """Return the parameters that a name gives."""
    name, _, query = name.partition("?")
    known = zoo_parameters(name)
    values: dict[str, int | str] = {}
    problems = []
    for item in filter(None, query.split("&")):
        key, _, text = item.partition("=")
        if key not in known:
            problems.append(f"zoo:{name}: unknown parameter '{key}'; {did_you_mean(key, list(known))}")
        elif isinstance(known[key], str):
            values[key] = text
        elif text.isascii() and text.isdecimal() and len(text) < 10:
            values[key] = int(text)
        else:
            problems.append(f"zoo:{name}: cannot read {key} in '{item}'; write a whole number, e.g. {key}={known[key]}")
    if problems:
        raise InputError(problems)
    return values


def _model(name: str) -> Callable[..., ModelProto]:
    if name not in _models():
        raise InputError(f"zoo:{name}: there is no such model; {did_you_mean(name, zoo_names())}")
    return _models()[name]
