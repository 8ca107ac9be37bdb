"""What of a prediction is compared with what of a measurement, where both are timelines."""

from __future__ import annotations

from moirai_sim.studies.validate import Measured, Round, _by_link
from moirai_sim.timeline import Span, Timeline


def timeline(*spans: Span) -> Timeline:
    placement = {"a": "m0", "c": "m0", "b": "m1", "d": "m1"}
    return Timeline("measured", "", "fair", max(span.end_ns for span in spans), placement, spans=list(spans))


def operator(name: str, device: str, start: int, end: int) -> Span:
    return Span("operator", name, device, start, start, end, operators=(name,))


def transfer(producer: str, consumer: str, ready: int, start: int, end: int) -> Span:
    ends = {"producer": producer, "consumers": (consumer,), "source": "m0", "target": "m1", "bytes": 4}
    return Span("transfer", f"{producer}->{consumer}", "m0->m1", ready, start, end, **ends)


def test_links_are_judged_by_transfers_that_a_device_stood_still_for():
    predicted = timeline(
        operator("a", "m0", 0, 10), operator("c", "m0", 10, 20), transfer("a", "b", 10, 12, 40),
        transfer("c", "d", 20, 40, 60), operator("b", "m1", 40, 90), operator("d", "m1", 90, 100),
    )  # fmt: skip
    measured = timeline(
        operator("a", "m0", 0, 11), operator("c", "m0", 11, 21), transfer("a", "b", 11, 11, 30),
        transfer("c", "d", 21, 21, 85), operator("b", "m1", 35, 80), operator("d", "m1", 86, 95),
    )  # fmt: skip
    assert _by_link(predicted, measured) == {"m0->m1": [30, 24, 1]}, "d's tensor came while its device computed"


def test_rounds_count_that_lie_between_two_times_in_place_that_are_alike():
    rounds = [Round(i % 2, before, [(ns, 0.0)], timeline(operator("a", "m0", 0, 1))) for i, (before, ns) in enumerate(
        [(1, 70), (2, 100), (3, 900), (4, 110), (5, 120)])]  # fmt: skip
    found = Measured(rounds).only([False, True, True, False, True, True])
    assert [one.timed_before for one in found.rounds] == [2, 5]
    assert (found.alike, found.typical_ns(quiet=True)) == (2 / 5, 110)
    assert found.loads == [[[(120, 0.0)]], [[(100, 0.0)]]]
    none = Measured(rounds).only([False] * 6)
    assert (none.alike, none.rounds) == (0, rounds)
