"""Randomly wired networks: Xie et al. 2019 (arXiv 1904.01569), small regime.

The generators are the paper's best: Watts-Strogatz WS(4, 0.75), Erdos-Renyi ER(0.2) and Barabasi-Albert BA(5).
"""

from __future__ import annotations

from functools import partial

import networkx as nx
from onnx import ModelProto

from moirai_sim.graphs.zoo.builder import Builder, Value


def _random_graph(kind: str, nodes: int, seed: int) -> nx.Graph:
    if kind == "ws":
        return nx.connected_watts_strogatz_graph(nodes, 4, 0.75, tries=200, seed=seed)
    if kind == "ba":
        return nx.barabasi_albert_graph(nodes, 5, seed=seed)
    attempt = seed
    while not nx.is_connected(graph := nx.erdos_renyi_graph(nodes, 0.2, seed=attempt)):
        attempt += 1_000_003  # another draw of the same seed, as the paper repeats until the graph is connected
    return graph


def randomly_wired(
    name: str, *, kind: str, nodes: int = 32, width: int = 78, seed: int = 0, batch: int = 1, image: int = 224,
    dtype: str = "float32",
) -> ModelProto:  # fmt: skip
    """Build two convolutions and three randomly wired stages; ``seed`` draws the wiring."""
    if kind not in _KINDS:
        raise ValueError(f"kind={kind} is none of {', '.join(_KINDS)}")
    b = Builder(name, dtype=dtype)
    x = b.batch_norm(b.conv(b.input("image", [batch, 3, image, image]), width // 2, 3, stride=2))
    x = b.batch_norm(b.conv(b.relu(x), width, 3, stride=2))
    for stage in range(3):
        with b.scope(f"stage{stage}"):
            x = _stage(b, x, width << stage, _random_graph(kind, nodes, 3 * seed + stage))
    x = b.relu(b.batch_norm(b.conv(b.relu(x), 1280, 1)))
    b.output(b.classifier(x))
    return b.model()


def _stage(b: Builder, x: Value, channels: int, wiring: nx.Graph) -> Value:
    """Run the graph with edges from smaller to larger nodes; sources read ``x`` at stride 2, sinks are averaged."""
    done: dict[int, Value] = {}
    sinks = []
    for node in sorted(wiring):
        with b.scope(f"node{node}"):
            before = sorted(other for other in wiring[node] if other < node)
            joined = _weighted_sum(b, [done[other] for other in before]) if before else x
            done[node] = _separable(b, b.relu(joined), channels, stride=1 if before else 2)
        if all(other < node for other in wiring[node]):
            sinks.append(done[node])
    return b.op("Mean", sinks, sinks[0].shape) if len(sinks) > 1 else sinks[0]


def _weighted_sum(b: Builder, values: list[Value]) -> Value:
    if len(values) == 1:
        return values[0]
    weighted = [b.mul(value, b.unary("Sigmoid", b.weight([1], 0.5))) for value in values]
    return b.op("Sum", weighted, values[0].shape)


def _separable(b: Builder, x: Value, channels: int, stride: int) -> Value:
    depthwise = b.conv(x, x.shape[1], 3, stride=stride, groups=x.shape[1])
    return b.batch_norm(b.conv(depthwise, channels, 1))


_KINDS = ("ws", "er", "ba")
MODELS = {f"{kind}-32": partial(randomly_wired, f"{kind}-32", kind=kind) for kind in _KINDS}
