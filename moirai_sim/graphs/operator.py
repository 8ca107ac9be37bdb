"""Operator and OperatorGraph: what runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import networkx as nx

DTYPE_BITS: dict[str, int] = {
    "float64": 64, "float32": 32, "tf32": 32, "float16": 16, "bfloat16": 16, "float8": 8, "int64": 64, "int32": 32,
    "int16": 16, "int8": 8, "uint64": 64, "uint32": 32, "uint16": 16, "uint8": 8, "bool": 8, "int4": 4, "uint4": 4,
    "float4": 4,
}  # fmt: skip
"""Storage bits of an element, by the spelling of devices and operators files."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """An array that an operator reads or writes."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    weight: bool = False
    """A parameter of the model: it lies on the device before the request arrives, so it never travels."""

    @property
    def elements(self) -> int:
        """Number of elements; 1 for a scalar."""
        return int(math.prod(self.shape))

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        bits: int = self.elements * DTYPE_BITS[self.dtype]
        return (bits + 7) // 8


@dataclass(frozen=True)
class Operator:
    """One node of the graph after reading: real work with known cost drivers."""

    name: str
    op_type: str
    """ONNX operator type; the type of the main part for a fused kernel."""
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    attributes: Mapping[str, object] = field(default_factory=dict)
    dtype: str = "float32"
    """Data type of the arithmetic, spelt as in a device's ``peak_flops``."""
    flops: int = 0
    """Floating point operations; a multiply-add counts as two."""
    read_bytes: int = 0
    """Bytes read from memory: activations and weights, each once."""
    write_bytes: int = 0
    """Bytes written to memory."""
    weight_bytes: int = 0
    """Bytes of parameters that must lie on the device; a parameter shared by operators counts at its first reader."""
    bytes_only: bool = False
    """The operator type is not known: ``flops`` is 0 and the cost rests on its bytes alone."""
    parts: tuple[Operator, ...] = ()
    """The operators that a fused kernel stands for, in execution order; empty for a plain operator."""


class OperatorGraph:
    """A typed face of a ``networkx.DiGraph``: nodes are operator names, edges carry the tensors that flow.

    Node attribute ``operator`` is an `Operator`; edge attribute ``tensors`` is a tuple of `Tensor`.
    """

    def __init__(self, name: str, digraph: nx.DiGraph, *, source: Mapping[str, object] | None = None) -> None:
        self.name = name
        self.digraph = digraph
        self.source: Mapping[str, object] = source or {}
        """Where the graph came from: path, SHA-256, opset, producer."""

    def _repr_html_(self) -> str:
        from moirai_sim.display import graph_html

        return graph_html(self)

    def __len__(self) -> int:
        return len(self.digraph.nodes)

    def __iter__(self) -> Iterator[Operator]:
        """Iterate over the operators in topological order, ties by position in the model."""
        return iter(self.operators.values())

    def __getitem__(self, name: str) -> Operator:
        return self.operators[name]

    @cached_property
    def operators(self) -> dict[str, Operator]:
        """Operators by name in topological order; ties keep the order in which the model lists them."""
        position = {name: i for i, name in enumerate(self.digraph.nodes)}
        order = nx.lexicographical_topological_sort(self.digraph, key=position.__getitem__)
        return {name: self.digraph.nodes[name]["operator"] for name in order}

    def edges(self) -> Iterator[tuple[str, str, tuple[Tensor, ...]]]:
        """Iterate over (producer, consumer, tensors that flow), in topological order of the producer."""
        position = {name: i for i, name in enumerate(self.operators)}
        for producer in self.operators:
            for consumer in sorted(self.digraph.successors(producer), key=position.__getitem__):
                yield producer, consumer, self.digraph.edges[producer, consumer]["tensors"]

    @property
    def flops(self) -> int:
        """Floating point operations of one run."""
        return sum(operator.flops for operator in self)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(operator.weight_bytes for operator in self)
