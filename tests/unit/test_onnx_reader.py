"""Reading ONNX: folding, work, and broken input."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from moirai_sim.errors import InputError
from moirai_sim.graphs.load import load_graph, load_model, model_names
from moirai_sim.graphs.onnx_reader import node_names, read_model, read_onnx

LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


def model(nodes, inputs, outputs, initializers=(), value_info=(), opset=17, domains=()):
    def infos(values):
        return [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in values]

    graph = helper.make_graph(
        nodes, "g", infos(inputs), infos(outputs), list(initializers), value_info=infos(value_info)
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=imports)


def array(name, value, dtype=np.int64):
    return numpy_helper.from_array(np.array(value, dtype=dtype), name)


F = TensorProto.FLOAT
I64 = TensorProto.INT64

# MACs and parameters as published: torchvision 0.20 model cards ("GFLOPS" there are multiply-adds) for ResNet-50 4.09,
# VGG-19 19.63, DenseNet-121 2.83; for the two-column AlexNet of 2012 at the 224 x 224 input of this file, the sizes
# of Krizhevsky et al. give 54 x 54 x 96 x 363 + 26 x 26 x 256 x 1200 + 12 x 12 x (384 x 2304 + 384 x 1728 + 256 x 1728)
# + 9216 x 4096 + 4096 x 4096 + 4096 x 1000 = 0.6543e9.
PUBLISHED = {
    "resnet50": (4.09e9, 25.557e6),
    "vgg19": (19.63e9, 143.667e6),
    "densenet121": (2.83e9, 7.979e6),
    "bvlc_alexnet": (0.6543e9, 60.965e6),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_work_of_light_models_is_as_published(name):
    graph = read_onnx(LIGHT / f"light_{name}.onnx")
    macs, parameters = PUBLISHED[name]
    assert graph.flops / 2 == pytest.approx(macs, rel=0.02)
    assert graph.weight_bytes / 4 == pytest.approx(parameters, rel=0.025)  # BN statistics are stored too


@pytest.mark.parametrize("path", sorted(LIGHT.glob("light_*.onnx")), ids=lambda p: p.stem)
def test_light_models_hold_real_work_only(path):
    graph = read_onnx(path)
    types = {operator.op_type for operator in graph}
    assert types.isdisjoint({"ConstantOfShape", "Constant", "Shape"})
    assert not any(operator.bytes_only for operator in graph)
    stored = onnx.load(path)
    folded = {"ConstantOfShape", "Unsqueeze", "Reshape"}  # Inception v1 reshapes a weight, all reshape activations
    kept = [n.op_type for n in stored.graph.node if n.op_type not in folded]
    assert sorted(kept) == sorted(o.op_type for o in graph if o.op_type not in folded)


def test_shape_arithmetic_folds_and_the_reshape_is_resolved():
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["batch"], axis=0),
        helper.make_node("Unsqueeze", ["batch", "zeros"], ["batch1"]),
        helper.make_node("Concat", ["batch1", "minus"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["flat"]),
        helper.make_node("Relu", ["flat"], ["y"]),
    ]
    constants = [array("zero", 0), array("zeros", [0]), array("minus", [-1])]
    graph = read_model(model(nodes, [("x", F, [2, 3, 4])], [("y", F, None)], constants), name="g")
    assert [(o.op_type, o.outputs[0].shape, o.flops) for o in graph] == [("Reshape", (2, 12), 0), ("Relu", (2, 12), 24)]
    reshape, relu = graph
    assert (reshape.read_bytes, reshape.write_bytes, reshape.weight_bytes) == (0, 0, 0)
    assert (relu.read_bytes, relu.write_bytes) == (96, 96)


def test_weights_made_by_nodes_are_weights_and_take_no_memory():
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["w"]),
        helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("MatMul", ["h", "wt"], ["y"]),
    ]
    large = model(nodes, [("x", F, [1, 50_000])], [("y", F, None)], [array("shape", [50_000, 1_000_000])])
    first, second = read_model(large, name="g")  # 200 GB of weights
    assert first.weight_bytes == 4 * 50_000 * 1_000_000
    assert second.weight_bytes == 0, "the transposed weight shares the storage"
    assert first.inputs[1].weight
    assert second.inputs[1].weight
    assert first.flops == second.flops == 2 * 50_000 * 1_000_000


def test_initializer_listed_among_the_inputs_is_a_weight():
    nodes = [helper.make_node("Add", ["x", "b"], ["y"])]
    both = model(nodes, [("x", F, [4]), ("b", F, [4])], [("y", F, [4])], [array("b", [1, 2, 3, 4], np.float32)])
    (add,) = read_model(both, name="g")
    assert [tensor.weight for tensor in add.inputs] == [False, True]
    assert add.weight_bytes == 16


def test_dead_operators_are_dropped_and_nodes_may_be_unsorted():
    nodes = [
        helper.make_node("Relu", ["h"], ["y"], name="b"),
        helper.make_node("Exp", ["x"], ["h"], name="a"),
        helper.make_node("Log", ["h"], ["unused"], name="dead"),
    ]
    graph = read_model(model(nodes, [("x", F, [4])], [("y", F, [4])]), name="g")
    assert list(graph.operators) == ["a", "b"]
    assert [(a, b, [t.name for t in tensors]) for a, b, tensors in graph.edges()] == [("a", "b", ["h"])]


def test_names_are_unique_and_deterministic():
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Relu", ["x"], ["b"], name="a"),
        helper.make_node("Relu", ["x"], ["c"], name="a"),
        helper.make_node("Relu", ["x"], ["d"]),
    ]
    assert node_names(nodes) == ["a#2", "a", "a#3", "d"]


def test_symbolic_dimensions_are_fixed_on_request(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(model([helper.make_node("Relu", ["x"], ["y"])], [("x", F, ["batch", 3])], [("y", F, ["batch", 3])]), path)
    with pytest.raises(InputError, match=r"dynamic dimension 'batch' at axis 0; fix it by '.*\?batch=1'"):
        read_onnx(path)
    assert load_graph(f"{path}?batch=8").flops == 24
    assert load_graph(f"{path}?batch=8").source["dimensions"] == {"batch": 8}
    assert read_model(load_model(f"{path}?batch=8"), name="m").flops == 24


@pytest.mark.parametrize("read", [load_graph, load_model])
def test_sizes_for_dimensions_that_no_value_has_are_refused(tmp_path, read):
    path = tmp_path / "m.onnx"
    for sizes, message in ((["batch", 3], "'bacth'; did you mean 'batch'"), ([2, 3], "its sizes are fixed")):
        onnx.save(model([helper.make_node("Relu", ["x"], ["y"])], [("x", F, sizes)], [("y", F, sizes)]), path)
        with pytest.raises(InputError, match=message):
            read(f"{path}?bacth=8")


@pytest.mark.parametrize("kept", [None, 7])
def test_weights_beside_a_model_that_are_missing_or_cut_short_are_told(tmp_path, kept):
    path, beside = tmp_path / "m.onnx", tmp_path / "m.data"
    weights = [array("w", np.ones((4, 4)), np.float32)]
    built = model([helper.make_node("MatMul", ["x", "w"], ["y"])], [("x", F, [2, 4])], [("y", F, [2, 4])], weights)
    onnx.save(built, path, save_as_external_data=True, location="m.data", size_threshold=0)
    assert len(load_model(path).graph.initializer[0].raw_data) == 64
    content = beside.read_bytes()
    beside.unlink()
    if kept:
        beside.write_bytes(content[:kept])
    with pytest.raises(InputError, match="weights in other files cannot be read"):
        load_model(path)


def test_a_cache_has_the_length_that_the_model_declares():
    names = ["x", "k", "v", "pk", "pv"]
    node = helper.make_node(
        "GroupQueryAttention", names, ["y", "nk", "nv"], domain="com.microsoft", num_heads=4, kv_num_heads=1
    )
    sizes = [(2, 4, 32), (2, 4, 8), (2, 4, 8), (2, 1, 9, 8), (2, 1, 9, 8)]
    inputs = [(name, F, size) for name, size in zip(names, sizes, strict=True)]
    for declared, length in ((True, 9), (True, 13), (False, 9)):  # shared with the past, or put together of both
        cache = [2, 1, length, 8] if declared else None
        outputs = [("y", F, [2, 4, 32]), ("nk", F, cache), ("nv", F, cache)]
        (operator,) = read_model(model([node], inputs, outputs, domains=["com.microsoft"]), name="g")
        assert [tensor.shape for tensor in operator.outputs] == [(2, 4, 32), (2, 1, length, 8), (2, 1, length, 8)]
        assert operator.flops == 2 * 4 * 4 * length * (4 * 8 + 7)


def test_models_whose_files_have_one_name_are_told_apart_by_folder_or_size():
    names = model_names(
        ["a/net.onnx", "b/net.onnx", "b/small.onnx?batch=1", "b/small.onnx?batch=8", "c/gpt2.onnx", "zoo:gpt2",
         "zoo:gpt3-1.3b?seq=64", "zoo:gpt3-1.3b?seq=128", "b/alone.onnx?batch=8"]
    )  # fmt: skip
    assert list(names.values()) == [
        "a/net", "b/net", "small?batch=1", "small?batch=8", "gpt2", "zoo:gpt2",
        "zoo:gpt3-1.3b?seq=64", "zoo:gpt3-1.3b?seq=128", "alone",
    ]  # fmt: skip


def test_unknown_operators_are_bytes_only_or_refused():
    node = helper.make_node("Mystery", ["x"], ["y"], name="m", domain="my.domain")
    with pytest.raises(InputError, match=r"'m' \(Mystery\) has an output 'y' whose shape is not known"):
        read_model(model([node, helper.make_node("Relu", ["y"], ["z"])], [("x", F, [4])], [("z", F, [4])]), name="g")
    (mystery,) = read_model(model([node], [("x", F, [4])], [("y", F, [8])]), name="g")
    assert (mystery.bytes_only, mystery.flops, mystery.read_bytes, mystery.write_bytes) == (True, 0, 16, 32)


def test_an_output_is_known_where_it_is_read_even_if_an_equal_node_leaves_it_unread():
    def mystery(number):
        return helper.make_node("Mystery", ["x"], [f"a{number}", f"b{number}"], name=f"m{number}", domain="my.domain")

    nodes = [
        mystery(1),
        mystery(2),
        helper.make_node("Add", ["a1", "b2"], ["sum"]),
        helper.make_node("Add", ["sum", "a2"], ["y"]),
    ]
    declared = [("a1", F, [4]), ("a2", F, [4]), ("b2", F, [4])]
    graph = read_model(model(nodes, [("x", F, [4])], [("y", F, [4])], value_info=declared), name="g")
    assert [operator.write_bytes for operator in graph] == [16, 32, 16, 16]


def test_local_functions_are_expanded():
    function = helper.make_function(
        "local", "Twice", ["a"], ["c"],
        [helper.make_node("Relu", ["a"], ["b"]), helper.make_node("Exp", ["b"], ["c"])], [helper.make_opsetid("", 17)],
    )  # fmt: skip
    node = helper.make_node("Twice", ["x"], ["y"], domain="local")
    built = model([node], [("x", F, [4])], [("y", F, [4])], domains=["local"])
    built.functions.append(function)
    assert [operator.op_type for operator in read_model(built, name="g")] == ["Relu", "Exp"]


def test_contrib_operators_have_shapes_and_work():
    nodes = [
        helper.make_node("FusedConv", ["x", "w", "b"], ["c"], domain="com.microsoft", activation="Relu", pads=[1] * 4),
        helper.make_node("Gelu", ["c"], ["y"], domain="com.microsoft"),
    ]
    weights = [array("w", np.zeros((8, 3, 3, 3)), np.float32), array("b", np.zeros(8), np.float32)]
    fused = model(nodes, [("x", F, [1, 3, 6, 6])], [("y", F, None)], weights, domains=["com.microsoft"])
    conv, gelu = read_model(fused, name="g")
    assert conv.outputs[0].shape == (1, 8, 6, 6)
    assert conv.flops == 8 * 36 * (2 * 27 + 1 + 1)
    assert gelu.flops == 5 * 8 * 36


@pytest.mark.parametrize(
    ("op_type", "domain", "inputs", "attributes", "shapes"),
    [
        ("LayerNormalization", "", [(2, 4, 8), (8,)], {}, [(2, 4, 8)]),  # in opset 16: ONNX Runtime's own
        ("SkipLayerNormalization", "com.microsoft", [(2, 4, 8), (2, 4, 8), (8,)], {}, [(2, 4, 8)]),
        ("FusedMatMul", "com.microsoft", [(2, 4, 8), (2, 5, 8)], {"transB": 1}, [(2, 4, 5)]),
        ("FusedMatMul", "com.microsoft", [(6, 3, 8), (6, 3, 8)],
         {"transBatchA": 1, "transBatchB": 1, "transB": 1}, [(3, 6, 6)]),
        ("MatMulNBits", "com.microsoft", [(4, 64), (32, 2, 16)], {"K": 64, "N": 32}, [(4, 32)]),
        ("Attention", "com.microsoft", [(2, 4, 8), (8, 48)], {"num_heads": 4}, [(2, 4, 16), (2, 2, 4, 4, 4)]),
        ("MultiHeadAttention", "com.microsoft", [(2, 4, 8), (2, 6, 8), (2, 6, 16)], {"num_heads": 4}, [(2, 4, 16)]),
        ("MultiHeadAttention", "com.microsoft", [(2, 5, 8, 3, 64)], {"num_heads": 8}, [(2, 5, 512)]),
        ("MultiHeadAttention", "com.microsoft", [(2, 5, 512), (2, 7, 8, 2, 64)], {"num_heads": 8}, [(2, 5, 512)]),
        (
            "GroupQueryAttention", "com.microsoft", [(2, 4, 32), (2, 4, 8), (2, 4, 8)],
            {"num_heads": 4, "kv_num_heads": 1}, [(2, 4, 32), (2, 1, 4, 8), (2, 1, 4, 8)],
        ),
    ],
)  # fmt: skip
def test_shapes_of_operators_without_a_schema(op_type, domain, inputs, attributes, shapes):
    names = [f"x{i}" for i in range(len(inputs))]
    outputs = [f"y{i}" for i in range(len(shapes))]
    node = helper.make_node(op_type, names, outputs, domain=domain, **attributes)
    sinks = [helper.make_node("Relu", [output], [f"{output}z"]) for output in outputs]
    values = [(name, F, shape) for name, shape in zip(names, inputs, strict=True)]
    built = model([node, *sinks], values, [(f"{o}z", F, None) for o in outputs], opset=16, domains=["com.microsoft"])
    operator, *_ = read_model(built, name="g")
    assert [tensor.shape for tensor in operator.outputs] == shapes
    assert operator.flops > 0


def test_subgraphs_are_refused_by_name():
    body = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["o"])], "b", [], [helper.make_tensor_value_info("o", F, [4])]
    )
    node = helper.make_node("If", ["c"], ["y"], name="branch", then_branch=body, else_branch=body)
    with pytest.raises(InputError, match=r"'branch' \(If\) runs a subgraph"):
        read_model(model([node], [("c", TensorProto.BOOL, []), ("x", F, [4])], [("y", F, [4])]), name="g")


def test_cycle_is_named():
    nodes = [
        helper.make_node("Add", ["x", "b"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"], name="second"),
    ]
    with pytest.raises(InputError, match=r"cycle: first -> second|cycle: second -> first"):
        read_model(model(nodes, [("x", F, [4])], [("b", F, [4])]), name="g")


def huge_initializer():
    tensor = TensorProto(name="w", data_type=F, dims=[10**6, 10**6])
    return model([helper.make_node("Add", ["x", "w"], ["y"])], [("x", F, [1])], [("y", F, None)], [tensor])


def huge_input():
    return model([helper.make_node("Relu", ["x"], ["y"])], [("x", F, [10**12])], [("y", F, [10**12])])


def huge_constant_of_shape():
    nodes = [helper.make_node("ConstantOfShape", ["s"], ["w"]), helper.make_node("Add", ["x", "w"], ["y"])]
    return model(nodes, [("x", F, [1])], [("y", F, None)], [array("s", [10**12])])


def huge_range():
    nodes = [helper.make_node("Range", ["a", "b", "c"], ["r"]), helper.make_node("Add", ["x", "r"], ["y"])]
    scalars = [array("a", 0), array("b", 10**12), array("c", 1)]
    return model(nodes, [("x", I64, [1])], [("y", I64, None)], scalars)


@pytest.mark.parametrize("build", [huge_initializer, huge_input, huge_constant_of_shape, huge_range])
def test_absurd_sizes_are_refused_before_allocation(build):
    with pytest.raises(InputError, match=r"1e\+12 elements") as caught:
        read_model(build(), name="g")
    assert len(caught.value.problems) == 1


def test_broken_files_give_one_error(tmp_path):
    whole = (LIGHT / "light_squeezenet.onnx").read_bytes()
    path = tmp_path / "cut.onnx"
    for size in (len(whole) // 2, 100):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"cut\.onnx: ") as caught:
            read_onnx(path)
        assert len(caught.value.problems) == 1
    path.write_bytes(b"")
    with pytest.raises(InputError, match="no operators"):
        read_onnx(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_onnx(tmp_path / "missing.onnx")


def test_damaged_names_are_refused(tmp_path):
    path = tmp_path / "damaged.onnx"
    path.write_bytes((LIGHT / "light_squeezenet.onnx").read_bytes().replace(b"MaxPool", b"MaxP\xff\xffl"))
    with pytest.raises(InputError, match="not valid UTF-8"):
        read_onnx(path)


def test_initializer_shorter_than_declared_is_refused():
    tensor = array("w", [1.0, 2.0], np.float32)
    tensor.dims[0] = 3
    bad = model([helper.make_node("Add", ["x", "w"], ["y"])], [("x", F, [3])], [("y", F, [3])], [tensor])
    with pytest.raises(InputError, match="needs 12 bytes, 8 are stored"):
        read_model(bad, name="g")


def test_operator_that_does_not_fit_its_inputs_is_named():
    weights = [array("w", np.zeros((8, 4, 3, 3)), np.float32)]
    bad = model(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="mm")], [("x", F, [5, 7])], [("y", F, None)], weights
    )
    with pytest.raises(InputError, match=r"'mm' \(MatMul\) does not fit"):
        read_model(bad, name="g")


def test_a_long_chain_is_read_in_linear_work(monkeypatch):
    """Equal operators are inferred once, however many there are."""
    from onnx import shape_inference

    calls = itertools.count()
    infer = shape_inference.infer_node_outputs

    def counting(*args, **kwargs):
        next(calls)
        return infer(*args, **kwargs)

    monkeypatch.setattr(shape_inference, "infer_node_outputs", counting)
    nodes = [helper.make_node("Relu", [f"v{i}"], [f"v{i + 1}"]) for i in range(5000)]
    graph = read_model(model(nodes, [("v0", F, [4])], [("v5000", F, [4])]), name="g")
    assert len(graph) == 5000
    assert next(calls) == 1
