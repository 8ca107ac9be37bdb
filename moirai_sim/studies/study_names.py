"""What a study names must exist before anything runs: models, clusters, policies and overrides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moirai_sim.catalog import find
from moirai_sim.errors import InputError, did_you_mean, nearest
from moirai_sim.graphs.load import ZOO_PREFIX, split_source
from moirai_sim.policies.registry import check_policy

if TYPE_CHECKING:
    from moirai_sim.studies.study import Study
    from moirai_sim.yaml_files import Location


def unknown_names(study: Study, folder: Path) -> Iterator[tuple[Location, str]]:
    """Iterate over the keys of a study in ``folder`` that name nothing, with what is wrong and how to repair it."""
    checks: list[tuple[Location, Callable[[], object]]] = [
        (("models", i), partial(_check_model, model, study.kind, folder)) for i, model in enumerate(study.models)
    ]
    if study.kind == "whatif":
        checks += [(("cluster",), partial(find, "topologies", study.cluster))]
        checks += [(("policy",), partial(check_policy, study.policy))]
        checks += [
            (("scenarios", scenario, i), partial(_check_override, name, study.overrides))
            for scenario, names in study.scenarios.items()
            for i, name in enumerate(names)
        ]
    else:
        clusters = [(("clusters", i), name) for i, name in enumerate(study.clusters) if name is not None]
        checks += [(place, partial(find, "topologies", name)) for place, name in clusters]
        checks += [(("policies", i), partial(check_policy, name)) for i, name in enumerate(study.policies)]
    for place, check in checks:
        try:
            check()
        except InputError as error:
            yield from ((place, problem) for problem in error.problems)


def _check_model(model: str, kind: str, folder: Path) -> None:
    from moirai_sim.graphs.light import light_models
    from moirai_sim.graphs.zoo import check_zoo, zoo_names

    bare = list(light_models()) if kind == "validate" else []
    if model.startswith(ZOO_PREFIX):
        check_zoo(model.removeprefix(ZOO_PREFIX))
    elif model not in bare and not split_source(model)[0].is_file():
        known = [*bare, *(ZOO_PREFIX + name for name in zoo_names()), *(path.name for path in folder.glob("*.onnx"))]
        raise InputError(
            f"{model}: there is no such file, here or beside the study; {nearest(model, known)}name one that exists, "
            "or zoo:NAME of 'catalog models'"
        )


def _check_override(name: str, overrides: Mapping[str, object]) -> None:
    if name not in overrides:
        raise InputError(f"unknown override '{name}'; {did_you_mean(name, list(overrides))}")
