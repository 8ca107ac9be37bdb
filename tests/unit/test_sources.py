"""Models priced on clusters: tensors, fusion, memory, sources of the costs, options."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from moirai_sim.clusters.cluster import Cluster, Device, DeviceType, Link
from moirai_sim.clusters.reader import read_cluster
from moirai_sim.costs.links import Curve, Group, LinkModel
from moirai_sim.costs.roofline import Roofline
from moirai_sim.errors import InputError
from moirai_sim.evidence import cost_share, log_spread, with_evidence
from moirai_sim.graphs.fusion import fuse
from moirai_sim.graphs.onnx_reader import read_onnx
from moirai_sim.placement import Placement
from moirai_sim.problem import UNLIMITED
from moirai_sim.simulation.engine import simulate
from moirai_sim.sources import build_problem, load_problem, recognise, transfer_table


@pytest.fixture
def model(tmp_path):
    """x -> Relu -> (MatMul, Sigmoid) -> Concat: one tensor with two readers, one operator with weights."""
    value = helper.make_tensor_value_info
    weights = helper.make_tensor("w", TensorProto.FLOAT, [64, 64], np.ones(4096, np.float32).tobytes(), raw=True)
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], "relu"),
        helper.make_node("MatMul", ["r", "w"], ["m"], "matmul"),
        helper.make_node("Sigmoid", ["r"], ["s"], "sigmoid"),
        helper.make_node("Concat", ["m", "s"], ["y"], "concat", axis=1),
    ]
    inputs, outputs = [value("x", TensorProto.FLOAT, [8, 64])], [value("y", TensorProto.FLOAT, [8, 128])]
    graph = helper.make_graph(nodes, "fork", inputs, outputs, [weights])
    path = tmp_path / "fork.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


def test_a_tensor_is_one_however_many_read_it(model):
    problem = build_problem(read_onnx(model), read_cluster("diviml-server"), fuse="none")
    assert problem.operators == ("relu", "matmul", "sigmoid", "concat")
    assert problem.edges.tolist() == [[0, 1], [0, 2], [1, 3], [2, 3]]
    assert problem.edge_tensor.tolist() == [0, 0, 1, 2]
    assert problem.tensor_bytes.tolist() == [8 * 64 * 4] * 3
    assert problem.weight_bytes.tolist() == [0, 64 * 64 * 4, 0, 0]
    assert problem.network == "fair"


def test_devices_without_a_cost_model_are_priced_by_their_data_sheet(model):
    cluster = read_cluster("moirai-one-server")
    graph = read_onnx(model)
    problem = build_problem(graph, cluster, fuse="none")
    assert problem.operator_ns.shape == (4, 2)  # two types of two devices each
    for k, device in enumerate(cluster.devices):
        price = Roofline().predict(list(graph), device.type)
        column = problem.device_type[k]
        assert problem.operator_ns[:, column].tolist() == np.rint(price.latency_s * 1e9).astype(int).tolist()
        assert problem.evidence.high_ns[:, column].tolist() == np.rint(price.high_s * 1e9).astype(int).tolist()
    timeline = simulate(problem, Placement(np.array([0, 1, 2, 3])))
    assert cost_share(problem, timeline) == {"data sheet": 1.0}
    sure = with_evidence(problem, timeline)
    assert sure.low_ns == timeline.makespan_ns < sure.high_ns, "a data sheet is a limit: what rests on it takes longer"


def test_evidence_is_that_of_the_placement(model):
    """Not of the devices that could have run it."""
    cluster = read_cluster("moirai-one-server")
    devices = [replace(one, cost_model="nvidia-gpus") if k < 2 else one for k, one in enumerate(cluster.devices)]
    problem = build_problem(read_onnx(model), replace(cluster, devices=tuple(devices)), fuse="none")
    on = [cost_share(problem, simulate(problem, Placement(np.full(4, k)))) for k in (0, 2)]
    assert on[1] == {"data sheet": 1.0}
    assert set(on[0]) <= {"predicted", "extrapolated"}
    assert sum(on[0].values()) == pytest.approx(1)
    both = cost_share(problem, simulate(problem, Placement(np.array([0, 0, 2, 2]))))
    assert 0 < both["data sheet"] < 1
    spread = log_spread(problem, simulate(problem, Placement(np.array([0, 0, 2, 2]))))
    assert len(spread) == 2
    assert min(spread.values()) > 0


def test_times_that_change_stay_as_sure(model):
    problem = build_problem(read_onnx(model), read_cluster("moirai-one-server"), fuse="none")
    longer = problem.with_operator_ns(problem.operator_ns * 3)
    assert (longer.evidence.high_ns == problem.evidence.high_ns * 3).all()


def test_memory_is_what_is_granted(model):
    kind = DeviceType("t", "gpu", 1000, 1e9, {"float32": 1e9})
    devices = (Device("a", kind), Device("b", kind, memory_bytes=600))
    cluster = Cluster("c", devices, (Link("l", ("a", "b"), 1e9, 5),))
    problem = build_problem(read_onnx(model), cluster)
    assert problem.memory_bytes.tolist() == [1000, 600]
    assert problem.operator_ns.shape == (4, 1)


def test_devices_that_run_operators_unlike_are_priced_apart(model):
    kind = DeviceType("t", "cpu", 1000, 1e9, {"float32": 1e9})
    two_threads, torch = Device("b", kind, threads=2), Device("c", kind, backend="torch")
    devices = (Device("a", kind), two_threads, torch, Device("d", kind, address="cpu:1"))
    cluster = Cluster("c", devices, tuple(Link(f"l{name}", ("a", name), 1e9, 5) for name in "bcd"))
    problem = build_problem(read_onnx(model), cluster)
    assert problem.device_type.tolist() == [0, 1, 2, 0]


def test_a_fused_kernel_costs_at_its_last_operator_and_ties_the_others_to_it():
    path = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / "light_squeezenet.onnx"
    graph, cluster = read_onnx(path), read_cluster("local-cpu")
    fused = fuse(graph, "onnxruntime")
    problem = build_problem(graph, cluster)
    prices = Roofline().predict(list(fused.graph), cluster.devices[0].type).latency_s
    index = {name: i for i, name in enumerate(problem.operators)}
    groups = []
    for kernel, price in zip(fused.graph, prices, strict=True):
        *others, last = (index[name] for name in fused.members[kernel.name])
        assert problem.operator_ns[last, 0] == round(price * 1e9)
        assert (problem.operator_ns[others] == 0).all()
        tied = {int(problem.colocation[i]) for i in (*others, last)}
        assert len(tied) == 1
        groups += tied if others else []
        assert others or tied == {-1}
    assert len(groups) == len(set(groups)) > 10
    assert build_problem(graph, cluster, fuse="none").colocation is None


def test_options(model, tmp_path):
    cluster = read_cluster("local-cpu")
    assert (load_problem(model, cluster, memory=False).memory_bytes == UNLIMITED).all()
    assert load_problem(model, cluster, memory=False).provenance["memory"] == "unlimited"
    scaled = load_problem(model, cluster, memory_scale=0.5)
    assert scaled.memory_bytes.tolist() == [64 * 64 * 2] * len(cluster.devices)
    assert load_problem(model, cluster, network="one-port").network == "one-port"
    with pytest.raises(InputError, match="unknown network"):
        load_problem(model, cluster, network="ethernet")
    with pytest.raises(InputError, match="needs devices"):
        load_problem(model)


def test_the_same_model_gives_the_same_arrays(model):
    one, two = (load_problem(model, read_cluster("dgx-a100")) for _ in range(2))
    for name in ("operator_ns", "edges", "edge_tensor", "transfer_ns", "route_class"):
        assert (getattr(one, name) == getattr(two, name)).all()
    assert one.provenance == two.provenance


def test_models_are_recognised_without_their_suffix(model, tmp_path):
    model.rename(tmp_path / "model.bin")
    assert recognise(tmp_path / "model.bin") == "model"
    assert recognise("zoo:gpt3-1.3b") == "model"
    with pytest.raises(InputError, match="cannot read it"):
        recognise(tmp_path / "absent.onnx")


LINE = (1 << 10, 1 << 20, 1 << 30)


def copies(tmp_path, *groups):
    """Write a link model: time is the size over the rate of each group, bytes/s."""
    curves = {group: Curve(LINE, tuple(size / rate for size in LINE)) for group, rate in groups}
    tmp_path.mkdir(exist_ok=True)
    LinkModel("m", curves, {}).write(tmp_path)
    return str(tmp_path)


def mixed(link_model, server="", wires=2e10):
    """A CPU and two GPUs, all on one bus."""
    cpu = DeviceType("c", "cpu", 1000, 1e9, {"float32": 1e9})
    gpu = DeviceType("g", "gpu", 1000, 1e9, {"float32": 1e9})
    devices = (Device("cpu", cpu), Device("gpu0", gpu), Device("gpu1", gpu, server=server))
    links = tuple(Link(f"l{i}", (a, "bus"), wires, 0) for i, a in enumerate(("cpu", "gpu0", "gpu1")))
    return Cluster("c", devices, links, ("bus",), link_model=link_model)


TO_GPU, TO_CPU = Group("copy host-device pinned", 2), Group("copy device-host pinned", 2)


@pytest.mark.parametrize("device", ["", "g"])
def test_measured_copies_price_transfers_between_cpu_and_gpu(tmp_path, device):
    to_gpu, to_cpu = (replace(group, device=device) for group in (TO_GPU, TO_CPU))
    cluster = mixed(copies(tmp_path, (to_gpu, 4e9), (to_cpu, 8e9)))
    classes, times, source = transfer_table(cluster, np.array([1 << 20]))
    taken = (1 << 20) / (times[0][classes] / 1e9) / 1e9
    assert taken[0, 1:] == pytest.approx([4, 4], rel=1e-4)
    assert taken[1:, 0] == pytest.approx([8, 8], rel=1e-4)
    assert taken[1, 2] == taken[2, 1] == pytest.approx(20, rel=1e-4)
    assert source == f"{cluster.link_model}; data sheet: g to g"


def test_wires_that_are_slower_than_those_that_were_measured_bound_what_they_carry(tmp_path):
    cluster = mixed(copies(tmp_path, (TO_GPU, 4e9), (TO_CPU, 8e9)), wires=6e9)
    classes, times, _ = transfer_table(cluster, np.array([1 << 20]))
    taken = (1 << 20) / (times[0][classes] / 1e9) / 1e9
    assert taken[0, 1:] == pytest.approx([4, 4], rel=1e-4)
    assert taken[1:, 0] == pytest.approx([6, 6], rel=1e-4)


def test_what_a_link_model_was_not_measured_on_is_named(tmp_path):
    folder = copies(tmp_path, (TO_GPU, 4e9), (TO_CPU, 8e9), (Group("send", 2, device="g"), 5e9))
    assert transfer_table(mixed(folder), np.array([1 << 20]))[2] == folder
    source = transfer_table(mixed(folder, server="other"), np.array([1 << 20]))[2]
    assert source == (
        f"{folder}; data sheet: c to g of another server, g to c of another server, g to g of another server"
    )


def test_a_link_model_that_knows_no_transfer_of_the_cluster_is_refused(tmp_path):
    folder = copies(tmp_path, (Group("all-reduce", 2, device="g"), 4e9))
    with pytest.raises(InputError, match=r"'m' knows no transfer .*c to g.* it has all-reduce among 2 g; leave out"):
        transfer_table(mixed(folder), np.array([1 << 20]))
