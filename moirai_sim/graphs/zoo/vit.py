"""Vision Transformer: Dosovitskiy et al. 2021 (arXiv 2010.11929); tiny and small: Touvron et al. 2021 (DeiT)."""

from __future__ import annotations

from functools import partial

from onnx import ModelProto

from moirai_sim.graphs.zoo.builder import Builder
from moirai_sim.graphs.zoo.transformer import pre_norm_block


def vit(
    name: str, *, layers: int, hidden: int, heads: int, patch: int, batch: int = 1, image: int = 224,
    classes: int = 1000, dtype: str = "float32", opset: int = 17,
) -> ModelProto:  # fmt: skip
    """Build an encoder over square patches with a class token."""
    b = Builder(name, dtype=dtype, opset=opset)
    patches = b.conv(b.input("image", [batch, 3, image, image]), hidden, patch, stride=patch, padding=0, bias=True)
    length = (image // patch) ** 2
    x = b.transpose(b.reshape(patches, [batch, hidden, length]), [0, 2, 1])
    x = b.concat([b.weight([batch, 1, hidden], 0.01, "class_token"), x], axis=1)
    x = b.add(x, b.weight([1, length + 1, hidden], 0.01, "position_embedding"))
    for layer in range(layers):
        with b.scope(f"layer{layer}"):
            x = pre_norm_block(b, x, heads, None, b.gelu)
    first = b.reshape(b.slice(b.layer_norm(x), 0, 1, axis=1), [batch, hidden])
    b.output(b.linear(first, classes))
    return b.model()


MODELS = {
    "vit-ti": partial(vit, "vit-ti", layers=12, hidden=192, heads=3, patch=16),
    "vit-s": partial(vit, "vit-s", layers=12, hidden=384, heads=6, patch=16),
    "vit-b": partial(vit, "vit-b", layers=12, hidden=768, heads=12, patch=16),
    "vit-l": partial(vit, "vit-l", layers=24, hidden=1024, heads=16, patch=16),
    "vit-h": partial(vit, "vit-h", layers=32, hidden=1280, heads=16, patch=14),
}
