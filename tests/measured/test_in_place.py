"""A model timed on its workers, placed, simulated and run: the commands, one after the other."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two devices need two cores")
def test_what_is_timed_in_place_foretells_what_a_placement_takes(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    count, size = 24, 256
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.standard_normal((size, size)).astype(np.float32) / size, f"w{i}")
        for i in range(count)
    ]
    nodes = [helper.make_node("MatMul", [f"t{i}", f"w{i}"], [f"t{i + 1}"], name=f"mm{i}") for i in range(count)]
    ends = [helper.make_tensor_value_info(f"t{i}", TensorProto.FLOAT, [size, size]) for i in (0, count)]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), "chain.onnx")
    options = ("chain.onnx", "--cluster", "local-cpu")
    found = json.loads(cli("profile", "in-place", *options, "-o", "times.json", "--json").out)
    assert found == json.loads(Path("times.json").read_text())
    for device in found["devices"]:
        assert sum(device["operator_ns"].values()) == pytest.approx(device["whole_ns"], rel=1e-3)
        assert set(device["operator_ns"]) == {f"mm{i}" for i in range(count)}
    assert cli("place", *options, "--in-place", "times.json", "--policy", "random", "-o", "placed.json").code == 0
    assert len(set(json.loads(Path("placed.json").read_text())["placement"].values())) > 1
    shared = (*options, "--placement", "placed.json", "--json")
    simulated = json.loads(cli("simulate", *shared, "--in-place", "times.json").out)
    measured = json.loads(cli("measure", *shared, "-o", "measured.json").out)
    # Wide enough for a machine that others keep busy.
    assert 0.6 < simulated["makespan_ns"] / measured["makespan_ns"] < 1.6
