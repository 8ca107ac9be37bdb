"""U-Net: Ronneberger et al. 2015 (arXiv 1505.04597).

With padded convolutions and batch normalisation, as is usual today.
"""

from __future__ import annotations

from functools import partial

from onnx import ModelProto

from moirai_sim.graphs.zoo.builder import Builder, Value


def unet(
    name: str, *, width: int = 64, batch: int = 1, image: int = 256, classes: int = 2, dtype: str = "float32"
) -> ModelProto:
    """Build four levels down and up again, joined by skip connections."""
    if image % 16:
        raise ValueError(f"image={image} is no multiple of 16")
    b = Builder(name, dtype=dtype)
    x = _double(b, b.input("image", [batch, 3, image, image]), width, "down0")
    skips = []
    for level in range(1, 5):
        skips.append(x)
        x = _double(b, b.pool("MaxPool", x, 2, stride=2), width << level, f"down{level}")
    for level in range(3, -1, -1):
        n, c, h, w = x.shape
        weights = [b.weight([c, c // 2, 2, 2], 1 / c), b.weight([c // 2], 0.01, "bias")]
        x = b.op(
            "ConvTranspose", [x, *weights], [n, c // 2, 2 * h, 2 * w], kernel_shape=[2, 2], strides=[2, 2]
        )  # fmt: skip
        x = _double(b, b.concat([skips[level], x], 1), width << level, f"up{level}")
    b.output(b.conv(x, classes, 1, bias=True))
    return b.model()


def _double(b: Builder, x: Value, channels: int, name: str) -> Value:
    with b.scope(name):
        for _ in range(2):
            x = b.relu(b.batch_norm(b.conv(x, channels, 3)))
        return x


MODELS = {"unet": partial(unet, "unet")}
