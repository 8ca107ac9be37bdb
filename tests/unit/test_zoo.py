"""The zoo: published sizes, valid ONNX, and runs where it is small enough."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest

from moirai_sim.errors import InputError
from moirai_sim.graphs.load import load_graph
from moirai_sim.graphs.zoo import zoo_model, zoo_names, zoo_parameters

# Name: (parameters, tolerance, multiply-adds of one run or None, tolerance). Parameters that a graph stores beyond the
# published ones are constants: batch statistics, causal masks, the relative position bias written out for every pair.
PUBLISHED = {
    # torchvision model cards
    "resnet18": (11.69e6, 0.01, 1.81e9, 0.01),
    "resnet34": (21.80e6, 0.01, 3.66e9, 0.01),
    "resnet50": (25.56e6, 0.01, 4.09e9, 0.01),
    "resnet101": (44.55e6, 0.01, 7.80e9, 0.01),
    "resnet152": (60.19e6, 0.01, 11.51e9, 0.01),
    "googlenet": (6.62e6, 0.01, 1.50e9, 0.01),
    "inception-v3": (23.83e6, 0.01, 5.71e9, 0.01),  # parameters without the auxiliary head: timm
    "vit-ti": (5.72e6, 0.01, 1.26e9, 0.01),  # timm
    "vit-s": (22.05e6, 0.01, 4.61e9, 0.01),  # timm
    "vit-b": (86.57e6, 0.01, 17.56e9, 0.01),
    "vit-l": (304.3e6, 0.01, 61.55e9, 0.01),
    "vit-h": (632.0e6, 0.01, 167.29e9, 0.01),
    "swin-t": (28.29e6, 0.05, 4.49e9, 0.02),
    "swin-s": (49.61e6, 0.05, 8.74e9, 0.02),
    "swin-b": (87.77e6, 0.04, 15.43e9, 0.02),
    "inception-v4": (42.68e6, 0.01, 12.28e9, 0.01),  # timm
    # ultralytics/yolov5 release 6, FLOPs at 640
    "yolov5n": (1.9e6, 0.03, 4.5e9 / 2, 0.02),
    "yolov5s": (7.2e6, 0.01, 16.5e9 / 2, 0.02),
    "yolov5m": (21.2e6, 0.01, 49.0e9 / 2, 0.02),
    "yolov5l": (46.5e6, 0.01, 109.1e9 / 2, 0.02),
    "yolov5x": (86.7e6, 0.01, 205.7e9 / 2, 0.02),
    "unet": (31.04e6, 0.01, None, 0),  # milesial/Pytorch-UNet
    # Xie et al. 2019, table 2, mean over wirings
    "ws-32": (5.6e6, 0.05, 583e6, 0.05),
    "er-32": (5.6e6, 0.08, 583e6, 0.08),
    "ba-32": (5.6e6, 0.08, 583e6, 0.08),
    "bert-small": (28.8e6, 0.01, None, 0),
    "bert-base": (110e6, 0.02, 22.5e9 / 2, 0.02),  # Sun et al. 2020 (MobileBERT), table 4, at 128 tokens
    "bert-large": (335e6, 0.02, None, 0),
    "gpt2": (124.4e6, 0.02, None, 0),
    "gpt2-xl": (1558e6, 0.02, None, 0),
    # Brown et al. 2020; the 330M model counts no position and half of the token embedding
    "gpt3-330m": (350e6, 0.03, None, 0),
    "gpt3-1.3b": (1.3e9, 0.02, None, 0),
    "gpt3-2.7b": (2.7e9, 0.02, None, 0),
    "gpt3-13b": (13e9, 0.02, None, 0),
    "gpt3-175b": (175e9, 0.01, None, 0),
    "llama2-7b": (6.738e9, 0.001, None, 0),
    "llama2-70b": (68.98e9, 0.001, None, 0),
    "llama3-8b": (8.030e9, 0.001, None, 0),
    "llama3-70b": (70.55e9, 0.001, None, 0),
    "mixtral-8x7b": (46.70e9, 0.001, None, 0),
    # by name
    "swin-1.8b": (1.8e9, 0.02, None, 0),
    "swin-6.6b": (6.6e9, 0.02, None, 0),
    "swin-13b": (13e9, 0.02, None, 0),
    "alphafold2-87m": (87e6, 0.02, None, 0),
    "alphafold2-240m": (240e6, 0.02, None, 0),
    "alphafold2-730m": (730e6, 0.02, None, 0),
    "alphafold2-930m": (930e6, 0.02, None, 0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_work_are_as_published(name):
    parameters, tolerance, macs, macs_tolerance = PUBLISHED[name]
    graph = load_graph(f"zoo:{name}")
    item = 2 if "dtype" in zoo_parameters(name) and zoo_parameters(name)["dtype"] == "float16" else 4
    assert graph.weight_bytes / item == pytest.approx(parameters, rel=tolerance)
    if macs is not None:
        assert graph.flops / 2 == pytest.approx(macs, rel=macs_tolerance)
    assert not any(operator.bytes_only for operator in graph)


# Layers that the papers draw. ResNet-n has n - 1 convolutions besides the 1x1 ones of its 3 or 4 changes of width.
# A layer of BERT has six products with weights and two of attention; ViT and GPT fuse query, key and value into one.
OPERATORS = {
    "resnet18": {"Conv": 17 + 3, "Gemm": 1},
    "resnet50": {"Conv": 49 + 4, "Gemm": 1},
    "resnet152": {"Conv": 151 + 4, "Gemm": 1},
    "googlenet": {"Conv": 3 + 9 * 6, "MaxPool": 4 + 9, "Gemm": 1},
    "inception-v3": {"Conv": 94},  # torchvision
    "inception-v4": {"Conv": 149},  # timm
    "unet": {"Conv": 9 * 2 + 1, "ConvTranspose": 4, "MaxPool": 4},
    "bert-base": {"MatMul": 12 * 8 + 1, "Softmax": 12},  # and the pooler
    "vit-b": {"Conv": 1, "MatMul": 12 * 6 + 1, "Softmax": 12},
    "gpt3-1.3b": {"MatMul": 24 * 6 + 1, "Softmax": 24},
    "gpt3-13b": {"MatMul": 40 * 6 + 1, "Softmax": 40},
}


@pytest.mark.parametrize("name", OPERATORS)
def test_layers_are_as_many_as_published(name):
    counts = Counter(operator.op_type for operator in load_graph(f"zoo:{name}"))
    assert {op_type: counts[op_type] for op_type in OPERATORS[name]} == OPERATORS[name]


@pytest.mark.parametrize(
    ("name", "layers", "hidden", "vocabulary"), [("gpt3-175b", 96, 12288, 50257), ("gpt3-1.3b", 24, 2048, 50257)]
)
def test_gpt_work_is_the_closed_form(name, layers, hidden, vocabulary):
    """24 h^2 + 4 s h operations a token and layer, 2 h V for the output (Narayanan et al. 2021, arXiv 2104.04473)."""
    seq = 2048
    closed = seq * (layers * (24 * hidden**2 + 4 * seq * hidden) + 2 * hidden * vocabulary)
    assert load_graph(f"zoo:{name}").flops == pytest.approx(closed, rel=0.015)


def test_unet_work_is_the_closed_form():
    def level(side, before, channels):
        return side**2 * 9 * channels * (before + channels)

    down = level(256, 3, 64) + sum(level(256 >> i, 32 << i, 64 << i) for i in range(1, 5))
    up = sum(level(256 >> i, 128 << i, 64 << i) + (256 >> i) ** 2 * (128 << i) * (64 << i) for i in range(4))
    assert load_graph("zoo:unet").flops / 2 == pytest.approx(down + up, rel=0.01)


def test_mixture_activates_two_experts_of_eight():
    shape = "layers=1&hidden=512&heads=8&kv_heads=8&vocabulary=8&feed_forward=1024&seq=512"
    sparse, dense = load_graph(f"zoo:mixtral-8x7b?{shape}"), load_graph(f"zoo:llama2-7b?{shape}")
    layer = 2 * 512 * 3 * 512 * 1024
    assert sparse.flops - dense.flops == pytest.approx(layer, rel=0.05), "two experts instead of one dense layer"


@pytest.mark.parametrize("name", zoo_names())
def test_models_are_valid_onnx(name):
    model = zoo_model(name)
    onnx.checker.check_model(model)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    assert model.ByteSize() < 3_000_000, "weights are declared, not stored"


TINY_LLAMA = "layers=1&hidden=64&heads=4&kv_heads=2&feed_forward=96&vocabulary=100&dtype=float32"


@pytest.mark.parametrize(
    "name",
    [
        "resnet18?image=64",
        "gpt2?layers=2&hidden=64&heads=4&seq=16&vocabulary=100",
        "gpt2?layers=1&hidden=64&heads=4&seq=16&vocabulary=100&opset=16",
        "bert-base?layers=1&hidden=64&heads=4&seq=16&vocabulary=100",
        f"llama2-7b?{TINY_LLAMA}&seq=8",
        f"llama3-8b?{TINY_LLAMA}&seq=1&past=7",
        f"mixtral-8x7b?{TINY_LLAMA}&seq=8",
        "swin-t?batch=2",
        "vit-b?layers=1",
        "unet?width=8&image=32",
        "googlenet?image=64",
        "yolov5n?image=64",
        "ws-32?image=32",
        "alphafold2-87m?blocks=1&residues=8&sequences=4",
    ],
)
def test_small_models_run(name):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(zoo_model(name).SerializeToString(), options, ["CPUExecutionProvider"])
    feeds = {
        item.name: np.ones(item.shape, dtype=np.int64 if "int64" in item.type else np.float32)
        for item in session.get_inputs()
    }
    shapes = {t.name: t.shape for operator in load_graph(f"zoo:{name}") for t in operator.outputs}
    for info, value in zip(session.get_outputs(), session.run(None, feeds), strict=True):
        assert shapes[info.name] == value.shape
        assert np.isfinite(value).all()
        assert (np.abs(value) > 1e-6).all()


def test_seed_draws_the_wiring():
    assert zoo_model("er-32?seed=1") == zoo_model("er-32?seed=1")
    assert zoo_model("er-32?seed=1") != zoo_model("er-32?seed=2")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt-3", "did you mean 'gpt2'|did you mean 'gpt3"),
        ("gpt2?sequence=3", "unknown parameter 'sequence'"),
        ("gpt2?seq=many", "cannot read seq in 'seq=many'"),
        ("gpt2?heads=7", "7 heads do not divide 768"),
        ("ws-32?nodes=3", "cannot be built with nodes=3"),
        ("ba-32?nodes=5", "cannot be built with nodes=5"),
        ("gpt2?dtype=int8", "dtype=int8 is none of float32, float16, bfloat16"),
    ],
)
def test_wrong_names_and_parameters_are_told(name, message):
    with pytest.raises(InputError, match=message):
        zoo_model(name)
