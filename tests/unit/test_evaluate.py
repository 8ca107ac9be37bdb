"""Batch evaluation: complete, resumable after any kill, and the same bytes however it was run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moirai_sim.errors import InputError
from moirai_sim.studies.evaluate import evaluate
from moirai_sim.studies.store import Store

RUN = "import sys; from pathlib import Path; from moirai_sim.studies.evaluate import evaluate; "
RUN += "evaluate(Path(sys.argv[1]), Path(sys.argv[2]), jobs=1)"


def _instance(seed, operators=12):
    """A random layered instance in the format of dnn-partitioning."""
    draw = random.Random(seed)
    nodes = [
        {
            "name": f"n{i}", "id": i, "supportedOnFpga": 1, "cpuLatency": draw.uniform(5, 20), "size": 10.0,
            "fpgaLatency": draw.uniform(1, 4), "isBackwardNode": False, "colorClass": i,
        }
        for i in range(operators)
    ]  # fmt: skip
    edges = [{"sourceId": draw.randrange(i), "destId": i, "cost": 0.5, "size": 100.0} for i in range(1, operators)]
    return {"maxSizePerFPGA": 1000.0, "maxFPGAs": 2, "maxCPUs": 1, "nodes": nodes, "edges": edges}


@pytest.fixture
def study(tmp_path):
    for seed in range(3):
        (tmp_path / f"net{seed}.json").write_text(json.dumps(_instance(seed)))
    path = tmp_path / "study.yaml"
    path.write_text(
        "kind: evaluate\nmodels: [net0.json, net1.json, net2.json]\n"
        "policies: [single, heft, random]\nseeds: [0, 1, 2, 3]\n"
    )
    return path


def _bytes(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "results").iterdir())}


def test_every_combination_has_a_result_and_a_second_call_does_nothing(study, tmp_path):
    first = evaluate(study, tmp_path / "out", jobs=1)
    assert first == {"study": "study", "runs": 36, "failed": 0, "resumed": 0}
    before = _bytes(tmp_path / "out")
    assert len(before) == 36
    assert evaluate(study, tmp_path / "out", jobs=1)["resumed"] == 36
    assert _bytes(tmp_path / "out") == before


def test_instances_run_on_their_own_devices_and_models_on_named_clusters(study, tmp_path):
    study.write_text(
        "kind: evaluate\nmodels: [net0.json, 'zoo:ws-32?seed=1']\nclusters: [null, diviml-server]\npolicies: [single]\n"
    )
    assert evaluate(study, tmp_path / "out", jobs=1)["failed"] == 0
    ran = {(Path(r["key"]["model"]).name, r["key"]["cluster"]) for r in Store(tmp_path / "out").read()}
    assert ran == {("net0.json", None), ("zoo:ws-32?seed=1", "diviml-server")}


def test_a_study_without_a_run_is_refused(study, tmp_path):
    head = "kind: evaluate\npolicies: [single]\n"
    for rest, message in (
        ("models: [net0.json]\nclusters: [diviml-server]\n", "brings its own devices"),
        ("models: ['zoo:ws-32']\n", "needs devices to run on"),
        ("models: [net0.json]\nexclude: [{}]\n", "nothing to run"),
    ):
        study.write_text(head + rest)
        with pytest.raises(InputError, match=message):
            evaluate(study, tmp_path / "out", jobs=1)
    assert not (tmp_path / "out").exists()


def test_workers_make_no_difference(study, tmp_path):
    evaluate(study, tmp_path / "one", jobs=1)
    evaluate(study, tmp_path / "two", jobs=2)
    assert _bytes(tmp_path / "one") == _bytes(tmp_path / "two")


def test_ray_makes_no_difference(study, tmp_path):
    pytest.importorskip("ray", reason="needs the extra 'ray'")
    evaluate(study, tmp_path / "here", jobs=1)
    code = RUN.replace("jobs=1", "ray='local'")
    subprocess.run([sys.executable, "-c", code, str(study), str(tmp_path / "ray")], check=True, capture_output=True)
    assert _bytes(tmp_path / "ray") == _bytes(tmp_path / "here")


def test_failures_are_results_and_run_again_on_request(study, tmp_path, cli):
    study.write_text(study.read_text().replace("heft", "milp") + "objectives: [throughput]\n")
    summary = evaluate(study, tmp_path / "out", jobs=1)
    assert (summary["runs"], summary["failed"]) == (36, 12)
    errors = {r["outcome"]["error"] for r in Store(tmp_path / "out").read() if r["outcome"]["status"] == "error"}
    assert len(errors) == 1
    (error,) = errors
    assert "minimises latency only" in error
    answer = cli("evaluate", study, "-o", tmp_path / "out", "--jobs", 1, "--json")
    assert answer.code == 1
    assert json.loads(answer.out)["resumed"] == 36
    assert f"{error} (12 of 12 failures)" in answer.err
    assert evaluate(study, tmp_path / "out", jobs=1, retry_failed=True)["resumed"] == 24


def test_killed_at_random_moments_it_ends_with_the_same_bytes(study, tmp_path):
    evaluate(study, tmp_path / "calm", jobs=1)
    calm = _bytes(tmp_path / "calm")
    draw = random.Random(7)
    stormy = tmp_path / "stormy"
    interrupted = 0
    for _ in range(5):
        started = len(list(stormy.glob("results/*.json")))
        process = subprocess.Popen([sys.executable, "-c", RUN, str(study), str(stormy)], start_new_session=True)
        wanted = started + draw.randrange(1, 6)
        deadline = time.monotonic() + 60
        while process.poll() is None and len(list(stormy.glob("results/*.json"))) < wanted:
            assert time.monotonic() < deadline
            time.sleep(draw.uniform(0, 0.002))
        if process.poll() is None:
            interrupted += 1
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert interrupted
    (stormy / "results" / ".half.json.x1").write_text("{")  # what a kill in the middle of a write leaves
    resumed = evaluate(study, stormy, jobs=1)["resumed"]
    assert resumed > 0
    assert _bytes(stormy) == calm


def test_a_folder_keeps_one_kind_of_study(study, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "study.json").write_text('{"kind": "whatif"}')
    with pytest.raises(InputError, match="kind 'whatif'"):
        evaluate(study, tmp_path / "out", jobs=1)


def test_a_file_that_changed_is_read_again(study, tmp_path):
    evaluate(study, tmp_path / "out", jobs=1)
    (tmp_path / "net1.json").write_text(json.dumps(_instance(7)))
    again = evaluate(study, tmp_path / "out", jobs=1)
    assert again["resumed"] == 24
    fresh = evaluate(study, tmp_path / "fresh", jobs=1)
    assert fresh["failed"] == 0
    assert _bytes(tmp_path / "fresh").items() <= _bytes(tmp_path / "out").items()
