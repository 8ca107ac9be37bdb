"""ResNet: He et al. 2016 (arXiv 1512.03385), with the stride in the 3 x 3 convolution as torchvision has it."""

from __future__ import annotations

from functools import partial

from onnx import ModelProto

from moirai_sim.graphs.zoo.builder import Builder, Value


def resnet(
    name: str, *, depths: tuple[int, ...], bottleneck: bool = True, batch: int = 1, image: int = 224,
    dtype: str = "float32",
) -> ModelProto:  # fmt: skip
    """Build a stem and four stages of residual blocks."""
    b = Builder(name, dtype=dtype)
    x = b.input("image", [batch, 3, image, image])
    x = b.relu(b.batch_norm(b.conv(x, 64, 7, stride=2)))
    x = b.pool("MaxPool", x, 3, stride=2, padding=1)
    block = _bottleneck if bottleneck else _basic
    for stage, depth in enumerate(depths):
        for i in range(depth):
            with b.scope(f"stage{stage}/block{i}"):
                x = block(b, x, 64 << stage, stride=2 if stage and not i else 1)
    b.output(b.classifier(x))
    return b.model()


def _residual(b: Builder, x: Value, y: Value, stride: int) -> Value:
    if x.shape != y.shape:
        with b.scope("shortcut"):
            x = b.batch_norm(b.conv(x, y.shape[1], 1, stride=stride))
    return b.relu(b.add(y, x))


def _basic(b: Builder, x: Value, channels: int, stride: int) -> Value:
    y = b.relu(b.batch_norm(b.conv(x, channels, 3, stride=stride)))
    return _residual(b, x, b.batch_norm(b.conv(y, channels, 3)), stride)


def _bottleneck(b: Builder, x: Value, channels: int, stride: int) -> Value:
    y = b.relu(b.batch_norm(b.conv(x, channels, 1)))
    y = b.relu(b.batch_norm(b.conv(y, channels, 3, stride=stride)))
    return _residual(b, x, b.batch_norm(b.conv(y, 4 * channels, 1)), stride)


MODELS = {
    "resnet18": partial(resnet, "resnet18", depths=(2, 2, 2, 2), bottleneck=False),
    "resnet34": partial(resnet, "resnet34", depths=(3, 4, 6, 3), bottleneck=False),
    "resnet50": partial(resnet, "resnet50", depths=(3, 4, 6, 3)),
    "resnet101": partial(resnet, "resnet101", depths=(3, 4, 23, 3)),
    "resnet152": partial(resnet, "resnet152", depths=(3, 8, 36, 3)),
}
