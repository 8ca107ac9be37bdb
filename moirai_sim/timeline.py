"""Timeline: what ran where and when, simulated or measured. One format for ``place``, ``simulate`` and ``measure``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moirai_sim.errors import InputError
from moirai_sim.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from moirai_sim.placement import Status

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
    """Throughput objective: time between two finished requests of a saturated pipeline."""
    lower_bound_ns: int = 0
    """Proven lower bound of the objective (makespan for latency, period for throughput)."""
    solve_seconds: float = 0.0
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def objective_ns(self) -> int:
        """The value that the policy minimised: the makespan, or the period for throughput."""
        return self.makespan_ns if self.period_ns is None else self.period_ns

    @property
    def gap(self) -> float:
        """Distance to the bound as a share of the objective: 0 is proven optimal, 1 is nothing known."""
        value = self.objective_ns
        return 0.0 if value <= 0 else max(0.0, (value - self.lower_bound_ns) / value)

    def _repr_html_(self) -> str:
        from moirai_sim.display import timeline_html

        return timeline_html(self)

    def to_json(self) -> dict[str, Any]:
        """Return the timeline as the document that the file holds."""
        period = {} if self.period_ns is None else {"period_ns": self.period_ns}
        return {
            "format": FORMAT,
            "status": self.status,
            "policy": self.policy,
            "objective": self.objective,
            "network": self.network,
            "makespan_ns": self.makespan_ns,
            **period,
            "lower_bound_ns": self.lower_bound_ns,
            "gap": self.gap,
            "solve_seconds": self.solve_seconds,
            "placement": dict(self.placement),
            "spans": [span.to_json() for span in self.spans],
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
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read it ({error})") from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}:{error.lineno}:{error.colno}: not JSON ({error.msg}); write it with 'place'"
        ) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise InputError(f'{path}: not a timeline; its "format" must be "{FORMAT}"')
    if not isinstance(document.get("placement"), dict):
        raise InputError(f'{path}: "placement" must be an object that maps operators to devices')
    problems: list[str] = []
    spans = [
        span
        for index, entry in enumerate(document.get("spans", []))
        if (span := _read_span(entry, f"{path}: spans[{index}]", problems)) is not None
    ]
    for key in ("makespan_ns", "lower_bound_ns", "period_ns"):
        value = document.get(key, 0)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            problems.append(f'{path}: "{key}" must be a whole number of nanoseconds, read {value!r}')
    if problems:
        raise InputError(problems)
    return Timeline(
        status=document.get("status", "feasible"),
        policy=str(document.get("policy", "")),
        network=str(document.get("network", "")),
        makespan_ns=document.get("makespan_ns", 0),
        placement={str(k): str(v) for k, v in document["placement"].items()},
        spans=spans,
        objective=str(document.get("objective", "latency")),
        period_ns=document.get("period_ns"),
        lower_bound_ns=document.get("lower_bound_ns", 0),
        solve_seconds=float(document.get("solve_seconds", 0.0)),
        provenance=document.get("provenance", {}),
    )


def _read_span(entry: Any, place: str, problems: list[str]) -> Span | None:  # noqa: ANN401
    if not isinstance(entry, dict) or entry.get("kind") not in ("operator", "transfer"):
        problems.append(f'{place}: must be an object whose "kind" is "operator" or "transfer"')
        return None
    text = ("name", "resource") if entry["kind"] == "operator" else ("name", "producer", "source", "target")
    wrong = [key for key in text if not isinstance(entry.get(key), str)]
    times = ("ready_ns", "start_ns", "end_ns")
    wrong += [key for key in times if not isinstance(entry.get(key), int) or isinstance(entry.get(key), bool)]
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
