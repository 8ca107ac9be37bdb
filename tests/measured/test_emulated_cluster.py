"""Workers in network namespaces: real bytes over real slow links, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from onnx import TensorProto, helper

import moirai_sim.execution.namespaces as namespaces_module
import moirai_sim.execution.workers as workers_module
from moirai_sim.clusters.cluster import Cluster, Device, DeviceType, Link
from moirai_sim.errors import ExecutionError, InputError
from moirai_sim.execution.carrying import CarryingTimer, carrying
from moirai_sim.execution.measure import Subject, load_order, typical_ns
from moirai_sim.execution.namespaces import check_emulated, connect, kernel_delays, why_not
from moirai_sim.execution.workers import Workers, device_cores
from moirai_sim.graphs.onnx_reader import read_model
from moirai_sim.placement import Placement
from moirai_sim.simulation.engine import simulate
from moirai_sim.sources import build_problem

CORES = sorted(os.sched_getaffinity(0))
CORE = DeviceType("core", "cpu", 2**33, 1e10, {"float32": 1e11})
RATE = 25e6
"""Bytes per second: 200 Mbit/s."""
SIZE = 2**20
HOPS = 4

pytestmark = [pytest.mark.root, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


def star(count: int = 3) -> Cluster:
    devices = tuple(Device(f"m{i}", CORE, address=f"netns:{CORES[i % len(CORES)]}") for i in range(count))
    links = tuple(Link(f"l{i}", (f"m{i}", "hub"), RATE) for i in range(count))
    return Cluster("star", devices, links, switches=("hub",))


def delayed(latency_ns: int) -> Cluster:
    plain = star()
    return replace(plain, links=tuple(replace(link, latency_ns=latency_ns) for link in plain.links))


def chain(size: int = SIZE) -> Subject:
    nodes = [helper.make_node("Neg", [f"t{i}"], [f"t{i + 1}"], name=f"n{i}") for i in range(HOPS + 1)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [size // 4]) for name in ("t0", f"t{HOPS + 1}")]
    model = helper.make_model(
        helper.make_graph(nodes, "chain", ends[:1], ends[1:]),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=10,
    )
    return Subject(model, read_model(model, name="chain"))


def namespaces() -> set[str]:
    return {str(path.readlink()) for path in Path("/proc").glob("[0-9]*/ns/net") if os.access(path, os.R_OK)}


def test_tensors_cross_the_links_at_their_rate_and_arrive_whole():
    subject = chain()
    device = {f"n{i}": f"m{i % 3}" for i in range(HOPS + 1)}
    with Workers(star()) as crew:
        assert crew.shares_cores == (len(CORES) < 3)
        assert crew.apart == crew.names[: len(CORES)]
        loaded = load_order(crew, subject, device, list(subject.graph.operators))
        loaded.run()
        assert loaded.check() == 0
        assert loaded.run_hot()
        timeline = loaded.timeline(*loaded.run())
    transfers = [span for span in timeline.spans if span.kind == "transfer"]
    assert [(span.source, span.target, span.bytes) for span in transfers] == [
        (device[f"n{i}"], device[f"n{i + 1}"], SIZE) for i in range(HOPS)
    ]
    at_full_rate = HOPS * SIZE / RATE * 1e9
    assert timeline.makespan_ns > 0.9 * at_full_rate, "the links are not slowed down"


def test_small_tensors_have_no_start_on_links_that_were_idle():
    """A bucket of tokens that fills up meanwhile would let the first packets pass at any rate."""
    size = 2**16
    subject = chain(size)
    device = {f"n{i}": f"m{i % 3}" for i in range(HOPS + 1)}
    with Workers(star()) as crew:
        loaded = load_order(crew, subject, device, list(subject.graph.operators))
        runs = [loaded.timeline(*loaded.run()) for _ in range(5)]
    transfers = [span.end_ns - span.start_ns for run in runs for span in run.spans if span.kind == "transfer"]
    assert np.median(transfers) > 0.6 * size / RATE * 1e9


@pytest.mark.parametrize("by_kernel", [False, True])
def test_tensors_arrive_later_by_the_latency_of_their_links_and_the_simulator_knows(by_kernel, monkeypatch):
    if by_kernel and not kernel_delays():
        pytest.skip("this kernel has no netem")
    monkeypatch.setattr(namespaces_module, "kernel_delays", lambda: by_kernel)
    subject, cluster = chain(), delayed(30_000_000)
    device = {f"n{i}": f"m{i % 3}" for i in range(HOPS + 1)}
    with Workers(cluster) as crew:
        loaded = load_order(crew, subject, device, list(subject.graph.operators))
        loaded.run()
        assert loaded.check() == 0
        measured = loaded.timeline(*loaded.run())
    under_way = HOPS * (2 * 30e6 + SIZE / RATE * 1e9)
    assert measured.makespan_ns > 0.9 * under_way, "the links are not delayed"
    transfers = [span.end_ns - span.start_ns for span in measured.spans if span.kind == "transfer"]
    assert sum(transfers) > 0.9 * under_way, "a transfer lasts from its sending on"
    problem = build_problem(subject.graph, cluster)
    where = np.array([problem.devices.index(device[name]) for name in problem.operators])
    predicted = simulate(problem, Placement(where))
    assert sum(span.end_ns - span.start_ns for span in predicted.spans if span.kind == "transfer") == pytest.approx(
        under_way, rel=1e-6
    )


def test_a_core_that_sends_or_receives_computes_less_meanwhile():
    with Workers(star(2)) as workers, closing(CarryingTimer(workers, "m0", "m1")) as timer:
        rounds = [timer.time(0.05) for _ in range(3)]
    found = carrying(rounds, quiet=True)
    assert 0.1 < sum(found) < 50, "nanoseconds a byte: no machine moves one for nothing, and none takes so long"
    lasted = typical_ns([one["sends: for"] for one in rounds])
    assert lasted == pytest.approx(6 * 2**17 / RATE * 1e9, rel=0.15), "as long as the link takes for the bytes"


def test_emulated_machines_share_cores_where_there_are_too_few():
    devices = [Device(f"m{i}", CORE, address=f"netns:{i}") for i in range(2 * len(CORES))]
    assert [device_cores(device) for device in devices] == [(core,) for core in CORES * 2]
    with pytest.raises(InputError, match="names core"):
        device_cores(Device("c", CORE, address=f"cpu:{max(CORES) + 1}"))


@pytest.mark.parametrize("end", ["closed", "killed worker"])
def test_no_namespace_is_left(end):
    before = namespaces()
    crew = Workers(star())
    processes = crew.processes
    assert len(namespaces() - before) == 4
    if end == "closed":
        crew.close()
    else:
        os.kill(processes["m1"], signal.SIGKILL)
        subject = chain()
        with pytest.raises(ExecutionError, match="'m1'"):
            load_order(crew, subject, {f"n{i}": f"m{i % 3}" for i in range(HOPS + 1)}, list(subject.graph.operators))
    assert not any(psutil.pid_exists(pid) for pid in processes.values())
    deadline = time.monotonic() + 5
    while namespaces() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not namespaces() - before


def test_links_wait_until_their_processes_are_in_their_namespaces():
    late = ["sh", "-c", "sleep 0.2; exec unshare --net sleep 60"]
    cluster = replace(star(2), links=(Link("l", ("m0", "m1"), RATE),), switches=())
    with ExitStack() as stack:
        processes = {device.name: stack.enter_context(subprocess.Popen(late)) for device in cluster.devices}
        try:
            pids = {name: process.pid for name, process in processes.items()}
            assert set(connect(cluster, pids)) == {"m0", "m1"}
            ended = processes["m1"]
            ended.kill()
            ended.wait()
            with pytest.raises(ExecutionError, match="process of 'm1' did not enter"):
                connect(cluster, pids)
        finally:
            for process in processes.values():
                process.kill()


def test_no_namespace_outlives_a_killed_master():
    before = namespaces()
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_emulated_cluster import Workers, star\n"
        "import time\n"
        "crew = Workers(star()); print('up', flush=True); time.sleep(60)\n"
    )
    import sys

    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as master:
        assert master.stdout is not None
        assert master.stdout.readline() == "up\n"
        assert len(namespaces() - before) == 4
        master.kill()
    deadline = time.monotonic() + 5
    while namespaces() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not namespaces() - before


@pytest.mark.parametrize("stage", ["running", "resting"])
def test_a_killed_machine_is_one_clear_error(stage):
    subject = chain(2**16)
    device = {f"n{i}": f"m{i % 3}" for i in range(HOPS + 1)}
    with Workers(star()) as crew:
        processes = crew.processes
        loaded = load_order(crew, subject, device, list(subject.graph.operators))
        loaded.run()
        killer = threading.Timer(0.3, os.kill, (processes["m1"], signal.SIGKILL))
        killer.start()
        start = time.monotonic()
        with pytest.raises(ExecutionError, match="worker 'm1' was killed by signal 9"):
            if stage == "running":
                loaded.run([0] * 10_000)
            else:
                loaded.run_hot(patience_s=0, rest_ns=3_000_000_000)
        assert time.monotonic() - start < 5
        assert not any(psutil.pid_exists(pid) for pid in processes.values())


def test_slow_links_are_no_hang(monkeypatch):
    """What arrives is work, though it needs less processor time than the system counts."""
    rate = 50e3
    slow = star(2)
    slow = replace(slow, links=tuple(replace(link, bandwidth_bytes_per_s=rate) for link in slow.links))
    subject = chain(2**17)
    with Workers(slow) as crew:
        loaded = load_order(
            crew, subject, {f"n{i}": f"m{int(i > 2)}" for i in range(HOPS + 1)}, list(subject.graph.operators)
        )
        monkeypatch.setattr(workers_module, "PATIENCE_S", 1.0)
        start = time.monotonic()
        loaded.run()
        assert time.monotonic() - start > 0.5 * 2**17 / rate
        assert loaded.check() == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"links": (Link("half", ("m0", "hub"), RATE, duplex="half"), *star(3).links[1:])}, "'half' is half duplex"),
        (
            {
                "switches": ("hub", "a", "b"),
                "links": (
                    *star(3).links,
                    *(Link(x + y, (x, y), RATE) for x, y in (("hub", "a"), ("a", "b"), ("b", "hub"))),
                ),
            },
            "switches .* form a cycle",
        ),
        (
            {"switches": ("hub", "a"), "links": (*star(3).links, *(Link(n, ("hub", "a"), RATE) for n in "xy"))},
            "switches .* form a cycle",
        ),
        (
            {"devices": (replace(star(3).devices[0], address="cpu:0"), *star(3).devices[1:])},
            "'m0': address 'cpu:0' is none",
        ),
    ],
)
def test_what_cannot_be_emulated_is_refused(change, said):
    with pytest.raises(InputError, match=said):
        check_emulated(replace(star(), **change))


def test_a_tree_of_switches_is_no_cycle():
    tree = star()
    check_emulated(
        replace(
            tree,
            switches=("hub", "a", "b"),
            links=(*tree.links, Link("x", ("hub", "a"), RATE), Link("y", ("a", "b"), RATE)),
        )
    )


def test_a_device_of_two_links_is_refused():
    ring = star()
    with pytest.raises(InputError, match="'m0' has 2 links"):
        check_emulated(replace(ring, links=(*ring.links, Link("extra", ("m0", "m1"), RATE))))
