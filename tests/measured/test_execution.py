"""Placements on real workers: outputs, order, timelines, and what happens when something breaks."""

from __future__ import annotations

import itertools
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from pathlib import Path

import networkx as nx
import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from moirai_sim.clusters.cluster import Cluster, Device, DeviceType, Link
from moirai_sim.errors import ExecutionError, InputError
from moirai_sim.execution import workers as workers_module
from moirai_sim.execution.cuts import InPlace
from moirai_sim.execution.measure import (
    Subject,
    covered_operators,
    load,
    load_order,
    load_subject,
    measure,
    typical_ns,
    undisturbed,
)
from moirai_sim.execution.split import Executed, execute_as, share_places, split
from moirai_sim.execution.tcp import Address
from moirai_sim.execution.workers import Workers, check_runnable, device_cores
from moirai_sim.graphs.load import load_graph
from moirai_sim.graphs.onnx_reader import read_model
from moirai_sim.placement import Placement
from moirai_sim.simulation.engine import simulate
from moirai_sim.simulation.plan import part_heads
from moirai_sim.sources import build_problem

CORES = sorted(os.sched_getaffinity(0))
CORE = DeviceType("core", "cpu", 2**33, 1e10, {"float32": 1e11})


def cluster(count: int = 2) -> Cluster:
    devices = tuple(Device(f"c{i}", CORE, address=f"cpu:{CORES[i % len(CORES)]}") for i in range(count))
    links = tuple(Link(f"l{i}", ("c0", f"c{i}"), 1e10, 1000) for i in range(1, count))
    return Cluster("test", devices, links)


def network(seed: int = 0, blocks: int = 4) -> onnx.ModelProto:
    """Two branches of convolutions a block, added; random weights, so that wrong wiring changes the output."""
    rng = np.random.default_rng(seed)
    nodes, weights, last = [], [], "x"
    for b in range(blocks):
        for side in "lr":
            weight = (rng.standard_normal((16, 16, 3, 3)) / 12).astype(np.float32)
            weights.append(numpy_helper.from_array(weight, f"w{b}{side}"))
            nodes.append(
                helper.make_node("Conv", [last, f"w{b}{side}"], [f"c{b}{side}"], name=f"conv{b}{side}", pads=[1] * 4)
            )
            nodes.append(helper.make_node("Relu", [f"c{b}{side}"], [f"r{b}{side}"], name=f"relu{b}{side}"))
        nodes.append(helper.make_node("Add", [f"r{b}l", f"r{b}r"], [f"a{b}"], name=f"add{b}"))
        last = f"a{b}"
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["mean"], name="mean"))
    shape = [1, 16, 12, 12]
    outputs = [helper.make_tensor_value_info("mean", TensorProto.FLOAT, [1, 16, 1, 1])]
    outputs.append(helper.make_tensor_value_info("r1l", TensorProto.FLOAT, shape))  # a second one, from the middle
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)], outputs, weights
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


@pytest.fixture(scope="module")
def subject() -> Subject:
    model = network()
    return Subject(model, read_model(model, name="net"))


@pytest.fixture(scope="module")
def workers():
    with Workers(cluster()) as crew:
        yield crew


def test_a_device_of_several_threads_runs_its_parts_on_as_many(subject):
    class Crew:
        names, threads = ["c0", "c1"], {"c0": 1, "c1": 3}
        backends = dict.fromkeys(names, "onnxruntime")

        def load(self, assignments):
            self.threads_of = {name: assignment.threads for name, assignment in assignments.items()}
            return 1

    crew = Crew()
    load_order(crew, subject, random_device(subject, 0), list(subject.graph.operators))
    assert crew.threads_of == crew.threads
    one = cluster(1)
    with Workers(replace(one, devices=(replace(one.devices[0], threads=2),))) as real:
        before = psutil.Process(real.processes["c0"]).num_threads()
        loaded = load_order(real, subject, dict.fromkeys(subject.graph.operators, "c0"), list(subject.graph.operators))
        assert psutil.Process(real.processes["c0"]).num_threads() > before
        loaded.run()
        assert loaded.check() < 1e-3


def random_device(subject: Subject, seed: int, devices: int = 2) -> dict[str, str]:
    rng = np.random.default_rng(seed)
    return {operator.name: f"c{rng.integers(devices)}" for operator in subject.graph}


@pytest.mark.parametrize("seed", range(12))
def test_parts_cover_every_kernel_once_and_can_run_in_their_order(subject, seed):
    device = random_device(subject, seed, 3)
    executed = execute_as(subject.model, subject.graph, device, subject.whole)
    order = [operator.name for operator in subject.graph]
    parts = split(executed, device, order)
    kernels = [i for part in parts for i in part.kernels]
    assert sorted(kernels) == list(range(len(executed.nodes)))
    known = set(executed.inputs)
    for part in parts:
        assert set(part.inputs) <= known, "a part waits for a later one"
        known.update(part.outputs)
        assert {device[name] for name in part.operators} == {part.device}
        first = set(executed.reads(part.kernels[0]))
        assert set(part.awaits) <= first, "only the first kernel of a part may wait"
        inner = {name for i in part.kernels[:-1] for name in executed.nodes[i].output}
        assert not inner & {name for name, _ in part.sends}, "a tensor is sent as soon as it is there"
    for earlier, later in itertools.pairwise(parts):
        if earlier.device == later.device:
            assert earlier.sends or later.awaits, "two parts that could be one"


def test_sizes_behind_a_model_are_those_that_it_runs_with(tmp_path: Path):
    model = network()
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.save(model, tmp_path / "net.onnx")
    source = f"{tmp_path / 'net.onnx'}?batch=3"
    one = load_subject(source, load_graph(source))
    assert {name: array.shape for name, array in one.feeds.items()} == {"x": (3, 16, 12, 12)}
    assert one.whole.tensors["mean"].shape == (3, 16, 1, 1)


def test_one_device_is_one_part(subject):
    device = dict.fromkeys(subject.graph.operators, "c0")
    parts = split(subject.whole, device, list(subject.graph.operators))
    assert len(parts) == 1
    assert len(parts[0].kernels) == len(subject.whole.nodes)


def test_a_placement_that_cuts_a_fused_kernel_is_respected(subject):
    device = dict.fromkeys(subject.graph.operators, "c0") | {"relu0l": "c1"}
    assert "conv0l" not in subject.whole.owners  # fused into relu0l
    executed = execute_as(subject.model, subject.graph, device, subject.whole)
    assert "conv0l" in executed.owners
    parts = split(executed, device, list(subject.graph.operators))
    assert [part.operators for part in parts if part.device == "c1"] == [("relu0l",)]


@pytest.mark.parametrize("seed", range(4))
def test_outputs_equal_the_unsplit_model(subject, workers, seed):
    loaded = load_order(workers, subject, random_device(subject, seed), list(subject.graph.operators))
    loaded.run()
    assert loaded.check() < 1e-5
    loaded.close()


def test_a_wrong_output_is_noticed(subject, workers):
    other = Subject(network(seed=1), read_model(network(seed=1), name="net"))
    loaded = load_order(workers, other, random_device(other, 0), list(other.graph.operators))
    loaded.run()
    other._reference = subject.reference(workers)  # what the unsplit model of other weights says
    with pytest.raises(ExecutionError, match="differs from the unsplit"):
        loaded.check()
    loaded.close()


def test_a_measured_timeline_holds_together(subject, workers):
    problem = build_problem(subject.graph, cluster(), fuse="none")
    rng = np.random.default_rng(3)
    placement = Placement(rng.integers(0, 2, problem.n_operators))
    timeline = measure(subject, problem, placement, workers=workers, repeats=5)
    assert timeline.status == "measured"
    assert timeline.makespan_ns == sorted(timeline.provenance["makespans_ns"])[2]
    assert timeline.provenance["problem"]["fusion"] == "none"
    assert {"repeats", "seed", "versions", "problem"} <= timeline.provenance.keys()
    parts = [span for span in timeline.spans if span.kind == "operator"]
    covered = [name for span in parts for name in span.operators]
    assert sorted(covered) == sorted(problem.operators)
    for span in parts:
        assert 0 <= span.ready_ns <= span.start_ns <= span.end_ns <= timeline.makespan_ns
        assert {timeline.placement[name] for name in span.operators} <= {span.resource}
    for resource_name in problem.devices:
        own = sorted((s.start_ns, s.end_ns) for s in parts if s.resource == resource_name)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(own))
    ends = {name: span.end_ns for span in parts for name in span.operators}
    starts = {name: span.start_ns for span in parts for name in span.operators}
    transfers = [span for span in timeline.spans if span.kind == "transfer"]
    assert len({(t.producer, t.target) for t in transfers}) == len(transfers)
    for transfer in transfers:
        assert transfer.start_ns >= ends[transfer.producer]
        assert all(starts[name] >= transfer.end_ns for name in transfer.consumers)
        assert transfer.bytes == 16 * 12 * 12 * 4


def test_devices_keep_the_order_of_the_placement(workers):
    nodes = [helper.make_node("Neg", ["x"], [f"y{i}"], name=f"n{i}") for i in range(6)]
    shape = [4096]
    values = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, shape) for i in range(6)]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)], values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    subject = Subject(model, read_model(model, name="g"))
    problem = build_problem(subject.graph, cluster(), fuse="none")
    order = np.array([5, 3, 1, 0, 2, 4])
    placement = Placement(np.zeros(6, dtype=np.int64), order=order)
    loaded = load(workers, subject, problem, placement)
    assert loaded.parts[0].operators == tuple(f"n{i}" for i in np.argsort(order))
    loaded.close()


def test_without_an_order_parts_run_as_the_simulator_runs_them(workers):
    """It takes the operator with the most work behind it first; as a graph, they stand the other way round."""
    nodes, values, inputs = [], [], []
    for i in range(4):
        inputs.append(helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, [4096 << i]))
        values.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [4096 << i]))
        nodes.append(helper.make_node("Neg", [f"x{i}"], [f"y{i}"], name=f"n{i}"))
    graph = helper.make_graph(nodes, "g", inputs, values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    subject = Subject(model, read_model(model, name="g"))
    problem = build_problem(subject.graph, cluster(), fuse="none")
    placement = Placement(np.zeros(4, dtype=np.int64))
    predicted = [span.name for span in simulate(problem, placement).spans]
    assert predicted == ["n3", "n2", "n1", "n0"]
    loaded = load(workers, subject, problem, placement)
    assert list(loaded.parts[0].operators) == predicted
    loaded.close()
    assert measure(subject, problem, placement, workers=workers, repeats=3).provenance["order"] == "simulated"
    ordered = replace(placement, order=np.arange(4))
    facts = measure(subject, problem, ordered, workers=workers, repeats=3).provenance
    assert facts["order"] == "given"
    assert facts["clock_error_ns"] == 0


def test_requests_in_flight_all_come_out_right(subject, workers):
    loaded = load_order(workers, subject, random_device(subject, 1), list(subject.graph.operators), in_flight=4)
    _, records = loaded.run([0] * 40)
    for record in records.values():
        assert sorted({request for request, *_ in record.runs}) == list(range(40))
    for request in range(36, 40):
        assert loaded.check(request) < 1e-5
    loaded.close()


# ---- parts ----


@pytest.mark.parametrize("seed", range(12))
def test_a_place_is_taken_again_only_when_nobody_can_still_use_it(subject, seed):
    device = random_device(subject, seed, 3)
    executed = execute_as(subject.model, subject.graph, device, subject.whole)
    parts = split(executed, device, list(subject.graph.operators))
    size = {name: spec.bytes for name, spec in executed.tensors.items()}
    place, place_bytes = share_places(parts, size, executed.outputs)
    crossing = [name for part in parts for name, _ in part.sends]
    assert sorted(place) == sorted(crossing)
    assert all(size[name] <= place_bytes[k] for name, k in place.items())
    order = nx.DiGraph()
    order.add_nodes_from(range(len(parts)))
    writer = {name: p for p, part in enumerate(parts) for name in part.outputs}
    for p, part in enumerate(parts):
        order.add_edges_from((writer[name], p) for name in part.awaits)
        earlier = [q for q in range(p) if parts[q].device == part.device]
        order.add_edges_from((q, p) for q in earlier[-1:])
    for a in crossing:
        for b in crossing:
            if a != b and place[a] == place[b] and writer[a] <= writer[b]:
                users = {p for p, part in enumerate(parts) if a in (*part.inputs, *part.outputs)}
                assert users <= nx.ancestors(order, writer[b]), "written while somebody may still read"
                assert a not in executed.outputs


def test_places_are_shared_and_results_stay_right(subject):
    order = list(subject.graph.operators)
    device = {name: f"c{i % 2}" for i, name in enumerate(order)}
    with Workers(cluster()) as crew:
        loaded = load_order(crew, subject, device, order)
        crossing = {name for part in loaded.parts for name, _ in part.sends}
        place, _ = share_places(loaded.parts, dict.fromkeys(crossing, 1), loaded.executed.outputs)
        assert len(set(place.values())) < len(crossing)
        for run in loaded.run_hot():
            assert run.makespan_ns > 0
        assert loaded.check() < 1e-5


def test_requests_rest_before_they_begin(subject, workers):
    order = list(subject.graph.operators)
    loaded = load_order(workers, subject, {name: f"c{i % 2}" for i, name in enumerate(order)}, order)
    loaded.run_hot()  # from now on a burst has several requests
    runs = loaded.run_hot(patience_s=0, rest_ns=20_000_000)
    begun = np.array([run.origin for run in runs])
    assert len(runs) > 1
    assert np.diff(begun).min() >= 20_000_000


@pytest.mark.parametrize("seed", range(8))
def test_the_simulator_begins_parts_where_the_executor_does(subject, seed):
    problem = build_problem(subject.graph, cluster(3), fuse="onnxruntime")
    rng = np.random.default_rng(seed)
    where = rng.integers(0, 3, problem.n_operators)
    if problem.colocation is not None:
        for group in range(int(problem.colocation.max()) + 1):
            members = np.flatnonzero(problem.colocation == group)
            where[members] = where[members[0]]
    device = {name: problem.devices[k] for name, k in zip(problem.operators, where, strict=True)}
    order = problem.topological_order
    executed = execute_as(subject.model, subject.graph, device, subject.whole)
    parts = split(executed, device, [problem.operators[i] for i in order])
    heads = part_heads(problem, where, order)
    assert heads.sum() <= len(parts) <= heads.sum() + 2  # a change of layout may be a part of its own


def test_operators_timed_in_place_add_up_to_the_model(subject):
    order = list(subject.graph.operators)
    with Workers(cluster()) as crew:
        in_place = InPlace(crew, subject, {"c0": "c0", "c1": "c0"})
        in_place.round()
        cuts = in_place.cuts("c0")
        loaded = load_order(crew, subject, dict.fromkeys(order, "c0"), order, most_kernels=1)
        assert len(loaded.parts) == len(subject.whole.nodes)
    assert set(cuts.operator_ns) <= set(order)
    assert sum(cuts.operator_ns.values()) == pytest.approx(cuts.whole_ns, rel=0.01)
    assert cuts.part_ns >= 0
    assert 0 <= cuts.split_share < 1
    assert cuts.crossing is not None
    assert 0 <= cuts.crossing.exchange_ns < 1_000_000
    assert 0 <= cuts.crossing.hand_over_ns < 1_000_000
    assert 0 <= cuts.crossing.read_ns_per_byte < 10
    heavy = max(cuts.operator_ns, key=cuts.operator_ns.__getitem__)
    assert heavy.startswith("conv")


def test_a_single_device_times_no_crossing(subject):
    with Workers(cluster(1)) as crew:
        in_place = InPlace(crew, subject, {"c0": "c0"})
        in_place.round()
        assert in_place.cuts("c0").crossing is None


def chain(nodes: list[onnx.NodeProto], outputs: list[str]) -> Subject:
    """Return a model of a 4 x 8 input ``x`` and some nodes; every output is a matrix."""
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 8])]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None]) for name in outputs]
    graph = helper.make_graph(nodes, "chain", ends, results)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    model = onnx.shape_inference.infer_shapes(model)
    return Subject(model, read_model(model, name="chain"))


def test_a_single_kernel_times_no_crossing():
    one = chain([helper.make_node("Softmax", ["x"], ["y"], name="soft")], ["y"])
    with Workers(cluster()) as crew:
        in_place = InPlace(crew, one, {"c0": "c0", "c1": "c0"})
        in_place.round()
        assert in_place.cuts("c0").crossing is None
        assert in_place.alike() == [True]


def test_an_input_in_another_order_that_is_an_output_too_comes_out(workers):
    nodes = [
        helper.make_node("Transpose", ["x"], ["y"], name="turn", perm=[1, 0]),
        helper.make_node("Relu", ["y"], ["r"], name="relu"),
        helper.make_node("Sigmoid", ["y"], ["s"], name="sigmoid"),
    ]
    subject = chain(nodes, ["y", "r", "s"])
    device = {"turn": "c0", "relu": "c0", "sigmoid": "c1"}
    loaded = load_order(workers, subject, device, list(subject.graph.operators))
    loaded.run()
    assert loaded.check() == 0
    loaded.close()


def test_a_kernel_that_serves_twins_counts_where_its_work_is():
    """ONNX Runtime rectifies the convolution once for both readers and fuses it: the time is the convolution's."""
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.standard_normal((16, 16, 3, 3)).astype(np.float32), f"w{i}") for i in "abc"]
    nodes = [helper.make_node("Conv", ["x", "wa"], ["c"], name="heavy", pads=[1] * 4)]
    for side, weight in (("l", "wb"), ("r", "wc")):
        nodes.append(helper.make_node("Relu", ["c"], [f"r{side}"], name=f"relu-{side}"))
        nodes.append(helper.make_node("Conv", [f"r{side}", weight], [side], name=f"conv-{side}", strides=[4, 4]))
    nodes.append(helper.make_node("Add", ["l", "r"], ["y"], name="add"))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    ends[0].type.tensor_type.shape.dim.extend(onnx.TensorShapeProto.Dimension(dim_value=d) for d in (1, 16, 32, 32))
    graph = helper.make_graph(nodes, "twins", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    twins = Subject(model, read_model(model, name="twins"))
    order = list(twins.graph.operators)
    parts = split(twins.whole, dict.fromkeys(order, "c0"), order, most_kernels=1)
    covered = covered_operators(twins.whole, twins.graph, parts, dict.fromkeys(order, "c0"))
    host = {name: part for part, names in covered.items() for name in names}
    assert len({host["relu-l"], host["relu-r"], host["heavy"]}) == 1
    assert len({host["heavy"], host["conv-l"], host["conv-r"]}) == 3


# ---- what runs take ----


def test_undisturbed_runs_alone_count_and_of_them_the_fast_ones():
    rounds = [[(100, 0.2), (140, 0.9), (50, 3.0)], [(300, 2.0)], [(110, 1.0)]]
    assert typical_ns(rounds) == pytest.approx(np.median([104, 110])), "the tenth percentile of 100 and 140 is 104"
    assert typical_ns(rounds, quiet=False) == 110, "the median of 100, 300 and 110"
    assert typical_ns([[(300, 2.0), (200, 5.0)]]) < 300, "without any, the least disturbed ones"
    assert [undisturbed(runs) for runs in rounds] == [True, False, True]


# ---- faults ----


def gone(processes: dict[str, int], within_s: float = 5.0) -> bool:
    """Tell whether all processes end in time."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if not any(psutil.pid_exists(pid) for pid in processes.values()):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("stage", ["before loading", "loaded", "running", "resting", "plain"])
def test_a_killed_worker_is_one_clear_error(subject, stage):
    with Workers(cluster()) as crew:
        processes = crew.processes
        device = random_device(subject, 2)
        order = list(subject.graph.operators)
        if stage == "before loading":
            os.kill(processes["c1"], signal.SIGKILL)
            with pytest.raises(ExecutionError, match=r"worker 'c1' was killed by signal 9"):
                load_order(crew, subject, device, order)
        else:
            loaded = load_order(crew, subject, device, order)
            if stage == "plain":
                os.kill(processes["c1"], signal.SIGSTOP)  # so that it is killed before it has answered
            killer = threading.Timer(0.3, os.kill, (processes["c1"], signal.SIGKILL))
            killer.start()
            if stage == "loaded":
                killer.join()
            start = time.monotonic()
            with pytest.raises(ExecutionError, match=r"worker 'c1' was killed by signal 9"):
                if stage == "plain":
                    subject.load_plain(crew, "c1")
                elif stage == "resting":
                    loaded.run_hot(patience_s=0, rest_ns=3_000_000_000)
                else:
                    loaded.run([0] * (100_000 if stage == "running" else 1))
            assert time.monotonic() - start < 5
        assert gone(processes)


@pytest.mark.parametrize("room", [32, 150, 300])
def test_a_worker_without_memory_is_one_clear_error(room):
    """The command, the weights, and the result take 64 MiB each."""
    side = 2**12
    value = helper.make_tensor_value_info
    ends = [value(name, TensorProto.FLOAT, [rows, side]) for name, rows in (("x", 1), ("y", side))]
    weight = numpy_helper.from_array(np.ones((side, side), np.float32), "w")
    node = helper.make_node("Add", ["x", "w"], ["y"], name="n")
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10).SerializeToString()
    with Workers(cluster()) as crew:
        processes = crew.processes
        worker = psutil.Process(processes["c1"])
        worker.rlimit(psutil.RLIMIT_AS, (worker.memory_info().vms + room * 2**20,) * 2)
        start = time.monotonic()
        with pytest.raises(ExecutionError, match=r"worker 'c1'.* ran out of memory"):
            crew.call(["c1"], "load_plain", model, {"x": np.ones((1, side), np.float32)}, ["y"], 1)
        assert time.monotonic() - start < 5
        assert gone(processes)


def test_a_hung_worker_is_one_clear_error(subject):
    with Workers(cluster()) as crew:
        processes = crew.processes
        loaded = load_order(crew, subject, random_device(subject, 2), list(subject.graph.operators))
        os.kill(processes["c1"], signal.SIGSTOP)
        with pytest.raises(ExecutionError, match="hangs"):
            loaded.run()
        assert gone(processes)
        with pytest.raises(ExecutionError, match="start new workers"):
            loaded.run()


ODD = """
import os, signal, struct, sys, time
from moirai_sim.execution import worker

class Odd(worker.Worker):
    def _burn(self, seconds):
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    def _half(self):
        os.write(self.control.fileno(), struct.pack("!i", 1 << 20) + bytes(1000))
        os.kill(os.getpid(), signal.SIGSTOP)

worker.Worker = Odd
worker.main(sys.argv[1:])
"""
"""A worker that also computes for so many seconds, or stops in the middle of an answer of 1 MiB."""


def test_a_busy_worker_does_not_hang_because_a_busier_one_has_answered(monkeypatch):
    monkeypatch.setattr(workers_module, "_START", ODD)
    with Workers(cluster()) as crew:
        crew.call(["c0"], "burn", 3.0)
        monkeypatch.setattr(workers_module, "PATIENCE_S", 1.0)
        crew._send("c0", "burn", 0.1)
        crew._send("c1", "burn", 2.5)  # less than the other one has computed in its life
        assert crew._collect(["c0", "c1"]) == {"c0": None, "c1": None}


def test_a_worker_that_stops_within_an_answer_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(workers_module, "_START", ODD)
    with Workers(cluster()) as crew:
        processes = crew.processes
        awake = threading.Timer(20, os.kill, (processes["c1"], signal.SIGKILL))  # so that a failure ends
        awake.start()
        start = time.monotonic()
        with pytest.raises(ExecutionError, match="worker 'c1' hangs"):
            crew.call(["c1"], "half")
        assert time.monotonic() - start < 6
        awake.cancel()
        assert gone(processes)


def test_a_hung_worker_that_gets_a_large_command_is_one_clear_error():
    with Workers(cluster()) as crew:
        processes = crew.processes
        os.kill(processes["c1"], signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(ExecutionError, match="worker 'c1' hangs"):
            crew.call(["c1"], "load_plain", bytes(1 << 26), {}, [], 1)
        assert time.monotonic() - start < 5
        assert gone(processes)


def test_a_worker_that_dies_before_it_gets_its_memory_is_one_clear_error(subject, monkeypatch):
    def send_late(control, handle, process):
        os.kill(process, signal.SIGKILL)
        time.sleep(0.5)
        send_handle(control, handle, process)

    monkeypatch.setattr(workers_module, "send_handle", send_late)
    with Workers(cluster()) as crew:
        processes = crew.processes
        with pytest.raises(ExecutionError, match=r"worker 'c\d' was killed by signal 9"):
            load_order(crew, subject, random_device(subject, 2), list(subject.graph.operators))
        assert gone(processes)


def test_workers_end_with_their_master(tmp_path: Path):
    script = tmp_path / "master.py"
    script.write_text(
        "import sys, time\n"
        "sys.path[:0] = sys.argv[1:]\n"
        "from test_execution import Workers, cluster\n"
        "crew = Workers(cluster())\n"
        "print(*crew.processes.values(), flush=True)\n"
        "time.sleep(60)\n"
    )
    master = subprocess.Popen([sys.executable, script, Path(__file__).parent], stdout=subprocess.PIPE, text=True)
    assert master.stdout is not None
    processes = {str(i): int(pid) for i, pid in enumerate(master.stdout.readline().split())}
    assert len(processes) == 2
    master.kill()
    master.wait()
    master.stdout.close()
    assert gone(processes)


def test_short_memory_is_one_clear_error(subject):
    branches = {name: "c1" if name.endswith("r") else "c0" for name in subject.graph.operators}  # cuts no kernel
    with Workers(cluster()) as crew:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            with pytest.raises(ExecutionError, match="shared memory"):
                load_order(crew, subject, branches, list(subject.graph.operators))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        loaded = load_order(crew, subject, branches, list(subject.graph.operators))
        loaded.run()  # the workers live on
        assert loaded.check() < 1e-5


def test_a_model_with_a_free_dimension_is_refused():
    graph = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["y"], name="n")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    with pytest.raises(InputError, match="dimension"):
        Executed(model, read_model(fixed, name="g"))


@pytest.mark.parametrize("address", ["cuda:", "cuda:x", "cpu:1x", "cpu:100000", "tcp:1", "cpu:3-1", "netns:1-0"])
def test_an_address_that_is_not_here_is_refused(address):
    with pytest.raises(InputError, match=f"address '{address}'"):
        device_cores(Device("d", CORE, address=address))


def test_all_that_cannot_run_here_is_named_at_once():
    devices = (
        Device("far", CORE, address="cpu:0-99999999999"),
        Device("odd", CORE, address="cpu:0", backend="abacus"),
        Device("wrong", CORE, address="tcp:1"),
    )
    with pytest.raises(InputError) as error:
        check_runnable(Cluster("here", devices, ()))
    assert [name for line in error.value.problems for name in ("far", "wrong", "odd") if f"'{name}'" in line] == [
        "far", "wrong", "odd",
    ]  # fmt: skip


def test_nothing_stays_in_shared_memory():
    before = set(Path("/dev/shm").iterdir()) if Path("/dev/shm").is_dir() else set()
    model = network()
    with Workers(cluster()) as crew:
        subject = Subject(model, read_model(model, name="net"))
        loaded = load_order(crew, subject, random_device(subject, 2), list(subject.graph.operators))
        loaded.run()
        assert {p.name for p in Path("/dev/shm").iterdir()} == {p.name for p in before}


def test_a_port_in_use_is_one_clear_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = Address(*taken.getsockname())
        ours, theirs = socket.socketpair()
        inbox, write = os.pipe()
        with theirs:
            start = "import sys; from moirai_sim.execution.worker import main; main(sys.argv[1:])"
            worker = subprocess.Popen(
                [sys.executable, "-c", start, str(theirs.fileno()), str(inbox)],
                pass_fds=(theirs.fileno(), inbox, write),
            )
        control = Connection(ours.detach())
        settings = {"name": "c0", "cores": CORES[:1], "spin_ns": 0, "backend": "onnxruntime", "peers": {"c0": write}}
        control.send(settings | {"place": "cpu", "addresses": {"c0": address}, "latency_ns": {}})
        assert control.poll(20)
        assert control.recv() == ("error", f"127.0.0.1, port {address.port}: Address already in use")
        assert worker.wait(5) is not None
        control.close()
        os.close(inbox)
        os.close(write)
