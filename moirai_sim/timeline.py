"""Timeline: what ran where and when, simulated or measured. One format for ``place``, ``simulate`` and ``measure``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from moirai_sim.errors import InputError
from moirai_sim.files import refuse_constant, write_whole
from moirai_sim.placement import UNANSWERED, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

FORMAT = "moirai-sim/timeline@1"


@dataclass(frozen=True, slots=True)
class Span:
    """One thing that occupied one resource for a while. Times are integer nanoseconds from the request's arrival."""

    kind: Literal["operator", "transfer"]
    name: str
    resource: str
    """The device of an operator; ``source->target`` for a transfer."""
    ready_ns: int
    """When its last input was there."""
    start_ns: int
    end_ns: int
    producer: str = ""
    """Transfers: the operator whose output travels."""
    consumers: tuple[str, ...] = ()
    """Transfers: the operators on the target device that read it."""
    source: str = ""
    target: str = ""
    bytes: int | None = None
    """Transfers: size of the tensor; None where an instance gives times only."""
    operators: tuple[str, ...] = ()
    """Measured spans that cover several operators run as one part: their names."""

    def to_json(self) -> dict[str, Any]:
        """Return the span as it stands in a timeline file."""
        times = {"ready_ns": self.ready_ns, "start_ns": self.start_ns, "end_ns": self.end_ns}
        if self.kind == "transfer":
            return {
                "kind": "transfer",
                "name": self.name,
                "producer": self.producer,
                "consumers": list(self.consumers),
                "source": self.source,
                "target": self.target,
                "bytes": self.bytes,
                **times,
            }
        covered = {"operators": list(self.operators)} if self.operators else {}
        return {"kind": "operator", "name": self.name, "resource": self.resource, **times, **covered}


@dataclass(frozen=True)
class Timeline:
    """A placement together with everything it made happen, and how good it is."""

    status: Status
    policy: str
    network: str
    makespan_ns: int
    placement: Mapping[str, str]
    """Operator name to device name."""
    spans: Sequence[Span] = ()
    objective: str = "latency"
    period_ns: int | None = None
    """Of streams: mean time between two finished requests of a saturated pipeline, rounded up."""
    lower_bound_ns: int = 0
    """Proven lower bound of the objective (latency, or period for throughput)."""
    low_ns: int | None = None
    """Lower end of the 90 % interval that the objective has because times of operators are unsure; None where they are
    exact."""
    high_ns: int | None = None
    """Upper end of that interval."""
    solve_seconds: float = 0.0
    provenance: Mapping[str, Any] = field(default_factory=dict)
    replicas: Sequence[Timeline] = ()
    """One request by each further placement of a cycle; see `placement.Placement.replicas`."""
    max_latency_ns: int | None = None
    """What was asked: the longest latency that a request may have."""
    max_period_ns: int | None = None
    """What was asked: the longest period that a stream may have."""

    @property
    def cycle(self) -> Sequence[Timeline]:
        """One request by every placement that takes turns, this one's first."""
        return [self, *self.replicas]

    @property
    def latency_ns(self) -> int:
        """How long a request takes that is alone: the makespan, the longest where placements take turns."""
        return max(one.makespan_ns for one in self.cycle)

    @property
    def objective_ns(self) -> int:
        """The value that the policy minimised: the latency, or the period for throughput."""
        return self.latency_ns if self.objective == "latency" or self.period_ns is None else self.period_ns

    @property
    def gap(self) -> float:
        """Distance to the bound as a share of the objective: 0 is proven optimal, 1 is nothing known, or no answer."""
        if self.status in UNANSWERED:
            return 1.0
        value = self.objective_ns
        return 0.0 if value <= 0 else max(0.0, (value - self.lower_bound_ns) / value)

    @property
    def memory(self) -> tuple[bool, float | None]:
        """What it was made for: whether memory was lifted, and the scale that was given, as far as the file says."""
        scale = self._made_for.get("memory_scale")
        known = isinstance(scale, int | float) and not isinstance(scale, bool)
        return self._made_for.get("memory") == "unlimited", scale if known else None

    @property
    def fusion(self) -> str | None:
        """The backend whose fusions its times rest on, as far as the file says."""
        backend = self._made_for.get("fusion")
        return backend if isinstance(backend, str) else None

    @property
    def _made_for(self) -> Mapping[str, Any]:
        problem = self.provenance.get("problem")
        return problem if isinstance(problem, dict) else {}

    def _repr_html_(self) -> str:
        from moirai_sim.display import timeline_html

        return timeline_html(self)

    def to_json(self) -> dict[str, Any]:
        """Return the timeline as the document that the file holds."""
        optional = {
            key: value
            for key, value in (
                ("period_ns", self.period_ns),
                ("low_ns", self.low_ns),
                ("high_ns", self.high_ns),
                ("max_latency_ns", self.max_latency_ns),
                ("max_period_ns", self.max_period_ns),
            )
            if value is not None
        }
        replicas = [
            {
                "makespan_ns": replica.makespan_ns,
                "placement": dict(replica.placement),
                "spans": [span.to_json() for span in replica.spans],
            }
            for replica in self.replicas
        ]
        return {
            "format": FORMAT,
            "status": self.status,
            "policy": self.policy,
            "objective": self.objective,
            "network": self.network,
            "makespan_ns": self.makespan_ns,
            **optional,
            "lower_bound_ns": self.lower_bound_ns,
            "gap": self.gap,
            "solve_seconds": self.solve_seconds,
            "placement": dict(self.placement),
            "spans": [span.to_json() for span in self.spans],
            **({"replicas": replicas} if replicas else {}),
            "provenance": dict(self.provenance),
        }

    def write(self, path: Path) -> None:
        """Write the timeline file, whole or not at all."""
        write_whole(path, json.dumps(self.to_json(), indent=1) + "\n")


def read_timeline(path: Path) -> Timeline:
    """Read a timeline file.

    Raises
    ------
    InputError
        If the file cannot be read, is no JSON, or misses fields; every problem is listed.
    """
    document = read_json(path)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise InputError(f'{path}: not a timeline; its "format" must be "{FORMAT}"')
    problems: list[str] = []
    timeline = _read_one(document, f"{path}: ", problems)
    entries = document.get("replicas", [])
    replicas = []
    if isinstance(entries, list):
        for index, entry in enumerate(entries):
            place = f"{path}: replicas[{index}]"
            if not isinstance(entry, dict) or set(entry) - {"makespan_ns", "placement", "spans"}:
                problems.append(f"{place}: must be an object with makespan_ns, placement and spans")
            else:
                read = _read_one(entry, f"{place}: ", problems)
                replicas.append(replace(timeline, **{key: getattr(read, key) for key in _OWN}, **_PLAIN))
    if problems:
        raise InputError(problems)
    return replace(timeline, replicas=tuple(replicas))


_OWN = ("makespan_ns", "placement", "spans")
"""What a replica has of its own; the rest is the timeline's."""
_PLAIN: dict[str, Any] = {
    "status": "feasible", "objective": "latency", "period_ns": None, "lower_bound_ns": 0, "solve_seconds": 0.0,
    "provenance": {}, "low_ns": None, "high_ns": None, "max_latency_ns": None, "max_period_ns": None,
}  # fmt: skip


def _read_one(document: Mapping[str, Any], place: str, problems: list[str]) -> Timeline:
    placed = document.get("placement")
    if not isinstance(placed, dict) or not _texts(list(placed.values())):
        problems.append(f'{place}"placement" must be an object that maps names of operators to names of devices')
        placed = {}
    problems += [f'{place}"{key}" must be {what}, read {document[key]!r}' for key, what in _wrong(document, _FIELDS)]
    spans: list[Span] = []
    entries = document.get("spans", [])
    if isinstance(entries, list):
        found = (_read_span(entry, f"{place}spans[{index}]", problems) for index, entry in enumerate(entries))
        spans = [span for span in found if span is not None]
    if problems:
        return Timeline(status="error", policy="", network="", makespan_ns=0, placement={})
    return Timeline(
        status=document.get("status", "feasible"),
        policy=document.get("policy", ""),
        network=document.get("network", ""),
        makespan_ns=document.get("makespan_ns", 0),
        placement=placed,
        spans=spans,
        objective=document.get("objective", "latency"),
        period_ns=document.get("period_ns"),
        lower_bound_ns=document.get("lower_bound_ns", 0),
        solve_seconds=float(document.get("solve_seconds", 0.0)),
        provenance=document.get("provenance", {}),
        low_ns=document.get("low_ns"),
        high_ns=document.get("high_ns"),
        max_latency_ns=document.get("max_latency_ns"),
        max_period_ns=document.get("max_period_ns"),
    )


def read_json(path: Path) -> Any:  # noqa: ANN401
    """Read a JSON file of a stranger.

    Raises
    ------
    InputError
        If it cannot be read, or is no JSON: no NaN, nothing too deep, no whole number of thousands of digits.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse_constant)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read it ({error})") from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}:{error.lineno}:{error.colno}: not JSON ({error.msg}); write it with 'place'"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); write it with 'place'") from error


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _wrong(entry: Mapping[str, Any], fields: Mapping[str, _Field]) -> list[tuple[str, str]]:
    """Return key and rule of every entry that breaks its rule; keys that are not there break none."""
    return [(key, what) for key, (what, good) in fields.items() if key in entry and not good(entry[key])]


_Field: TypeAlias = "tuple[str, Callable[[Any], bool]]"
_NS: _Field = ("a whole number of nanoseconds", lambda value: _whole(value) and value >= 0)
_TEXT: _Field = ("text", lambda value: isinstance(value, str))
_FIELDS: dict[str, _Field] = {
    "status": (f"one of {', '.join(get_args(Status))}", lambda value: value in get_args(Status)),
    "objective": ("latency or throughput", lambda value: value in ("latency", "throughput")),
    "policy": _TEXT,
    "network": _TEXT,
    "spans": ("a list", lambda value: isinstance(value, list)),
    "provenance": ("an object", lambda value: isinstance(value, dict)),
    "makespan_ns": _NS,
    "lower_bound_ns": _NS,
    "period_ns": _NS,
    "low_ns": _NS,
    "high_ns": _NS,
    "max_latency_ns": _NS,
    "max_period_ns": _NS,
    "replicas": ("a list", lambda value: isinstance(value, list)),
    "solve_seconds": (
        "a number of seconds",
        lambda value: isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e18,
    ),
}
_TIME: _Field = ("a whole number", _whole)
_SPAN_FIELDS: dict[str, _Field] = {
    "name": _TEXT,
    "resource": _TEXT,
    "producer": _TEXT,
    "source": _TEXT,
    "target": _TEXT,
    "ready_ns": _TIME,
    "start_ns": _TIME,
    "end_ns": _TIME,
    "consumers": ("a list of names", _texts),
    "operators": ("a list of names", _texts),
    "bytes": ("a whole number or null", lambda value: value is None or (_whole(value) and value >= 0)),
}


def _read_span(entry: Any, place: str, problems: list[str]) -> Span | None:  # noqa: ANN401
    if not isinstance(entry, dict) or entry.get("kind") not in ("operator", "transfer"):
        problems.append(f'{place}: must be an object whose "kind" is "operator" or "transfer"')
        return None
    needed = ("name", "resource") if entry["kind"] == "operator" else ("name", "producer", "source", "target")
    wrong = [key for key in (*needed, "ready_ns", "start_ns", "end_ns") if key not in entry]
    wrong += [key for key, _ in _wrong(entry, _SPAN_FIELDS)]
    if wrong:
        problems.append(f"{place}: missing or of the wrong type: {', '.join(wrong)}")
        return None
    if entry["kind"] == "operator":
        return Span(
            kind="operator",
            name=entry["name"],
            resource=entry["resource"],
            ready_ns=entry["ready_ns"],
            start_ns=entry["start_ns"],
            end_ns=entry["end_ns"],
            operators=tuple(entry.get("operators", ())),
        )
    return Span(
        kind="transfer",
        name=entry["name"],
        resource=f"{entry['source']}->{entry['target']}",
        ready_ns=entry["ready_ns"],
        start_ns=entry["start_ns"],
        end_ns=entry["end_ns"],
        producer=entry["producer"],
        consumers=tuple(entry.get("consumers", ())),
        source=entry["source"],
        target=entry["target"],
        bytes=entry.get("bytes"),
    )
