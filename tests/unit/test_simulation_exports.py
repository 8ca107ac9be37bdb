"""What the simulator writes: traces, tables, pictures; and its options on the command line."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from moirai_sim.errors import InputError
from moirai_sim.placement import Placement
from moirai_sim.problem import UNLIMITED, PlacementProblem
from moirai_sim.simulation.engine import simulate
from moirai_sim.simulation.explain import explain
from moirai_sim.simulation.gantt import compare_gantts, figure, write_gantt
from moirai_sim.simulation.options import Fault, SimulationOptions, parse_fault
from moirai_sim.simulation.trace import chrome_trace, tracks, write_parquet, write_trace


@pytest.fixture
def problem() -> PlacementProblem:
    """A diamond over two devices, 10 ns an operator and a tensor of 8 bytes."""
    return PlacementProblem(
        name="diamond",
        operators=("a", "b", "c", "d"),
        operator_ns=np.full((4, 1), 10),
        weight_bytes=np.ones(4, dtype=np.int64),
        devices=("d0", "d1"),
        device_type=np.zeros(2, dtype=np.int64),
        memory_bytes=np.full(2, UNLIMITED),
        edges=np.array([[0, 1], [0, 2], [1, 3], [2, 3]]),
        edge_tensor=np.arange(4),
        tensor_bytes=np.full(4, 8),
        route_class=np.array([[-1, 0], [0, -1]]),
        transfer_ns=np.full((4, 1), 5),
    )


PLACEMENT = Placement(np.array([0, 0, 1, 0]))


def test_slices_of_a_track_never_overlap(problem, tmp_path) -> None:
    timeline = simulate(problem, PLACEMENT, options=SimulationOptions(streams=2))
    write_trace(timeline, tmp_path / "t.json", problem)
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    slices = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            slices[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert sum(len(found) for found in slices.values()) == 4 + 2 * 2  # a transfer stands on two ports
    for found in slices.values():
        assert all(one[1] <= other[0] + 1e-9 for one, other in itertools.pairwise(sorted(found)))


def test_a_picture_says_that_it_shows_the_first_of_several_placements(problem) -> None:
    other = Placement(np.array([1, 1, 0, 1]))
    assert "take turns" not in figure(simulate(problem, PLACEMENT)).layout.title.text
    cycle = replace(PLACEMENT, replicas=(other, other))
    assert "first of 3 placements that take turns" in figure(simulate(problem, cycle)).layout.title.text


def test_counters_follow_memory_and_load(problem) -> None:
    events = chrome_trace(simulate(problem, PLACEMENT), problem)["traceEvents"]
    counters = defaultdict(list)
    for event in events:
        if event["ph"] == "C":
            counters[event["name"]].append((event["ts"] * 1e3, *event["args"].values()))
    assert counters["load of d0->d1"] == [(0, 0), (10, 1.6e9), (15, 0)]
    assert counters["memory of d1"][0] == (0, 1)
    assert max(held for _, held in counters["memory of d1"]) == 1 + 8 + 8


def test_the_table_holds_every_span(problem, tmp_path) -> None:
    timeline = simulate(problem, PLACEMENT)
    write_parquet(timeline, tmp_path / "spans.parquet")
    table = pd.read_parquet(tmp_path / "spans.parquet")
    assert list(table["name"]) == [span.name for span in timeline.spans]
    assert table["end_ns"].max() == timeline.makespan_ns


def test_pictures(problem, tmp_path) -> None:
    timeline = simulate(problem, PLACEMENT)
    explanation = explain(problem, PLACEMENT)
    write_gantt(timeline, tmp_path / "g.html", explanation)
    write_gantt(timeline, tmp_path / "g.png", explanation)
    assert (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")
    assert "plotly" in (tmp_path / "g.html").read_text()[:10_000].lower()
    assert len(figure(timeline).data) == len(tracks(timeline))
    assert len(compare_gantts(timeline, timeline).data) == 2 * len(tracks(timeline))
    with pytest.raises(InputError, match=r"\.html or \.png"):
        write_gantt(timeline, tmp_path / "g.bmp")


def test_a_picture_without_matplotlib_names_the_extra(problem, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("moirai_sim.simulation.gantt.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"moirai-sim\[figures\]"):
        write_gantt(simulate(problem, PLACEMENT), tmp_path / "g.png")


def test_faults_are_read_from_text() -> None:
    assert parse_fault("gpu0@3 ms=0.5") == Fault("gpu0", 3_000_000, 0.5)
    assert parse_fault("a@b@1 us") == Fault("a@b", 1_000, 0.0)
    for wrong in ("gpu0", "@1 ms", "gpu0@1 ms=fast", "gpu0@1"):
        with pytest.raises(InputError):
            parse_fault(wrong)


def test_a_request_that_is_never_done_names_what_is_missing(problem) -> None:
    with pytest.raises(InputError, match=r"2 of 4 operators from ending \(c, d\)"):
        simulate(problem, PLACEMENT, options=SimulationOptions(faults=(Fault("d1", 12),)))


def test_a_failure_on_the_way_names_operator_device_and_time(problem) -> None:
    from moirai_sim.errors import InternalError
    from moirai_sim.simulation.engine import Engine
    from moirai_sim.simulation.plan import make_plan

    def broken(record: tuple[int, int, int, int]) -> None:
        if record[2] == 10:
            raise ZeroDivisionError("observer")

    engine = Engine(make_plan(problem, PLACEMENT), on_operator=broken, on_transfer=lambda _: None)
    engine.submit(0)
    with pytest.raises(InternalError, match=r"at 10 ns, operator 'b' on device 'd0'.*ZeroDivisionError"):
        engine.run()
