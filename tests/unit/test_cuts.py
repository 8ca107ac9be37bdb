"""What cuts of a model cost, from hand-made times."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from moirai_sim.execution.cuts import InPlace


@pytest.mark.parametrize(
    ("small", "large", "expected"),
    [
        (1000 + 20 + 10 * 5, 1000 + 20 + 2 * 5, (5, 0.02)),  # 11 and 3 parts
        (1000 + 10 * 5, 1000 + 2 * 5, (5, 0)),
        (1000 + 50, 1000 + 4, (5, 0)),  # a line that meets the axis below nothing goes through nothing
        (1000, 1000 + 30, (0, 0.03)),  # small parts cost nothing
        (990, 980, (0, 0)),
    ],
)
def test_a_line_through_small_and_large_parts(small: int, large: int, expected: tuple[float, float]):
    in_place = InPlace.__new__(InPlace)
    in_place.patience_s = 0.1
    in_place._loaded, in_place._coarse = ({"d": SimpleNamespace(parts=[None] * n)} for n in (11, 3))
    in_place._rounds = [{("small parts", "d"): [[(small, 0.0)]], ("large parts", "d"): [[(large, 0.0)]]}]
    in_place._alternating_ns = [0.0]
    assert in_place._parts("d", 1000.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("alternating", "alike"),
    [
        ([10, 10.5, 9.8, 21], [True, True, True, False]),
        ([10, 21, 20, 22], [False, True, True, True]),  # the machine as it mostly was, be it slow
        ([21, 10, 10, 21], [False, True, True, False]),  # as fast as it can be, where there is no most
        ([0, 0], [True, True]),  # crossings were not timed
        ([], []),
    ],
)
def test_rounds_are_alike_where_tensors_cross_as_fast_as_in_most(alternating: list[float], alike: list[bool]):
    in_place = InPlace.__new__(InPlace)
    in_place._alternating_ns = alternating
    assert in_place.alike() == alike


def test_times_are_those_of_the_rounds_that_are_alike():
    in_place = InPlace.__new__(InPlace)
    in_place.patience_s = 0.1
    in_place._alternating_ns = [10, 30, 10]
    in_place._rounds = [{("whole", "d"): [[(ns, 0.0)]]} for ns in (5, 100, 7)]
    in_place._rounds[1]["cold", "d"] = [[(9, 0.0)]]
    assert in_place._typical("whole", "d") == 6
    assert in_place._typical("cold", "d") == 9, "was found in no other round"
