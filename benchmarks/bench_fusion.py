"""Our fusion rules against the graph that ONNX Runtime really runs (``optimized_model_filepath``).

``fusion-recall`` is the share of its fused kernels that the rules find, exactly; ``fusion-precision`` the share of ours
that it has. The rules were tuned on the nine models that ship with ``onnx`` (*light*) and on *transformers* of the zoo
in PyTorch's export forms, and mended on more of the *zoo*; *held-out* models were never looked at for that.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import chain
from pathlib import Path

import onnx

from benchmarks.row import Row
from benchmarks.torch_models import HELD_OUT, exported
from moirai_sim.graphs.fusion import fuse
from moirai_sim.graphs.light import light_models
from moirai_sim.graphs.onnx_reader import node_names, read_model
from moirai_sim.graphs.operator import OperatorGraph
from moirai_sim.graphs.work import VIEWS
from moirai_sim.graphs.zoo import zoo_model
from moirai_sim.profiling.backends.onnxruntime import make_session

_TRANSFORMERS = (
    "bert-base?layers=3&seq=64&vocabulary=1000",
    "bert-base?layers=3&seq=64&vocabulary=1000&opset=16",
    "gpt2?layers=3&seq=64&vocabulary=1000",
    "gpt2?layers=3&seq=64&vocabulary=1000&opset=16",
)
_OTHERS = (
    "vit-b?layers=3", "swin-t", "alphafold2-87m?blocks=2&residues=16&sequences=8", "resnet18", "resnet50",
    "inception-v3", "inception-v4", "googlenet", "yolov5n", "yolov5s", "unet?width=16", "ws-32", "er-32",
    "ba-32?seed=1",
    "llama2-7b?layers=2&hidden=64&heads=4&kv_heads=2&feed_forward=96&vocabulary=100&dtype=float32&seq=8",
    "mixtral-8x7b?layers=2&hidden=64&heads=4&kv_heads=2&feed_forward=96&vocabulary=100&dtype=float32&seq=8",
)  # fmt: skip
"""More families, to see where the rules end. Some rules were mended on them, so they are not held out."""
_HELD_OUT = (
    "vit-l?layers=2&opset=16", "swin-s", "bert-large?layers=2&seq=32&vocabulary=500",
    "gpt2-medium?layers=2&seq=32&vocabulary=500", "alphafold2-240m?blocks=1&residues=12&sequences=4", "resnet34",
    "resnet101", "unet?width=24&image=128", "yolov5m", "ws-32?seed=7", "er-32?seed=3", "ba-32?seed=5",
    "llama3-8b?layers=2&hidden=64&heads=8&kv_heads=2&feed_forward=160&vocabulary=100&dtype=float32&seq=16",
)  # fmt: skip
"""Models on which no rule was ever tuned; with them the networks of `torch_models`."""
_LAYOUT_SUFFIX = re.compile(r"(_bn|_mul)?_nchwc$")
Groups = set[frozenset[str]]


def _models(names: tuple[str, ...]) -> Iterator[tuple[str, onnx.ModelProto]]:
    for name in names:
        yield name, zoo_model(name)


def _light_models() -> Iterator[tuple[str, onnx.ModelProto]]:
    for name, path in light_models().items():
        model = onnx.load(str(path))
        fillers = [node for node in model.graph.node if node.op_type == "ConstantOfShape"]
        for i, node in enumerate(fillers):  # equal weights would let ONNX Runtime merge equal branches into one
            del node.attribute[:]
            value = onnx.helper.make_tensor("value", onnx.TensorProto.FLOAT, [1], [0.01 + 1e-5 * i])
            node.attribute.append(onnx.helper.make_attribute("value", value))
        yield name, model


def _runtime_groups(model: onnx.ModelProto, graph: OperatorGraph) -> Groups:
    """Return the sets of operators that ONNX Runtime runs as one kernel.

    An operator that no node of the optimized graph stands for went into the kernel that reads it.
    """
    for node, name in zip(model.graph.node, node_names(model.graph.node), strict=True):
        node.name = name
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        make_session(model.SerializeToString(), save=path)
        optimized = onnx.load(str(path), load_external_data=False).graph.node
    survivors, written = _survivors(optimized, graph), _written_together(optimized, graph)
    computed = {(graph[name].op_type, graph[name].inputs) for name in survivors}
    kernel: dict[str, str] = {}
    for operator in reversed(list(graph)):
        name = operator.name
        readers = {kernel[reader] for reader in graph.digraph.successors(name)}
        merged = (operator.op_type, operator.inputs) in computed  # with an operator that computes the same
        fused = name not in survivors and not merged and len(readers) == 1
        kernel[name] = readers.pop() if fused else name
    groups: dict[str, set[str]] = {}
    for name, last in kernel.items():
        groups.setdefault(written.get(last, last), set()).add(name)
    return _without_views(graph, groups.values())


def _written_together(optimized: Sequence[onnx.NodeProto], graph: OperatorGraph) -> dict[str, str]:
    """Return one operator for all whose outputs one node writes: slices of a tensor that became a Split."""
    writer = {tensor.name: operator.name for operator in graph for tensor in operator.outputs}
    together: dict[str, str] = {}
    for node in optimized:
        names = [writer[name] for name in node.output if name in writer]
        together |= dict.fromkeys(names, names[0] if names else "")
    return together


def _survivors(optimized: Sequence[onnx.NodeProto], graph: OperatorGraph) -> set[str]:
    """Return the operators whose output some node of the optimized graph computes.

    A node writes the operator's tensor, or is named for it or for the operator. In the blocked layout tensors have
    other names, a convolution keeps the name from before it took up an addition or an activation, and QuickGelu has
    none.
    """
    writer = {tensor.name: operator.name for operator in graph for tensor in operator.outputs}
    stands_for: dict[str, str] = {}
    found = set()

    def reader(name: str, types: tuple[str, ...]) -> str:
        return next((r for r in graph.digraph.successors(name) if graph[r].op_type in types), name)

    for node in optimized:
        names = [*node.output, _LAYOUT_SUFFIX.sub("", node.name)]
        last = next((writer[name] for name in names if name in writer), None)
        if last is None and node.name in graph.operators:
            last = node.name
        if last is None and node.input and node.input[0] in stands_for:
            last = stands_for[node.input[0]]
            if node.op_type == "QuickGelu":
                last = reader(last, ("Mul",))
        if last is None:
            continue
        if node.domain == "com.microsoft.nchwc" and node.op_type == "Conv":
            if len(node.input) > 3:
                last = reader(last, ("Add", "Sum"))
            activation = next((a.s.decode() for a in node.attribute if a.name == "activation"), "")
            if activation and graph[last].op_type != activation:
                last = reader(last, (activation,))
        found |= {last, *(writer[name] for name in node.output if name in writer)}
        stands_for |= dict.fromkeys(node.output, last)
    return found


def _without_views(graph: OperatorGraph, groups: object) -> Groups:
    work = ({name for name in group if graph[name].op_type not in VIEWS} for group in groups)  # type: ignore[attr-defined]
    return {frozenset(group) for group in work if len(group) > 1}


@cache
def _compared(kind: str) -> tuple[int, int, int, str]:
    """Return (fused kernels of both, of ONNX Runtime, of ours, the models that differ)."""
    models = {
        "held-out": lambda: chain(_models(_HELD_OUT), exported(*HELD_OUT)),
        "light": _light_models,
        "transformers": lambda: _models(_TRANSFORMERS),
        "zoo": lambda: chain(_models(_OTHERS), exported("torch-mobilenet-v3")),
    }
    both = theirs = ours = 0
    differ = []
    for name, model in models[kind]():
        graph = read_model(model, name=name)
        found = _without_views(graph, fuse(graph, "onnxruntime").members.values())
        real = _runtime_groups(model, graph)
        both, theirs, ours = both + len(found & real), theirs + len(real), ours + len(found)
        if found != real:
            differ.append(f"{name.split('?')[0]} {len(found & real)}/{len(real)}/{len(found)}")
        if "--verbose" in sys.argv:
            for label, extra in (("only ONNX Runtime", real - found), ("only ours", found - real)):
                for group in sorted(extra, key=sorted):
                    order = [n for n in graph.operators if n in group]
                    print(name, label, " + ".join(f"{graph[n].op_type}({n})" for n in order), file=sys.stderr)
    return both, theirs, ours, "; ".join(differ)


def _share(name: str, kind: str, *, recall: bool) -> Row:
    both, theirs, ours, differ = _compared(kind)
    of = theirs if recall else ours
    note = f"{both} of {of} fused kernels" + (f"; found/real/ours differ: {differ}" if differ else "")
    return Row(name, both / of, "share", ">= 0.95", both / of >= 0.95, note)


BENCHMARKS = {
    f"fusion-{what}-{kind}": (
        lambda kind=kind, what=what: _share(f"fusion-{what}-{kind}", kind, recall=what == "recall")
    )
    for kind in ("light", "transformers", "zoo", "held-out")
    for what in ("recall", "precision")
}
