"""Real profiles of this machine: operators add up to the model, links answer, telemetry is there."""

import math
import os
import resource
import tempfile

import numpy as np
import onnx
import pytest

from moirai_sim.clusters.cluster import Cluster, Device, DeviceType
from moirai_sim.errors import InputError
from moirai_sim.profiling import telemetry
from moirai_sim.profiling.backends.onnxruntime import executed_graph, kernel_graph, kernel_key, owners
from moirai_sim.profiling.links import profile_links
from moirai_sim.profiling.operators import load, profile_operators
from moirai_sim.profiling.schema import LINK_COLUMNS, OPERATOR_COLUMNS, check_profile, operator_key, row_operator
from moirai_sim.profiling.sweep import sweep_model

CORES = sorted(os.sched_getaffinity(0))
pytestmark = pytest.mark.measured


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "sweep-3.onnx"
    onnx.save(sweep_model(3), path)
    return path


@pytest.fixture(scope="module")
def frame(model):
    return profile_operators([model], f"cpu:{CORES[0]}", budget_s=1.5)


def test_profile_is_whole(frame):
    check_profile(frame)
    assert set(OPERATOR_COLUMNS) <= set(frame.columns)
    assert (frame["source"] == "measured").all()
    assert (frame["count"] >= 5).all()


def test_operators_are_held_against_the_whole_model(frame):
    (facts,) = frame.attrs["metadata"]["models"].values()
    assert facts["ratio"] == pytest.approx(facts["operators_s"] / facts["median_s"])
    assert 0.2 < facts["ratio"] < 5  # says that it is the same model, not how fast this machine is
    assert facts["executed_nodes"] > 0


def test_every_kernel_is_booked_once(model, frame):
    one = load(str(model))
    assert len(one.owner) == len(one.executed.nodes)
    assert set(one.owner) <= set(one.graph.operators)
    keys = {operator_key(row_operator(row)) for row in frame.to_dict("records")}
    assert keys == {operator_key(operator) for operator in one.graph}


def test_pinning_is_undone(frame):
    assert sorted(os.sched_getaffinity(0)) == CORES


def test_sweeps_repeat_and_run():
    assert sweep_model(5).SerializeToString() == sweep_model(5).SerializeToString()
    for seed in range(8):
        graph = kernel_graph(sweep_model(seed).SerializeToString())
        assert len({kernel_key(node, graph) for node in graph.nodes}) > 3


def test_owner_of_a_blocked_node_is_named_after_the_tensor_it_stands_for():
    node = onnx.helper.make_node
    nodes = [
        node("ReorderInput", ["x"], ["t0"], name="r"), node("Conv", ["t0", "w"], ["t1"], name="y_nchwc"),
        node("ReorderOutput", ["t1"], ["y"], name="o"), node("Relu", ["y"], ["z"], name="n2"),
        node("Reshape", ["z"], ["f0"], name="flat"), node("Gemm", ["f0", "v"], ["f1"], name="made-up"),
        node("Reshape", ["f1"], ["q"], name="back"),
    ]  # fmt: skip
    expected = ("conv", "conv", "conv", "relu", "product", "product", "product")
    assert owners(nodes, {"w", "v"}, {"y": "conv", "z": "relu", "q": "product"}) == expected


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")
def test_links_tell_what_a_crossing_costs():
    kind = DeviceType("core", "cpu", 1 << 30, 1e10, {"float32": 1e11})
    devices = tuple(Device(name, kind, address=f"cpu:{core}") for name, core in zip("ab", CORES, strict=False))
    found = profile_links(Cluster("two", devices), sizes=(1024, 1 << 20), repeats=10)
    assert list(found.columns) == list(LINK_COLUMNS)
    assert set(zip(found["source_device"], found["target_device"], strict=True)) == {("a", "b")}
    assert sorted(zip(found["collective"], found["participants"], found["bytes"], strict=True)) == [
        ("send", 2, 1024), ("send", 2, 1 << 20),
    ]  # fmt: skip
    assert (found["median_s"] > 0).all()
    check_profile(found, "links")


@pytest.mark.parametrize(
    ("device", "backend"), [("cpu:999", "onnxruntime"), ("core0", "onnxruntime"), ("cpu:0", "tensorflow")]
)
def test_wrong_devices_are_input_errors(device, backend, model):
    with pytest.raises(InputError):
        profile_operators([model], device, backend=backend)


def test_a_gpu_needs_the_option_that_the_error_names(model):
    with pytest.raises(InputError, match=r"cuda:INDEX with --backend torch"):
        profile_operators([model], "cuda:0")
    with pytest.raises(InputError, match=r"write cuda:INDEX|not installed"):
        profile_operators([model], "cuda:x", backend="torch")


def test_a_full_disk_is_told_by_its_folder(model, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(InputError, match=rf"folder '{tmp_path}': ONNX Runtime cannot write there.*set TMPDIR"):
            executed_graph(model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    executed_graph(model)
    with pytest.raises(InputError, match=r"^model: ONNX Runtime cannot run it"):
        executed_graph(b"no model")


def test_missing_model_and_no_model():
    with pytest.raises(InputError):
        profile_operators([], f"cpu:{CORES[0]}")
    with pytest.raises(InputError, match=r"absent\.onnx"):
        profile_operators(["absent.onnx"], f"cpu:{CORES[0]}")


def test_models_of_one_file_name_and_with_sizes_of_their_own_are_told_apart(tmp_path):
    value, sources = onnx.helper.make_tensor_value_info, []
    for folder, batch in (("a", 1), ("a", 8), ("b", 8)):
        ends = [value(name, onnx.TensorProto.FLOAT, ["batch", 64]) for name in ("x", "y")]
        weights = [onnx.numpy_helper.from_array(np.full((64, 64), 0.01, np.float32), "w")]
        nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["y"], "product")]
        graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
        opset = [onnx.helper.make_opsetid("", 17)]
        (tmp_path / folder).mkdir(exist_ok=True)
        onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / folder / "net.onnx")
        sources.append(f"{tmp_path / folder / 'net.onnx'}?batch={batch}")
    found = profile_operators(sources, f"cpu:{CORES[0]}", budget_s=0.1)
    assert list(found.attrs["metadata"]["models"]) == ["net?batch=1", "a/net?batch=8", "b/net?batch=8"]
    assert list(found["model"]) == list(found.attrs["metadata"]["models"])
    assert [row_operator(row).inputs[0].shape for row in found.to_dict("records")] == [(1, 64), (8, 64), (8, 64)]


def test_telemetry_names_the_hardware_and_no_person():
    facts = telemetry.hardware()
    assert facts["cpu"] and facts["memory_bytes"] > 0
    assert telemetry.versions()["onnxruntime"]
    assert all(math.isfinite(x) for x in telemetry.snapshot()["load"])
    assert os.uname().nodename not in str(facts)


def test_torch_backend_on_the_cpu(model):
    pytest.importorskip("torch")
    from moirai_sim.graphs.work import make_operator
    from moirai_sim.profiling.backends.torch import TorchDevice

    device = TorchDevice(f"cpu:{CORES[0]}")
    samples = device.time_operator(make_operator("m", "MatMul", [(64, 64), (64, 64)], [(64, 64)]), 0.01)
    assert (np.asarray(samples) > 0).all()
    with pytest.raises(InputError, match="cuda"):
        TorchDevice("cuda:99")


def test_torch_inputs_rotate_are_random_and_never_point_outside():
    torch = pytest.importorskip("torch")
    from moirai_sim.graphs.work import make_operator
    from moirai_sim.profiling.backends.torch import TorchDevice

    device = TorchDevice(f"cpu:{CORES[0]}")
    add = device.prepare(make_operator("a", "Add", [(64, 64), (64, 64)], [(64, 64)]))
    first, second = add(), add()
    assert not torch.equal(first, second)
    assert first.count_nonzero() == first.numel()
    gather = make_operator("g", "Gather", [(5, 8), (300,)], [(300, 8)], {"axis": 0})
    assert device.prepare(gather)().shape == (300, 8)
    assert (device.time_operator(gather, 0.01) > 0).all()


@pytest.mark.gpu
def test_torch_backend_on_a_gpu():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device")
    from moirai_sim.graphs.work import make_operator
    from moirai_sim.profiling.backends.torch import TorchDevice

    device = TorchDevice("cuda:0")
    small, large = (
        device.time_operator(make_operator("m", "MatMul", [(n, n), (n, n)], [(n, n)], dtype="bfloat16"), 0.2)
        for n in (256, 8192)
    )
    assert np.median(large) > np.median(small)
    sheet = device.device_type()
    assert 2 * 8192**3 / np.median(large) < 1.2 * sheet.peak_flops["bfloat16"]
