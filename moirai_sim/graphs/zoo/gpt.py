"""GPT-2 and GPT-3: Radford et al. 2019; Brown et al. 2020 (arXiv 2005.14165, table 2.1)."""

from __future__ import annotations

from functools import partial

from onnx import ModelProto

from moirai_sim.graphs.zoo.builder import Builder, Value
from moirai_sim.graphs.zoo.transformer import pre_norm_block


def causal_mask(b: Builder, length: int) -> Value:
    """Return (length, length) with 0 where a token may look and a large negative number where it may not."""
    blocked = b.weight([length, length], -10_000.0, "mask")
    return b.op("Trilu", [blocked, b.integer(1)], [length, length], upper=1)


def gpt(
    name: str, *, layers: int, hidden: int, heads: int, batch: int = 1, seq: int = 1024, vocabulary: int = 50257,
    dtype: str = "float32", opset: int = 17,
) -> ModelProto:  # fmt: skip
    """Build a decoder with learned positions, normalisation before each sublayer, and a tied output embedding."""
    b = Builder(name, dtype=dtype, opset=opset)
    tokens = b.tokens("tokens", [batch, seq])
    table = b.weight([vocabulary, hidden], 0.02, "token_embedding")
    x = b.add(b.embedding(table, tokens), b.weight([seq, hidden], 0.01, "position_embedding"))
    mask = causal_mask(b, seq)
    for layer in range(layers):
        with b.scope(f"layer{layer}"):
            x = pre_norm_block(b, x, heads, mask, b.gelu_tanh)
    x = b.layer_norm(x)
    b.output(b.matmul(x, b.transpose(table, [1, 0])))
    return b.model()


_SIZES = {
    "gpt2": (12, 768, 12, 1024),
    "gpt2-medium": (24, 1024, 16, 1024),
    "gpt2-large": (36, 1280, 20, 1024),
    "gpt2-xl": (48, 1600, 25, 1024),
    "gpt3-330m": (24, 1024, 16, 2048),
    "gpt3-1.3b": (24, 2048, 16, 2048),  # the paper's 24 heads do not divide 2048; 16 of depth 128 do
    "gpt3-2.7b": (32, 2560, 32, 2048),
    "gpt3-6.7b": (32, 4096, 32, 2048),
    "gpt3-13b": (40, 5120, 40, 2048),  # the paper's width 5140 is not 40 x 128; 5120 is
    "gpt3-175b": (96, 12288, 96, 2048),
}
MODELS = {
    name: partial(gpt, name, layers=layers, hidden=hidden, heads=heads, seq=seq)
    for name, (layers, hidden, heads, seq) in _SIZES.items()
}
