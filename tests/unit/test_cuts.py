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
    in_place._makespans, in_place._few_parts = ({"d": [[(ns, 0.0)]]} for ns in (small, large))
    assert in_place._parts("d", 1000.0) == pytest.approx(expected)
