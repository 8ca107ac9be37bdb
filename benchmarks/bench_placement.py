"""How good placements are, how far proven, and how long that takes: published instances and a large language model."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.row import Row, data_folder, without_data
from moirai_sim.policies.base import Request
from moirai_sim.policies.run import place
from moirai_sim.sources import load_problem

if TYPE_CHECKING:
    from collections.abc import Callable

    from moirai_sim.problem import PlacementProblem
    from moirai_sim.timeline import Timeline

WORKERS = 2
RIVALS = ("single", "heft", "heft-blind", "cpop", "met", "m-topo", "m-etf", "m-sct", "getf")


def _servers() -> str:
    """Return the YAML of eight servers of eight GPUs, four of each of two kinds, joined by one switch."""
    servers = "".join(
        f"""
  - name: {letter}{number}
    devices: [{{name: gpu, device: {kind}, count: 8}}]
    switches: [nvswitch]
    links: [{{ends: [gpu, nvswitch], bandwidth: {bandwidth}, latency: 1 us}}]"""
        for letter, kind, bandwidth in (("a", "nvidia-h100-sxm", "450 GB/s"), ("b", "nvidia-a100-sxm-80gb", "300 GB/s"))
        for number in range(4)
    )
    uplinks = "".join(
        f"\n  - {{ends: [{letter}{number}.nvswitch, fabric], bandwidth: 400 Gbps, latency: 5 us}}"
        for letter in "ab"
        for number in range(4)
    )
    head = "name: eight-servers\nsource: made for this benchmark\nswitches: [fabric]\n"
    return f"{head}servers:{servers}\nlinks:{uplinks}\n"


def _example(number: int) -> Row:
    name = f"example-1-{('memory', 'no-memory', 'half-duplex')[number]}"
    expected = (30, 28, 31)[number]
    data = data_folder()
    if data is None:
        return without_data(name, "s", f"{expected} ms proven in 5 s")
    problem = load_problem(data / "moirai" / "example-1.xls", memory=number != 1)
    problem = replace(problem, network="half-duplex") if number == 2 else problem
    timeline, seconds = _timed(problem, "milp", 30)
    proven = timeline.status == "optimal" and timeline.makespan_ns == expected * 1_000_000
    return Row(name, round(seconds, 2), "s", f"{expected} ms proven in 5 s", proven and seconds < 5, _note(timeline))


def _googlenet() -> Row:
    problem = _instance("GoogLeNet")
    if problem is None:
        return without_data("googlenet", "s", "1.278110 ms proven in 60 s")
    timeline, seconds = _timed(problem, "auto", 60)
    good = timeline.status == "optimal" and timeline.makespan_ns == 1_278_110 and seconds < 60
    return Row("googlenet", round(seconds, 2), "s", "1.278110 ms proven in 60 s", good, _note(timeline))


def _googlenet_quick() -> Row:
    problem = _instance("GoogLeNet")
    if problem is None:
        return without_data("googlenet-5s", "ms", "1.2909")
    timeline, seconds = _timed(problem, "auto", 5)
    value = timeline.makespan_ns / 1e6
    note = f"{_note(timeline)}; {seconds:.1f} s"
    return Row("googlenet-5s", value, "ms", "within 1 % of 1.278110", value <= 1.278110 * 1.01, note)


def _transformer() -> Row:
    problem = _instance("transformer")
    if problem is None:
        return without_data("transformer", "ms", "22.44")
    timeline, seconds = _timed(problem, "auto", 60)
    value = timeline.makespan_ns / 1e6
    note = f"{_note(timeline)}; {seconds:.1f} s"
    return Row("transformer", value, "ms", "22.44 in 60 s, bound well above 10.11", value <= 22.44, note)


def _memory_bound(name: str) -> Row:
    row = f"{name.lower()}-memory-0.4"
    problem = _instance(name)
    if problem is None:
        return without_data(row, "%", "10 % below the best rival")
    problem = problem.with_memory_scale(0.4)
    ours, _ = _timed(problem, "auto", 60)
    rivals = {rival: place(problem, rival, Request(workers=WORKERS)) for rival in RIVALS}
    best, by = min((timeline.makespan_ns, rival) for rival, timeline in rivals.items() if timeline.spans)
    gain = 100 * (1 - ours.makespan_ns / best)
    return Row(row, round(gain, 1), "%", "10 % below the best rival", gain >= 10, f"{_note(ours)}; best rival {by}")


def _milp_build() -> Row:
    import cvxpy  # noqa: F401 - imported before the clock starts

    from moirai_sim.policies.milp import canonical
    from moirai_sim.policies.milp_model import MilpModel
    from moirai_sim.policies.starts import find_starts
    from moirai_sim.testing.problems import layered_problem

    problem = layered_problem(0, operators=500, devices=4)
    start = find_starts(problem, Request(), ("heft", "single"))[0]
    started = time.perf_counter()
    model = MilpModel(problem, start.value_ns)
    seconds = time.perf_counter() - started
    rows = sum(len(family.right) for family in model.families.values())
    started = time.perf_counter()
    canonical(model)
    note = f"{model.n_columns} columns, {rows} rows; cvxpy takes {time.perf_counter() - started:.1f} s more"
    return Row("milp-build", round(seconds, 2), "s", "< 2 s for 500 operators", seconds < 2, note)


def _gpt3() -> Row:
    from moirai_sim.clusters.reader import read_cluster

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "servers.yaml"
        path.write_text(_servers())
        problem = load_problem("zoo:gpt3-175b?dtype=float16", read_cluster(path))
    timeline, seconds = _timed(problem, "auto", 40)
    rivals = {name: place(problem, name, Request(time_limit_s=10)).makespan_ns for name in ("heft", "m-topo", "m-etf")}
    note = f"{_note(timeline)}; {problem.n_operators} operators; " + ", ".join(
        f"{name} {value / 1e6:.1f} ms" for name, value in rivals.items()
    )
    return Row("gpt3-64", round(seconds, 1), "s", "verified, with a gap, in 60 s", seconds < 60, note)


def _instance(name: str) -> PlacementProblem | None:
    data = data_folder()
    return None if data is None else load_problem(data / "moirai" / f"{name}.xls")


def _timed(problem: PlacementProblem, policy: str, limit: float) -> tuple[Timeline, float]:
    started = time.perf_counter()
    timeline = place(problem, policy, Request(time_limit_s=limit, workers=WORKERS))
    return timeline, time.perf_counter() - started


def _note(timeline: Timeline) -> str:
    return (
        f"{timeline.status} {timeline.makespan_ns / 1e6:.6f} ms, bound {timeline.lower_bound_ns / 1e6:.6f} ms, "
        f"gap {100 * timeline.gap:.2f} %"
    )


LATENCY = {"bert24": 100.22, "gnmt": 244.33, "bert_l-3": 414.44, "resnet50": 839.54}
"""Published latencies, ms: the best of greedy, DP split and expert (Tarnawski et al., NeurIPS 2020)."""


def _published_latency(name: str) -> Row:
    from moirai_sim.instances.dnn_partitioning import read_dnn_partitioning
    from moirai_sim.policies.contiguous import bound_ns, split

    row, target = f"latency-{name}", f"at most {LATENCY[name]}"
    data = data_folder()
    if data is None:
        return without_data(row, "ms", target)
    path = next(data.glob(f"dnn-partitioning/latency-inputs/*/{name}_inference.json"))
    instance = read_dnn_partitioning(path)
    started = time.perf_counter()
    value = split(instance)[1] / 1e6
    bound = bound_ns(instance) / 1e6
    note = f"bound {bound:.2f}, gap {100 * (1 - bound / value):.1f} %, {time.perf_counter() - started:.1f} s"
    return Row(row, round(value, 2), "ms", target, round(value, 2) <= LATENCY[name], note)


BENCHMARKS: dict[str, Callable[[], Row]] = {
    "example-1-memory": lambda: _example(0),
    "example-1-no-memory": lambda: _example(1),
    "example-1-half-duplex": lambda: _example(2),
    "googlenet": _googlenet,
    "googlenet-5s": _googlenet_quick,
    "transformer": _transformer,
    "googlenet-memory": lambda: _memory_bound("GoogLeNet"),
    "transformer-memory": lambda: _memory_bound("transformer"),
    "gpt3-64": _gpt3,
    "milp-build": _milp_build,
    **{f"latency-{name}": partial(_published_latency, name) for name in LATENCY},
}
