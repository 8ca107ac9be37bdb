"""Which device should run which operator of my network, how fast will it be, and how sure are we."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from moirai_sim.clusters.cluster import Cluster as Cluster
    from moirai_sim.clusters.reader import read_cluster as read_cluster
    from moirai_sim.errors import InputError as InputError
    from moirai_sim.graphs.onnx_reader import read_onnx as read_onnx
    from moirai_sim.graphs.operator import OperatorGraph as OperatorGraph
    from moirai_sim.placement import Placement as Placement
    from moirai_sim.policies.run import place as place
    from moirai_sim.problem import PlacementProblem as PlacementProblem
    from moirai_sim.simulation.engine import simulate as simulate
    from moirai_sim.sources import load_problem as load_problem
    from moirai_sim.timeline import Timeline as Timeline
    from moirai_sim.timeline import read_timeline as read_timeline
    from moirai_sim.verify import verify as verify

_PUBLIC = {
    "Cluster": "moirai_sim.clusters.cluster",
    "InputError": "moirai_sim.errors",
    "OperatorGraph": "moirai_sim.graphs.operator",
    "Placement": "moirai_sim.placement",
    "PlacementProblem": "moirai_sim.problem",
    "Timeline": "moirai_sim.timeline",
    "load_problem": "moirai_sim.sources",
    "place": "moirai_sim.policies.run",
    "read_cluster": "moirai_sim.clusters.reader",
    "read_onnx": "moirai_sim.graphs.onnx_reader",
    "read_timeline": "moirai_sim.timeline",
    "simulate": "moirai_sim.simulation.engine",
    "verify": "moirai_sim.verify",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> object:
    """Import public names on first use, so that ``import moirai_sim`` stays cheap."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'moirai_sim' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


class _Package(ModuleType):
    """Keeps public names when a submodule of the same name is imported: ``moirai_sim.verify`` stays the function."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
