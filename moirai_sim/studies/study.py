"""Study files: one YAML schema with three kinds, for ``evaluate``, ``whatif`` and ``validate``.

Every key and its default is a field below; ``moirai-sim schema study`` prints the same as JSON Schema for editors.
"""

from __future__ import annotations

import fnmatch
import glob
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    RootModel,
    ValidationInfo,
    field_validator,
    model_validator,
)

from moirai_sim.errors import InputError
from moirai_sim.graphs.load import split_source
from moirai_sim.policies.base import Objective
from moirai_sim.problem import Network
from moirai_sim.studies.study_names import unknown_names
from moirai_sim.units import parse_ns, parse_period_ns
from moirai_sim.yaml_files import YamlDocument

Value = float | int | str | bool
MOST_VALUES = 100_000
"""Values of one range, and variants of one study: a slip of the keyboard must not fill the memory."""
Seed = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Range(_Strict):
    """Evenly spaced values ``from``, ``from + step``, ... up to ``to``, with the ``unit`` behind each ("Gbps")."""

    start: FiniteFloat = Field(alias="from")
    to: FiniteFloat
    step: FiniteFloat = Field(gt=0)
    unit: str = ""

    @model_validator(mode="after")
    def _has_an_end(self) -> Range:
        if self.to - self.start > MOST_VALUES * self.step:
            raise ValueError(f"a range of more than {MOST_VALUES:,} values; take a larger step")
        return self

    def values(self) -> list[float | str]:
        """Return the values: text where they have a unit, whole numbers as integers; none where ``to`` comes first."""
        count = math.floor((self.to - self.start) / self.step + 1e-9) + 1
        values = [self.start + i * self.step for i in range(max(0, count))]
        if self.unit:
            return [f"{value:.12g} {self.unit}" for value in values]
        return [int(value) if value == int(value) else value for value in values]


class Rule(_Strict):
    """A combination of runs, by shell patterns; a key left out matches everything."""

    model: str = "*"
    cluster: str = "*"
    policy: str = "*"
    network: str = "*"
    objective: str = "*"

    def matches(self, **run: str | None) -> bool:
        """Tell whether a run, given by its keys, falls under this rule."""
        return all(fnmatch.fnmatchcase(str(run[key] or ""), getattr(self, key)) for key in type(self).model_fields)


class _Runs(_Strict):
    name: str = ""
    description: str = ""
    models: list[str] = Field(min_length=1)
    """SOURCES: ONNX files (relative to the study file) or ``zoo:NAME``; for ``evaluate`` also published instances, for
    ``whatif`` PipeDream's graphs, for ``validate`` the bare names of the models inside the ``onnx`` package."""
    time_limit: str = "10 s"
    """Per run, for policies that search; heuristics ignore it."""

    @field_validator("max_latencies", "min_throughputs", check_fields=False)
    @classmethod
    def _are_limits(cls, values: list[str | None], info: ValidationInfo) -> list[str | None]:
        for value in values:
            try:
                read = parse_ns if info.field_name == "max_latencies" else parse_period_ns
                if value is not None and read(value) < 1:
                    raise ValueError(f"no placement takes less than a nanosecond, read {value!r}")
            except InputError as error:
                raise ValueError(str(error)) from error
        return values

    @field_validator("time_limit", "target", "calibrate", "patience", "budget", mode="before", check_fields=False)
    @classmethod
    def _is_a_time(cls, value: object, info: ValidationInfo) -> object:
        if value is not None:
            try:
                known = parse_ns(str(value))
            except InputError as error:
                raise ValueError(str(error)) from error
            if info.field_name == "time_limit" and not known:
                raise ValueError("no policy answers in no time; give more than 0")
        return value

    @property
    def time_limit_s(self) -> float:
        """The time limit in seconds."""
        return parse_ns(self.time_limit) / 1e9


class EvaluateStudy(_Runs):
    """Policies x models x clusters x networks x objectives x memory scales x seeds."""

    kind: Literal["evaluate"]
    clusters: list[str | None] = Field(default=[None], min_length=1)
    """Catalog names or YAML files for models; null for published instances, which bring their own devices."""
    policies: list[str] = Field(min_length=1)
    networks: list[Network | None] = [None]
    """null: the source's own default (one-port for instances, fair for clusters)."""
    objectives: list[Objective] = ["latency"]
    memory_scales: list[Annotated[float, Field(gt=0, allow_inf_nan=False)] | None] = [None]
    """null: the devices' own memory; a number gives every device this share of the model's weights."""
    seeds: list[Seed] = [0]
    replicas: list[Annotated[int, Field(ge=1)]] = [1]
    """Placements that may take turns in serving a stream (data parallelism)."""
    max_latencies: list[str | None] = [None]
    """Longest latency that a request may have, e.g. ``30 ms``; null: any."""
    min_throughputs: list[str | None] = [None]
    """Least throughput that a stream may have, e.g. ``50/s``; null: any."""
    include: list[Rule] = [Rule()]
    """Runs that match none of these are left out."""
    exclude: list[Rule] = []
    """Runs that match any of these are left out."""


class WhatIfStudy(_Runs):
    """One base cluster, overrides of it, and scenarios that combine overrides."""

    kind: Literal["whatif"]
    cluster: str
    policy: str = "auto"
    network: Network | None = None
    objective: Objective = "latency"
    seed: Seed = 0
    overrides: dict[str, dict[str, Value | list[Value] | Range]] = {}
    """Name -> dotted key of the cluster YAML -> a value, several values, or a range. Several values make several
    variants; several keys in one override combine to their product. A link's or device's name stands for its index."""
    scenarios: dict[str, list[str]] = {}
    """Name -> overrides applied together, in order. Empty: each override is a scenario of its own. The names ``base``
    and ``sizes`` are taken."""
    target: str | None = None
    """A latency ("20 ms"), or the period of a pipeline for throughput, that the questions ask for."""
    prices: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}
    """EUR by device type, or by link without its number (``wire``, ``node.nvlink``); they go before any ``price_eur``
    of a file. A device without a price leaves its cluster without one; a link without a price costs nothing."""
    sizes: dict[str, list[int] | Range] = {}
    """Dotted keys that end in ``count`` -> numbers to choose from, 0 for none at all. The study then looks for the
    cheapest combination that reaches the target (the fewest devices, where one has no price)."""

    @model_validator(mode="after")
    def _sizes_are_counts(self) -> WhatIfStudy:
        if self.sizes and self.target is None:
            raise ValueError("sizes: a search for the cheapest size needs a target, e.g. target: 20 ms")
        for key, value in self.sizes.items():
            counts = value.values() if isinstance(value, Range) else value
            whole = all(isinstance(count, int) and count >= 0 for count in counts)
            if key.rpartition(".")[2] != "count" or not counts or not whole:
                raise ValueError(f"sizes: '{key}': give a key that ends in '.count' whole numbers from 0 on")
        return self


class ValidateStudy(_Runs):
    """Predicted against measured, on this machine's devices."""

    kind: Literal["validate"]
    clusters: list[str] = Field(default=["local-cpu"], min_length=1)
    policies: list[str] = ["single", "random", "heft"]
    random_placements: int = Field(default=2, ge=0)
    """Random placements a model beside those of the policies."""
    bad_placements: int = Field(default=0, ge=0)
    """Hand-made bad ones: devices alternate from operator to operator, in blocks of growing length."""
    calibrate: str | None = "60 s"
    """Time to profile the models' operators on this machine first; null takes the clusters' own cost models."""
    repeats: int = Field(default=10, ge=3)
    """Rounds in which each placement runs, interleaved so that a noisy spell hits all of them. Where something disturbs
    them, more are run: see ``validate``."""
    patience: str = "150 ms"
    """How long to look, in each round, for runs of a placement that nothing else on the machine disturbs."""
    budget: str | None = None
    """Time after which disturbed placements of a model have no more rounds than ``repeats``; null for no limit."""
    in_flight: int = Field(default=1, ge=1)
    """Requests in flight while measuring; more than 1 measures the throughput of a stream."""
    seed: Seed = 0


Study = Annotated[EvaluateStudy | WhatIfStudy | ValidateStudy, Field(discriminator="kind")]


class StudyFile(RootModel[Study]):
    """A study file: its ``kind`` says which keys it takes."""


_KINDS: dict[str, type[EvaluateStudy | WhatIfStudy | ValidateStudy]] = {
    "evaluate": EvaluateStudy,
    "whatif": WhatIfStudy,
    "validate": ValidateStudy,
}


def read_study(path: Path, kind: Literal["evaluate", "whatif", "validate"]) -> Study:
    """Read a study file of the kind that a command expects.

    Model and cluster files named in it are found relative to the study file.

    Raises
    ------
    InputError
        With every problem and its line; also where a model, cluster, policy or override that it names does not exist. A
        ``whatif`` takes no published instance that brings its own devices, a ``validate`` none at all.
    """
    document = YamlDocument(path)
    found = document.data.get("kind")
    if found != kind:
        known = ", ".join(_KINDS)
        raise InputError(
            f"{document.place(('kind',))}: kind: must be '{kind}' for this command, read {found!r} of {known}"
        )
    study = document.validate(_KINDS[kind])

    def beside(source: str) -> str:
        candidate = path.parent / source
        return str(candidate) if source and split_source(candidate)[0].is_file() else source

    models = [beside(model) for model in study.models]
    refusals = enumerate(_refusal(kind, model) for model in models)
    problems = [f"{document.place(('models', i))}: models.{i}: {refusal}" for i, refusal in refusals if refusal]
    if problems:
        raise InputError(problems)
    moved: dict[str, object] = {"models": models, "name": study.name or path.stem}
    if isinstance(study, WhatIfStudy):
        moved["cluster"] = beside(study.cluster)
    else:
        moved["clusters"] = [cluster and beside(cluster) for cluster in study.clusters]
    if isinstance(study, EvaluateStudy):
        moved |= {name: list(_moved_too(getattr(study, name), path.parent)) for name in ("include", "exclude")}
    study = study.model_copy(update=moved)
    unknown = list(unknown_names(study, path.parent))
    if unknown:
        raise InputError(f"{document.place(key)}: {'.'.join(map(str, key))}: {problem}" for key, problem in unknown)
    return study


def _moved_too(rules: list[Rule], folder: Path) -> Iterator[Rule]:
    """Iterate over rules, and over what they are for files that a study names as they lie beside it."""

    def forms(pattern: str) -> list[str]:
        moved = str(Path(glob.escape(str(folder))) / pattern)
        return [pattern] if pattern == "*" or moved == pattern else [pattern, moved]

    for rule in rules:
        for model in forms(rule.model):
            for cluster in forms(rule.cluster):
                yield rule.model_copy(update={"model": model, "cluster": cluster})


def _refusal(kind: str, model: str) -> str | None:
    """Return why a kind of study cannot take a model; one that is no file is refused, if at all, by who reads it."""
    from moirai_sim.sources import WITH_DEVICES, recognise

    found = recognise(model) if Path(model).is_file() else "model"
    if kind == "whatif" and found in WITH_DEVICES:
        return f"'{model}' brings its own devices, and a what-if changes those of a cluster; take evaluate for it"
    if kind == "validate" and found != "model":
        return f"'{model}' is a published instance, which nothing can run; give a model"
    return None
