"""A CPU and a GPU in one placement. Where no GPU is, PyTorch on the CPU copies tensors as if its memory were apart."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from moirai_sim.clusters.cluster import Cluster, Device, DeviceType, Link
from moirai_sim.errors import InputError
from moirai_sim.execution import workers as workers_module
from moirai_sim.execution.backends import HOST, _Torch
from moirai_sim.execution.cuts import InPlace
from moirai_sim.execution.measure import Subject, load_order
from moirai_sim.execution.worker import _Loaded
from moirai_sim.execution.workers import Workers, device_cores, shared_cores, worker_cores
from moirai_sim.graphs.onnx_reader import read_model

CORES = sorted(os.sched_getaffinity(0))
CORE = DeviceType("core", "cpu", 2**33, 1e10, {"float32": 1e11})
CARD = DeviceType("card", "gpu", 2**33, 1e12, {"float32": 1e13})
HAS_TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="PyTorch is not installed; pip install 'moirai-sim[torch]'")

APART = """
import sys
from moirai_sim.execution import torch_place, worker

class Apart(torch_place.TorchPlace):
    def __init__(self, name):
        super().__init__("cpu", apart=name.startswith("cuda"))

torch_place.TorchPlace = Apart
worker.main(sys.argv[1:])
"""
"""A worker whose GPU is PyTorch on the CPU."""


def cluster(*addresses: str) -> Cluster:
    devices = tuple(
        Device(f"d{i}", CARD, backend="torch", address=address)
        if address.startswith("cuda")
        else Device(f"d{i}", CORE, address=address)
        for i, address in enumerate(addresses)
    )
    links = tuple(Link(f"l{i}", ("d0", f"d{i}"), 1e10, 1000) for i in range(1, len(devices)))
    return Cluster("mixed", devices, links)


def network(blocks: int = 3) -> onnx.ModelProto:
    """Two branches a block, added, and the block before added again: tensors with readers on both sides."""
    rng = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for b in range(blocks):
        for side in "lr":
            weight = (rng.standard_normal((8, 8, 3, 3)) / 8).astype(np.float32)
            weights.append(numpy_helper.from_array(weight, f"w{b}{side}"))
            nodes.append(
                helper.make_node("Conv", [last, f"w{b}{side}"], [f"c{b}{side}"], f"conv{b}{side}", pads=[1] * 4)
            )
        nodes.append(helper.make_node("Add", [f"c{b}l", f"c{b}r"], [f"s{b}"], f"sum{b}"))
        nodes.append(helper.make_node("Add", [f"s{b}", last], [f"a{b}"], f"add{b}"))
        last = f"a{b}"
    shape = [1, 8, 10, 10]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", last, "s0")]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(network(), read_model(network(), name="net"))


def mixed(subject: Subject, seed: int, devices: int = 2) -> dict[str, str]:
    rng = np.random.default_rng(seed)
    return {name: f"d{rng.integers(devices)}" for name in subject.graph.operators}


def check_both(subject: Subject, seed: int) -> None:
    """Run a placement over a CPU and a GPU, single requests and several at once."""
    with Workers(cluster(f"cpu:{CORES[0]}", "cuda:0")) as crew:
        loaded = load_order(crew, subject, mixed(subject, seed), list(subject.graph.operators), in_flight=2)
        assert {part.device for part in loaded.parts} == {"d0", "d1"}
        assert loaded.run_hot()
        assert loaded.check() < 1e-4
        loaded.run([0] * 6)
        assert loaded.check(4) < 1e-4
        assert loaded.check(5) < 1e-4
        loaded.close()


@needs_torch
@pytest.mark.parametrize("seed", range(3))
def test_parts_in_memory_apart_make_the_unsplit_model(subject, seed, monkeypatch):
    monkeypatch.setattr(workers_module, "_START", APART)
    check_both(subject, seed)


@pytest.mark.gpu
@needs_torch
@pytest.mark.parametrize("seed", range(3))
def test_parts_on_a_gpu_make_the_unsplit_model(subject, seed):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no GPU")
    check_both(subject, seed)


@pytest.mark.gpu
@needs_torch
def test_memory_between_devices_is_locked_for_the_gpu(subject):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no GPU")
    from moirai_sim.execution.backends import HostMemory
    from moirai_sim.execution.torch_place import TorchPlace

    memory = HostMemory().new(1 << 20)
    unpin = TorchPlace("cuda:0").pin(memory)
    assert torch.from_numpy(memory).is_pinned()
    unpin()
    assert not torch.from_numpy(memory).is_pinned()


@needs_torch
def test_operators_are_timed_in_memory_apart(subject, monkeypatch):
    monkeypatch.setattr(workers_module, "_START", APART)
    with Workers(cluster(f"cpu:{CORES[0]}", "cuda:0")) as crew:
        in_place = InPlace(crew, subject, {"d0": "d0", "d1": "d1"}, patience_s=0.0)
        in_place.round()
        cuts = in_place.cuts("d1")
    assert sum(cuts.operator_ns.values()) == pytest.approx(cuts.whole_ns, rel=0.01)


@needs_torch
def test_only_what_crosses_is_copied_and_only_once(subject):
    """What stays on the device stays in its memory, though other parts of it read what has crossed again."""
    from moirai_sim.execution.torch_place import TorchPlace

    class Crew:
        names, threads = ["d0", "d1"], {"d0": 1, "d1": 1}
        backends = {"d0": "onnxruntime", "d1": "torch"}

        def load(self, assignments):
            self.assignments = assignments
            return 1

    crew = Crew()
    order = list(subject.graph.operators)
    device = {name: "d0" if name.endswith("r") else "d1" for name in order}
    load_order(crew, subject, device, order)
    assignment = replace(crew.assignments["d1"], shared=False)
    backend = _Torch(HOST)
    backend.memory = backend._place = TorchPlace("cpu", apart=True)
    copied = []

    def bind(session, inputs, outputs, fetched, returned):
        copied.append((len(fetched), len(returned)))
        return session.bind(inputs, outputs, fetched, returned)

    backend.bind = bind
    _Loaded(assignment, -1, backend)
    arriving = sum(len(job.awaits) for job in assignment.jobs) + len(assignment.feeds)
    assert sum(fetched for fetched, _ in copied) == arriving
    assert sum(len(job.inputs) for job in assignment.jobs) > arriving, "some are read again"
    leaving = {n for job in assignment.jobs for n in job.outputs if n in assignment.place or n in assignment.results}
    assert sum(returned for _, returned in copied) == len(leaving)
    assert sum(len(job.outputs) for job in assignment.jobs) >= len(leaving)


def test_a_gpu_shares_no_core_and_its_worker_takes_free_ones(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    full = cluster("cpu:0", "cpu:1-2", "cuda:0")
    assert device_cores(full.devices[2]) == (0, 1, 2)
    assert shared_cores(full) == []
    assert worker_cores(full) == ({"d0": (0,), "d1": (1, 2), "d2": (0, 1, 2)}, {"d2"})
    assert worker_cores(cluster("cpu:0", "cuda:0")) == ({"d0": (0,), "d1": (1, 2)}, set())
    assert worker_cores(cluster("cpu:0", "cpu:0-1", "cuda:0"))[1] == {"d0", "d1"}


def test_a_gpu_without_pytorch_is_wrong_input(monkeypatch):
    one = cluster(f"cpu:{CORES[0]}", "cuda:0")
    onnx_only = replace(one, devices=(one.devices[0], replace(one.devices[1], backend="onnxruntime")))
    with pytest.raises(InputError, match="device 'd1': address 'cuda:0' is for PyTorch, and its backend is 'onnxrun"):
        Workers(onnx_only)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="device 'd1': backend 'torch' needs PyTorch"):
        Workers(one)


@needs_torch
def test_a_gpu_that_is_not_here_is_wrong_input():
    with pytest.raises(InputError, match=r"device 'd1': address 'cuda:77': PyTorch .* sees .*CUDA device"):
        Workers(cluster(f"cpu:{CORES[0]}", "cuda:77"))
