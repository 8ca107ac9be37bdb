"""Studies: a thousand runs, twice the workers, memory of the parent, two hundred scenarios, size of a report."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.row import Row, curve

POLICIES = ("single", "heft", "cpop", "met", "random")

RUN = """
import resource, sys, time
from pathlib import Path
from moirai_sim.studies.{kind} import {kind}
started = time.perf_counter()
summary = {kind}(Path(sys.argv[1]), Path(sys.argv[2]), jobs=int(sys.argv[3]))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(time.perf_counter() - started, peak, summary["failed"])
"""


def instance(seed: int) -> dict[str, object]:
    """Return a random layered network of 100 to 500 operators in the format of dnn-partitioning."""
    draw = random.Random(seed)
    operators = draw.randint(100, 500)
    nodes = [
        {
            "name": f"n{i}", "id": i, "supportedOnFpga": 1, "cpuLatency": draw.uniform(5, 20), "size": 1e6,
            "fpgaLatency": draw.uniform(1, 4), "isBackwardNode": False, "colorClass": i,
        }
        for i in range(operators)
    ]  # fmt: skip
    edges = [
        {"sourceId": j, "destId": i, "cost": draw.uniform(0.1, 1), "size": 1e5}
        for i in range(1, operators)
        for j in sorted({draw.randrange(max(0, i - 12), i) for _ in range(2)})
    ]
    return {"maxSizePerFPGA": 1e9, "maxFPGAs": 4, "maxCPUs": 2, "nodes": nodes, "edges": edges}


def _evaluate(runs: int, jobs: int, folder: Path, policies: tuple[str, ...] = POLICIES) -> tuple[float, float, int]:
    """Return seconds, peak bytes of the parent, and failed runs of a fresh evaluation."""
    models = runs // len(policies) // 2
    for seed in range(models):
        (folder / f"net{seed}.json").write_text(json.dumps(instance(seed)))
    study = folder / "study.yaml"
    names = ", ".join(f"net{seed}.json" for seed in range(models))
    study.write_text(f"kind: evaluate\nmodels: [{names}]\npolicies: [{', '.join(policies)}]\nseeds: [0, 1]\n")
    return _run("evaluate", study, folder / f"out-{jobs}", jobs)


def _run(kind: str, study: Path, out: Path, jobs: int) -> tuple[float, float, int]:
    command = [sys.executable, "-c", RUN.format(kind=kind), str(study), str(out), str(jobs)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(printed[0]), float(printed[1]), int(printed[2])


def evaluate_1000() -> Row:
    """1,000 runs of 100-500 operators with heuristics, two workers; failed runs count against it."""
    with tempfile.TemporaryDirectory() as folder:
        seconds, _, failed = _evaluate(1000, 2, Path(folder))
    return Row("evaluate-1000", seconds, "s", "at most 300", seconds <= 300 and not failed, f"{failed} failed")


def evaluate_speed_up() -> Row:
    """Speed of two workers over one, on the same 1,000 runs; starting workers counts."""
    with tempfile.TemporaryDirectory() as folder:
        one, _, _ = _evaluate(1000, 1, Path(folder), ("m-sct", "getf"))
        two, _, _ = _evaluate(1000, 2, Path(folder), ("m-sct", "getf"))
    note = f"1,000 runs of m-sct and getf, {one:.1f} s over {two:.1f} s"
    return Row("evaluate-speed-up", one / two, "ratio", "at least 1.7", one / two >= 1.7, note)


def evaluate_memory() -> Row:
    """Growth of the parent's memory from 100 to 1,000 runs, with the curve between."""
    points = []
    for runs in (100, 300, 1000):
        with tempfile.TemporaryDirectory() as folder:
            seconds, peak, _ = _evaluate(runs, 2, Path(folder))
            points.append((runs, seconds, peak / 2**20))
    curve("evaluate", ("runs", "seconds", "parent MiB"), points)
    growth = points[-1][2] / points[0][2]
    return Row("evaluate-memory", growth, "ratio", "at most 1.1", growth <= 1.1, "parent's peak, 1,000 over 100 runs")


def evaluate_kills() -> Row:
    """SIGKILL of the parent and its workers at twenty random moments; then the bytes of an undisturbed evaluation."""
    draw = random.Random(7)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole, _, _ = _evaluate(1000, 2, folder)
        calm, stormy = folder / "out-2", folder / "out-killed"
        command = [sys.executable, "-c", RUN.format(kind="evaluate"), str(folder / "study.yaml"), str(stormy), "2"]
        kills, left = 0, []
        while kills < 20:
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
            )
            try:
                process.wait(draw.uniform(0, 0.45 * whole))
                break  # done before twenty kills: too few runs for this machine, and the row says so
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
                left.append(len(list(stormy.glob("results/*.json"))))
        _run("evaluate", folder / "study.yaml", stormy, 2)
        same = _results(stormy) == _results(calm)
    note = f"equal bytes: {same}; results there after each kill: {' '.join(map(str, left))}"
    return Row("evaluate-kills", float(kills), "kills", "20, then the same bytes", kills == 20 and same, note)


def _results(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / "results").iterdir()}


def whatif_200() -> Row:
    """A what-if of 200 scenarios on GPT-3 13B over 16 devices, two workers."""
    gbps = [f"{10 * i} Gbps" for i in range(1, 21)]
    nvlink = [f"{60 * i} GB/s" for i in range(1, 11)]
    cluster = {
        "name": "sixteen",
        "servers": [
            {
                "name": "node",
                "count": 2,
                "devices": [{"name": "gpu", "device": "nvidia-a100-sxm-80gb", "count": 8}],
                "switches": ["nvswitch"],
                "links": [{"name": "nvlink", "ends": ["gpu", "nvswitch"], "bandwidth": "300 GB/s", "latency": "1 us"}],
            }
        ],
        "links": [
            {"name": "wire", "ends": ["node0.nvswitch", "node1.nvswitch"], "bandwidth": "200 Gbps", "latency": "3 us"}
        ],
    }
    study = {
        "kind": "whatif",
        "models": ["zoo:gpt3-13b"],
        "cluster": "sixteen.yaml",
        "policy": "heft",
        "overrides": {
            "wire": {"links.wire.bandwidth": gbps},
            "nvlink": {"servers.node.links.nvlink.bandwidth": nvlink},
        },
        "scenarios": {"both": ["wire", "nvlink"]},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "sixteen.yaml").write_text(json.dumps(cluster))
        (folder / "study.yaml").write_text(json.dumps(study))
        seconds, _, failed = _run("whatif", folder / "study.yaml", folder / "out", 2)
    return Row(
        "whatif-200", seconds, "s", "at most 180", seconds <= 180 and not failed, f"201 variants, {failed} failed"
    )


def report_1000() -> Row:
    """Size of the report of 1,000 runs, and in the note the time to write it."""
    from moirai_sim.studies.report import report

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _evaluate(1000, 2, folder)
        started = time.perf_counter()
        report(folder / "out-2", folder / "report.html")
        seconds = time.perf_counter() - started
        size = (folder / "report.html").stat().st_size / 1e6
    return Row("report-1000", size, "MB", "below 15", size < 15, f"written in {seconds:.1f} s")


BENCHMARKS: dict[str, Callable[[], Row]] = {
    "evaluate-1000": evaluate_1000,
    "evaluate-speed-up": evaluate_speed_up,
    "evaluate-memory": evaluate_memory,
    "evaluate-kills": evaluate_kills,
    "whatif-200": whatif_200,
    "report-1000": report_1000,
}
