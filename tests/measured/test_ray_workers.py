"""The executor on Ray: the same placements, parts and checks, with actors for workers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray")

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
    print("worst", worst, "clock", crew.clock_error_ns)
    assert worst < 1e-5
"""


@pytest.mark.slow
def test_a_placement_runs_on_a_local_ray_cluster(tmp_path: Path):
    script = tmp_path / "on_ray.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-W", "ignore", str(script), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-2000:]
