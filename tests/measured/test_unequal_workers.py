"""Two devices of different speed on one machine: ONNX Runtime runs one, PyTorch the other."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from moirai_sim.clusters.cluster import Cluster
from moirai_sim.clusters.local import TORCH_SUFFIX
from moirai_sim.clusters.reader import read_cluster
from moirai_sim.errors import InputError
from moirai_sim.execution.cuts import InPlace
from moirai_sim.execution.measure import Subject, load_order
from moirai_sim.execution.workers import Workers
from moirai_sim.graphs.onnx_reader import read_model
from moirai_sim.profiling.cpu import device_type_name
from moirai_sim.profiling.operators import profile_operators
from moirai_sim.sources import build_problem
from moirai_sim.studies.validate import validate

CORES = sorted(os.sched_getaffinity(0))
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch is not installed; pip install 'moirai-sim[torch]'"
)


def network(blocks: int = 3) -> onnx.ModelProto:
    """Convolutions in two branches a block; random weights, so that wrong wiring changes the output."""
    rng = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for b in range(blocks):
        for side in "lr":
            weight = (rng.standard_normal((16, 16, 3, 3)) / 12).astype(np.float32)
            weights.append(numpy_helper.from_array(weight, f"w{b}{side}"))
            nodes.append(
                helper.make_node("Conv", [last, f"w{b}{side}"], [f"c{b}{side}"], f"conv{b}{side}", pads=[1] * 4)
            )
            nodes.append(helper.make_node("Relu", [f"c{b}{side}"], [f"r{b}{side}"], f"relu{b}{side}"))
        nodes.append(helper.make_node("Add", [f"r{b}l", f"r{b}r"], [f"a{b}"], f"add{b}"))
        last = f"a{b}"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 16, 12, 12]) for name in ("x", last)]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


@pytest.fixture
def cluster_file(tmp_path: Path) -> Path:
    path = tmp_path / "unequal.yaml"
    path.write_text(
        "name: unequal\ndevices:\n"
        f"  - {{name: fast, device: local-core, address: 'cpu:{CORES[0]}'}}\n"
        f"  - {{name: slow, device: local-core, backend: torch, address: 'cpu:{CORES[-1]}'}}\n"
        "links:\n  - {ends: [fast, slow], bandwidth: 4 GB/s, latency: 20 us}\n"
    )
    return path


@pytest.fixture
def cluster(cluster_file: Path) -> Cluster:
    return read_cluster(cluster_file)


@pytest.fixture
def subject() -> Subject:
    return Subject(network(), read_model(network(), name="net"))


def test_the_backend_makes_another_device_type(cluster, subject):
    problem = build_problem(subject.graph, cluster)
    assert len(set(problem.device_type.tolist())) == 2
    assert problem.colocation is not None, "what ONNX Runtime fuses stays together on both devices"


@needs_torch
@pytest.mark.parametrize("seed", range(3))
def test_parts_of_both_backends_make_the_unsplit_model(cluster, subject, seed):
    order = list(subject.graph.operators)
    rng = np.random.default_rng(seed)
    device = {name: ("fast", "slow")[k] for name, k in zip(order, rng.integers(0, 2, len(order)), strict=True)}
    with Workers(cluster) as crew:
        loaded = load_order(crew, subject, device, order, in_flight=2)
        assert {part.device for part in loaded.parts} == {"fast", "slow"}
        loaded.run([0] * 6)
        assert loaded.check(4) < 1e-4
        assert loaded.check(5) < 1e-4


@needs_torch
def test_each_device_is_timed_by_itself(cluster, subject):
    with Workers(cluster) as crew:
        in_place = InPlace(crew, subject, {name: name for name in crew.names})
        in_place.round()
        cuts = {name: in_place.cuts(name) for name in crew.names}
    for one in cuts.values():
        assert sum(one.operator_ns.values()) == pytest.approx(one.whole_ns, rel=0.01)
    assert cuts["fast"].operator_ns != cuts["slow"].operator_ns


@needs_torch
def test_an_operator_that_pytorch_cannot_run_is_one_clear_error(cluster):
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])]
    ends.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, [4]))
    graph = helper.make_graph([helper.make_node("Acos", ["x"], ["y"], "acos")], "g", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    subject = Subject(model, read_model(model, name="g"))
    with (
        Workers(cluster) as crew,
        pytest.raises(InputError, match=r"device 'slow': .*the operator Acos here; place it on another device"),
    ):
        load_order(crew, subject, {"acos": "slow"}, ["acos"])


def test_a_backend_that_is_missing_or_unknown_is_an_input_error(cluster, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"device 'slow': backend 'torch' needs PyTorch; pip install"):
        Workers(cluster)
    odd = replace(cluster, devices=(replace(cluster.devices[0], backend="tensorflow"), *cluster.devices[1:]))
    with pytest.raises(InputError, match="device 'fast': no backend 'tensorflow'"):
        Workers(odd)


@needs_torch
def test_a_study_runs_on_unequal_workers(cluster_file, tmp_path):
    onnx.save(network(), tmp_path / "net.onnx")
    study = tmp_path / "study.yaml"
    study.write_text(
        f"kind: validate\nname: small\nmodels: [net.onnx]\nclusters: [{cluster_file.name}]\npolicies: [heft]\n"
        "random_placements: 1\nbad_placements: 1\ncalibrate: null\nrepeats: 3\n"
    )
    found = validate(study, tmp_path / "out")
    assert found["failed"] == 0
    assert found["summary"]["cases"] == 3


@needs_torch
def test_pytorch_is_profiled_under_a_name_of_its_own(cluster, tmp_path):
    onnx.save(network(1), tmp_path / "net.onnx")
    frame = profile_operators([tmp_path / "net.onnx"], f"cpu:{CORES[-1]}", backend="torch", budget_s=0.5)
    assert set(frame["backend"]) == {"torch"}
    assert set(frame["device"]) == {device_type_name() + TORCH_SUFFIX}
    assert cluster.device["slow"].type.name.endswith(TORCH_SUFFIX)
