"""Fusion: the rules, their legality, and what a fused kernel carries."""

from __future__ import annotations

from pathlib import Path

import networkx as nx
import onnx
import pytest

from moirai_sim.costs.families import describe
from moirai_sim.errors import InputError
from moirai_sim.graphs.fusion import BACKENDS, fuse
from moirai_sim.graphs.load import load_graph
from moirai_sim.graphs.onnx_reader import read_model
from moirai_sim.graphs.work import VIEWS
from moirai_sim.graphs.zoo import zoo_model
from moirai_sim.graphs.zoo.builder import Builder

LIGHT = sorted((Path(onnx.__file__).parent / "backend" / "test" / "data" / "light").glob("light_*.onnx"))
ZOO = ["bert-base?layers=2&opset=16", "gpt2?layers=2&opset=16", "swin-t", "alphafold2-87m?blocks=1", "yolov5n", "er-32"]


def graph_of(build):
    b = Builder("g")
    b.output(build(b))
    return read_model(b.model(), name="g")


def kernels(graph, backend="onnxruntime"):
    return [tuple(part.op_type for part in o.parts) for o in fuse(graph, backend).graph if o.parts]


def image(b, channels=16):
    return b.input("x", [1, channels, 8, 8])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("source", [*map(str, LIGHT), *(f"zoo:{name}" for name in ZOO)])
def test_fused_graph_keeps_work_weights_and_order(source, backend):
    graph = load_graph(source)
    fused = fuse(graph, backend)
    assert nx.is_directed_acyclic_graph(fused.graph.digraph)
    assert sorted(name for members in fused.members.values() for name in members) == sorted(graph.operators)
    assert fused.graph.flops == graph.flops
    assert fused.graph.weight_bytes == graph.weight_bytes
    owner = {name: kernel for kernel, members in fused.members.items() for name in members}
    position = {name: i for i, name in enumerate(graph.operators)}
    for kernel, members in fused.members.items():
        assert members[-1] == kernel
        assert list(members) == sorted(members, key=position.__getitem__)
        for inner in members[:-1]:  # what is inside is read inside only, so the region is convex
            assert {owner[reader] for reader in graph.digraph.successors(inner)} == {kernel}
    crossing = {(owner[a], owner[b]) for a, b, _ in graph.edges() if owner[a] != owner[b]}
    assert set(fused.graph.digraph.edges) == crossing


def test_kernel_carries_its_boundary_only():
    graph = graph_of(lambda b: b.relu(b.batch_norm(b.conv(image(b), 32, 3))))
    (kernel,) = fuse(graph, "onnxruntime").graph
    conv, norm, relu = graph
    assert kernel.op_type == "Conv"
    assert kernel.parts == (conv, norm, relu)
    assert kernel.inputs[:2] == conv.inputs
    assert kernel.attributes == conv.attributes
    assert kernel.flops == conv.flops + norm.flops + relu.flops
    assert kernel.read_bytes == conv.read_bytes + 4 * 32 * 4
    assert kernel.write_bytes == relu.write_bytes
    assert kernel.weight_bytes == conv.weight_bytes + norm.weight_bytes


def test_an_inner_value_with_another_reader_is_not_fused_away():
    def build(b):
        conv = b.conv(image(b), 16, 3)
        return b.mul(b.relu(conv), b.unary("Exp", conv))

    assert kernels(graph_of(build)) == []


def test_an_output_of_the_model_is_not_fused_away():
    b = Builder("g")
    conv = b.conv(image(b), 16, 3)
    b.output(conv)
    b.output(b.relu(conv))
    assert kernels(read_model(b.model(), name="g")) == []


def test_residual_joins_the_first_free_convolution_before_its_relu():
    def build(b):
        x = image(b)
        return b.relu(b.add(b.conv(x, 16, 1), b.conv(b.relu(x), 16, 3)))

    assert kernels(graph_of(build)) == [("Conv", "Add", "Relu")]


def test_residual_of_another_layout_stays_apart():
    def build(b):
        x = image(b)
        return b.add(b.conv(x, 16, 3), b.transpose(x, [0, 1, 3, 2]))

    assert kernels(graph_of(build)) == []


def test_product_reads_a_transposed_operand_and_scales():
    def build(b):
        q, k = b.input("q", [2, 3, 4]), b.input("k", [2, 5, 4])
        return b.binary("Div", b.matmul(q, b.transpose(k, [0, 2, 1])), b.scalar(2.0))

    graph = graph_of(build)
    assert kernels(graph) == [("Transpose", "MatMul", "Div")]
    (kernel,) = fuse(graph, "onnxruntime").graph
    assert kernel.op_type == "MatMul"
    assert [tensor.name for tensor in kernel.inputs[:2]] == ["q", "k"]


def test_a_product_of_a_tensor_with_itself_keeps_both_operands():
    def build(b):
        x = b.input("x", [2, 3, 4])
        return b.matmul(x, b.transpose(x, [0, 2, 1]))

    (kernel,) = fuse(graph_of(build), "onnxruntime").graph
    assert [tensor.name for tensor in kernel.inputs] == ["x", "x"]
    assert kernel.read_bytes == 4 * 2 * 3 * 4
    assert describe([kernel])[1][0, :4].tolist() == [2, 3, 3, 4]


def test_a_first_operand_that_is_read_transposed_keeps_its_contraction():
    def build(b):
        q, k = b.input("q", [2, 4, 3]), b.input("k", [2, 4, 5])
        return b.matmul(b.transpose(q, [0, 2, 1]), k)

    (kernel,) = fuse(graph_of(build), "onnxruntime").graph
    assert describe([kernel])[1][0, :4].tolist() == [2, 3, 5, 4]


def test_only_a_matrix_result_takes_the_activation():
    def build(shape):
        return lambda b: b.unary("Tanh", b.linear(b.input("x", shape), 8))

    assert kernels(graph_of(build([4, 8]))) == [("MatMul", "Add", "Tanh")]
    assert kernels(graph_of(build([2, 4, 8]))) == [("MatMul", "Add")]


@pytest.mark.parametrize("opset", [16, 17])
def test_layer_norm_and_gelu_are_recognised_written_out(opset):
    b = Builder("g", opset=opset)
    x = b.input("x", [2, 4, 8])
    b.output(b.gelu(b.layer_norm(b.add(x, b.input("y", [2, 4, 8])))))
    fused = fuse(read_model(b.model(), name="g"), "onnxruntime").graph
    assert [o.op_type for o in fused] == ["SkipLayerNormalization", "Gelu"]


def test_inductor_fuses_pointwise_chains_and_keeps_library_calls():
    def build(b):
        x = b.linear(b.input("x", [2, 4, 8]), 8)
        return b.softmax(b.mul(b.unary("Exp", x), 2.0))

    assert kernels(graph_of(build), "inductor") == [("MatMul", "Add"), ("Exp", "Mul", "Softmax")]


@pytest.mark.parametrize(
    "name",
    [
        "resnet18?image=64",
        "yolov5n?image=64",
        "ws-32?image=32",
        "bert-base?layers=1&hidden=64&heads=4&seq=16&vocabulary=100",
        "bert-base?layers=1&hidden=64&heads=4&seq=16&vocabulary=100&opset=16",
        "gpt2?layers=2&hidden=64&heads=4&seq=16&vocabulary=100&opset=16",
        "vit-b?layers=1&hidden=64&heads=4&image=32",
        "alphafold2-87m?blocks=1&residues=8&sequences=4",
    ],
)
def test_onnx_runtime_runs_as_many_kernels(name, tmp_path):
    """Its optimized graph, without views and changes of layout, has as many nodes as we have kernels."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(zoo_model(name).SerializeToString(), options, ["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    real = [node for node in nodes if node.op_type not in {*VIEWS, "ReorderInput", "ReorderOutput"}]
    ours = [kernel for kernel in fuse(load_graph(f"zoo:{name}"), "onnxruntime").graph if kernel.op_type not in VIEWS]
    assert len(real) == pytest.approx(len(ours), rel=0.05), "branches that compute the same are merged"
    if name[:2] != "ws":
        assert len(real) == len(ours)


def test_long_chains_are_cut():
    def build(b):
        x = b.input("x", [4])
        for _ in range(200):
            x = b.unary("Sin", x)
        return x

    assert sorted(map(len, kernels(graph_of(build), "inductor")), reverse=True) == [64, 64, 64, 8]


def test_unknown_backend_is_told():
    with pytest.raises(InputError, match="did you mean 'inductor'"):
        fuse(load_graph("zoo:resnet18"), "inducter")
