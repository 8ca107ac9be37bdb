"""Output shapes of operators without an ONNX schema: those that ONNX Runtime adds (domain ``com.microsoft``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

Shape = tuple[int, ...]
_Rule = Callable[[Sequence[Shape], Mapping[str, object]], list[Shape]]

STANDARD_TWIN = {"FusedConv": "Conv", "FusedGemm": "Gemm"}
"""Operators with the output shape of a standard one."""


def contrib_shapes(op_type: str, inputs: Sequence[Shape], attributes: Mapping[str, object]) -> list[Shape] | None:
    """Return the shapes of the leading outputs, or None for an unknown operator type.

    ``inputs`` are shapes by position, ``(0,)`` for an absent one. All outputs have the element type of the first
    floating point input.
    """
    rule = _RULES.get(op_type)
    return rule(inputs, attributes) if rule else None


def _integer(attributes: Mapping[str, object], name: str) -> int:
    value = attributes[name]
    if not isinstance(value, int):
        raise TypeError(name)
    return value


def _like_first(inputs: Sequence[Shape], _attributes: Mapping[str, object]) -> list[Shape]:
    return [inputs[0]]


def _skip_norm(inputs: Sequence[Shape], _attributes: Mapping[str, object]) -> list[Shape]:
    statistics = (*inputs[0][:-1], 1)
    return [inputs[0], statistics, statistics, inputs[0]]


def _fused_matmul(inputs: Sequence[Shape], attributes: Mapping[str, object]) -> list[Shape]:
    left, right = list(inputs[0]), list(inputs[1])
    for operand, name in ((left, "A"), (right, "B")):
        if attributes.get(f"transBatch{name}"):  # (rows, batch..., columns)
            operand.insert(len(operand) - 2, operand.pop(0))
        if attributes.get(f"trans{name}"):
            operand[-2:] = operand[:-3:-1]
    rank = max(len(left), len(right))
    batch = zip([1] * (rank - len(left)) + left[:-2], [1] * (rank - len(right)) + right[:-2], strict=True)
    return [(*(max(a, b) for a, b in batch), left[-2], right[-1])]


def _matmul_nbits(inputs: Sequence[Shape], attributes: Mapping[str, object]) -> list[Shape]:
    return [(*inputs[0][:-1], _integer(attributes, "N"))]


def _embed_layer_norm(inputs: Sequence[Shape], _attributes: Mapping[str, object]) -> list[Shape]:
    hidden = (*inputs[0], inputs[2][-1])
    return [hidden, (inputs[0][0],), hidden]


def _attention(inputs: Sequence[Shape], attributes: Mapping[str, object]) -> list[Shape]:
    batch, length, _ = inputs[0]
    heads, packed = _integer(attributes, "num_heads"), inputs[1][1]
    sizes = attributes.get("qkv_hidden_sizes")
    value = int(sizes[2]) if isinstance(sizes, tuple) else packed // 3
    past = inputs[4][-2] if len(inputs) > 4 and inputs[4] != (0,) else 0
    return [(batch, length, value), (2, batch, heads, length + past, value // heads)]


def _multi_head_attention(inputs: Sequence[Shape], attributes: Mapping[str, object]) -> list[Shape]:
    query, heads = inputs[0], _integer(attributes, "num_heads")
    past = inputs[6][-2] if len(inputs) > 6 and inputs[6] != (0,) else 0
    given = [shape for shape in inputs[:3] if shape != (0,)]
    value = given[-1]  # or the keys where both are packed, or the queries where all three are
    keys = value[2 if len(value) == 4 else 1]
    hidden = value[2] if len(value) == 3 else heads * value[-1]
    present = (query[0], heads, keys + past, hidden // heads)
    return [(query[0], query[1], hidden), present, present]


def _grouped_query_attention(inputs: Sequence[Shape], attributes: Mapping[str, object]) -> list[Shape]:
    query, heads, kv_heads = inputs[0], _integer(attributes, "num_heads"), _integer(attributes, "kv_num_heads")
    packed = len(inputs) < 2 or inputs[1] == (0,)
    depth = query[2] // (heads + 2 * kv_heads) if packed else query[2] // heads
    past = inputs[3][-2] if len(inputs) > 3 and inputs[3] != (0,) else 0
    present = (query[0], kv_heads, max(past, query[1]), depth)
    return [(query[0], query[1], heads * depth), present, present]


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(
        (
            "Gelu",
            "BiasGelu",
            "FastGelu",
            "QuickGelu",
            "LayerNormalization",
            "SimplifiedLayerNormalization",
            "RotaryEmbedding",
            "MoE",
        ),
        _like_first,
    ),
    **dict.fromkeys(("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"), _skip_norm),
    "FusedMatMul": _fused_matmul,
    "MatMulNBits": _matmul_nbits,
    "EmbedLayerNormalization": _embed_layer_norm,
    "Attention": _attention,
    "MultiHeadAttention": _multi_head_attention,
    "GroupQueryAttention": _grouped_query_attention,
}
