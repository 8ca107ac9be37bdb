"""What the PyTorch backend of profiles times is the operator that it books."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from moirai_sim.errors import InputError
from moirai_sim.graphs.operator import Tensor
from moirai_sim.graphs.work import make_operator
from moirai_sim.profiling.backends.onnxruntime import make_session

pytest.importorskip("torch", reason="PyTorch is not installed; pip install 'moirai-sim[torch]'")

import torch

from moirai_sim.profiling.backends.torch import TorchDevice, profile_graph_operators
from moirai_sim.profiling.backends.torch_calls import Unsupported, call_of
from moirai_sim.profiling.schema import operator_row, row_operator

IMAGE, ROWS, HEADS = (1, 4, 15, 14), (5, 7), (1, 2, 6, 8)
KERNEL = (6, 4, 3, 3)
POOL = {"kernel_shape": [3, 3], "strides": [2, 2]}
CASES = [
    ("Conv", [IMAGE, KERNEL], {"auto_pad": "SAME_UPPER"}),
    ("Conv", [IMAGE, (6, 4, 4, 3), (6,)], {"auto_pad": "SAME_UPPER", "strides": [2, 3]}),
    ("Conv", [IMAGE, (6, 4, 4, 3)], {"auto_pad": "SAME_LOWER", "strides": [1, 2]}),
    ("Conv", [IMAGE, KERNEL], {"auto_pad": "VALID"}),
    ("Conv", [IMAGE, KERNEL, (6,)], {"pads": [0, 0, 1, 1], "strides": [2, 2]}),
    ("Conv", [IMAGE, KERNEL], {"pads": [2, 0, 1, 3], "dilations": [2, 1]}),
    ("MaxPool", [IMAGE], POOL | {"ceil_mode": 1}),
    ("MaxPool", [IMAGE], POOL | {"pads": [0, 0, 1, 1]}),
    ("MaxPool", [IMAGE], POOL | {"pads": [2, 2, 2, 2]}),
    ("MaxPool", [IMAGE], POOL | {"dilations": [2, 2]}),
    ("MaxPool", [IMAGE], POOL | {"auto_pad": "SAME_LOWER"}),
    ("AveragePool", [IMAGE], POOL | {"ceil_mode": 1}),
    ("AveragePool", [IMAGE], POOL | {"pads": [1, 1, 1, 1]}),
    ("AveragePool", [IMAGE], POOL | {"pads": [1, 1, 1, 1], "count_include_pad": 1}),
    ("GlobalAveragePool", [IMAGE], {}),
    ("LRN", [IMAGE], {"size": 3, "alpha": 0.1}),
    ("Einsum", [ROWS, (7, 3)], {"equation": "ij,jk->ki"}),
    ("Sum", [ROWS, ROWS, ROWS], {}),
    ("Max", [ROWS, ROWS, (7,), ROWS], {}),
    ("Add", [ROWS, (7,)], {}),
    ("Gelu", [ROWS], {"approximate": "tanh"}),
    ("ReduceMax", [IMAGE], {"axes": [1, 3]}),
    ("ReduceMean", [IMAGE], {"axes": [2], "keepdims": 0}),
    ("Attention", [HEADS] * 3, {"is_causal": 1}),
    ("Attention", [HEADS] * 3, {}),
    ("Attention", [HEADS, (1, 1, 9, 8), (1, 1, 9, 8), (6, 9)], {}),
]


def expected(op_type, feeds, attributes):
    """Return what ONNX Runtime makes of it."""
    node = helper.make_node(op_type, list(feeds), ["y"], **attributes)
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape) for name, value in feeds.items()]
    graph = helper.make_graph([node], "one", given, [helper.make_empty_tensor_value_info("y")])
    opset = {"Attention": 23, "Gelu": 20}.get(op_type, 17)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return make_session(model.SerializeToString(), optimize=False).run(None, feeds)[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{'-'.join(case[2])}")
def test_what_runs_is_the_operator(case):
    op_type, shapes, attributes = case
    rng = np.random.default_rng(3)
    feeds = {f"i{n}": rng.standard_normal(shape).astype(np.float32) for n, shape in enumerate(shapes)}
    want = expected(op_type, feeds, attributes)
    operator = make_operator("one", op_type, shapes, [want.shape], attributes)
    found = call_of(torch, operator)(*(torch.from_numpy(value) for value in feeds.values())).numpy()
    assert found.shape == want.shape
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-6)
    assert (TorchDevice("cpu:0").time_operator(operator, 0.001) > 0).all()


@pytest.mark.parametrize("axis", [0, -1])
def test_a_gather_has_the_shape_of_its_indices(axis):
    shape = (2, 3, 7) if axis == 0 else (5, 2, 3)
    gather = make_operator("g", "Gather", [ROWS, (2, 3)], [shape], {"axis": axis})
    assert (TorchDevice("cpu:0").time_operator(gather, 0.001) > 0).all()


def test_a_variance_is_positive_before_the_clock_starts():
    norm = make_operator("n", "BatchNormalization", [IMAGE, *[(4,)] * 4], [IMAGE])
    device = TorchDevice("cpu:0")
    run = device.prepare(norm)
    with torch.profiler.profile() as seen:
        result = run()
    assert result.isfinite().all()
    assert "aten::abs" not in {event.key for event in seen.key_averages()}


REFUSED = [
    make_operator("a result of another shape", "Relu", [ROWS], [(7, 5)]),
    make_operator("odd pads", "Conv", [IMAGE, KERNEL], [(1, 6, 13, 12)], {"pads": [1, 1, 1]}),
    make_operator("odd pads", "MaxPool", [IMAGE], [(1, 4, 7, 6)], POOL | {"pads": [1, 1, 1]}),
    make_operator("strides of three axes", "MaxPool", [IMAGE], [(1, 4, 7, 6)], POOL | {"strides": [2, 2, 2]}),
    make_operator("uneven pads", "AveragePool", [IMAGE], [(1, 4, 7, 7)], POOL | {"pads": [0, 0, 1, 1]}),
    make_operator("outside", "Slice", [ROWS], [(3, 7)], {"axes": [0], "starts": [4], "ends": [9]}),
    make_operator("mirrored", "Pad", [ROWS], [(7, 9)], {"mode": "reflect"}),
    make_operator("batches", "MatMulInteger", [HEADS, (*HEADS[:2], 8, 6)], [(1, 2, 6, 6)], dtype="int8"),
    make_operator("a sum of one", "Sum", [ROWS], [ROWS]),
    make_operator("no window", "Conv", [(1, 4), (6, 4)], [(1, 6)]),
    make_operator("past keys", "Attention", [HEADS] * 3 + [(0,), HEADS, HEADS], [HEADS], {"is_causal": 1}),
    *(make_operator(dtype, "Add", [ROWS, ROWS], [ROWS], dtype=dtype) for dtype in ("int16", "uint16", "float4")),
    make_operator("mixed", "Gather", [Tensor("table", ROWS, "int4"), Tensor("i", (3,), "int64")], [(3, 7)]),
]


@pytest.mark.parametrize("operator", REFUSED, ids=lambda operator: f"{operator.op_type}-{operator.name}")
def test_what_cannot_be_timed_is_left_out_and_the_rest_is_not(operator):
    device, plain = TorchDevice("cpu:0"), make_operator("plain", "Relu", [ROWS], [ROWS])
    with pytest.raises(Unsupported):
        device.time_operator(operator, 0.001)
    frame, skipped = profile_graph_operators(device, [operator, plain], 0.01)
    assert list(frame["name"]) == ["plain"]
    assert list(skipped.values()) == [1]


@pytest.mark.parametrize("name", ["cuda:x", "cuda:", "cuda:-1", "cuda0", "gpu:0"])
def test_a_device_of_another_form_says_what_is_expected(name):
    with pytest.raises(InputError, match="cuda:INDEX"):
        TorchDevice(name)


RNG = np.random.default_rng(5)
X, SCALE = (RNG.standard_normal(shape).astype(np.float32) for shape in (ROWS, (7,)))
SIGN = X > 0
LEFT, RIGHT = (RNG.integers(-128, 128, shape, dtype=np.int8) for shape in ((24, 16), (16, 8)))
COPIES = [
    ("Slice", [X], {"axes": [1, 0], "starts": [-3, 1], "ends": [6, 4]}, [X[1:4, -3:-1]]),
    ("Slice", [X, np.array([0])], {}, [X[:2, :5]]),
    ("Split", [X], {"axis": 1}, [X[:, :3], X[:, 3:]]),
    ("Pad", [X], {"pads": [0, 1, 2, 3], "value": 2.0}, [np.pad(X, [(0, 2), (1, 3)], constant_values=2)]),
    ("Pad", [X, np.array([0])], {}, [np.pad(X, [(0, 2), (0, 3)])]),
    ("Clip", [X], {"min": -0.5, "max": 0.5}, [X.clip(-0.5, 0.5)]),
    ("Clip", [X, np.float32(-1), np.float32(0)], {}, [X.clip(-1, 0)]),
    ("Cast", [X], {}, [X.astype(np.float16)]),
    ("Expand", [SCALE, np.array([5, 7])], {}, [np.broadcast_to(SCALE, ROWS)]),
    ("Where", [SIGN, X, SCALE], {}, [np.where(SIGN, X, SCALE)]),
    ("RMSNormalization", [X, SCALE], {"epsilon": 1e-3},
     [X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-3) * SCALE]),
    ("MatMulInteger", [LEFT, RIGHT], {}, [LEFT.astype(np.int32) @ RIGHT.astype(np.int32)]),
]  # fmt: skip


@pytest.mark.parametrize("case", COPIES, ids=lambda case: f"{case[0]}-{'-'.join(case[2])}")
def test_what_runs_is_the_operator_of_the_standard(case):
    op_type, given, attributes, wanted = case
    read = [Tensor(f"i{n}", value.shape, str(value.dtype)) for n, value in enumerate(given)]
    written = [Tensor(f"o{n}", value.shape, str(value.dtype)) for n, value in enumerate(wanted)]
    operator = make_operator("one", op_type, read, written, attributes, str(given[-1].dtype))
    feeds = [torch.from_numpy(np.asarray(value)) for value in given]
    found = call_of(torch, operator)(*feeds)
    for one, want in zip(found if isinstance(found, tuple) else (found,), wanted, strict=True):
        np.testing.assert_allclose(one.numpy(), want, rtol=1e-5, atol=1e-6)
        assert one.is_contiguous()
        assert not any(one.data_ptr() == feed.data_ptr() for feed in feeds)
    assert (TorchDevice("cpu:0").time_operator(operator, 0.001) > 0).all()


def test_a_condition_read_from_a_profile_is_one_again():
    pick = row_operator(operator_row(make_operator("w", "Where", [Tensor("c", ROWS, "bool"), ROWS, ROWS], [ROWS])))
    assert (TorchDevice("cpu:0").time_operator(pick, 0.001) > 0).all()


def test_a_transposition_that_moves_nothing_is_a_copy():
    """What PyTorch would give as a view, ONNX writes: else an empty call is timed."""
    turn = make_operator("t", "Transpose", [(1, 64)], [(64, 1)], {"perm": [1, 0]})
    x = torch.randn(1, 64)
    assert call_of(torch, turn)(x).data_ptr() != x.data_ptr()


def test_bytes_are_random():
    device = TorchDevice("cpu:0")
    for dtype, least, most in (("int8", -128, 127), ("uint8", 0, 255)):
        drawn = device.tensor((4096,), dtype)
        assert (int(drawn.min()), int(drawn.max())) == (least, most)
