"""Small random networks whose operators fill the space between those of real models.

An operator is priced in its context (fused with its neighbours, in the layout that they leave it), so a sweep draws
whole blocks, as exports of image networks hold them, with sizes that are log-uniform over what such networks use.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper

PREFIX = "sweep-"
"""Names of sweep models begin so: a calibration does not take them for real models."""
_SIDES = (224, 192, 160, 128, 112, 96, 80, 64, 56, 48, 40, 32, 28, 24, 20, 16, 14, 12, 10, 8, 7)
_CHANNELS = (
    3,
    8,
    16,
    24,
    32,
    40,
    48,
    64,
    80,
    96,
    112,
    128,
    160,
    192,
    224,
    256,
    320,
    384,
    448,
    512,
    640,
    768,
    1024,
    2048,
)
_MAX_ELEMENTS = 900_000
_MAX_MACS = 700_000_000


@dataclass
class _Network:
    """A network under construction; ``at`` is the tensor that the next block reads, of shape 1 x channels x side^2."""

    rng: random.Random
    channels: int
    side: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)
    at: str = "input"

    def add(self, op_type: str, inputs: list[str], **attributes: object) -> str:
        name = f"{op_type.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], name=name, **attributes))
        return name

    def weight(self, *shape: int, value: float = 0.02) -> str:
        """Return a constant that a node makes, so that the file holds no data; the profiler draws random data."""
        shape_name, name = f"shape_{len(self.weights)}", f"weight_{len(self.weights)}"
        self.weights.append(onnx.numpy_helper.from_array(np.array(shape, dtype=np.int64), shape_name))
        filled = helper.make_tensor("value", TensorProto.FLOAT, [1], [value])
        self.nodes.append(helper.make_node("ConstantOfShape", [shape_name], [name], name=name, value=filled))
        return name

    def integers(self, *values: int) -> str:
        name = f"integers_{len(self.weights)}"
        self.weights.append(onnx.numpy_helper.from_array(np.array(values, dtype=np.int64), name))
        return name

    def conv(self, source: str, into: int, kernel: int, *, stride: int = 1, group: int = 1, channels: int = 0) -> str:
        channels = channels or self.channels
        inputs = [source, self.weight(into, channels // group, kernel, kernel)]
        if self.rng.random() < 0.6:
            inputs.append(self.weight(into))
        pad = kernel // 2
        return self.add(
            "Conv", inputs, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4, group=group
        )  # fmt: skip

    def norm(self, source: str, channels: int) -> str:
        positive = [self.weight(channels, value=value) for value in (1.0, 0.1, 0.1, 1.0)]
        return self.add("BatchNormalization", [source, *positive], epsilon=1e-5)

    def scale(self, source: str, channels: int) -> str:
        """Return a per-channel Mul and Add, into which some exporters split a batch normalisation."""
        product = self.add("Mul", [source, self.weight(channels, 1, 1, value=1.1)])
        return self.add("Add", [product, self.weight(channels, 1, 1)])

    def activation(self, source: str) -> str:
        return self.add(self.rng.choice(["Relu"] * 8 + ["Sigmoid", "LeakyRelu"]), [source])


def sweep_model(seed: int, operators: int = 24) -> onnx.ModelProto:
    """Return a random image network of about so many operators; the same seed gives the same network."""
    rng = random.Random(seed)  # noqa: S311 - a design of experiments, nothing secret
    net = _Network(rng, 3, rng.choice(_SIDES[:9]))
    if rng.random() < 0.6:  # a later stage of a network; else it begins with an image
        net.side = rng.choice(_SIDES)
        net.channels = rng.choice([c for c in _CHANNELS if c % 8 == 0 and c * net.side**2 <= _MAX_ELEMENTS])
    start = [1, net.channels, net.side, net.side]
    blocks = (
        [_plain] * 6 + [_residual] * 2 + [_branches] * 2 + [_fire] * 2 + [_dense] * 3 + [_shuffle] * 3 + [_pool] * 3
    )
    while len([node for node in net.nodes if node.op_type != "ConstantOfShape"]) < operators and net.side >= 4:
        rng.choice([*blocks, _response])(net)
    pooled = net.add("GlobalAveragePool", [net.at])
    flat = net.add("Flatten", [pooled], axis=1)
    classes = rng.choice([10, 100, 365, 1000])
    logits = net.add("Gemm", [flat, net.weight(classes, net.channels), net.weight(classes)], transB=1)
    out = net.add("Softmax", [logits], axis=1)
    graph = helper.make_graph(
        net.nodes,
        f"{PREFIX}{seed}",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, start)],
        [helper.make_tensor_value_info(out, TensorProto.FLOAT, [1, classes])],
        net.weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def _next_channels(net: _Network, kernel: int, stride: int = 1) -> int:
    """Draw an output width that keeps tensors and work within what a sweep can afford."""
    side = net.side // stride
    fits = [
        c
        for c in _CHANNELS[1:]
        if c * side**2 <= _MAX_ELEMENTS and c * net.channels * kernel**2 * side**2 <= _MAX_MACS
        and net.channels // 8 <= c <= max(net.channels * 8, 128)
    ]  # fmt: skip
    return net.rng.choice(fits or [net.channels])


def _stride(net: _Network) -> int:
    return 2 if net.side >= 14 and net.side % 2 == 0 and net.rng.random() < 0.3 else 1


def _plain(net: _Network) -> None:
    """Convolution, with or without normalisation and activation."""
    kernel = net.rng.choice([1, 1, 1, 3, 3, 3, 5, 7, 11])
    kernel = min(kernel, max(net.side - 1 + net.side % 2, 1))
    stride = _stride(net)
    into = _next_channels(net, kernel, stride)
    net.at = net.conv(net.at, into, kernel, stride=stride)
    net.side, net.channels = (net.side - 1) // stride + 1, into
    style = net.rng.random()
    if style < 0.5:
        net.at = net.norm(net.at, into)
    elif style < 0.6:
        net.at = net.scale(net.norm(net.at, into), into)
    if net.rng.random() < 0.8:
        net.at = net.activation(net.at)


def _residual(net: _Network) -> None:
    """Bottleneck with an identity or projected shortcut (He et al., CVPR 2016)."""
    inner, into, start = max(net.channels // 4, 8), net.channels, net.at
    tail = net.add("Relu", [net.norm(net.conv(start, inner, 1), inner)])
    tail = net.add("Relu", [net.norm(net.conv(tail, inner, 3, channels=inner), inner)])
    if net.rng.random() < 0.4:
        into = _next_channels(net, 1)
        start = net.norm(net.conv(start, into, 1), into)
    tail = net.norm(net.conv(tail, into, 1, channels=inner), into)
    net.at = net.add("Relu", [net.add(net.rng.choice(["Add", "Sum"]), [tail, start])])
    net.channels = into


def _branches(net: _Network) -> None:
    """Inception module (Szegedy et al., CVPR 2015): branches of several windows, concatenated."""
    outputs, widths = [], []
    for kernel in net.rng.sample([1, 3, 5, 3], net.rng.choice([2, 3, 4])):
        width = net.rng.choice([c for c in _CHANNELS[1:12] if c <= max(net.channels, 16)])
        reduced = max(width // 2, 8)
        source = net.activation(net.conv(net.at, reduced, 1)) if kernel > 1 else net.at
        branch = net.conv(source, width, kernel, channels=reduced if kernel > 1 else net.channels)
        branch = net.norm(branch, width) if net.rng.random() < 0.5 else branch
        outputs.append(net.activation(branch))
        widths.append(width)
    if net.rng.random() < 0.6:
        kind = net.rng.choice(["MaxPool", "AveragePool"])
        pooled = net.add(kind, [net.at], kernel_shape=[3, 3], strides=[1, 1], pads=[1, 1, 1, 1])
        widths.append(net.rng.choice(_CHANNELS[2:8]))
        outputs.append(net.add("Relu", [net.conv(pooled, widths[-1], 1)]))
    net.at, net.channels = net.add("Concat", outputs, axis=1), sum(widths)


def _fire(net: _Network) -> None:
    """Squeeze and expand (Iandola et al., 2016)."""
    squeezed = net.rng.choice(_CHANNELS[2:8])
    width = squeezed * 4
    if 2 * width * net.side**2 > _MAX_ELEMENTS:
        return _pool(net)
    thin = net.add("Relu", [net.conv(net.at, squeezed, 1)])
    sides = [net.add("Relu", [net.conv(thin, width, kernel, channels=squeezed)]) for kernel in (1, 3)]
    net.at, net.channels = net.add("Concat", sides, axis=1), 2 * width
    return None


def _dense(net: _Network) -> None:
    """Pre-activated layers of a dense block (Huang et al., CVPR 2017): nothing to fuse the normalisation into."""
    split = net.rng.random() < 0.6
    growth = net.rng.choice([16, 32, 48])
    for _ in range(net.rng.choice([1, 2, 3])):
        if (net.channels + growth) * net.side**2 > _MAX_ELEMENTS:
            return
        before = net.norm(net.at, net.channels)
        tail = net.add("Relu", [net.scale(before, net.channels) if split else before])
        tail = net.norm(net.conv(tail, 4 * growth, 1), 4 * growth)
        tail = net.add("Relu", [net.scale(tail, 4 * growth) if split else tail])
        tail = net.conv(tail, growth, 3, channels=4 * growth)
        net.at = net.add("Concat", [net.at, tail], axis=1)
        net.channels += growth


def _shuffle(net: _Network) -> None:
    """Group convolutions around a channel shuffle and a depthwise one (Zhang et al., CVPR 2018)."""
    groups = net.rng.choice([2, 3, 4, 8])
    width = groups * net.rng.choice([4, 8, 14, 17, 24, 34, 40, 68])
    if width * net.side**2 > _MAX_ELEMENTS or net.channels % groups:
        return _depthwise(net)
    start, channels = net.at, net.channels
    tail = net.add("Relu", [net.norm(net.conv(start, width, 1, group=groups), width)])
    split = net.integers(1, groups, width // groups, net.side, net.side)
    tail = net.add("Transpose", [net.add("Reshape", [tail, split])], perm=[0, 2, 1, 3, 4])
    tail = net.add("Reshape", [tail, net.integers(1, width, net.side, net.side)])
    tail = net.norm(net.conv(tail, width, 3, group=width, channels=width), width)
    tail = net.norm(net.conv(tail, channels, 1, group=groups, channels=width), channels)
    net.at = net.add("Relu", [net.add(net.rng.choice(["Add", "Sum"]), [tail, start])])
    return None


def _depthwise(net: _Network) -> None:
    """Depthwise and pointwise convolution (Howard et al., 2017)."""
    kernel, stride = net.rng.choice([3, 3, 5]), _stride(net)
    tail = net.norm(net.conv(net.at, net.channels, kernel, stride=stride, group=net.channels), net.channels)
    net.side = (net.side - 1) // stride + 1
    into = _next_channels(net, 1)
    net.at = net.activation(net.norm(net.conv(net.add("Relu", [tail]), into, 1), into))
    net.channels = into


def _pool(net: _Network) -> None:
    kernel, stride = net.rng.choice([(2, 2), (3, 2), (3, 2), (3, 1)])
    if net.side < 6:
        stride = 1
    kernel = min(kernel, net.side)
    pad = 1 if kernel == 3 else 0
    kind = net.rng.choice(["MaxPool", "MaxPool", "AveragePool"])
    net.at = net.add(kind, [net.at], kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4)
    net.side = (net.side + 2 * pad - kernel) // stride + 1


def _response(net: _Network) -> None:
    """Local response normalisation (Krizhevsky et al., 2012)."""
    if net.channels * net.side**2 < 300_000:
        net.at = net.add("LRN", [net.at], size=5, alpha=1e-4, beta=0.75, bias=1.0)


def sweep_transformer(seed: int) -> onnx.ModelProto:
    """Return one block of a transformer of random sizes, for text or for images; the same seed gives the same block."""
    from moirai_sim.graphs.zoo.bert import bert
    from moirai_sim.graphs.zoo.gpt import gpt
    from moirai_sim.graphs.zoo.vit import vit

    rng = random.Random(seed)  # noqa: S311 - a design of experiments, nothing secret
    depth = rng.choice([32, 64, 64, 64, 80, 128])
    heads = rng.choice([h for h in (2, 3, 4, 6, 8, 10, 12, 16, 20) if 128 <= h * depth <= 1280])
    name, width, length = f"{PREFIX}transformer-{seed}", heads * depth, round(16 * 24 ** rng.random())
    kind = rng.choice(["bert", "gpt", "vit"])
    if kind == "bert":
        return bert(name, layers=1, hidden=width, heads=heads, seq=length, vocabulary=2000)
    if kind == "gpt":
        return gpt(name, layers=1, hidden=width, heads=heads, seq=length, vocabulary=2000)
    patch = rng.choice([14, 16, 32])
    return vit(name, layers=1, hidden=width, heads=heads, patch=patch, image=patch * rng.choice([6, 7, 10, 12, 14, 16]))
