"""GoogLeNet (Szegedy et al. 2015, arXiv 1409.4842), Inception v3 (1512.00567) and v4 (1602.07261).

Without the auxiliary heads, which serve training only.
"""

from __future__ import annotations

from functools import partial

from onnx import ModelProto

from moirai_sim.graphs.zoo.builder import Builder, Value

_Kernel = int | tuple[int, int]
_WIDE, _TALL = (1, 7), (7, 1)


def _conv(
    b: Builder, x: Value, channels: int, kernel: _Kernel = 1, *, stride: int = 1, padding: int | None = None
) -> Value:
    return b.relu(b.batch_norm(b.conv(x, channels, kernel, stride=stride, padding=padding)))


def _chain(b: Builder, x: Value, *layers: tuple[int, _Kernel]) -> Value:
    for channels, kernel in layers:
        x = _conv(b, x, channels, kernel)
    return x


def _pooled(b: Builder, x: Value, channels: int) -> Value:
    return _conv(b, b.pool("AveragePool", x, 3, stride=1, padding=1), channels)


def googlenet(name: str, *, batch: int = 1, image: int = 224, dtype: str = "float32") -> ModelProto:
    """Build GoogLeNet with batch normalisation, and 3 x 3 for 5 x 5 windows, as torchvision has it."""
    b = Builder(name, dtype=dtype)
    x = _conv(b, b.input("image", [batch, 3, image, image]), 64, 7, stride=2)
    x = b.pool("MaxPool", x, 3, stride=2, ceil=True)
    x = _chain(b, x, (64, 1), (192, 3))
    x = b.pool("MaxPool", x, 3, stride=2, ceil=True)
    blocks: tuple[tuple[int, ...] | int, ...] = (
        (64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64), 3,
        (192, 96, 208, 16, 48, 64), (160, 112, 224, 24, 64, 64), (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64), (256, 160, 320, 32, 128, 128), 2,
        (256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128),
    )  # fmt: skip
    for i, block in enumerate(blocks):
        with b.scope(f"inception{i}"):
            if isinstance(block, int):
                x = b.pool("MaxPool", x, block, stride=2, ceil=True)
                continue
            one, reduce3, three, reduce5, five, pool = block
            side = _conv(b, b.pool("MaxPool", x, 3, stride=1, padding=1), pool)
            x = b.concat(
                [_conv(b, x, one), _chain(b, x, (reduce3, 1), (three, 3)), _chain(b, x, (reduce5, 1), (five, 3)), side],
                1,
            )
    b.output(b.classifier(x))
    return b.model()


def inception_v3(name: str, *, batch: int = 1, image: int = 299, dtype: str = "float32") -> ModelProto:
    """Build Inception v3 as torchvision has it."""
    b = Builder(name, dtype=dtype)
    x = b.input("image", [batch, 3, image, image])
    x = _conv(b, x, 32, 3, stride=2, padding=0)
    x = _conv(b, _conv(b, x, 32, 3, padding=0), 64, 3)
    x = b.pool("MaxPool", x, 3, stride=2)
    x = _conv(b, _conv(b, x, 80), 192, 3, padding=0)
    x = b.pool("MaxPool", x, 3, stride=2)
    for pool in (32, 64, 64):
        branches = [_conv(b, x, 64), _chain(b, x, (48, 1), (64, 5)), _chain(b, x, (64, 1), (96, 3), (96, 3))]
        x = b.concat([*branches, _pooled(b, x, pool)], 1)
    double = _conv(b, _chain(b, x, (64, 1), (96, 3)), 96, 3, stride=2, padding=0)
    x = b.concat([_conv(b, x, 384, 3, stride=2, padding=0), double, b.pool("MaxPool", x, 3, stride=2)], 1)
    for c in (128, 160, 160, 192):
        deep = _chain(b, x, (c, 1), (c, _TALL), (c, _WIDE), (c, _TALL), (192, _WIDE))
        x = b.concat([_conv(b, x, 192), _chain(b, x, (c, 1), (c, _WIDE), (192, _TALL)), deep, _pooled(b, x, 192)], 1)
    left = _conv(b, _conv(b, x, 192), 320, 3, stride=2, padding=0)
    right = _conv(b, _chain(b, x, (192, 1), (192, _WIDE), (192, _TALL)), 192, 3, stride=2, padding=0)
    x = b.concat([left, right, b.pool("MaxPool", x, 3, stride=2)], 1)
    for _ in range(2):
        three, double = _conv(b, x, 384), _chain(b, x, (448, 1), (384, 3))
        split = [_conv(b, y, 384, kernel) for y in (three, double) for kernel in ((1, 3), (3, 1))]
        x = b.concat([_conv(b, x, 320), b.concat(split[:2], 1), b.concat(split[2:], 1), _pooled(b, x, 192)], 1)
    b.output(b.classifier(x))
    return b.model()


def inception_v4(name: str, *, batch: int = 1, image: int = 299, dtype: str = "float32") -> ModelProto:
    """Build Inception v4 (figures 3 to 9 of the paper)."""
    b = Builder(name, dtype=dtype)
    x = b.input("image", [batch, 3, image, image])
    x = _conv(b, x, 32, 3, stride=2, padding=0)
    x = _conv(b, _conv(b, x, 32, 3, padding=0), 64, 3)
    x = b.concat([b.pool("MaxPool", x, 3, stride=2), _conv(b, x, 96, 3, stride=2, padding=0)], 1)
    left = _conv(b, _conv(b, x, 64), 96, 3, padding=0)
    right = _conv(b, _chain(b, x, (64, 1), (64, _WIDE), (64, _TALL)), 96, 3, padding=0)
    x = b.concat([left, right], 1)
    x = b.concat([_conv(b, x, 192, 3, stride=2, padding=0), b.pool("MaxPool", x, 3, stride=2)], 1)
    for _ in range(4):
        branches = [_conv(b, x, 96), _chain(b, x, (64, 1), (96, 3)), _chain(b, x, (64, 1), (96, 3), (96, 3))]
        x = b.concat([*branches, _pooled(b, x, 96)], 1)
    double = _conv(b, _chain(b, x, (192, 1), (224, 3)), 256, 3, stride=2, padding=0)
    x = b.concat([_conv(b, x, 384, 3, stride=2, padding=0), double, b.pool("MaxPool", x, 3, stride=2)], 1)
    for _ in range(7):
        deep = _chain(b, x, (192, 1), (192, _TALL), (224, _WIDE), (224, _TALL), (256, _WIDE))
        single = _chain(b, x, (192, 1), (224, _WIDE), (256, _TALL))
        x = b.concat([_conv(b, x, 384), single, deep, _pooled(b, x, 128)], 1)
    left = _conv(b, _conv(b, x, 192), 192, 3, stride=2, padding=0)
    right = _conv(b, _chain(b, x, (256, 1), (256, _WIDE), (320, _TALL)), 320, 3, stride=2, padding=0)
    x = b.concat([left, right, b.pool("MaxPool", x, 3, stride=2)], 1)
    for _ in range(3):
        single, double = _conv(b, x, 384), _chain(b, x, (384, 1), (448, (3, 1)), (512, (1, 3)))
        split = [_conv(b, y, 256, kernel) for y in (single, double) for kernel in ((1, 3), (3, 1))]
        x = b.concat([_conv(b, x, 256), *split, _pooled(b, x, 256)], 1)
    b.output(b.classifier(x))
    return b.model()


MODELS = {
    "googlenet": partial(googlenet, "googlenet"),
    "inception-v3": partial(inception_v3, "inception-v3"),
    "inception-v4": partial(inception_v4, "inception-v4"),
}
