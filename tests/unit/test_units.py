"""Quantities as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moirai_sim import units
from moirai_sim.errors import InputError


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (units.parse_bytes, "80 GiB", 80 * 2**30),
        (units.parse_bytes, "50MB", 50_000_000),
        (units.parse_bytes, 0, 0),
        (units.parse_ns, "3 us", 3000),
        (units.parse_ns, "1.5 ms", 1_500_000),
        (units.parse_bandwidth, "25 Gbps", 3.125e9),
        (units.parse_bandwidth, "25 GB/s", 25e9),
        (units.parse_bandwidth, "1 Gbit/s", 125e6),
        (units.parse_flops, "66.9 TFLOP/s", 66.9e12),
        (units.parse_hertz, "1980 MHz", 1.98e9),
        (units.parse_watts, "0.7 kW", 700.0),
    ],
)
def test_reads_what_people_write(parse, text, value):
    assert parse(text) == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("80", "missing unit"),
        ("80 gib", "unknown unit 'gib'"),
        ("-1 B", "negative"),
        ("1e B", "cannot read"),
        ("", "cannot"),
    ],
)
def test_says_what_is_wrong_and_which_units_exist(text, complaint):
    with pytest.raises(InputError, match=complaint):
        units.parse_bytes(text)


@given(st.integers(0, 2**62))
def test_whole_bytes_and_nanoseconds_survive(value):
    assert units.parse_bytes(f"{value} B") == value
    assert units.parse_ns(f"{value} ns") == value


def test_formats_for_people():
    assert units.format_ns(1_278_110) == "1.278 ms"
    assert units.format_bytes(80 * 2**30) == "80 GiB"
    assert units.format_count(7_750_000_000) == "7.75 G"
