"""The sweep of a device runs through on a CPU without the solvers, and a second run measures nothing again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moirai_sim.profiling.schema import read_profile

SWEEP = Path(__file__).parents[2] / "experiments" / "profiles" / "sweep.py"
BLOCKED = ("cvxpy", "simpy", "ortools", "highspy", "sklearn", "scipy", "onnx", "onnxruntime", "psutil", "pynvml",
           "numba", "pydantic", "typer", "rich")  # fmt: skip


def run(section, out):
    script = f"""
import sys, runpy
for name in {BLOCKED!r}:
    sys.modules[name] = None
sys.path.insert(0, {str(SWEEP.parent)!r})
sys.argv = ["sweep.py", "--device", "cpu:0", "--minutes", "0.01", "--section", {section!r}, "-o", {str(out)!r}]
runpy.run_path({str(SWEEP)!r}, run_name="__main__")
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=200)
    return json.loads((out / f"{section}.json").read_text())


def test_sections_run_without_the_solvers(tmp_path):
    pytest.importorskip("torch")
    assert run("limits", tmp_path)["sheet"]["memory_bandwidth_bytes_per_s"] > 0
    assert run("filling", tmp_path)["operators"] > 20
    assert run("filling", tmp_path)["operators"] == 0
    sums = run("real", tmp_path)["sums"]
    assert all(found["calls"] > 1 and found["not_timed"] == 0 and found["operators_s"] > 0 for found in sums.values())
    frame, _ = read_profile(tmp_path / "parts" / "filling-000.parquet")
    assert len(frame) > 20
    cases = run("placements", tmp_path)["rows"]
    for case in cases:
        assert "error" in case or all(found["right"] for found in case["placements"])
    assert any("placements" in case for case in cases)
