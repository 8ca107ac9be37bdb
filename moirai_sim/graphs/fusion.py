"""Fusion: the kernels that a backend will really run for a graph.

A match is legal only if no inner value is read outside it or leaves the model. Then every path out of the kernel starts
at its last operator, so the region is convex and the fused graph is acyclic.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import cast

import networkx as nx

from moirai_sim.errors import InputError, did_you_mean
from moirai_sim.graphs.fusion_conditions import CONDITIONS, blocked_values
from moirai_sim.graphs.fusion_rules import CLASSES, COMMUTATIVE, MAIN_TYPE, RULES, Rule
from moirai_sim.graphs.operator import Operator, OperatorGraph, Tensor

BACKENDS = tuple(RULES)
"""Names of the backends whose fusions are known."""
MAX_MEMBERS = 64
"""Operators in a kernel at most, as TorchInductor has it (``max_fusion_size``); it keeps long chains linear too."""


@dataclass(frozen=True)
class FusedGraph:
    """A graph of kernels, and what each stands for."""

    graph: OperatorGraph
    """Fused kernels carry the name of their last member."""
    members: Mapping[str, tuple[str, ...]]
    """Names of the original operators of every kernel, in execution order."""


def fuse(graph: OperatorGraph, backend: str) -> FusedGraph:
    """Return the kernels that ``backend`` runs for ``graph``.

    Raises
    ------
    InputError
        If the backend is unknown.
    """
    if backend not in RULES:
        raise InputError(f"unknown backend '{backend}'; {did_you_mean(backend, BACKENDS)}")
    state = _Kernels(graph)
    for rule in RULES[backend]:
        state.apply(rule)
    return state.result()


@dataclass(eq=False, slots=True)
class Kernel:
    """A set of operators with one last member, whose outputs alone leave it."""

    type: str
    """Type that rules match."""
    op_type: str
    """Type that cost models know."""
    operators: tuple[Operator, ...]
    """In execution order."""
    inputs: tuple[Tensor, ...]
    """What is read from outside, the inputs of the main operator first."""
    main: Operator

    @property
    def root(self) -> Operator:
        """The last operator."""
        return self.operators[-1]


class _Pattern:
    """A parsed pattern: the types of an operator and the patterns of its first inputs."""

    def __init__(self, head: str, arguments: tuple[_Pattern | str, ...]) -> None:
        self.types = frozenset(CLASSES.get(head, (head,))) | {head}
        """Types of kernels that the last operator of a match may have."""
        below = [argument.needed for argument in arguments if isinstance(argument, _Pattern)]
        self.needed: list[frozenset[str]] = [self.types, *(types for needed in below for types in needed)]
        """A graph that has none of one of these sets has no match."""
        self.arguments = arguments
        self.orders = [arguments]
        if len(arguments) == 2 and self.types & COMMUTATIVE:
            self.orders.append(arguments[::-1])


@cache
def _parse(text: str) -> _Pattern:
    tokens: list[str] = re.findall(r"\w+|[#*(),]", text)
    position = 0

    def node() -> _Pattern | str:
        nonlocal position
        head = tokens[position]
        position += 1
        if not head[0].isupper():
            return head
        arguments: list[_Pattern | str] = []
        if position < len(tokens) and tokens[position] == "(":
            while tokens[position] != ")":
                position += 1
                arguments.append(node())
            position += 1
        return _Pattern(head, tuple(arguments))

    return cast("_Pattern", node())  # every rule begins with a type


class _Kernels:
    """The kernels of a graph while rules are applied."""

    def __init__(self, graph: OperatorGraph) -> None:
        self.graph = graph
        self.position = {name: i for i, name in enumerate(graph.operators)}
        self.producer = {tensor.name: operator.name for operator in graph for tensor in operator.outputs if tensor.name}
        self.readers: dict[str, list[str]] = {}
        for operator in graph:
            for tensor in operator.inputs:
                self.readers.setdefault(tensor.name, []).append(operator.name)
        kept = graph.source.get("outputs", ())
        self.kept = frozenset(kept) if isinstance(kept, Sequence) else frozenset()
        self.kernel = {o.name: Kernel(o.op_type, o.op_type, (o,), o.inputs, o) for o in graph}
        self.types = {operator.op_type for operator in graph}

    def apply(self, rule: Rule) -> None:
        """Fuse every match of a rule, in topological order of the last operators."""
        pattern = _parse(rule.pattern)
        if any(self.types.isdisjoint(types) for types in pattern.needed):
            return
        condition = CONDITIONS.get(rule.when)
        blocked = blocked_values(self.roots()) if rule.when == "same_layout" else frozenset()
        for kernel in list(self.roots()):
            if kernel.type not in pattern.types or self.kernel[kernel.root.name] is not kernel:
                continue
            for match in self._matches(pattern, kernel):
                if self._is_legal(match) and (condition is None or condition(match, blocked)):
                    self._merge(match, rule.result)
                    break

    def roots(self) -> Iterator[Kernel]:
        """Iterate over the kernels in topological order."""
        return (kernel for name, kernel in self.kernel.items() if kernel.root.name == name)

    def _matches(self, pattern: _Pattern, kernel: Kernel) -> Iterator[list[Kernel]]:
        """Yield the kernels of every way to match, the root first."""
        for _, found in self._match(pattern, kernel, {}, []):
            yield list(dict.fromkeys(found))

    def _match(
        self, pattern: _Pattern, kernel: Kernel, bound: dict[str, Tensor], found: list[Kernel]
    ) -> Iterator[tuple[dict[str, Tensor], list[Kernel]]]:
        if kernel.type not in pattern.types:
            return
        for arguments in pattern.orders:
            if len(arguments) <= len(kernel.inputs):
                yield from self._match_inputs(arguments, kernel.inputs, bound, [*found, kernel])

    def _match_inputs(
        self,
        arguments: Sequence[_Pattern | str],
        inputs: Sequence[Tensor],
        bound: dict[str, Tensor],
        found: list[Kernel],
    ) -> Iterator[tuple[dict[str, Tensor], list[Kernel]]]:
        if not arguments:
            yield bound, found
            return
        argument, tensor = arguments[0], inputs[0]
        if isinstance(argument, _Pattern):
            producer = self.producer.get(tensor.name)
            if producer is None:
                return
            below = self._match(argument, self.kernel[producer], bound, found)
        elif argument == "#":
            below = iter([(bound, found)] if tensor.weight else [])
        elif argument == "*":
            below = iter([(bound, found)])
        else:
            same = bound.get(argument, tensor) == tensor
            below = iter([({**bound, argument: tensor}, found)] if same else [])
        for more_bound, more_found in below:
            yield from self._match_inputs(arguments[1:], inputs[1:], more_bound, more_found)

    def _is_legal(self, match: Sequence[Kernel]) -> bool:
        """Tell whether no inner value is read outside the match or leaves the model, and it is not too long."""
        inside = {operator.name for kernel in match for operator in kernel.operators}
        return len(inside) <= MAX_MEMBERS and all(
            tensor.name not in self.kept and inside.issuperset(self.readers.get(tensor.name, ()))
            for kernel in match[1:]
            for tensor in kernel.root.outputs
        )

    def _merge(self, match: Sequence[Kernel], result: str) -> None:
        operators = sorted((o for kernel in match for o in kernel.operators), key=lambda o: self.position[o.name])
        main = next((k.main for k in match if k.type in (result, MAIN_TYPE.get(result))), None)
        if main is None:
            main = max(operators, key=lambda operator: operator.flops)
        op_type = MAIN_TYPE.get(result, result)
        if result in CLASSES:
            op_type = max(match, key=lambda kernel: sum(operator.flops for operator in kernel.operators)).op_type
        merged = Kernel(result, op_type, tuple(operators), self._boundary(operators, main, op_type), main)
        self.types.add(result)
        for operator in operators:
            self.kernel[operator.name] = merged

    def _boundary(self, operators: Sequence[Operator], main: Operator, op_type: str) -> tuple[Tensor, ...]:
        """Return the tensors read from outside, the inputs of the main operator first.

        Where the main operator reads an inner value, the activation which that is made from stands in its place. Each
        stands there once, but for both operands of a product.
        """
        inside = {tensor.name: operator for operator in operators for tensor in operator.outputs if tensor.name}

        def source(tensor: Tensor) -> Tensor:
            while tensor.name in inside:
                before = inside[tensor.name].inputs
                tensor = next((t for t in before if not t.weight), before[0])
            return tensor

        first = [source(tensor) for tensor in main.inputs]
        if op_type not in ("MatMul", "Gemm"):
            first = list(dict.fromkeys(first))
        others = dict.fromkeys(t for o in operators for t in o.inputs if t.name and t.name not in inside)
        return (*first, *(tensor for tensor in others if tensor not in first))

    def result(self) -> FusedGraph:
        """Return the graph of kernels."""
        digraph = nx.DiGraph()
        members = {}
        for kernel in self.roots():
            name = kernel.root.name
            members[name] = tuple(operator.name for operator in kernel.operators)
            digraph.add_node(name, operator=_operator(kernel))
        for kernel in self.roots():
            flows: dict[str, list[Tensor]] = {}
            for tensor in digraph.nodes[kernel.root.name]["operator"].inputs:
                if tensor.name in self.producer:
                    source = self.kernel[self.producer[tensor.name]].root.name
                    flows.setdefault(source, []).append(tensor)
            for source, tensors in flows.items():
                digraph.add_edge(source, kernel.root.name, tensors=tuple(dict.fromkeys(tensors)))
        return FusedGraph(OperatorGraph(self.graph.name, digraph, source=self.graph.source), members)


def _operator(kernel: Kernel) -> Operator:
    """Return the operator that stands for a kernel: the work of all members, the traffic of the boundary alone."""
    if len(kernel.operators) == 1:
        return kernel.root
    return Operator(
        kernel.root.name,
        kernel.op_type,
        kernel.inputs,
        kernel.root.outputs,
        {**kernel.main.attributes, **({"transA": 1} if _is_turned(kernel) else {})},
        kernel.main.dtype,
        flops=sum(operator.flops for operator in kernel.operators),
        read_bytes=sum(tensor.bytes for tensor in dict.fromkeys(kernel.inputs)),
        write_bytes=sum(tensor.bytes for tensor in kernel.root.outputs),
        weight_bytes=sum(operator.weight_bytes for operator in kernel.operators),
        bytes_only=any(operator.bytes_only for operator in kernel.operators),
        parts=kernel.operators,
    )


def _is_turned(kernel: Kernel) -> bool:
    """Tell whether a product reads its first operand with the last two axes swapped."""
    made = {tensor.name: operator for operator in kernel.operators for tensor in operator.outputs if tensor.name}
    turned, tensor = False, kernel.main.inputs[0] if kernel.op_type == "MatMul" else None
    while tensor is not None and tensor.name in made:
        before = made[tensor.name]
        turned ^= before.op_type == "Transpose"
        tensor = next((t for t in before.inputs if not t.weight), before.inputs[0])
    return turned
