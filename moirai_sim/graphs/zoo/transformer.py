"""Transformer blocks with attention written out in elementary operators, as PyTorch exports it."""

from __future__ import annotations

import math
from collections.abc import Callable

from moirai_sim.graphs.zoo.builder import Builder, Value


def heads_first(b: Builder, x: Value, heads: int) -> Value:
    """Turn (batch, length, heads x depth) into (batch, heads, length, depth)."""
    batch, length, hidden = x.shape
    return b.transpose(b.reshape(x, [batch, length, heads, hidden // heads]), [0, 2, 1, 3])


def scores_to_output(b: Builder, q: Value, k: Value, v: Value, bias: Value | None) -> Value:
    """Return softmax(q k^T / sqrt(depth) + bias) v for (batch, heads, length, depth) tensors, heads merged again."""
    batch, heads, length, depth = q.shape
    scores = b.matmul(q, b.transpose(k, [0, 1, 3, 2]))
    scores = b.binary("Div", scores, b.scalar(math.sqrt(depth)))
    if bias is not None:
        scores = b.add(scores, bias)
    mixed = b.matmul(b.softmax(scores), v)
    return b.reshape(b.transpose(mixed, [0, 2, 1, 3]), [batch, length, heads * depth])


def attention(b: Builder, x: Value, heads: int, bias: Value | None = None, *, packed: bool = False) -> Value:
    """Append multi-head self-attention with its projections; ``packed`` projects Q, K and V in one product."""
    hidden = x.shape[-1]
    if hidden % heads:
        raise ValueError(f"{heads} heads do not divide {hidden}")
    with b.scope("attention"):
        if packed:
            q, k, v = b.split(b.linear(x, 3 * hidden), [hidden] * 3, axis=2)
        else:
            q, k, v = b.linear(x, hidden), b.linear(x, hidden), b.linear(x, hidden)
        q, k, v = (heads_first(b, part, heads) for part in (q, k, v))
        return b.linear(scores_to_output(b, q, k, v, bias), hidden)


def feed_forward(b: Builder, x: Value, size: int, activation: Callable[[Value], Value]) -> Value:
    """Append two fully connected layers with an activation between."""
    with b.scope("feed_forward"):
        return b.linear(activation(b.linear(x, size)), x.shape[-1])


def pre_norm_block(b: Builder, x: Value, heads: int, bias: Value | None, activation: Callable[[Value], Value]) -> Value:
    """Append a block that normalises before attention and before the feed-forward layer (GPT, ViT)."""
    x = b.add(x, attention(b, b.layer_norm(x), heads, bias, packed=True))
    return b.add(x, feed_forward(b, b.layer_norm(x), 4 * x.shape[-1], activation))
