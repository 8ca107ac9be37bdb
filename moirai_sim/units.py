"""Quantities as people write them ("25 Gbps", "80 GiB", "3 us"), parsed once, at the border.

Inside the package time is integer nanoseconds and memory integer bytes; rates are floats per second.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from moirai_sim.errors import InputError

_SI = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_PREFIXES = _SI | _BINARY

BYTES: dict[str, Decimal] = {f"{p}B": Decimal(f) for p, f in _PREFIXES.items()}
"""Units of memory and tensor size, in bytes."""

BYTES_PER_SECOND: dict[str, Decimal] = (
    {f"{p}B/s": Decimal(f) for p, f in _PREFIXES.items()}
    | {f"{p}bps": Decimal(f) / 8 for p, f in _PREFIXES.items()}
    | {f"{p}bit/s": Decimal(f) / 8 for p, f in _PREFIXES.items()}
)
"""Units of bandwidth, in bytes per second: "GB/s" are bytes, "Gbps" and "Gbit/s" are bits."""

NANOSECONDS: dict[str, Decimal] = {
    "ns": Decimal(1),
    "us": Decimal(10**3),
    "µs": Decimal(10**3),
    "ms": Decimal(10**6),
    "s": Decimal(10**9),
    "min": Decimal(60 * 10**9),
    "h": Decimal(3600 * 10**9),
}
"""Units of time, in nanoseconds."""

REQUESTS_PER_SECOND: dict[str, Decimal] = {"/s": Decimal(1), "/min": Decimal(1) / 60, "/h": Decimal(1) / 3600}
"""Units of throughput, in requests per second."""

FLOPS_PER_SECOND: dict[str, Decimal] = {
    f"{p}{u}": Decimal(f) for p, f in _SI.items() for u in ("FLOP/s", "FLOPS", "OP/s", "OPS")
}
"""Units of arithmetic rate, in operations per second."""

HERTZ: dict[str, Decimal] = {f"{p}Hz": Decimal(f) for p, f in _SI.items()}
"""Units of frequency, in hertz."""

WATTS: dict[str, Decimal] = {"W": Decimal(1), "kW": Decimal(1000), "mW": Decimal("0.001")}
"""Units of power, in watts."""

_ALL = BYTES | BYTES_PER_SECOND | NANOSECONDS | REQUESTS_PER_SECOND | FLOPS_PER_SECOND | HERTZ | WATTS
_LARGEST = Decimal(2**62)
"""In base units: what fits into 64 bits, and in time or rate is beyond any machine."""
_QUANTITY = re.compile(r"\s*([-+0-9.eE_]+)\s*([A-Za-zµ/]*)\s*")


def parse(text: str | float, units: dict[str, Decimal]) -> Decimal:
    """Parse a quantity with its unit.

    Parameters
    ----------
    text
        A number followed by one of ``units``. A bare number is taken only where it is zero, because a number without
        a unit is a mistake waiting to happen.
    units
        One of the tables of this module.

    Raises
    ------
    InputError
        If the number or the unit cannot be read, or the quantity is negative or not finite.
    """
    match = _QUANTITY.fullmatch(str(text))
    example = f"write a number and a unit, e.g. '10 {next(iter(units))}'; units: {', '.join(units)}"
    if match is None:
        raise InputError(f"cannot read the quantity {text!r}; {example}")
    try:
        number = Decimal(match[1].replace("_", ""))
    except InvalidOperation:
        raise InputError(f"cannot read the number in {text!r}; {example}") from None
    if number < 0:
        raise InputError(f"{text!r} is negative; give a quantity of at least 0")
    if number > _LARGEST or number * units.get(match[2], 1) > _LARGEST:
        raise InputError(f"{text!r} is too large; {example}")
    if match[2] in units:
        return number * units[match[2]]
    if number == 0 and not match[2]:
        return number
    what = f"unknown unit '{match[2]}'" if match[2] else "missing unit"
    raise InputError(f"{what} in {text!r}; {example}")


def number_of(value: object) -> float | None:
    """Return a number, or a quantity in its base unit ("16 GB/s" -> 1.6e10); None for anything else."""
    match = None if isinstance(value, bool) else _QUANTITY.fullmatch(str(value))
    if match is None or (match[2] and match[2] not in _ALL):
        return None
    try:
        return float(Decimal(match[1].replace("_", "")) * _ALL.get(match[2], 1))
    except InvalidOperation:
        return None


def unit_of(value: object) -> str:
    """Return the unit that a quantity is written with; nothing for what is none."""
    match = _QUANTITY.fullmatch(str(value))
    return match[2] if match and match[2] in _ALL else ""


def parse_bytes(text: str | float) -> int:
    """Return a size in whole bytes, e.g. ``parse_bytes("80 GiB") == 85899345920``."""
    return int(parse(text, BYTES).to_integral_value())


def parse_ns(text: str | float) -> int:
    """Return a time in whole nanoseconds, e.g. ``parse_ns("3 us") == 3000``."""
    return int(parse(text, NANOSECONDS).to_integral_value())


def parse_period_ns(text: str | float) -> int:
    """Return the longest whole period, ns, of a throughput: ``parse_period_ns("50/s") == 20_000_000``.

    Raises
    ------
    InputError
        If it is no rate, or zero.
    """
    rate = parse(text, REQUESTS_PER_SECOND)
    if not rate:
        raise InputError(f"{text!r} is no throughput; give a rate above 0, e.g. '50/s'")
    return int(10**9 / rate)


def parse_bandwidth(text: str | float) -> float:
    """Return a bandwidth in bytes per second, e.g. ``parse_bandwidth("25 Gbps") == 3.125e9``."""
    return float(parse(text, BYTES_PER_SECOND))


def parse_flops(text: str | float) -> float:
    """Return an arithmetic rate in operations per second, e.g. ``parse_flops("66.9 TFLOP/s") == 66.9e12``."""
    return float(parse(text, FLOPS_PER_SECOND))


def parse_hertz(text: str | float) -> float:
    """Return a frequency in hertz."""
    return float(parse(text, HERTZ))


def parse_watts(text: str | float) -> float:
    """Return a power in watts."""
    return float(parse(text, WATTS))


def _scaled(value: float, steps: list[tuple[float, str]]) -> str:
    for factor, unit in steps:
        if abs(value) >= factor:
            return f"{value / factor:.4g} {unit}"
    return f"{value:.4g} {steps[-1][1]}"


def format_ns(ns: float) -> str:
    """Write a time for people, with four significant digits."""
    return _scaled(ns, [(1e9, "s"), (1e6, "ms"), (1e3, "us"), (1, "ns")])


def format_bytes(size: float) -> str:
    """Write a size for people, in binary units."""
    return _scaled(size, [(2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B")])


def format_count(count: float) -> str:
    """Write a large count (FLOPs, parameters) for people."""
    return _scaled(count, [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, "")]).rstrip()
