"""The compiled replay and the rivals: speed, and Tarnawski's published figures."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.row import Row, data_folder, fastest, without_data
from moirai_sim.instances.random_graphs import layered_problem
from moirai_sim.placement import Placement
from moirai_sim.policies.base import Request
from moirai_sim.policies.heft import Heft
from moirai_sim.policies.pipeline_dp import PipelineDp
from moirai_sim.policies.search import improve
from moirai_sim.simulation.list_scheduling import Evaluator
from moirai_sim.simulation.replay import replay


def _replay() -> Row:
    target = ">= 3e7 (GoogLeNet, one core)"
    folder = data_folder()
    if folder is None:
        return without_data("replay", "operators/s", target)
    from moirai_sim.sources import load_problem

    speeds = {}
    for name in ("GoogLeNet", "transformer"):
        problem = load_problem(str(folder / "moirai" / f"{name}.xls"))
        start = Heft().place(problem, Request())
        device = improve(problem, [start], rounds=3).device  # a placement as a search meets it
        evaluator = Evaluator(problem)
        batch = np.repeat(device[None, :], 2000, axis=0)
        expected = replay(problem, Placement(device=device)).makespan_ns
        if set(evaluator.makespans_ns(batch).tolist()) != {expected}:
            raise RuntimeError(f"the evaluator and the replay disagree on {name}")
        speeds[name] = batch.size / fastest(partial(evaluator.makespans_ns, batch))
    note = ", ".join(f"{name} {speed:.3g}" for name, speed in speeds.items())
    return Row("replay", speeds["GoogLeNet"], "operators/s", target, speeds["GoogLeNet"] >= 3e7, note)


def _heft(nodes: int, limit_s: float) -> Callable[[], Row]:
    def run() -> Row:
        problem = layered_problem(nodes, 4)
        Heft().place(layered_problem(50, 4), Request())  # compile
        started = time.perf_counter()
        answer = Heft().place(problem, Request())
        seconds = time.perf_counter() - started
        makespan = replay(problem, answer).makespan_ns
        return Row(
            f"heft-{nodes}", seconds, "s", f"< {limit_s:g}", seconds < limit_s, f"makespan {makespan / 1e6:.3f} ms"
        )

    return run


def _pipeline(file: str, published_ms: float) -> Callable[[], Row]:
    def run() -> Row:
        name = f"pipeline-dp-{Path(file).name.removesuffix('_inference.json')}"
        target = f"{published_ms} in under 10 s"
        folder = data_folder()
        if folder is None:
            return without_data(name, "ms", target)
        from moirai_sim.sources import load_problem

        problem = load_problem(str(folder / "dnn-partitioning" / "throughput-inputs" / file))
        started = time.perf_counter()
        answer = PipelineDp().place(problem, Request(objective="throughput"))
        seconds = time.perf_counter() - started
        load = float(str(answer.provenance.get("largest_load_ns", "nan"))) / 1e6
        met = round(load, 2) == published_ms and seconds < 10
        return Row(name, load, "ms", target, met, f"{seconds:.2f} s, {answer.provenance.get('ideals')} ideals")

    return run


BENCHMARKS = {
    "replay": _replay,
    "heft-4000": _heft(4_000, 0.3),
    "heft-100000": _heft(100_000, 20.0),
    "pipeline-dp-bert24": _pipeline("LayerGraphs/bert24_inference.json", 17.79),
    "pipeline-dp-gnmt": _pipeline("LayerGraphs/gnmt_inference.json", 32.91),
    "pipeline-dp-bert_l-3": _pipeline("OperatorGraphs/bert_l-3_inference.json", 27.92),
    "pipeline-dp-resnet50": _pipeline("OperatorGraphs/resnet50_inference.json", 124.35),
}
