"""Sizes of the attention core: of ai.onnx.Attention and of the operators that ONNX Runtime adds, cache included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

Shape = Sequence[int]
_ABSENT = (0,)


class AttentionSize(NamedTuple):
    """What the core of an attention operator computes: softmax(Q K) V, without projections."""

    batch: int
    heads: int
    """Of the queries."""
    kv_heads: int
    """Of the keys and values."""
    queries: int
    """Tokens that ask."""
    keys: int
    """Tokens that are attended to, those in the cache included."""
    depth: int
    """Values of a query or key in one head."""
    value_depth: int
    """Values of a value in one head."""
    causal: bool
    """A query does not see the keys that lie ahead of it."""


def attention_size(
    op_type: str, inputs: Sequence[Shape], outputs: Sequence[Shape], attributes: Mapping[str, object]
) -> AttentionSize:
    """Return the sizes of an attention operator.

    Parameters
    ----------
    op_type
        ``Attention`` of either domain, ``MultiHeadAttention``, ``GroupQueryAttention`` or ``PagedAttention``.
    inputs, outputs
        Shapes by position, ``(0,)`` for an absent one. Missing keys and values are those of the queries.
    attributes
        ONNX attributes; ``num_heads`` tells com.microsoft.Attention, whose second input is a packed weight.

    Raises
    ------
    LookupError, TypeError, ValueError, ArithmeticError
        If shapes and attributes do not fit together.
    """
    if op_type in ("GroupQueryAttention", "PagedAttention"):
        return _grouped(op_type, inputs, outputs, attributes)
    if op_type == "MultiHeadAttention":
        return _multi_head(inputs, outputs, attributes)
    if "num_heads" in attributes:
        return _packed(inputs, outputs, attributes)
    query = inputs[0]
    key = inputs[1] if len(inputs) > 1 else query
    value = inputs[2] if len(inputs) > 2 else key
    keys = key[-2] + _length(inputs, 4)
    causal = bool(_number(attributes, "is_causal", 0))
    if len(query) == 4:
        return AttentionSize(query[0], query[1], key[1], query[2], keys, query[3], value[3], causal)
    heads = _number(attributes, "q_num_heads", 1)
    kv_heads = _number(attributes, "kv_num_heads", heads)
    batch, length, hidden = query
    return AttentionSize(batch, heads, kv_heads, length, keys, hidden // heads, value[-1] // kv_heads, causal)


def _packed(inputs: Sequence[Shape], outputs: Sequence[Shape], attributes: Mapping[str, object]) -> AttentionSize:
    """``com.microsoft.Attention``: inputs 0 and 1 are activations and the weight that projects them to Q, K and V."""
    batch, length, _ = inputs[0]
    heads, packed = _number(attributes, "num_heads", 1), inputs[1][1]
    value = outputs[0][-1] if outputs else packed // 3
    keys = length + _length(inputs, 4)
    causal = bool(_number(attributes, "unidirectional", 0))
    return AttentionSize(batch, heads, heads, length, keys, (packed - value) // 2 // heads, value // heads, causal)


def _multi_head(inputs: Sequence[Shape], outputs: Sequence[Shape], attributes: Mapping[str, object]) -> AttentionSize:
    """Find the keys in input 1, (batch, length, ...) or (batch, heads, length, depth), or packed with all else in 0."""
    query, heads = inputs[0], _number(attributes, "num_heads", 1)
    keys = query[1]
    if _present(inputs, 1):
        keys = inputs[1][2 if len(inputs[1]) == 4 else 1]
    keys += _length(inputs, 6)
    depth = query[-1] if len(query) == 5 else query[-1] // heads
    value_depth = outputs[0][-1] // heads if outputs else depth
    causal = bool(_number(attributes, "unidirectional", 0))
    return AttentionSize(query[0], heads, heads, query[1], keys, depth, value_depth, causal)


def _grouped(
    op_type: str, inputs: Sequence[Shape], outputs: Sequence[Shape], attributes: Mapping[str, object]
) -> AttentionSize:
    """Take output 1 for the cache, or input 3 where that is not given; pages do not tell how many are used."""
    batch, length, hidden = ((1,) * 3 + tuple(inputs[0]))[-3:]
    heads = _number(attributes, "num_heads", 1)
    keys = length
    if op_type == "GroupQueryAttention":
        keys = outputs[1][-2] if _present(outputs, 1) else max(length, _length(inputs, 3))
    depth = (outputs[0][-1] if outputs else hidden) // heads
    return AttentionSize(
        batch, heads, _number(attributes, "kv_num_heads", heads), length, keys, depth, depth, causal=True
    )


def _present(shapes: Sequence[Shape], index: int) -> bool:
    return len(shapes) > index and tuple(shapes[index]) != _ABSENT


def _length(inputs: Sequence[Shape], index: int) -> int:
    """Return the tokens of a cache, (..., tokens, depth); 0 where there is none."""
    return inputs[index][-2] if _present(inputs, index) else 0


def _number(attributes: Mapping[str, object], name: str, default: int) -> int:
    return int(attributes.get(name) or default)  # type: ignore[call-overload, no-any-return]  # checked by ONNX
