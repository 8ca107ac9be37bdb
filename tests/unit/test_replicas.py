"""Placements that take turns: hand-worked periods, memory, files, streams and limits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from moirai_sim.errors import InputError
from moirai_sim.placement import Placement, placement_from_timeline
from moirai_sim.policies.base import Request
from moirai_sim.policies.bounds import lower_bound_ns
from moirai_sim.policies.loads import fits
from moirai_sim.policies.run import place, time_placement
from moirai_sim.problem import PlacementProblem
from moirai_sim.simulation.engine import simulate
from moirai_sim.simulation.workloads import serve
from moirai_sim.timeline import read_timeline
from moirai_sim.timeline_schema import TimelineFile
from moirai_sim.units import parse_period_ns
from moirai_sim.verify import verify

if TYPE_CHECKING:
    from collections.abc import Callable


def _chain(times: list[list[int]], transfer_ns: int = 1, memory: int = 100) -> PlacementProblem:
    """Return a chain of operators of 10 bytes each, whose tensors take equally long between any two devices."""
    n, k = len(times), len(times[0])
    edges = np.column_stack([np.arange(n - 1), np.arange(1, n)])
    return PlacementProblem(
        name="chain",
        operators=tuple("abcdef"[:n]),
        operator_ns=np.array(times),
        weight_bytes=np.full(n, 10),
        devices=tuple(f"d{k}" for k in range(k)),
        device_type=np.arange(k),
        memory_bytes=np.full(k, memory),
        edges=edges,
        edge_tensor=np.arange(n - 1),
        tensor_bytes=np.full(n - 1, 8),
        route_class=np.where(np.eye(k, dtype=bool), -1, 0),
        transfer_ns=np.full((n - 1, 1), transfer_ns),
    )


def _cycle(*devices: list[int]) -> Placement:
    first, *others = (Placement(device=np.array(one)) for one in devices)
    return replace(first, replicas=tuple(others))


MODULE = _chain([[2, 2, 2], [4, 4, 4]])
"""Operator a takes 2 ns, b takes 4: alone on d1, b lets a request through every 4 ns; on d1 and d2 in turn, every 2."""
WHOLE = _chain([[6, 12], [4, 8]])
"""The model takes 10 ns on d0 and 20 on d1: two of three requests belong on d0."""


def _stream(problem: PlacementProblem, placement: Placement, **more: int) -> Request:
    return Request(objective="throughput", replicas=len(placement.cycle), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("problem", "cycle", "expected"),
    [
        (MODULE, ([0, 1],), 4),
        (MODULE, ([0, 1], [0, 2]), 2),
        (WHOLE, ([0, 0],), 10),
        (WHOLE, ([0, 0], [1, 1]), 10),
        (WHOLE, ([0, 0], [0, 0], [1, 1]), 7),  # 20 ns of work on each device in three requests, rounded up
    ],
)
def test_period_is_worked_out_by_hand(problem: PlacementProblem, cycle: list[list[int]], expected: int) -> None:
    placement = _cycle(*cycle)
    timeline = time_placement(problem, placement, _stream(problem, placement))
    assert timeline.period_ns == expected
    assert verify(problem, timeline) == []


@pytest.mark.parametrize(("problem", "cycle"), [(MODULE, ([0, 1], [0, 2])), (WHOLE, ([0, 0], [0, 0], [1, 1]))])
def test_a_saturated_stream_goes_at_the_period(problem: PlacementProblem, cycle: list[list[int]]) -> None:
    placement = _cycle(*cycle)
    service = serve(problem, placement, in_flight=8, requests=3_000)
    loads = np.zeros(problem.n_devices)
    for device in placement.devices:
        np.add.at(loads, device, problem.device_ns[np.arange(problem.n_operators), device])
    assert service.throughput_per_s == pytest.approx(len(cycle) * 1e9 / loads.max(), rel=0.01)


def test_unequal_shares_reach_the_fractional_bound() -> None:
    # 1 / (1/10 + 1/20) = 6.67: no share of the requests does better, and one placement alone can take 10 at best
    assert lower_bound_ns(WHOLE, "throughput", replicas=3) == 7
    timeline = time_placement(WHOLE, _cycle([0, 0], [0, 0], [1, 1]), Request(objective="throughput", replicas=3))
    assert timeline.status == "optimal"
    assert timeline.latency_ns == 20


def test_an_operator_longer_than_the_period_is_no_bound_of_replicas() -> None:
    assert lower_bound_ns(MODULE, "throughput") == 4
    assert lower_bound_ns(MODULE, "throughput", replicas=2) == 2


def test_a_device_holds_the_weights_of_every_replica_once() -> None:
    problem = replace(MODULE, memory_bytes=np.array([10, 10, 10]))
    assert fits(problem, np.array([[0, 1], [0, 2]]))
    assert not fits(problem, np.array([[0, 1], [1, 0]]))
    placement = _cycle([0, 1], [1, 0])
    timeline = time_placement(MODULE, placement, _stream(MODULE, placement))
    assert [line for line in verify(problem, timeline) if "all replicas" in line] == [
        f"device 'd{k}' holds 20 bytes of weights for all replicas but has 10" for k in (0, 1)
    ]


def test_a_file_keeps_the_cycle(tmp_path: Path) -> None:
    placement = _cycle([0, 1], [0, 2])
    timeline = time_placement(MODULE, placement, _stream(MODULE, placement, max_latency_ns=7, max_period_ns=3))
    path = tmp_path / "cycle.json"
    timeline.write(path)
    TimelineFile.model_validate(json.loads(path.read_text()))
    read = read_timeline(path)
    assert read.to_json() == timeline.to_json()
    assert verify(MODULE, read) == []
    again = placement_from_timeline(MODULE, read)
    assert again.devices.tolist() == [[0, 1], [0, 2]]
    for engine in ("simpy", "replay"):
        repeated = simulate(MODULE, again, engine=engine)  # type: ignore[arg-type]
        assert [one.makespan_ns for one in repeated.cycle] == [7, 7]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda d: d.update(replicas={}), '"replicas" must be a list'),
        (lambda d: d.update(replicas=[3]), r"replicas\[0\]: must be an object"),
        (lambda d: d["replicas"][0].update(placement=[]), r'replicas\[0\]: "placement" must be'),
        (lambda d: d["replicas"][0]["spans"][0].pop("name"), r"replicas\[0\]: spans\[0\]: missing"),
        (lambda d: d.update(max_latency_ns=-1), '"max_latency_ns" must be'),
    ],
)
def test_broken_replicas_are_named(tmp_path: Path, change: Callable[[dict[str, Any]], object], complaint: str) -> None:
    placement = _cycle([0, 1], [0, 2])
    document = time_placement(MODULE, placement, _stream(MODULE, placement)).to_json()
    change(document)
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=complaint):
        read_timeline(path)


def test_verify_sees_through_every_replica() -> None:
    placement = _cycle([0, 1], [0, 2])
    timeline = time_placement(MODULE, placement, _stream(MODULE, placement))
    short = replace(timeline, period_ns=1, lower_bound_ns=0, status="feasible")
    assert verify(MODULE, short) == ["period_ns is 1 but one resource works 4 ns in 2 requests"]
    (replica,) = timeline.replicas
    early = [replace(span, end_ns=span.end_ns - 1) if span.name == "b" else span for span in replica.spans]
    broken = verify(MODULE, replace(timeline, replicas=(replace(replica, spans=early),)))
    assert any(line.startswith("replica 1: operator 'b' lasts 3 ns") for line in broken)
    slow = replace(timeline, max_latency_ns=6, max_period_ns=1)
    assert verify(MODULE, slow) == [
        "the period is 2 ns; asked for at most 1 ns",
        "a request takes 7 ns; asked for at most 6 ns",
    ]


def test_an_answer_beyond_a_limit_is_refused_with_the_reason() -> None:
    refused = place(MODULE, "single", Request(max_period_ns=5))
    assert (refused.status, list(refused.spans)) == ("limit", [])
    assert refused.provenance["reason"] == "the policy's answer was refused: its period is 6 ns, above 5 ns"
    kept = place(MODULE, "single", Request(max_period_ns=6))
    assert (kept.period_ns, kept.objective_ns, kept.objective) == (6, 6, "latency")
    impossible = place(MODULE, "single", Request(max_latency_ns=5))
    assert impossible.status == "infeasible"
    assert "latency of at least 6 ns" in impossible.provenance["reason"]


def test_limits_below_one_are_refused() -> None:
    with pytest.raises(InputError, match="replicas: must be at least 1") as refusal:
        Request(replicas=0, max_latency_ns=0)
    assert "max_latency_ns: must be at least 1" in str(refusal.value)


def test_a_throughput_is_the_longest_whole_period() -> None:
    assert parse_period_ns("50/s") == 20_000_000
    assert parse_period_ns("3/s") == 333_333_333
    assert parse_period_ns("60/min") == 10**9
    with pytest.raises(InputError, match="no throughput"):
        parse_period_ns("0/s")
