"""Fusion rules of the backends, as data: what is rewritten into what, in the order in which the backend does it.

A pattern names operator types from the last to the first: ``Relu(Conv)`` is a Relu that reads a Conv. Arguments stand
for inputs by position (either order for a commutative type); inputs beyond the given ones are free. ``#`` is a
constant, ``*`` is anything, and a small letter is the same tensor wherever it occurs. A name of `CLASSES` stands for
any of its types. A rule sees the kernels that earlier rules made, by their ``result``.
"""

from __future__ import annotations

from typing import NamedTuple


class Rule(NamedTuple):
    """One rewriting: a match of ``pattern`` becomes a kernel of type ``result`` if the condition ``when`` holds."""

    pattern: str
    result: str
    when: str = ""
    """Name of a condition of `moirai_sim.graphs.fusion_conditions`; empty for none."""


COMMUTATIVE = frozenset({"Add", "Mul", "Sum"})

CLASSES: dict[str, tuple[str, ...]] = {
    "ConvActivation": ("Relu", "Sigmoid", "Tanh", "LeakyRelu", "Clip", "HardSigmoid", "HardSwish"),
    "GemmActivation": ("Relu", "Sigmoid", "Tanh", "LeakyRelu", "Elu", "Selu", "Softplus", "Softsign", "HardSigmoid"),
    "Scaled": ("Mul", "Div"),
    "Addition": ("Add", "Sum"),
    "Pointwise": (
        "Abs", "Add", "And", "BatchNormalization", "Cast", "Ceil", "Clip", "Cos", "Div", "Elu", "Equal", "Erf", "Exp",
        "FastGelu", "Floor", "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "LeakyRelu", "Less",
        "LessOrEqual", "Log", "Max", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or", "PRelu", "Pow", "QuickGelu",
        "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Sub", "Sum",
        "Swish", "Tanh", "Where",
    ),
    "RowWise": (
        "GroupNormalization", "InstanceNormalization", "LayerNormalization", "LogSoftmax", "RMSNormalization",
        "SimplifiedLayerNormalization", "SkipLayerNormalization", "Softmax",
    ),
}  # fmt: skip

_CENTRED = "Sub(x, ReduceMean(x))"
_VARIANCE = f"ReduceMean(Pow({_CENTRED}, #))"
_LAYER_NORM = f"Add(Mul(Div({_CENTRED}, Sqrt(Add({_VARIANCE}, #))), #), #)"
_RMS = "Sqrt(Add(ReduceMean(Pow(x, #)), #))"

_COMPOSITES = (
    Rule(_LAYER_NORM, "LayerNormalization"),
    Rule(f"Mul(Div(x, {_RMS}), #)", "SimplifiedLayerNormalization"),
    Rule(f"Mul(Mul(x, Div(#, {_RMS})), #)", "SimplifiedLayerNormalization"),
    Rule(f"Mul(Mul(x, Reciprocal({_RMS})), #)", "SimplifiedLayerNormalization"),
    Rule("Mul(Mul(x, Add(Erf(Div(x, #)), #)), #)", "Gelu"),
    Rule("Mul(Mul(x, #), Add(Erf(Div(x, #)), #))", "Gelu"),
    Rule("Mul(x, Mul(Add(Erf(Div(x, #)), #), #))", "Gelu"),
    Rule("Mul(Mul(x, #), Add(Tanh(Mul(Add(x, Mul(Pow(x, #), #)), #)), #))", "FastGelu"),
    Rule("Mul(x, Sigmoid(x))", "QuickGelu"),
    Rule("Mul(x, Sigmoid(Mul(x, #)))", "QuickGelu"),
)

RULES: dict[str, tuple[Rule, ...]] = {
    # ONNX Runtime 1.31 on an x86 CPU with all optimizations: found by reading the graphs that it runs
    "onnxruntime": (
        Rule("Transpose(Transpose)", "TransposePair"),
        Rule("BatchNormalization(Conv)", "Conv"),
        Rule("Mul(Conv, #)", "Conv", "constant_per_channel"),
        Rule("Add(Conv, #)", "Conv", "constant_per_channel"),
        Rule("Add(MatMul, #)", "Gemm", "bias_of_matrix"),
        *_COMPOSITES,
        Rule("LayerNormalization(Add)", "SkipLayerNormalization", "rows_added"),
        Rule("Gelu(Add(*, #))", "BiasGelu", "vector_added"),
        Rule("FastGelu(Add(*, #))", "FastGelu", "vector_added"),
        Rule("MatMul(Transpose)", "FusedMatMul", "last_axes_swapped"),
        Rule("MatMul(*, Transpose)", "FusedMatMul", "last_axes_swapped"),
        Rule("MatMul(Scaled(*, #))", "FusedMatMul", "scalar_factor"),
        Rule("FusedMatMul(Scaled(*, #))", "FusedMatMul", "scalar_factor"),
        Rule("Scaled(MatMul, #)", "FusedMatMul", "scalar_factor"),
        Rule("Scaled(FusedMatMul, #)", "FusedMatMul", "scalar_factor"),
        Rule("ConvActivation(Conv)", "FusedConv"),
        Rule("GemmActivation(Gemm)", "FusedGemm", "matrix_result"),
        Rule("Addition(Conv, *)", "ConvAdd", "same_layout"),
        Rule("ConvActivation(ConvAdd)", "FusedConv"),
    ),
    # PyTorch's eager mode runs one kernel a module: what an exporter writes out in elementary operators is one there
    "torch": (Rule("Add(MatMul, #)", "Gemm", "bias_of_matrix"), *_COMPOSITES),
    # A compiler that emits one loop nest for pointwise chains and row-wise reductions, and calls a library for matrix
    # products and convolutions, as TorchInductor does (Ansel et al. 2024, doi 10.1145/3620665.3640366)
    "inductor": (
        Rule("Add(MatMul, #)", "Gemm", "bias_of_matrix"),
        *_COMPOSITES,
        Rule("Pointwise(Pointwise)", "Pointwise", "same_elements"),
        Rule("Pointwise(*, Pointwise)", "Pointwise", "same_elements"),
        Rule("RowWise(Pointwise)", "RowWise", "same_elements"),
        Rule("Pointwise(RowWise)", "RowWise", "same_elements"),
    ),
}
"""Rules by backend, in the order of application."""

MAIN_TYPE = {
    "ConvAdd": "Conv",
    "FusedConv": "Conv",
    "FusedGemm": "Gemm",
    "FusedMatMul": "MatMul",
    "TransposePair": "Transpose",
}
"""Operator type of the main part, where the kernel's own name is not one that cost models know."""
