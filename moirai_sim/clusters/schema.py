"""The YAML forms of clusters and device types, as pydantic models. Quantities carry their units as text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from moirai_sim import units
from moirai_sim.errors import InputError, did_you_mean
from moirai_sim.graphs.operator import DTYPE_BITS

MAX_MEMBERS = 100_000
"""Devices that one entry may stand for: a slip of the keyboard must not fill the memory."""
MAX_LINKS = 1_000_000
"""Links that one entry may stand for."""


def _quantity(parse: Callable[[str | float], float], example: str, *, positive: bool = False) -> tuple[object, ...]:
    """Return the validator and the JSON Schema of a quantity with a unit."""

    def check(value: Any) -> float:  # noqa: ANN401 - anything that YAML can hold
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise PydanticCustomError("quantity", "{text}", {"text": f"must be a quantity such as '{example}'"})
        try:
            number = parse(value)
        except InputError as error:
            raise PydanticCustomError("value_error", "{text}", {"text": str(error)}) from error
        if positive and not number > 0:
            text = f"{value!r} is not above zero; give a quantity such as '{example}'"
            raise PydanticCustomError("value_error", "{text}", {"text": text})
        return number

    schema = {"type": "string", "pattern": r"^\s*[0-9.eE+_]+\s*[A-Za-zµ/]+\s*$", "examples": [example]}
    return BeforeValidator(check), WithJsonSchema(schema)


Size = Annotated[int, *_quantity(units.parse_bytes, "80 GiB", positive=True)]
Time = Annotated[int, *_quantity(units.parse_ns, "3 us")]
Bandwidth = Annotated[float, *_quantity(units.parse_bandwidth, "25 Gbps", positive=True)]
Rate = Annotated[float, *_quantity(units.parse_flops, "66.9 TFLOP/s", positive=True)]
Frequency = Annotated[float, *_quantity(units.parse_hertz, "1980 MHz", positive=True)]
Power = Annotated[float, *_quantity(units.parse_watts, "700 W")]


def _dtype(name: str) -> str:
    if name not in DTYPE_BITS:
        text = f"unknown data type '{name}'; {did_you_mean(name, list(DTYPE_BITS))}"
        raise PydanticCustomError("value_error", "{text}", {"text": text})
    return name


def _name(name: object) -> object:
    """Accept ``- 0`` as the name "0", and refuse what file formats use as separators."""
    text = str(name) if isinstance(name, int) and not isinstance(name, bool) else name
    if isinstance(text, str) and (not text or text != text.strip() or any(c in text for c in "\n\t,") or "->" in text):
        raise PydanticCustomError(
            "value_error", "{text}", {"text": f"{text!r} is no name; leave out commas, '->' and space around it"}
        )
    return text


Name = Annotated[str, BeforeValidator(_name)]


def _count(value: object) -> object:
    whole = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_MEMBERS
    if not whole and value not in (None, "cores"):
        text = (
            f"{value!r} is no count; give a whole number from 1 to {MAX_MEMBERS}, or 'cores' for those of this machine"
        )
        raise PydanticCustomError("value_error", "{text}", {"text": text})
    return value


def _two(ends: object) -> object:
    if not isinstance(ends, list) or len(ends) != 2:
        text = "a link has two ends; write ends: [ONE, OTHER]"
        raise PydanticCustomError("value_error", "{text}", {"text": text})
    return ends


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class DeviceFile(_Strict):
    """A device type: a data sheet. Figures are peaks."""

    name: Name
    kind: Literal["cpu", "gpu", "npu", "fpga"]
    memory: Size
    memory_bandwidth: Bandwidth
    peak_flops: Annotated[dict[Annotated[str, BeforeValidator(_dtype)], Rate], Field(min_length=1)]
    """By data type; a multiply-add counts as two."""
    compute_units: Annotated[int, Field(gt=0)] | None = None
    """Streaming multiprocessors of a GPU, cores of a CPU."""
    clock: Frequency | None = None
    l2_cache: Size | None = None
    idle_power: Power | None = None
    peak_power: Power | None = None
    price_eur: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    source: str = ""
    """Where the figures come from."""


class DeviceEntry(_Strict):
    """One device of a cluster, or with ``count`` several alike, called NAME0, NAME1, ..."""

    name: Name
    device: str
    """Device type: a name of ``moirai-sim catalog devices``, or a YAML file beside the cluster's."""
    count: Annotated[int | Literal["cores"] | None, BeforeValidator(_count)] = None
    """``cores``: one for every core of this machine that this process may use."""
    cost_model: str | None = None
    """A name of ``moirai-sim catalog cost-models`` or a folder; none prices by roofline."""
    backend: str = "onnxruntime"
    address: str | None = None
    """Where the backend finds it; ``{i}`` stands for the number within ``count``. Default ``cpu:{i}``, ``cuda:{i}``."""
    threads: Annotated[int, Field(ge=1)] = 1
    server: Name = ""
    memory: Size | None = None
    """Memory granted, where it is less than the data sheet's."""


class SwitchEntry(_Strict):
    """A switch, or with ``count`` several alike."""

    name: Name
    count: Annotated[int, Field(ge=1, le=MAX_MEMBERS)] | None = None


class LinkEntry(_Strict):
    """A cable or bus. An end that names a group joins each of its members; a group named twice, every two of them."""

    ends: Annotated[list[Name], Field(min_length=2, max_length=2), BeforeValidator(_two)]
    bandwidth: Bandwidth
    latency: Time = 0
    duplex: Literal["full", "half"] = "full"
    name: Name | None = None
    price_eur: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


class ServerEntry(_Strict):
    """A machine, or with ``count`` several alike. Its parts are called SERVER.PART, e.g. ``node0.gpu3``."""

    name: Name
    count: Annotated[int, Field(ge=1, le=MAX_MEMBERS)] | None = None
    devices: list[DeviceEntry] = []
    switches: list[Name | SwitchEntry] = []
    links: list[LinkEntry] = []


class ClusterFile(_Strict):
    """A cluster: devices, switches and links, and servers that hold some of each."""

    name: Name
    source: str = ""
    """Where the figures come from."""
    link_model: str | None = None
    """A calibrated link model, by name or folder; none takes the links' own figures."""
    devices: list[DeviceEntry] = []
    switches: list[Name | SwitchEntry] = []
    servers: list[ServerEntry] = []
    links: list[LinkEntry] = []
