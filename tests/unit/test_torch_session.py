"""What PyTorch makes of a node is what ONNX Runtime makes of it."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from moirai_sim.errors import InputError
from moirai_sim.profiling.backends.onnxruntime import make_session, portable_model

pytest.importorskip("torch", reason="PyTorch is not installed; pip install 'moirai-sim[torch]'")

from moirai_sim.execution.torch_session import TorchSession

IMAGE, ROWS, TOKENS = (2, 6, 9, 8), (5, 7), (2, 3, 4)


def constant(*values: object, dtype: str = "int64") -> np.ndarray:
    return np.array(values, dtype=dtype)


def weight(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


CASES = [
    ("Relu", [IMAGE], {}),
    ("Erf", [ROWS], {}),
    ("Softplus", [ROWS], {}),
    ("HardSwish", [ROWS], {}),
    ("LeakyRelu", [ROWS], {"alpha": 0.3}),
    ("Elu", [ROWS], {"alpha": 0.7}),
    ("HardSigmoid", [ROWS], {"alpha": 0.3, "beta": 0.4}),
    ("Clip", [ROWS, constant(-0.5, dtype="float32")[0], constant(0.5, dtype="float32")[0]], {}),
    ("Add", [TOKENS, TOKENS[2:]], {}),
    ("Sum", [ROWS, ROWS, ROWS], {}),
    ("Mean", [ROWS, ROWS, ROWS], {}),
    ("Max", [ROWS, ROWS], {}),
    ("Min", [ROWS, ROWS], {}),
    ("Conv", [IMAGE, weight(4, 6, 3, 3), weight(4)], {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    ("Conv", [IMAGE, weight(4, 6, 3, 2)], {"pads": [0, 1, 2, 1], "dilations": [2, 1]}),
    ("Conv", [IMAGE, weight(6, 2, 3, 3)], {"group": 3}),
    ("Conv", [(2, 6, 9), weight(4, 6, 3)], {"pads": [1, 1]}),
    ("ConvTranspose", [IMAGE, weight(6, 4, 2, 2)], {"strides": [2, 2]}),
    ("MaxPool", [IMAGE], {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    ("MaxPool", [IMAGE], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1]}),
    ("AveragePool", [IMAGE], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
    ("AveragePool", [IMAGE], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    ("AveragePool", [IMAGE], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1]}),
    ("GlobalAveragePool", [IMAGE], {}),
    ("GlobalMaxPool", [IMAGE], {}),
    ("LRN", [IMAGE], {"size": 5, "alpha": 0.1, "beta": 0.7, "bias": 1.5}),
    ("BatchNormalization", [IMAGE, weight(6), weight(6), weight(6), abs(weight(6))], {"epsilon": 0.01}),
    ("LayerNormalization", [TOKENS, weight(3, 4), weight(3, 4)], {"axis": 1, "epsilon": 0.01}),
    ("Gemm", [ROWS, weight(3, 7), weight(3)], {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    ("Gemm", [ROWS, weight(5, 3)], {"transA": 1, "alpha": 0.5}),
    ("MatMul", [TOKENS, weight(4, 3)], {}),
    ("Softmax", [TOKENS], {"axis": 1}),
    ("ReduceMean", [TOKENS], {"axes": [1], "keepdims": 0}),
    ("ReduceMax", [TOKENS], {}),
    ("ReduceSum", [TOKENS, constant(0, 2)], {}),
    ("Reshape", [TOKENS, constant(0, -1)], {}),
    ("Transpose", [TOKENS], {"perm": [2, 0, 1]}),
    ("Flatten", [IMAGE], {"axis": 2}),
    ("Concat", [TOKENS, TOKENS], {"axis": -1}),
    ("Unsqueeze", [ROWS, constant(0, -1)], {}),
    ("Squeeze", [(1, 5, 1), constant(2)], {}),
    ("Slice", [IMAGE, constant(1, -3), constant(100, -1), constant(1, 3), constant(2, 1)], {}),
    ("Split", [IMAGE, constant(2, 4)], {"axis": 1}, 2),
    ("Gather", [IMAGE, constant(-1, 0, 2)], {"axis": 1}),
    ("Expand", [(5, 1), constant(2, 1, 7)], {}),
    ("Cast", [ROWS], {"to": TensorProto.DOUBLE}),
    ("com.microsoft.Gelu", [ROWS], {}),
    ("com.microsoft.FastGelu", [ROWS, weight(7)], {}),
    ("com.microsoft.BiasGelu", [ROWS, weight(7)], {}),
    ("com.microsoft.QuickGelu", [ROWS], {"alpha": 1.5}),
    ("com.microsoft.FusedConv", [IMAGE, weight(4, 6, 1, 1), weight(4)], {"activation": "Relu"}),
    ("com.microsoft.FusedGemm", [ROWS, weight(7, 3), weight(3)], {"activation": "Tanh"}),
    ("com.microsoft.FusedMatMul", [TOKENS, TOKENS], {"transB": 1, "alpha": 0.25}),
    ("com.microsoft.SkipLayerNormalization", [TOKENS, TOKENS, weight(4), weight(4)], {"epsilon": 0.01}),
]


def model(op: str, inputs: list, attributes: dict, outputs: int = 1, opset: int = 17) -> bytes:
    names = [f"i{n}" for n in range(len(inputs))]
    given = [(name, one) for name, one in zip(names, inputs, strict=True) if isinstance(one, tuple)]
    domain, _, op_type = op.rpartition(".")
    node = helper.make_node(op_type, names, [f"o{n}" for n in range(outputs)], domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in given],
        [helper.make_empty_tensor_value_info(f"o{n}") for n in range(outputs)],
        [numpy_helper.from_array(np.asarray(one), name) for name, one in zip(names, inputs, strict=True)
         if not isinstance(one, tuple)],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def both(serialised: bytes) -> tuple[list[np.ndarray], list[np.ndarray]]:
    session = make_session(serialised, optimize=False)
    rng = np.random.default_rng(1)
    feeds = {value.name: rng.standard_normal(value.shape).astype(np.float32) for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    return session.run(names, feeds), TorchSession(serialised).run(names, feeds)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_an_operator_gives_what_onnx_runtime_gives(case):
    for left, right in zip(*both(model(*case)), strict=True):
        assert right.shape == left.shape
        assert right.dtype == left.dtype
        np.testing.assert_allclose(right, left, rtol=1e-4, atol=1e-5)


def test_an_old_softmax_takes_all_axes_from_its_own_on():
    left, right = both(model("Softmax", [TOKENS], {"axis": 1}, opset=11))
    np.testing.assert_allclose(right[0], left[0], rtol=1e-5)
    assert left[0].reshape(2, -1).sum(axis=1) == pytest.approx(1)


def test_bound_memory_is_read_and_written_in_place():
    session = TorchSession(model("Transpose", [ROWS], {"perm": [1, 0]}))
    source, target = np.zeros(ROWS, np.float32), np.zeros(ROWS[::-1], np.float32)
    binding = session.bind({"i0": source}, {"o0": target})
    for value in (1, 2):
        source[2, 3] = value
        session.run_with_iobinding(binding)
        assert target[3, 2] == value


def test_what_it_cannot_run_is_said_by_name():
    with pytest.raises(InputError, match="operator NonZero here"):
        TorchSession(model("NonZero", [ROWS], {}))
    with pytest.raises(InputError, match="'shape' is not constant"):
        TorchSession(model("Reshape", [ROWS, (1,)], {}))


def test_a_rewritten_model_needs_no_blocked_layout():
    from onnx import load_model_from_string

    serialised = model("Conv", [(1, 16, 8, 8), weight(16, 16, 3, 3)], {"pads": [1] * 4})
    assert {node.domain for node in load_model_from_string(portable_model(serialised)).graph.node} <= {"", "ai.onnx"}
