"""Llama and Mixtral.

Touvron et al. 2023 (arXiv 2307.09288), Grattafiori et al. 2024 (2407.21783), Jiang et al. 2024 (2401.04088).
Root-mean-square normalisation, rotary positions, grouped-query attention and gated feed-forward layers, in the standard
operators of opset 23. ``past`` tokens lie in a key-value cache, so that ``seq=1&past=2047`` is one decoding step.
"""

from __future__ import annotations

from functools import partial

from onnx import ModelProto

from moirai_sim.graphs.zoo.builder import Builder, Value


def llama(
    name: str, *, layers: int, hidden: int, heads: int, kv_heads: int, feed_forward: int, vocabulary: int,
    experts: int = 0, experts_per_token: int = 2, batch: int = 1, seq: int = 2048, past: int = 0,
    dtype: str = "float16",
) -> ModelProto:  # fmt: skip
    """Build a decoder; with ``experts`` each feed-forward layer is a sparse mixture."""
    b = Builder(name, dtype=dtype, opset=23)
    depth = hidden // heads
    x = b.embedding(b.weight([vocabulary, hidden], 0.02, "token_embedding"), b.tokens("tokens", [batch, seq]))
    rotary = [b.weight([batch, seq, depth // 2], value, label) for label, value in (("cos", 0.8), ("sin", 0.6))]
    zeros = b.weight([batch * seq, hidden], 0.0, "zeros") if experts else None
    for layer in range(layers):
        with b.scope(f"layer{layer}"):
            cache = [b.input(f"past{layer}/{side}", [batch, kv_heads, past, depth]) for side in "kv"] if past else []
            x = b.add(x, _attention(b, _norm(b, x), heads, kv_heads, rotary, cache))
            normal = _norm(b, x)
            if zeros is None:
                x = b.add(x, _gated(b, normal, feed_forward))
            else:
                x = b.add(x, _mixture(b, normal, feed_forward, experts, experts_per_token, zeros))
    b.output(b.linear(_norm(b, x), vocabulary, bias=False))
    return b.model()


def _norm(b: Builder, x: Value) -> Value:
    return b.op("RMSNormalization", [x, b.weight([x.shape[-1]], 1.0, "scale")], x.shape, axis=-1, epsilon=1e-5)


def _attention(b: Builder, x: Value, heads: int, kv_heads: int, rotary: list[Value], cache: list[Value]) -> Value:
    batch, seq, hidden = x.shape
    depth = hidden // heads
    with b.scope("attention"):
        q = b.linear(x, hidden, bias=False)
        k, v = (b.linear(x, kv_heads * depth, bias=False) for _ in range(2))
        q = b.op("RotaryEmbedding", [q, *rotary], q.shape, num_heads=heads)
        k = b.op("RotaryEmbedding", [k, *rotary], k.shape, num_heads=kv_heads)
        shapes = [[batch, seq, hidden]]
        if cache:
            shapes += [[batch, kv_heads, cache[0].shape[2] + seq, depth]] * 2
        mixed, *present = b.ops(
            "Attention", [q, k, v, *([None, *cache] if cache else [])], shapes,
            q_num_heads=heads, kv_num_heads=kv_heads, is_causal=1,
        )  # fmt: skip
        for tensor in present:
            b.output(tensor)
        return b.linear(mixed, hidden, bias=False)


def _gated(b: Builder, x: Value, size: int) -> Value:
    with b.scope("feed_forward"):
        gate = b.silu(b.linear(x, size, bias=False))
        return b.linear(b.mul(gate, b.linear(x, size, bias=False)), x.shape[-1], bias=False)


def _mixture(b: Builder, x: Value, size: int, experts: int, per_token: int, zeros: Value) -> Value:
    """Append a mixture with balanced load: every expert takes its best tokens, ``per_token / experts`` of them all.

    The routing of a real request depends on data and has no static shape. A balanced one (expert choice, Zhou et al.
    2022, arXiv 2202.09368) does the same work, on operators that can be placed expert by expert.
    """
    batch, seq, hidden = x.shape
    tokens = batch * seq
    share = max(1, tokens * per_token // experts)
    with b.scope("mixture"):
        flat = b.reshape(x, [tokens, hidden])
        router = b.transpose(b.softmax(b.linear(flat, experts, bias=False)), [1, 0])
        weights, chosen = b.ops("TopK", [router, b.integers([share])], [[experts, share]] * 2, axis=1)
        weights = b.op("Unsqueeze", [weights, b.integers([2])], [experts, share, 1])
        outputs = []
        rows = zip(b.split(chosen, [1] * experts, 0), b.split(weights, [1] * experts, 0), strict=True)
        for expert, (row, weight) in enumerate(rows):
            with b.scope(f"expert{expert}"):
                taken = b.embedding(flat, b.reshape(row, [share]))
                outputs.append(b.mul(_gated(b, taken, size), b.reshape(weight, [share, 1])))
        updates = b.concat(outputs, 0)
        indices = b.reshape(chosen, [experts * share, 1])
        mixed = b.op("ScatterND", [zeros, indices, updates], [tokens, hidden], reduction="add")
        return b.reshape(mixed, [batch, seq, hidden])


MODELS = {
    "llama2-7b": partial(
        llama, "llama2-7b", layers=32, hidden=4096, heads=32, kv_heads=32, feed_forward=11008, vocabulary=32000
    ),
    "llama2-70b": partial(
        llama, "llama2-70b", layers=80, hidden=8192, heads=64, kv_heads=8, feed_forward=28672, vocabulary=32000
    ),
    "llama3-8b": partial(
        llama, "llama3-8b", layers=32, hidden=4096, heads=32, kv_heads=8, feed_forward=14336, vocabulary=128256
    ),
    "llama3-70b": partial(
        llama, "llama3-70b", layers=80, hidden=8192, heads=64, kv_heads=8, feed_forward=28672, vocabulary=128256
    ),
    "mixtral-8x7b": partial(
        llama, "mixtral-8x7b", layers=32, hidden=4096, heads=32, kv_heads=8, feed_forward=14336, vocabulary=32000,
        experts=8,
    ),
}  # fmt: skip
