"""The executor on Ray: the same placements, parts and checks, with actors for workers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moirai_sim.clusters.cluster import Cluster, Device, DeviceType
from moirai_sim.errors import InputError
from moirai_sim.execution.ray_workers import RayWorkers

ray = pytest.importorskip("ray")

ONE = Cluster("one", (Device("c0", DeviceType("core", "cpu", 2**33, 1e10, {"float32": 1e11}), address="cpu:0"),), ())


def run_script(text: str, folder: Path) -> str:
    """Run a script in an interpreter of its own, since Ray is started once in a process; return what it printed."""
    script = folder / "script.py"
    script.write_text(text)
    command = [sys.executable, "-W", "ignore", str(script), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from test_execution import Subject, cluster, load_order, network, random_device, read_model
from moirai_sim.execution.ray_workers import RayWorkers

model = network()
subject = Subject(model, read_model(model, name="net"))
with RayWorkers(cluster()) as crew:
    loaded = load_order(crew, subject, random_device(subject, 1), list(subject.graph.operators), in_flight=2)
    timeline = loaded.timeline(*loaded.run([0] * 6), request=5)
    worst = loaded.check(5)
    covered = sorted(name for span in timeline.spans for name in span.operators)
    assert covered == sorted(subject.graph.operators)
    assert {span.resource for span in timeline.spans if span.kind == "operator"} == {"c0", "c1"}
    assert all(span.start_ns >= 0 for span in timeline.spans)
    ends = {name: span.end_ns for span in timeline.spans for name in span.operators}
    transfers = [span for span in timeline.spans if span.kind == "transfer"]
    assert transfers
    error_ns = 2 * crew.clock_error_ns
    for span in transfers:
        assert span.start_ns >= ends[span.producer] - error_ns, "it was sent before it was there"
        assert span.start_ns <= span.end_ns
    print("worst", worst, "clock", crew.clock_error_ns)
    assert worst < 1e-5
"""


@pytest.mark.slow
def test_a_placement_runs_on_a_local_ray_cluster(tmp_path: Path):
    run_script(SCRIPT, tmp_path)


KILLED = """
import os
import signal
import sys
import threading
import time
sys.path.insert(0, sys.argv[1])
from test_execution import Subject, cluster, load_order, network, random_device, read_model
from moirai_sim.errors import ExecutionError
from moirai_sim.execution.ray_workers import RayWorkers
import ray

model = network()
subject = Subject(model, read_model(model, name="net"))
with RayWorkers(cluster()) as crew:
    loaded = load_order(crew, subject, random_device(subject, 2), list(subject.graph.operators))
    loaded.run()
    pids = [ray.get(actor.__ray_call__.remote(lambda _: os.getpid())) for actor in crew._actors.values()]
    threading.Timer(1.0, os.kill, (pids[1], signal.SIGKILL)).start()
    start = time.monotonic()
    try:
        loaded.run([0] * 1_000_000)
    except ExecutionError as error:
        took = time.monotonic() - start
        assert "worker 'c1' on Ray failed" in str(error), error
        assert took < 6, took
    else:
        raise AssertionError("nothing was noticed")
    try:
        loaded.run()
    except ExecutionError as error:
        assert "start new workers" in str(error), error
end = time.monotonic() + 5
while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < end:
    time.sleep(0.1)
assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
print("done")
"""


@pytest.mark.slow
def test_a_killed_actor_is_one_clear_error(tmp_path: Path):
    assert run_script(KILLED, tmp_path).endswith("done\n")


ELSEWHERE = """
import os
import sys
sys.path.insert(0, sys.argv[1])
from dataclasses import replace
import ray
from test_execution import CORES, cluster
from moirai_sim.errors import InputError
from moirai_sim.execution.ray_workers import RayWorkers

ray.init(include_dashboard=False, log_to_driver=False)
os.sched_setaffinity(0, CORES[:1])  # as on a master that is smaller than the machines of its cluster
with RayWorkers(cluster()) as crew:
    assert crew.call(["c1"], "unload", 0) == {"c1": None}
one = cluster(1)
try:
    RayWorkers(replace(one, devices=(replace(one.devices[0], address="cpu:100000"),)))
except InputError as error:
    assert "names core 100000" in str(error), error
else:
    raise AssertionError("a core that is nowhere was taken")
assert ray.is_initialized(), "it was running before"
ray.shutdown()
try:
    RayWorkers(replace(one, devices=(replace(one.devices[0], server="nowhere"),)))
except InputError as error:
    assert "no Ray node has the resource 'nowhere'" in str(error), error
assert not ray.is_initialized(), "what was started here is ended"
print("done")
"""


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_cores_are_those_of_the_machine_of_the_actor(tmp_path: Path):
    assert run_script(ELSEWHERE, tmp_path).endswith("done\n")


def test_ray_that_is_not_installed_is_wrong_input(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"moirai-sim\[ray\]"):
        RayWorkers(ONE)


@pytest.mark.parametrize("error", [ConnectionError("nobody"), RuntimeError("nobody"), SystemExit(15)])
def test_a_ray_cluster_that_does_not_answer_is_wrong_input(monkeypatch, error):
    def init(**_):
        raise error

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(InputError, match="no cluster answers at address 'auto'"):
        RayWorkers(ONE, "auto")
