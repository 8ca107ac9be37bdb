"""BERT: Devlin et al. 2019 (arXiv 1810.04805), small: Turc et al. 2019 (arXiv 1908.08962). Encoder and pooler."""

from __future__ import annotations

from functools import partial

from onnx import ModelProto

from moirai_sim.graphs.zoo.builder import Builder
from moirai_sim.graphs.zoo.transformer import attention, feed_forward


def bert(
    name: str, *, layers: int, hidden: int, heads: int, batch: int = 1, seq: int = 128, vocabulary: int = 30522,
    dtype: str = "float32", opset: int = 17,
) -> ModelProto:  # fmt: skip
    """Build an encoder that normalises after each sublayer, with an additive attention mask as input."""
    b = Builder(name, dtype=dtype, opset=opset)
    tokens, segments = b.tokens("tokens", [batch, seq]), b.tokens("segments", [batch, seq])
    mask = b.input("mask", [batch, 1, 1, seq])
    words = b.embedding(b.weight([vocabulary, hidden], 0.02, "word_embedding"), tokens)
    kinds = b.embedding(b.weight([2, hidden], 0.01, "segment_embedding"), segments)
    positions = b.weight([1, seq, hidden], 0.01, "position_embedding")
    if seq > 512:
        raise ValueError(f"seq={seq} is above BERT's 512 positions")
    x = b.layer_norm(b.add(b.add(words, kinds), positions))
    for layer in range(layers):
        with b.scope(f"layer{layer}"):
            x = b.layer_norm(b.add(attention(b, x, heads, mask), x))
            x = b.layer_norm(b.add(feed_forward(b, x, 4 * hidden, b.gelu), x))
    first = b.reshape(b.slice(x, 0, 1, axis=1), [batch, hidden])
    b.output(b.unary("Tanh", b.linear(first, hidden)))
    b.output(x)
    return b.model()


MODELS = {
    "bert-small": partial(bert, "bert-small", layers=4, hidden=512, heads=8),
    "bert-base": partial(bert, "bert-base", layers=12, hidden=768, heads=12),
    "bert-large": partial(bert, "bert-large", layers=24, hidden=1024, heads=16, seq=512),
}
