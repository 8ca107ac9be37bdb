"""YOLOv5: the detector of Ultralytics, release 6 (doi 10.5281/zenodo.3908559), up to its raw predictions."""

from __future__ import annotations

from functools import partial

from onnx import ModelProto

from moirai_sim.graphs.zoo.builder import Builder, Value


class _Scaled:
    """The layers of a model whose widths and depths are multiples of the large one's."""

    def __init__(self, b: Builder, width: float, depth: float) -> None:
        self.b = b
        self.width = width
        self.depth = depth

    def channels(self, count: int) -> int:
        return -(-int(count * self.width) // 8) * 8

    def conv(self, x: Value, channels: int, kernel: int = 1, *, stride: int = 1, padding: int | None = None) -> Value:
        b = self.b
        return b.silu(b.batch_norm(b.conv(x, channels, kernel, stride=stride, padding=padding)))

    def down(self, x: Value, channels: int) -> Value:
        return self.conv(x, self.channels(channels), 3, stride=2)

    def c3(self, x: Value, channels: int, repeats: int, *, shortcut: bool = True) -> Value:
        """Cross-stage partial block with bottlenecks."""
        size = self.channels(channels)
        left = self.conv(x, size // 2)
        for _ in range(max(round(repeats * self.depth), 1)):
            inner = self.conv(self.conv(left, size // 2), size // 2, 3)
            left = self.b.add(left, inner) if shortcut else inner
        return self.conv(self.b.concat([left, self.conv(x, size // 2)], 1), size)

    def spatial_pyramid(self, x: Value, channels: int) -> Value:
        """Three chained poolings of 5 x 5."""
        parts = [self.conv(x, x.shape[1] // 2)]
        for _ in range(3):
            parts.append(self.b.pool("MaxPool", parts[-1], 5, stride=1, padding=2))
        return self.conv(self.b.concat(parts, 1), self.channels(channels))

    def up(self, x: Value) -> Value:
        n, c, h, w = x.shape
        sizes = self.b.integers([n, c, 2 * h, 2 * w])
        return self.b.op("Resize", [x, None, None, sizes], [n, c, 2 * h, 2 * w], mode="nearest")


def yolov5(
    name: str,
    *,
    scale: tuple[float, float],
    batch: int = 1,
    image: int = 640,
    classes: int = 80,
    dtype: str = "float32",
) -> ModelProto:
    """Build backbone, neck and the three prediction heads."""
    b = Builder(name, dtype=dtype)
    net = _Scaled(b, *scale)
    x = net.conv(b.input("image", [batch, 3, image, image]), net.channels(64), 6, stride=2, padding=2)
    x = net.c3(net.down(x, 128), 128, 3)
    p3 = net.c3(net.down(x, 256), 256, 6)
    p4 = net.c3(net.down(p3, 512), 512, 9)
    p5 = net.spatial_pyramid(net.c3(net.down(p4, 1024), 1024, 3), 1024)
    top = net.conv(p5, net.channels(512))
    middle = net.c3(b.concat([net.up(top), p4], 1), 512, 3, shortcut=False)
    lateral = net.conv(middle, net.channels(256))
    small = net.c3(b.concat([net.up(lateral), p3], 1), 256, 3, shortcut=False)
    medium = net.c3(b.concat([net.down(small, 256), lateral], 1), 512, 3, shortcut=False)
    large = net.c3(b.concat([net.down(medium, 512), top], 1), 1024, 3, shortcut=False)
    rows = []
    for level, feature in enumerate((small, medium, large)):
        with b.scope(f"detect{level}"):
            raw = b.conv(feature, 3 * (classes + 5), 1, bias=True)
            n, _, h, w = raw.shape
            boxes = b.transpose(b.reshape(raw, [n, 3, classes + 5, h, w]), [0, 1, 3, 4, 2])
            rows.append(b.reshape(b.unary("Sigmoid", boxes), [n, 3 * h * w, classes + 5]))
    b.output(b.concat(rows, 1))
    return b.model()


_SCALES = {
    "yolov5n": (0.25, 0.33),
    "yolov5s": (0.5, 0.33),
    "yolov5m": (0.75, 0.67),
    "yolov5l": (1.0, 1.0),
    "yolov5x": (1.25, 1.33),
}
MODELS = {name: partial(yolov5, name, scale=scale) for name, scale in _SCALES.items()}
