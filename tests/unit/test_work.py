"""Operations and bytes of single operators, against hand-worked figures."""

from __future__ import annotations

import pytest

from moirai_sim.errors import InputError
from moirai_sim.graphs.operator import Tensor
from moirai_sim.graphs.work import ABSENT, make_operator

B, H, S, D = 2, 4, 16, 8
CORE = B * H * S * S * (4 * D + 7)
"""Scores and weighted values, 2 D each; scale, mask and softmax, 7."""

CASES = [
    ("MatMul", [(512, 1024), (1024, 4096)], [(512, 4096)], {}, 2 * 512 * 1024 * 4096),
    ("MatMul", [(3, 5, 7), (3, 7, 11)], [(3, 5, 11)], {}, 2 * 3 * 5 * 7 * 11),
    ("FusedMatMul", [(3, 7, 5), (3, 7, 11)], [(3, 5, 11)], {"transA": 1}, 2 * 3 * 5 * 7 * 11),
    ("Gemm", [(7, 5), (11, 7), (11,)], [(5, 11)], {"transA": 1, "transB": 1}, 5 * 11 * (2 * 7 + 1)),
    ("FusedGemm", [(5, 7), (7, 11)], [(5, 11)], {"activation": "Relu"}, 5 * 11 * (2 * 7 + 1)),
    ("Conv", [(1, 6, 9, 9), (8, 3, 3, 3)], [(1, 8, 7, 7)], {"group": 2}, 2 * 8 * 49 * 27),
    ("FusedConv", [(1, 6, 9, 9), (8, 6, 1, 1), (8,), (1, 8, 9, 9)], [(1, 8, 9, 9)], {"activation": "Relu"}, 648 * 15),
    ("ConvTranspose", [(1, 6, 4, 4), (6, 3, 2, 2)], [(1, 3, 8, 8)], {}, 2 * 96 * 12),
    ("QLinearConv", [(1, 6, 4, 4), (), (), (8, 6, 1, 1)], [(1, 8, 4, 4)], {}, 2 * 8 * 16 * 6),
    ("QLinearConv", [(1, 6, 4, 4), (), (), (8, 6, 1, 1), (), (), (), (), (8,)], [(1, 8, 4, 4)], {}, 8 * 16 * 13),
    ("ConvInteger", [(1, 6, 4, 4), (8, 6, 1, 1), (), ()], [(1, 8, 4, 4)], {}, 2 * 8 * 16 * 6),
    ("DeformConv", [(1, 6, 4, 4), (8, 6, 1, 1), (1, 2, 4, 4)], [(1, 8, 4, 4)], {}, 2 * 8 * 16 * 6),
    ("FusedMatMul", [(7, 3, 5), (3, 7, 11)], [(3, 5, 11)], {"transA": 1, "transBatchA": 1}, 2 * 3 * 5 * 7 * 11),
    ("MatMulNBits", [(4, 64), (32, 2, 16)], [(4, 32)], {"K": 64, "N": 32}, 2 * 4 * 32 * 64),
    ("Einsum", [(2, 3, 4, 5), (2, 3, 6, 7)], [(2, 4, 6, 5, 7)], {"equation": "bsic,bsjd->bijcd"}, 4 * 2520),
    ("Einsum", [(2, 3, 4), (2, 4, 5)], [(2, 3, 5)], {"equation": "...ij,...jk->...ik"}, 2 * 2 * 3 * 4 * 5),
    ("Einsum", [(3, 4)], [(4, 3)], {"equation": "ij->ji"}, 0),
    ("Einsum", [(2, 1, 3, 4), (1, 5, 4, 6)], [(2, 5, 3, 6)], {"equation": "...ij,...jk->...ik"}, 2 * 10 * 72),
    ("Einsum", [(3,), (4,)], [(3, 4)], {"equation": "i,j->ij"}, 12),
    ("Einsum", [(3, 4)], [(3,)], {"equation": "ij->i"}, 12),
    ("TopK", [(1, 1024), (1,)], [(1, 1024), (1, 1024)], {}, 1024 * 10),
    ("TopK", [(8, 1024), (1,)], [(8, 4), (8, 4)], {}, 8 * 1024 * 2),
    ("DFT", [(2, 64, 1)], [(2, 64, 2)], {}, 5 * 2 * 64 * 6),
    ("Softmax", [(4, 10)], [(4, 10)], {}, 200),
    ("LayerNormalization", [(4, 10), (10,), (10,)], [(4, 10)], {}, 280),
    ("RMSNormalization", [(4, 10), (10,)], [(4, 10)], {}, 160),
    ("Gelu", [(4, 10)], [(4, 10)], {}, 200),
    ("MaxPool", [(1, 2, 8, 8)], [(1, 2, 4, 4)], {"kernel_shape": (3, 3)}, 32 * 9),
    ("GlobalAveragePool", [(1, 2, 8, 8)], [(1, 2, 1, 1)], {}, 128),
    ("ReduceMean", [(4, 10)], [(4, 1)], {}, 40),
    ("Sum", [(4, 10)] * 3, [(4, 10)], {}, 80),
    ("Resize", [(1, 2, 4, 4)], [(1, 2, 8, 8)], {"mode": "linear"}, 128 * 8),
    ("Resize", [(1, 2, 4, 4)], [(1, 2, 8, 8)], {}, 0),
    ("LSTM", [(5, 2, 3), (1, 16, 3), (1, 16, 4), (1, 32)], [(5, 1, 2, 4)], {}, 10 * (2 * 48 + 2 * 64 + 32)),
    ("Attention", [(B, H, S, D)] * 3, [(B, H, S, D)], {}, CORE),
    ("Attention", [(B, S, H * D), (B, S, D), (B, S, D)], [(B, S, H * D)], {"q_num_heads": H, "kv_num_heads": 1}, CORE),
    ("Attention", [(B, S, 24), (24, 3 * H * D)], [(B, S, H * D)], {"num_heads": H}, CORE + B * S * 3 * H * D * 2 * 24),
    ("MultiHeadAttention", [(B, S, H * D)] * 3, [(B, S, H * D)], {"num_heads": H}, CORE),
    (
        "GroupQueryAttention", [(B, S, H * D), (B, S, D), (B, S, D)], [(B, S, H * D), (B, 1, S, D), (B, 1, S, D)],
        {"num_heads": H, "kv_num_heads": 1}, CORE,
    ),
    (
        "QMoE", [(6, 8), (6, 4), (4, 8, 16), (4, 32), ABSENT, (4, 32, 4), (4, 8)], [(6, 8)], {"k": 2},
        12 * (2 * 2 * 8 * 32 + 32),
    ),
    ("MoE", [(6, 8), (6, 4), (4, 8, 32), ABSENT, (4, 32, 8)], [(6, 8)], {"k": 2}, 12 * (2 * 2 * 8 * 32 + 32)),
]  # fmt: skip


@pytest.mark.parametrize(("op_type", "inputs", "outputs", "attributes", "flops"), CASES)
def test_operations(op_type, inputs, outputs, attributes, flops):
    operator = make_operator("o", op_type, inputs, outputs, attributes)
    assert operator.flops == flops
    assert not operator.bytes_only


def test_bytes_are_each_input_and_output_once():
    weight = Tensor("w", (16, 8), "float16", weight=True)
    operator = make_operator("o", "MatMul", [Tensor("x", (4, 16), "float16"), weight], [(4, 8)], dtype="float16")
    assert (operator.read_bytes, operator.write_bytes, operator.weight_bytes) == (2 * (64 + 128), 64, 256)


def test_views_are_free_and_a_look_up_reads_what_it_picks():
    view = make_operator("o", "Reshape", [(4, 16), (2,)], [(64,)])
    assert (view.flops, view.read_bytes, view.write_bytes) == (0, 0, 0)
    table = Tensor("t", (50_000, 8), weight=True)
    pick = make_operator("o", "Gather", [table, Tensor("i", (3,), "int64")], [(3, 8)])
    assert (pick.flops, pick.read_bytes, pick.write_bytes) == (0, 96 + 24, 96)
    assert pick.weight_bytes == 50_000 * 8 * 4


def test_mixture_reads_only_the_experts_in_use():
    experts = [Tensor(name, (8, 4, 4), weight=True) for name in "ab"]
    few = make_operator("o", "MoE", [(1, 4), (1, 8), experts[0], ABSENT, experts[1]], [(1, 4)], {"k": 2})
    assert few.read_bytes == 16 + 32 + 2 * 8 * 16 * 4 * 2 // 8


def test_unknown_types_are_marked():
    operator = make_operator("o", "Mystery", [(4,)], [(8,)])
    assert (operator.bytes_only, operator.flops, operator.read_bytes, operator.write_bytes) == (True, 0, 16, 32)


@pytest.mark.parametrize(
    ("op_type", "inputs", "attributes"),
    [("Conv", [(1, 3, 8, 8)], {}), ("MaxPool", [(1, 3, 8, 8)], {}), ("MatMul", [], {})],
)
def test_shapes_that_do_not_fit_are_told(op_type, inputs, attributes):
    with pytest.raises(InputError, match=f"operator 'o': .* do not fit {op_type}"):
        make_operator("o", op_type, inputs, [(1, 3, 4, 4)], attributes)


def test_unknown_data_type_is_told():
    with pytest.raises(InputError, match="unknown data type 'float31'"):
        make_operator("o", "Relu", [(4,)], [(4,)], dtype="float31")
