"""Timeline files: what is written comes back, what is broken is named."""

import json
from dataclasses import replace

import numpy as np
import pytest

from moirai_sim.errors import InputError
from moirai_sim.placement import Placement, placement_from_timeline
from moirai_sim.problem import PlacementProblem
from moirai_sim.simulation.engine import simulate
from moirai_sim.timeline import Span, Timeline, read_timeline

SPANS = (
    Span(kind="operator", name="a", resource="d0", ready_ns=0, start_ns=0, end_ns=5),
    Span(
        kind="transfer", name="a->b", resource="d0->d1", producer="a", consumers=("b",), source="d0", target="d1",
        bytes=None, ready_ns=5, start_ns=5, end_ns=8,
    ),
    Span(kind="operator", name="b", resource="d1", ready_ns=8, start_ns=8, end_ns=10),
)  # fmt: skip


def _timeline():
    return Timeline(
        status="feasible", policy="hand", network="one-port", makespan_ns=10, placement={"a": "d0", "b": "d1"},
        spans=list(SPANS), lower_bound_ns=4, solve_seconds=0.5, provenance={"seed": 1},
    )  # fmt: skip


def test_round_trip(tmp_path):
    path = tmp_path / "t.json"
    _timeline().write(path)
    assert read_timeline(path) == _timeline()
    assert json.loads(path.read_text())["gap"] == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda d: d.pop("format"), "not a timeline"),
        (lambda d: d.update(placement=[]), '"placement" must be'),
        (lambda d: d.update(makespan_ns=1.5), "whole number of nanoseconds"),
        (lambda d: d["spans"][0].pop("start_ns"), r"spans\[0\]: missing or of the wrong type: start_ns"),
        (lambda d: d["spans"][1].update(kind="wait"), r"spans\[1\]"),
        (lambda d: d.update(placement={"a": ["d0"]}), '"placement" must be'),
        (lambda d: d.update(spans=None), '"spans" must be a list'),
        (lambda d: d.update(provenance=[]), '"provenance" must be an object'),
        (lambda d: d.update(status={}), '"status" must be one of optimal'),
        (lambda d: d.update(solve_seconds="long"), '"solve_seconds" must be a number'),
        (lambda d: d.update(lower_bound_ns=float("nan")), "NaN is no JSON number"),
        (lambda d: d["spans"][0].update(end_ns=10**30), "wrong type: end_ns"),
        (lambda d: d["spans"][0].update(operators=3), "wrong type: operators"),
        (lambda d: d["spans"][1].update(consumers=None), "wrong type: consumers"),
        (lambda d: d["spans"][1].update(consumers=[["b"]], bytes="x"), "wrong type: consumers, bytes"),
    ],
)
def test_names_what_is_broken(tmp_path, change, complaint):
    path = tmp_path / "t.json"
    document = _timeline().to_json()
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=complaint):
        read_timeline(path)


def test_truncated_file_names_the_line(tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps(_timeline().to_json(), indent=1)[:60])
    with pytest.raises(InputError, match=r"t\.json:\d+:\d+: not JSON"):
        read_timeline(path)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5_000])
def test_json_that_python_cannot_hold_is_refused(tmp_path, text):
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(InputError, match="not JSON"):
        read_timeline(path)


@pytest.mark.parametrize("made_for", [{"memory_scale": "x"}, {"memory_scale": True}, "text"])
def test_memory_that_makes_no_sense_is_not_taken_from_the_file(made_for):
    assert replace(_timeline(), provenance={"problem": made_for}).memory == (False, None)


def test_orders_come_back_from_the_spans():
    problem = PlacementProblem(
        name="pair", operators=("a", "b"), operator_ns=np.array([[5], [2]]), weight_bytes=np.array([0, 0]),
        devices=("d0", "d1"), device_type=np.array([0, 0]), memory_bytes=np.array([1, 1]), edges=np.array([[0, 1]]),
        edge_tensor=np.array([0]), tensor_bytes=np.array([-1]), route_class=np.array([[-1, 0], [0, -1]]),
        transfer_ns=np.array([[3]]),
    )  # fmt: skip
    placement = placement_from_timeline(problem, _timeline())
    assert placement.device.tolist() == [0, 1]
    assert placement.order.tolist() == [0, 2]
    assert placement.transfer_order.tolist() == [1]
    missing = Timeline(status="feasible", policy="", network="one-port", makespan_ns=0, placement={"a": "d0"})
    with pytest.raises(InputError, match="no device for 'b'"):
        placement_from_timeline(problem, missing)


@pytest.mark.parametrize(("sizes", "times"), [([-1, -1, -1], [3, 4, 4]), ([300, 400, 600], [3, 4, 6])])
def test_orders_come_back_where_several_tensors_go_the_same_way(sizes, times):
    """``a`` gives three tensors to ``b``, the first of which ``c`` reads too; the last goes first."""
    problem = PlacementProblem(
        name="tied", operators=("a", "b", "c"), operator_ns=np.array([[5], [2], [1]]), weight_bytes=np.zeros(3, int),
        devices=("d0", "d1"), device_type=np.array([0, 0]), memory_bytes=np.array([1, 1]),
        edges=np.array([[0, 1], [0, 1], [0, 1], [0, 2]]), edge_tensor=np.array([0, 1, 2, 0]),
        tensor_bytes=np.array(sizes), route_class=np.array([[-1, 0], [0, -1]]), transfer_ns=np.array(times)[:, None],
    )  # fmt: skip
    wanted = Placement(np.array([0, 1, 1]), np.array([0, 5, 4]), np.array([2, 3, 1, -1]))
    timeline = simulate(problem, wanted)
    assert [span.start_ns for span in timeline.spans if span.kind == "transfer"] == [5, 5 + times[2], 8 + times[2]]
    found = placement_from_timeline(problem, timeline)
    assert found.order is not None
    assert simulate(problem, found).spans == timeline.spans
