"""Speed of the simulator, on one core: ``simpy``, ``fair``, ``million``, ``stream``, each with its growth curve."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.row import Row, curve, data_folder, fastest, without_data
from moirai_sim.clusters.cluster import Cluster, Device, DeviceType, Link
from moirai_sim.clusters.routes import route_classes
from moirai_sim.placement import Placement
from moirai_sim.problem import UNLIMITED, PlacementProblem
from moirai_sim.simulation.engine import Engine, simulate_schedule
from moirai_sim.simulation.plan import make_plan
from moirai_sim.simulation.replay import replay
from moirai_sim.simulation.workloads import serve


def _layered(n: int, devices: int, seed: int = 0) -> PlacementProblem:
    """Return n operators in layers of a few, each reading one to three of the layer before; 5 us to 50 us long."""
    rng = np.random.default_rng(seed)
    width = max(2, min(devices, n // 4))
    later = np.arange(width, n)
    fan_in = rng.integers(1, 4, len(later))
    consumer = np.repeat(later, fan_in)
    producer = (consumer // width - 1) * width + rng.integers(0, width, len(consumer))
    edges = np.unique(np.stack([producer, consumer], axis=1), axis=0)
    return PlacementProblem(
        name=f"layered {n}",
        operators=tuple(f"o{i}" for i in range(n)),
        operator_ns=rng.integers(5_000, 50_000, (n, 2)),
        weight_bytes=np.ones(n, dtype=np.int64),
        devices=tuple(f"d{k}" for k in range(devices)),
        device_type=np.arange(devices) % 2,
        memory_bytes=np.full(devices, UNLIMITED),
        edges=edges,
        edge_tensor=np.arange(len(edges)),
        tensor_bytes=np.full(len(edges), 1_000),
        route_class=np.where(np.eye(devices, dtype=bool), -1, 0),
        transfer_ns=rng.integers(1_000, 20_000, (len(edges), 1)),
    )


def _spread(problem: PlacementProblem, seed: int = 0) -> Placement:
    return Placement(np.random.default_rng(seed).integers(0, problem.n_devices, problem.n_operators))


def _simpy() -> Row:
    target = ">= 150000"
    folder = data_folder()
    if folder is None:
        return without_data("simpy", "operators/s", target)
    from moirai_sim.sources import load_problem

    rates, notes = [], []
    for name in ("GoogLeNet", "transformer"):
        problem = load_problem(next((folder / "moirai").glob(f"{name}.xls")), network="one-port")
        placement = _spread(problem)
        compiled = replay(problem, placement)
        if simulate_schedule(problem, placement).makespan_ns != compiled.makespan_ns:
            raise ValueError(f"{name}: the two engines disagree")
        transfers = int((compiled.transfer_start_ns >= 0).sum())
        seconds = fastest(lambda p=problem, x=placement: simulate_schedule(p, x))
        rates.append(problem.n_operators / seconds)
        notes.append(f"{name}: {problem.n_operators} operators, {transfers} transfers, {rates[-1]:,.0f} operators/s")
    points = []
    for n in (100, 300, 1_000, 3_000, 10_000, 30_000):
        problem = _layered(n, 8)
        placement = _spread(problem)
        seconds = fastest(lambda p=problem, x=placement: simulate_schedule(p, x), repeats=3)
        compiled = fastest(lambda p=problem, x=placement: replay(p, x), repeats=3)
        points.append((n, n / seconds, n / compiled))
    curve("simpy", ("operators", "SimPy engine, operators/s", "compiled replay, operators/s"), points)
    value = min(rates)
    return Row("simpy", value, "operators/s", target, value >= 150_000, "random placement; " + "; ".join(notes))


def fat_tree(k: int) -> Cluster:
    """Return a fat tree of three tiers with k^3/4 devices at 100 Gbps and full bisection (Leiserson 1985).

    The k^2/4 core switches of the usual build from equal switches (Al-Fares et al. 2008) stand as one, and so do the
    k/2 aggregation switches of a pod: parallel links of equal-cost routes are one link of their summed bandwidth.
    """
    kind = DeviceType("unit", "gpu", 2**30, 1e9, {"float32": 1e9})
    half, rate = k // 2, 12.5e9
    devices, links, switches = [], [], ["core"]
    for p in range(k):
        switches.append(f"p{p}")
        links.append(Link(f"p{p}", (f"p{p}", "core"), rate * half * half, 500))
        for e in range(half):
            switches.append(f"p{p}e{e}")
            links.append(Link(f"p{p}e{e}", (f"p{p}", f"p{p}e{e}"), rate * half, 500))
            for h in range(half):
                name = f"p{p}e{e}h{h}"
                devices.append(Device(name, kind))
                links.append(Link(name, (name, f"p{p}e{e}"), rate, 500))
    return Cluster("fat tree", tuple(devices), tuple(links), tuple(switches))


def _flows(cluster: Cluster, flows: int, length: int) -> tuple[PlacementProblem, Placement]:
    """Return chains of transfers between random devices: ``flows`` of them are under way at any time."""
    rng = np.random.default_rng(1)
    route_class, classes, _ = route_classes(cluster)
    first = np.arange(flows)[:, None] * (length + 1) + np.arange(length)
    edges = np.stack([first.ravel(), first.ravel() + 1], axis=1)
    size = rng.integers(1, 2**20, len(edges))
    n, k = flows * (length + 1), len(cluster.devices)
    steps = rng.integers(1, k, (flows, length + 1))
    times = [latency + np.ceil(size * 1e9 / bandwidth).astype(np.int64) for latency, bandwidth in classes]
    problem = PlacementProblem(
        name="flows",
        operators=tuple(f"o{i}" for i in range(n)),
        operator_ns=np.zeros((n, 1), dtype=np.int64),
        weight_bytes=np.zeros(n, dtype=np.int64),
        devices=tuple(device.name for device in cluster.devices),
        device_type=np.zeros(k, dtype=np.int64),
        memory_bytes=np.full(k, UNLIMITED),
        edges=edges,
        edge_tensor=np.arange(len(edges)),
        tensor_bytes=size,
        route_class=route_class,
        transfer_ns=np.stack(times, axis=1),
        network="fair",
        cluster=cluster,
    )
    return problem, Placement(np.cumsum(steps, axis=1).ravel() % k)


def _flow_events_per_s(cluster: Cluster, flows: int, length: int, *, repeats: int = 3) -> float:
    problem, placement = _flows(cluster, flows, length)
    plan = make_plan(problem, placement)
    best = 0.0
    for _ in range(repeats):
        seen: list[object] = []
        engine = Engine(plan, on_operator=lambda _: None, on_transfer=seen.append)
        started = time.perf_counter()
        engine.submit(0)
        engine.run()
        best = max(best, 2 * len(seen) / (time.perf_counter() - started))
        if len(seen) != flows * length:
            raise ValueError(f"{len(seen)} flows ended instead of {flows * length}")
    return best


def _fair() -> Row:
    cluster = fat_tree(16)
    value = _flow_events_per_s(cluster, 1_000, 10)
    points = [(1_000, value)]
    points += [(flows, _flow_events_per_s(cluster, flows, 5_000 // flows)) for flows in (100, 300)]
    points += [(flows, _flow_events_per_s(cluster, flows, 1, repeats=1)) for flows in (3_000, 10_000)]
    curve("fair", ("concurrent flows", "flow events/s"), sorted(points))
    note = f"{len(cluster.devices)} devices, 1,000 flows at once; a start or an end is an event"
    return Row("fair", value, "flow events/s", ">= 20000", value >= 20_000, note)


def _million() -> Row:
    """Run in a process of its own, so that its peak memory is its own."""
    code = "from benchmarks.bench_simulation import million_once; million_once()"
    root = str(Path(__file__).resolve().parent.parent)
    points = []
    for n in (10_000, 100_000, 1_000_000):
        done = subprocess.run(
            [sys.executable, "-c", code, str(n)], capture_output=True, text=True, check=True, cwd=root,
            env={**os.environ, "PYTHONPATH": root},
        )  # fmt: skip
        points.append((n, *(float(word) for word in done.stdout.split())))
    curve("million", ("operators", "seconds", "peak GiB"), points)
    _, seconds, gib = points[-1]
    note = f"peak memory {gib:.2f} GiB (target: 4), 4,096 devices; problem, SimPy engine and all times as arrays"
    return Row("million", seconds, "s", "< 60 and 4 GiB", seconds < 60 and gib < 4, note)


def million_once() -> None:
    """Build and simulate the problem whose size stands on the command line; print seconds and peak GiB."""
    started = time.perf_counter()
    problem = _layered(int(sys.argv[1]), 4_096)
    schedule = simulate_schedule(problem, _spread(problem))
    if (schedule.operator_end_ns <= 0).any():
        raise ValueError("an operator never ran")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(time.perf_counter() - started, peak)


def _stream() -> Row:
    from moirai_sim.clusters.reader import read_cluster
    from moirai_sim.sources import load_problem

    problem = load_problem("zoo:resnet50", read_cluster("moirai-one-server"))
    order = problem.topological_order
    device = np.empty(problem.n_operators, dtype=np.int64)
    times = problem.operator_ns[order, problem.device_type[0]]
    share = (np.cumsum(times) - times) / max(1, times.sum())
    device[order] = np.minimum((share * 4).astype(np.int64), 3)  # four stages of equal work
    placement = Placement(device)
    points = []
    for requests in (100, 1_000, 10_000):
        started = time.perf_counter()
        service = serve(problem, placement, in_flight=8, requests=requests)
        points.append((requests, time.perf_counter() - started))
        if (service.done_ns < 0).any():
            raise ValueError("a request was never answered")
    curve("stream", ("requests", "seconds"), points)
    seconds = points[-1][1]
    note = f"{problem.n_operators} operators a request, network {problem.network}, 8 in flight"
    return Row("stream", seconds, "s", "< 30", seconds < 30, note)


BENCHMARKS: dict[str, Callable[[], Row]] = {"simpy": _simpy, "fair": _fair, "million": _million, "stream": _stream}
