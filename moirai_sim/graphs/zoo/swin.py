"""Swin Transformer: Liu et al. 2021 (arXiv 2103.14030).

``swin-t``, ``swin-s`` and ``swin-b`` are the paper's. The models of 1.8, 6.6 and 13 billion parameters keep its rules
(heads of depth 32, doubling widths) with widths and depths chosen here to meet the parameter count.
"""

from __future__ import annotations

from functools import partial

from onnx import ModelProto

from moirai_sim.graphs.zoo.builder import Builder, Value
from moirai_sim.graphs.zoo.transformer import feed_forward, heads_first, scores_to_output


def swin(
    name: str, *, width: int, depths: tuple[int, ...], batch: int = 1, image: int = 224, window: int = 7,
    classes: int = 1000, dtype: str = "float32", opset: int = 17,
) -> ModelProto:  # fmt: skip
    """Build four stages of windowed attention, every second block with shifted windows."""
    if image % (32 * window):
        raise ValueError(f"image={image} is no multiple of 32 windows of {window}")
    b = Builder(name, dtype=dtype, opset=opset)
    patches = b.conv(b.input("image", [batch, 3, image, image]), width, 4, stride=4, padding=0, bias=True)
    side = image // 4
    x = b.transpose(b.reshape(patches, [batch, width, side * side]), [0, 2, 1])
    x = b.reshape(b.layer_norm(x), [batch, side, side, width])
    for stage, depth in enumerate(depths):
        with b.scope(f"stage{stage}"):
            if stage:
                x = _merge(b, x)
            for block in range(depth):
                with b.scope(f"block{block}"):
                    shift = window // 2 if block % 2 and x.shape[1] > window else 0
                    x = _block(b, x, window, shift)
    channels = x.shape[-1]
    x = b.layer_norm(b.reshape(x, [batch, x.shape[1] * x.shape[2], channels]))
    pooled = b.op("GlobalAveragePool", [b.transpose(x, [0, 2, 1])], [batch, channels, 1])
    b.output(b.linear(b.op("Flatten", [pooled], [batch, channels], axis=1), classes))
    return b.model()


def _block(b: Builder, x: Value, window: int, shift: int) -> Value:
    y = _windowed_attention(b, b.layer_norm(x), window, shift)
    x = b.add(x, y)
    return b.add(x, feed_forward(b, b.layer_norm(x), 4 * x.shape[-1], b.gelu))


def _windowed_attention(b: Builder, x: Value, window: int, shift: int) -> Value:
    batch, height, width, channels = x.shape
    heads, area = channels // 32, window * window
    rows, columns = height // window, width // window
    with b.scope("attention"):
        if shift:
            x = _roll(b, _roll(b, x, shift, 1), shift, 2)
        tiled = b.transpose(b.reshape(x, [batch, rows, window, columns, window, channels]), [0, 1, 3, 2, 4, 5])
        windows = b.reshape(tiled, [batch * rows * columns, area, channels])
        q, k, v = (heads_first(b, t, heads) for t in b.split(b.linear(windows, 3 * channels), [channels] * 3, axis=2))
        bias = b.weight([1, heads, area, area], 0.01, "relative_position_bias")
        if shift:
            blocked = b.weight([rows * columns, 1, area, area], -0.01, "shift_mask")
            bias = b.add(bias, blocked)
            if batch > 1:
                bias = b.concat([bias] * batch, axis=0)
        mixed = b.linear(scores_to_output(b, q, k, v, bias), channels)
        tiled = b.reshape(mixed, [batch, rows, columns, window, window, channels])
        x = b.reshape(b.transpose(tiled, [0, 1, 3, 2, 4, 5]), [batch, height, width, channels])
        return _roll(b, _roll(b, x, height - shift, 1), width - shift, 2) if shift else x


def _roll(b: Builder, x: Value, shift: int, axis: int) -> Value:
    size = x.shape[axis]
    return b.concat([b.slice(x, shift, size, axis), b.slice(x, 0, shift, axis)], axis)


def _merge(b: Builder, x: Value) -> Value:
    """Join each 2 x 2 patches and project them from four widths to two."""
    batch, height, width, channels = x.shape
    tiled = b.reshape(x, [batch, height // 2, 2, width // 2, 2, channels])
    joined = b.reshape(b.transpose(tiled, [0, 1, 3, 2, 4, 5]), [batch, height // 2, width // 2, 4 * channels])
    return b.linear(b.layer_norm(joined), 2 * channels, bias=False)


_SIZES = {
    "swin-t": (96, (2, 2, 6, 2)),
    "swin-s": (96, (2, 2, 18, 2)),
    "swin-b": (128, (2, 2, 18, 2)),
    "swin-1.8b": (512, (2, 2, 26, 2)),
    "swin-6.6b": (960, (2, 2, 28, 2)),
    "swin-13b": (1344, (2, 2, 28, 2)),
}
MODELS = {name: partial(swin, name, width=width, depths=depths) for name, (width, depths) in _SIZES.items()}
