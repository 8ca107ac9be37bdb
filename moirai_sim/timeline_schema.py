"""The timeline file as a pydantic model: its JSON Schema is what editors and other programs check against."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Nanoseconds = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class OperatorSpan(_Strict):
    """An operator, or several that were run as one part, on a device."""

    kind: Literal["operator"]
    name: str
    resource: str
    """Name of the device."""
    ready_ns: Nanoseconds
    start_ns: Nanoseconds
    end_ns: Nanoseconds
    operators: list[str] = []
    """Measured spans of several operators: their names."""


class TransferSpan(_Strict):
    """A tensor on its way between two devices."""

    kind: Literal["transfer"]
    name: str
    producer: str
    consumers: list[str]
    """Operators on the target device that read the tensor."""
    source: str
    target: str
    bytes: Annotated[int, Field(ge=0)] | None
    """null where an instance gives times only."""
    ready_ns: Nanoseconds
    start_ns: Nanoseconds
    end_ns: Nanoseconds


class Replica(_Strict):
    """One request by a further placement of the cycle."""

    makespan_ns: Nanoseconds
    placement: dict[str, str]
    spans: list[Annotated[OperatorSpan | TransferSpan, Field(discriminator="kind")]]


class TimelineFile(_Strict):
    """A placement together with everything it made happen. Times are whole nanoseconds."""

    format: Literal["moirai-sim/timeline@1"]
    status: Literal["optimal", "feasible", "infeasible", "limit", "error", "measured"]
    policy: str
    objective: Literal["latency", "throughput"]
    network: str
    makespan_ns: Nanoseconds
    period_ns: Nanoseconds | None = None
    """Of streams: mean time between two finished requests of a saturated pipeline, rounded up."""
    low_ns: Nanoseconds | None = None
    """Lower end of the 90 % interval that the objective has because times of operators are unsure."""
    high_ns: Nanoseconds | None = None
    """Upper end of that interval."""
    max_latency_ns: Nanoseconds | None = None
    """What was asked: the longest latency that a request may have."""
    max_period_ns: Nanoseconds | None = None
    """What was asked: the longest period that a stream may have."""
    lower_bound_ns: Nanoseconds
    """A proven lower bound of the objective."""
    gap: Annotated[float, Field(ge=0, le=1)]
    solve_seconds: Annotated[float, Field(ge=0)]
    placement: dict[str, str]
    """Operator name to device name."""
    spans: list[Annotated[OperatorSpan | TransferSpan, Field(discriminator="kind")]]
    replicas: list[Replica] = []
    """Placements that take turns with this one: of R in all, request j runs by number j mod R, this one being 0."""
    provenance: dict[str, Any]
