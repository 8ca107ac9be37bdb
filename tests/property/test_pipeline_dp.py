"""The dynamic programme for pipelines against brute force over all contiguous placements, by both rules of load."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moirai_sim.policies.base import Request
from moirai_sim.policies.pipeline_dp import PUBLISHED_FORMAT, PipelineDp
from moirai_sim.policies.run import place
from moirai_sim.problem import UNLIMITED, UNSUPPORTED, PlacementProblem
from moirai_sim.sources import load_problem


def _problem(seed: int, *, published: bool) -> PlacementProblem:
    """Two accelerators and a CPU; a tensor costs c out and c in, by the published rule, or c between any two."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 6))
    edges = np.array([(i, j) for i in range(n) for j in range(i + 1, n) if rng.random() < 0.45], dtype=np.int64)
    edges = edges.reshape(-1, 2)
    producers, tensor = np.unique(edges[:, 0], return_inverse=True)
    cost = rng.integers(0, 6, len(producers))
    times = rng.integers(0, 9, (n, 2)) * (rng.random((n, 1)) < 0.8)  # some work for nothing, to test their merging
    if seed % 5 == 0:
        times[rng.integers(n), 0] = UNSUPPORTED
    weight = rng.integers(0, 4, n)
    group = np.full(n, -1)
    if seed % 4 == 0:
        group[[0, n - 1]] = 0
    memory = UNLIMITED if seed % 3 else max(int(0.7 * weight.sum()), int(weight.max()))
    route = np.array([[-1, 0, 1], [0, -1, 1], [1, 1, -1]])
    scale = (2, 1, 0) if published else (1, 1, 1)
    return PlacementProblem(
        name=f"pipeline-{seed}",
        operators=tuple(f"n{i}" for i in range(n)),
        operator_ns=times.astype(np.int64),
        weight_bytes=weight.astype(np.int64),
        devices=("acc0", "acc1", "cpu0"),
        device_type=np.array([0, 0, 1]),
        memory_bytes=np.array([memory, memory, UNLIMITED]),
        edges=edges,
        edge_tensor=tensor.astype(np.int64).reshape(-1),
        tensor_bytes=np.full(len(producers), -1, dtype=np.int64),
        route_class=route.astype(np.int64),
        transfer_ns=np.stack([cost * s for s in scale], axis=1).astype(np.int64),
        colocation=group.astype(np.int64) if seed % 4 == 0 else None,
        provenance={"format": PUBLISHED_FORMAT} if published else {},
    )


def _largest_load(problem: PlacementProblem, device: tuple[int, ...]) -> int | None:
    """Return the largest load by the definition in the papers' words; None where the placement is not allowed."""
    published = "format" in problem.provenance
    compute, out, into, held = ([0] * 3 for _ in range(4))
    for i, d in enumerate(device):
        time = int(problem.operator_ns[i, problem.device_type[d]])
        if time < 0:
            return None
        compute[d] += time
        held[d] += int(problem.weight_bytes[i])
    if any(held[d] > problem.memory_bytes[d] for d in range(3)):
        return None
    if problem.colocation is not None and device[0] != device[-1]:
        return None
    arcs = {(device[i], device[j]) for i, j in problem.edges.tolist() if device[i] != device[j]}
    if any((b, a) in arcs for a, b in arcs) or len(arcs & {(0, 1), (1, 2), (2, 0)}) == 3:
        return None
    if len(arcs & {(1, 0), (2, 1), (0, 2)}) == 3:
        return None
    for tensor in range(len(problem.tensor_bytes)):
        ends = problem.edges[problem.edge_tensor == tensor]
        home = device[int(ends[0, 0])]
        readers = {device[j] for j in ends[:, 1].tolist()} - {home}
        cost = int(problem.transfer_ns[tensor, 1])
        if readers:
            out[home] += cost
        for reader in readers:
            into[reader] += cost
    if published:
        return max(compute[0] + out[0] + into[0], compute[1] + out[1] + into[1], compute[2])
    return max(*compute, *out, *into)


@pytest.mark.parametrize("published", [True, False])
def test_pipeline_dp_is_exact(published: bool) -> None:
    for seed in range(48):
        problem = _problem(seed, published=published)
        loads = [_largest_load(problem, device) for device in itertools.product(range(3), repeat=problem.n_operators)]
        expected = min((load for load in loads if load is not None), default=None)
        answer = PipelineDp().place(problem, Request())
        if expected is None:
            assert answer.status == "limit", seed
            continue
        assert answer.provenance["largest_load_ns"] == expected, seed
        assert _largest_load(problem, tuple(answer.device.tolist())) == expected, seed


def test_too_many_ideals_are_refused_before_memory_runs_out() -> None:
    wide = _problem(1, published=False)
    n = 40
    wide = replace(
        wide,
        operators=tuple(f"n{i}" for i in range(n)),
        operator_ns=np.ones((n, 2), dtype=np.int64),
        weight_bytes=np.zeros(n, dtype=np.int64),
        edges=np.zeros((0, 2), dtype=np.int64),
        edge_tensor=np.zeros(0, dtype=np.int64),
        tensor_bytes=np.zeros(0, dtype=np.int64),
        transfer_ns=np.zeros((0, 2), dtype=np.int64),
        colocation=None,
    )
    assert PipelineDp().place(wide, Request()).status == "limit"


def test_what_costs_nothing_and_feeds_nobody_lies_somewhere(tmp_path: Path) -> None:
    """An idle output of an idle input, which otherwise belongs to whichever piece reads it first."""
    nodes = [
        {"id": i, "name": f"n{i}", "fpgaLatency": time, "cpuLatency": time, "size": size}
        for i, (time, size) in enumerate([(0, 0), (0, 0), (3, 4), (2, 4)])
    ]
    edges = [{"sourceId": 0, "destId": i, "cost": 0} for i in (1, 2, 3)]
    path = tmp_path / "idle.json"
    document = {"maxFPGAs": 1, "maxCPUs": 1, "maxSizePerFPGA": 100, "nodes": nodes, "edges": edges}
    path.write_text(json.dumps(document))
    timeline = place(load_problem(path), "pipeline-dp", Request(objective="throughput"))
    assert timeline.period_ns == 3_000_000
