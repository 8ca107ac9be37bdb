"""Every rule of ``verify`` fires on a timeline that breaks just this rule."""

from dataclasses import replace

import numpy as np
import pytest

from moirai_sim.problem import PlacementProblem
from moirai_sim.timeline import Span, Timeline
from moirai_sim.verify import verify


@pytest.fixture
def problem():
    """Two chains a -> b and c -> d that cross from d0 to d1 with transfers of 3 ns."""
    return PlacementProblem(
        name="two-chains",
        operators=("a", "b", "c", "d"),
        operator_ns=np.array([[5], [7], [2], [4]]),
        weight_bytes=np.array([10, 10, 10, 10]),
        devices=("d0", "d1"),
        device_type=np.array([0, 0]),
        memory_bytes=np.array([20, 20]),
        edges=np.array([[0, 1], [2, 3]]),
        edge_tensor=np.array([0, 1]),
        tensor_bytes=np.array([100, 100]),
        route_class=np.array([[-1, 0], [0, -1]]),
        transfer_ns=np.array([[3], [3]]),
        network="one-port",
    )


@pytest.fixture
def timeline():
    def send(i, j, ready, start):
        return Span(
            kind="transfer", name=f"{i}->{j}", resource="d0->d1", producer=i, consumers=(j,), source="d0", target="d1",
            bytes=100, ready_ns=ready, start_ns=start, end_ns=start + 3,
        )  # fmt: skip

    def run(name, device, start, end):
        return Span(kind="operator", name=name, resource=device, ready_ns=start, start_ns=start, end_ns=end)

    return Timeline(
        status="optimal",
        policy="hand",
        network="one-port",
        makespan_ns=19,
        lower_bound_ns=19,
        placement={"a": "d0", "b": "d1", "c": "d0", "d": "d1"},
        spans=[
            run("a", "d0", 0, 5), run("c", "d0", 5, 7), send("a", "b", 5, 5), send("c", "d", 7, 8),
            run("b", "d1", 8, 15), run("d", "d1", 15, 19),
        ],
    )  # fmt: skip


def test_accepts_a_right_timeline(problem, timeline):
    assert verify(problem, timeline) == []


def measured(timeline):
    """The same, as a run of parts: a and c in one."""
    spans = [
        replace(timeline.spans[0], end_ns=7, operators=("a", "c")), replace(timeline.spans[4], start_ns=9, end_ns=17),
        replace(timeline.spans[5], start_ns=17, end_ns=21),
    ]  # fmt: skip
    return replace(timeline, status="measured", spans=spans, makespan_ns=21, lower_bound_ns=0)


def test_of_a_measured_timeline_durations_are_what_they_were(problem, timeline):
    run = measured(timeline)
    assert verify(problem, run) == []
    short = replace(run, spans=run.spans[1:])
    assert verify(problem, short) == ["operator 'a' ran 0 times", "operator 'c' ran 0 times"]
    early = replace(run, spans=[*run.spans[:2], replace(run.spans[2], start_ns=16)])
    assert verify(problem, early) == ["device d1: 'b' and 'd' overlap at 16 ns"]
    moved = replace(run, spans=[*run.spans[:2], replace(run.spans[2], resource="d0")], makespan_ns=20)
    assert len(verify(problem, moved)) == 2


@pytest.mark.parametrize(("at", "there"), [(2, 5), (3, 7), (4, 8), (5, 11)])
def test_what_is_ready_before_its_inputs_are_there_is_told(problem, timeline, at, there):
    span = timeline.spans[at]
    spans = [*timeline.spans[:at], replace(span, ready_ns=there - 1), *timeline.spans[at + 1 :]]
    expected = f"'{span.name}' says it is ready at {there - 1} ns, but its inputs are there at {there} ns"
    assert verify(problem, replace(timeline, spans=spans)) == [expected]


def _move(timeline, name, by, stretch=0):
    return replace(
        timeline,
        spans=[
            replace(s, start_ns=s.start_ns + by, end_ns=s.end_ns + by + stretch) if s.name == name else s
            for s in timeline.spans
        ],
    )


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (lambda t: _move(t, "d", -1), "overlap"),
        (lambda t: _move(t, "c->d", -1), "send port of d0"),
        (lambda t: _move(t, "c->d", -1), "receive port of d1"),
        (lambda t: _move(t, "b", -1), "before the transfer 'a->b' arrives"),
        (lambda t: _move(t, "a->b", -1), "before its producer ends"),
        (lambda t: _move(t, "b", 0, stretch=-1), "lasts 6 ns instead of 7 ns"),
        (lambda t: _move(t, "c->d", 0, stretch=1), "alone it takes 3 ns"),
        (
            lambda t: replace(t, spans=[replace(s, ready_ns=s.start_ns + 1) for s in t.spans]),
            "'a' is ready at 1 ns but",
        ),
        (lambda t: replace(t, spans=[replace(s, bytes=7) for s in t.spans]), "carries 7 bytes instead of 100"),
        (lambda t: replace(t, makespan_ns=18), "the last span ends at 19"),
        (lambda t: replace(t, lower_bound_ns=20), "exceeds the objective"),
        (lambda t: replace(t, lower_bound_ns=18), "'optimal' but"),
        (lambda t: replace(t, period_ns=10), "one resource works 11 ns"),
        (lambda t: replace(t, network="none"), "timeline is for network"),
        (lambda t: replace(t, spans=t.spans[1:]), "'a' never runs"),
        (lambda t: replace(t, spans=[*t.spans, t.spans[0]]), "'a' runs twice"),
        (lambda t: replace(t, spans=[s for s in t.spans if s.name != "a->b"]), "'a' never travels to 'd1'"),
        (lambda t: replace(t, placement=t.placement | {"x": "d0"}), "no operator of the model"),
        (lambda t: replace(t, placement=t.placement | {"a": "d9"}), "no device of the cluster"),
        (lambda t: replace(t, placement=t.placement | {"a": "d1"}), "runs on 'd0' but is placed on 'd1'"),
        (lambda t: replace(t, spans=[replace(s, consumers=("d",)) for s in t.spans]), "carries nothing that is needed"),
    ],
)
def test_names_each_violation(problem, timeline, broken, complaint):
    assert any(complaint in line for line in verify(problem, broken(timeline))), verify(problem, broken(timeline))


def test_memory_colocation_and_unsupported_devices(problem, timeline):
    assert "holds 20 bytes" in verify(replace(problem, memory_bytes=np.array([19, 20])), timeline)[0]
    assert "split" in verify(replace(problem, colocation=np.array([0, 0, -1, -1])), timeline)[0]
    typed = replace(problem, operator_ns=np.array([[5, 5], [7, -1], [2, 2], [4, 4]]), device_type=np.array([0, 1]))
    assert any("cannot run on 'd1'" in line for line in verify(typed, timeline))


def test_zero_length_work_may_touch_but_not_lie_inside(problem, timeline):
    flat = replace(problem, operator_ns=np.array([[5], [7], [0], [4]]))
    spans = list(timeline.spans)
    for start, good in ((5, True), (0, True), (2, False)):
        spans[1] = replace(spans[1], start_ns=start, end_ns=start, ready_ns=start)
        assert (verify(flat, replace(timeline, spans=spans)) == []) == good


def test_an_answer_without_a_schedule_has_no_spans(problem, timeline):
    assert verify(problem, replace(timeline, status="infeasible"))
    assert verify(problem, replace(timeline, status="infeasible", spans=[])) == []


def test_a_link_that_carries_too_much_is_found():
    """Two flows that share a link cannot both have it to themselves."""
    import numpy as np

    from moirai_sim.clusters.cluster import Cluster, Device, DeviceType, Link
    from moirai_sim.placement import Placement
    from moirai_sim.policies.loads import period_ns
    from moirai_sim.problem import UNLIMITED, PlacementProblem
    from moirai_sim.simulation.engine import simulate

    kind = DeviceType("unit", "gpu", 1, 1.0, {"float32": 1.0})
    cluster = Cluster(
        "star",
        tuple(Device(f"d{i}", kind) for i in range(3)),
        tuple(Link(f"l{i}", (f"d{i}", "hub"), 1e9) for i in range(3)),
        ("hub",),
    )
    problem = PlacementProblem(
        name="fork",
        operators=("a", "b", "c"),
        operator_ns=np.zeros((3, 1), dtype=np.int64),
        weight_bytes=np.zeros(3, dtype=np.int64),
        devices=("d0", "d1", "d2"),
        device_type=np.zeros(3, dtype=np.int64),
        memory_bytes=np.full(3, UNLIMITED),
        edges=np.array([[0, 1], [0, 2]]),
        edge_tensor=np.arange(2),
        tensor_bytes=np.array([100, 100]),
        route_class=np.where(np.eye(3, dtype=bool), -1, 0),
        transfer_ns=np.array([[100], [100]]),
        network="fair",
        cluster=cluster,
    )
    placement = Placement(np.arange(3))
    assert verify(problem, simulate(problem, placement)) == []
    too_fast = replace(simulate(problem.with_network("none"), placement), network="fair")
    assert verify(problem, too_fast) == ["link 'l0' out of 'd0' carries more than it can from 0 ns to 100 ns"]
    assert period_ns(problem, placement.device) == 200, "both tensors leave by the same link"
    stream = replace(simulate(problem, placement), objective="throughput", period_ns=200)
    assert verify(problem, stream) == []
    assert verify(problem, replace(stream, period_ns=199)) == [
        "period_ns is 199 but one resource works 200 ns a request"
    ]
