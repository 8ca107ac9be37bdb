"""The Evoformer stack of AlphaFold2: Jumper et al. 2021 (doi 10.1038/s41586-021-03819-2, supplement section 1.6).

``alphafold2-87m`` is the paper's stack of 48 blocks. The larger ones are widened by rules chosen here to meet the
parameter count: their published users do not say how they are made.
"""

from __future__ import annotations

import math
from functools import partial

from onnx import ModelProto

from moirai_sim.graphs.zoo.builder import Builder, Value

_HEAD_DEPTH = 32


def evoformer(
    name: str, *, blocks: int, msa_width: int, pair_width: int, batch: int = 1, sequences: int = 128,
    residues: int = 256, dtype: str = "float32", opset: int = 17,
) -> ModelProto:  # fmt: skip
    """Build the stack over an alignment of ``sequences`` x ``residues`` and its pair representation."""
    b = Builder(name, dtype=dtype, opset=opset)
    msa = b.input("msa", [batch, sequences, residues, msa_width])
    pair = b.input("pair", [batch, residues, residues, pair_width])
    for block in range(blocks):
        with b.scope(f"block{block}"):
            with b.scope("row_attention"):
                msa = b.add(msa, _gated_attention(b, b.layer_norm(msa), msa_width // _HEAD_DEPTH, b.layer_norm(pair)))
            with b.scope("column_attention"):
                columns = b.transpose(b.layer_norm(msa), [0, 2, 1, 3])
                mixed = _gated_attention(b, columns, msa_width // _HEAD_DEPTH, None)
                msa = b.add(msa, b.transpose(mixed, [0, 2, 1, 3]))
            msa = _transition(b, msa, "msa_transition")
            pair = b.add(pair, _outer_product_mean(b, msa, pair_width))
            for equation in ("bikc,bjkc->bijc", "bkic,bkjc->bijc"):
                with b.scope("triangle_multiplication"):
                    pair = b.add(pair, _triangle_multiplication(b, pair, equation))
            with b.scope("triangle_attention_start"):
                normal = b.layer_norm(pair)
                pair = b.add(pair, _gated_attention(b, normal, pair_width // _HEAD_DEPTH, normal))
            with b.scope("triangle_attention_end"):
                normal = b.layer_norm(b.transpose(pair, [0, 2, 1, 3]))
                mixed = _gated_attention(b, normal, pair_width // _HEAD_DEPTH, normal)
                pair = b.add(pair, b.transpose(mixed, [0, 2, 1, 3]))
            pair = _transition(b, pair, "pair_transition")
    b.output(msa)
    b.output(pair)
    return b.model()


def _gated_attention(b: Builder, x: Value, heads: int, pair: Value | None) -> Value:
    """Attention along the third axis, biased by the pair representation and gated (algorithms 7, 8, 13, 14)."""
    batch, groups, length, width = x.shape
    shape = [batch, groups, length, heads, width // heads]

    def split_heads(value: Value, order: tuple[int, ...]) -> Value:
        return b.transpose(b.reshape(value, shape), order)

    q = split_heads(b.linear(x, width, bias=False), (0, 1, 3, 2, 4))
    k = split_heads(b.linear(x, width, bias=False), (0, 1, 3, 4, 2))
    v = split_heads(b.linear(x, width, bias=False), (0, 1, 3, 2, 4))
    scores = b.matmul(b.mul(q, 1 / math.sqrt(width // heads)), k)
    if pair is not None:
        bias = b.transpose(b.linear(pair, heads, bias=False), [0, 3, 1, 2])
        scores = b.add(scores, b.reshape(bias, [batch, 1, heads, length, length]))
    mixed = b.transpose(b.matmul(b.softmax(scores), v), [0, 1, 3, 2, 4])
    gate = b.unary("Sigmoid", b.linear(x, width))
    return b.linear(b.mul(gate, b.reshape(mixed, [batch, groups, length, width])), width)


def _transition(b: Builder, x: Value, name: str) -> Value:
    """Feed-forward layer of four widths (algorithms 9 and 15)."""
    with b.scope(name):
        inner = b.relu(b.linear(b.layer_norm(x), 4 * x.shape[-1]))
        return b.add(x, b.linear(inner, x.shape[-1]))


def _outer_product_mean(b: Builder, msa: Value, pair_width: int) -> Value:
    """Update of the pair representation from the alignment (algorithm 10)."""
    batch, sequences, residues, _ = msa.shape
    with b.scope("outer_product_mean"):
        normal = b.layer_norm(msa)
        left, right = b.linear(normal, 32), b.linear(normal, 32)
        outer = b.op(
            "Einsum", [left, right], [batch, residues, residues, 32, 32], equation="bsic,bsjd->bijcd"
        )  # fmt: skip
        mean = b.mul(b.reshape(outer, [batch, residues, residues, 1024]), 1 / sequences)
        return b.linear(mean, pair_width)


def _triangle_multiplication(b: Builder, pair: Value, equation: str) -> Value:
    """Triangle multiplicative update (algorithms 11 and 12)."""
    width = pair.shape[-1]
    normal = b.layer_norm(pair)
    left, right = (b.mul(b.unary("Sigmoid", b.linear(normal, width)), b.linear(normal, width)) for _ in range(2))
    product = b.op("Einsum", [left, right], pair.shape, equation=equation)
    mixed = b.linear(b.layer_norm(b.mul(product, 1 / pair.shape[1])), width)
    return b.mul(b.unary("Sigmoid", b.linear(normal, width)), mixed)


_SIZES = {
    "alphafold2-87m": (48, 256, 128),
    "alphafold2-240m": (34, 512, 256),
    "alphafold2-730m": (34, 1024, 256),
    "alphafold2-930m": (44, 1024, 256),
}
MODELS = {
    name: partial(evoformer, name, blocks=blocks, msa_width=msa_width, pair_width=pair_width)
    for name, (blocks, msa_width, pair_width) in _SIZES.items()
}
