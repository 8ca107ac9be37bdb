"""What people read: facts as lines, records as tables."""

from __future__ import annotations

import pytest

from moirai_sim.console import print_facts


def test_records_and_groups_of_facts_come_after_the_facts_with_their_names(capsys: pytest.CaptureFixture[str]):
    print_facts(
        {
            "models": [{"model": "a"}, {"model": "bcd", "ape": 0.25, "all": [1]}],
            "median": 0.123456,
            "missing": None,
            "before": {"cases": 3},
        }
    )
    assert capsys.readouterr().out.splitlines() == [
        "median  0.1235",
        "",
        "models:",
        "model   ape",
        "-----  ----",
        "a         -",
        "bcd    0.25",
        "",
        "before:",
        "cases  3",
    ]
