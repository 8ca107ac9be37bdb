"""What a model or a timeline amounts to, for people: the text behind ``graph``, ``place`` and ``simulate``."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx

from moirai_sim.console import print_facts, print_table, print_text
from moirai_sim.sources import NO_FUSION, check_fusion, load_problem, recognise
from moirai_sim.units import format_bytes, format_count, format_ns

if TYPE_CHECKING:
    from moirai_sim.graphs.operator import OperatorGraph
    from moirai_sim.problem import PlacementProblem
    from moirai_sim.timeline import Timeline


def summarise(source: str, fuse: str | None = None) -> dict[str, Any]:
    """Return operators, FLOPs, bytes and memory of a source, and what a backend fuses of it.

    Raises
    ------
    InputError
        If the source cannot be read, or the backend is unknown or given for a published instance.
    """
    kind = recognise(source)
    check_fusion(source, kind, fuse)
    if kind == "pipedream":
        from moirai_sim.instances.pipedream import read_pipedream

        layers = read_pipedream(Path(source))
        return {
            "name": layers.name,
            "kind": kind,
            "operators": len(layers.layers),
            "edges": len(layers.edges),
            "time_ns": sum(layers.forward_ns),
            "weight_bytes": sum(layers.parameter_bytes),
        }
    if kind != "model":
        problem = load_problem(source)
        columns = [problem.operator_ns[:, t] for t in problem.device_type]
        return {
            "name": problem.name,
            "kind": kind,
            "operators": problem.n_operators,
            "edges": len(problem.edges),
            "tensors": len(problem.tensor_bytes),
            "weight_bytes": int(problem.weight_bytes.sum()) // (8 if problem.memory_unit == "bits" else 1),
            "time_ns": {device: int(ns[ns >= 0].sum()) for device, ns in zip(problem.devices, columns, strict=True)},
        }
    from moirai_sim.graphs.load import load_graph

    graph = load_graph(source)
    summary = {"name": graph.name, "kind": kind, "source": dict(graph.source), **_figures(graph)}
    if fuse is not None and fuse != NO_FUSION:
        from moirai_sim.graphs.fusion import fuse as fused

        after = fused(graph, fuse)
        kernels = {name: list(members) for name, members in after.members.items() if len(members) > 1}
        summary["fusion"] = {"backend": fuse, **_figures(after.graph), "fused": kernels}
    return summary


def _figures(graph: OperatorGraph) -> dict[str, Any]:
    types: dict[str, Counter[str]] = defaultdict(Counter)
    for operator in graph:
        types[operator.op_type].update(
            count=1,
            flops=operator.flops,
            bytes=operator.read_bytes + operator.write_bytes,
            weights=operator.weight_bytes,
        )
    tensors = {(producer, t.name): t.bytes for producer, _, flowing in graph.edges() for t in flowing}
    return {
        "operators": len(graph),
        "edges": graph.digraph.number_of_edges(),
        "depth": nx.dag_longest_path_length(graph.digraph, weight=None, default_weight=1) + 1 if len(graph) else 0,
        "flops": graph.flops,
        "read_bytes": sum(operator.read_bytes for operator in graph),
        "write_bytes": sum(operator.write_bytes for operator in graph),
        "weight_bytes": graph.weight_bytes,
        "activation_bytes": sum(tensors.values()),
        "peak_activation_bytes": _peak_activations(graph),
        "bytes_only": sorted({operator.op_type for operator in graph if operator.bytes_only}),
        "by_type": [
            {"op_type": op_type, **{key: int(figures[key]) for key in ("count", "flops", "bytes", "weights")}}
            for op_type, figures in sorted(types.items(), key=lambda item: (-item[1]["flops"], item[0]))
        ],
    }


def _peak_activations(graph: OperatorGraph) -> int:
    """Return the most bytes of activations alive at once, run one operator after another in topological order."""
    waiting: Counter[tuple[str, str]] = Counter()
    reads: dict[str, list[tuple[str, str]]] = defaultdict(list)
    made: dict[str, dict[tuple[str, str], int]] = defaultdict(dict)
    for producer, consumer, flowing in graph.edges():
        for tensor in flowing:
            key = (producer, tensor.name)
            made[producer][key] = tensor.bytes
            reads[consumer].append(key)
            waiting[key] += 1
    size = {key: number for tensors in made.values() for key, number in tensors.items()}
    alive = peak = 0
    for operator in graph:
        alive += sum(made[operator.name].values())
        peak = max(peak, alive)
        for key in reads[operator.name]:
            waiting[key] -= 1
            alive -= size[key] if waiting[key] == 0 else 0
    return peak


def print_summary(summary: dict[str, Any]) -> None:
    """Write a summary of `summarise` for people."""
    times = summary.get("time_ns")
    print_facts(
        {
            "name": summary["name"],
            "kind": summary["kind"],
            "operators": summary["operators"],
            "edges": summary["edges"],
            "depth": summary.get("depth"),
            "FLOPs": None if "flops" not in summary else format_count(summary["flops"]),
            "weights": format_bytes(summary["weight_bytes"]),
            "activations": _size(summary, "activation_bytes"),
            "largest at once": _size(summary, "peak_activation_bytes"),
            "read": _size(summary, "read_bytes"),
            "written": _size(summary, "write_bytes"),
            "priced by bytes alone": ", ".join(summary.get("bytes_only", [])) or None,
            "time": format_ns(times) if isinstance(times, int) else None,
        }
    )
    if isinstance(times, dict):
        print_text()
        print_table(["device", "all operators"], ((name, format_ns(ns)) for name, ns in times.items()))
    if "by_type" in summary:
        print_text()
        _print_types(summary["by_type"])
    if "fusion" in summary:
        fusion = summary["fusion"]
        before, after = summary["operators"], fusion["operators"]
        print_text(f"\nfused by {fusion['backend']}: {before} operators become {after} kernels")
        _print_types(fusion["by_type"])


def _print_types(rows: list[dict[str, Any]]) -> None:
    print_table(
        ["operator", "count", "FLOPs", "read and written", "weights"],
        (
            (row["op_type"], row["count"], format_count(row["flops"]), format_bytes(row["bytes"]),
             format_bytes(row["weights"]))
            for row in rows
        ),
    )  # fmt: skip


def _size(summary: dict[str, Any], key: str) -> str | None:
    return None if key not in summary else format_bytes(summary[key])


def print_timeline(timeline: Timeline, problem: PlacementProblem, out: Path | None) -> None:
    """Write how good a timeline is: bound, gap, best single device, load of each device, and what the times rest on."""
    from moirai_sim.policies.loads import best_single_device

    if not timeline.spans:
        reason = timeline.provenance.get("reason")
        print_facts({"status": timeline.status, "policy": timeline.policy, "reason": reason, "file": out})
        return
    measured = timeline.status == "measured"
    alone = best_single_device(problem)
    single = None if alone is None else f"{format_ns(alone[1])} on {problem.devices[alone[0]]}"
    if alone is not None and timeline.makespan_ns and timeline.period_ns is None:
        single = f"{single} ({alone[1] / timeline.makespan_ns:.3g} times the makespan)"
    print_facts(
        {
            "status": timeline.status,
            "policy": timeline.policy or None,
            "network": timeline.network,
            "makespan": format_ns(timeline.makespan_ns) + (within(timeline) if timeline.period_ns is None else ""),
            "longest latency": f"{format_ns(timeline.latency_ns)} (of {len(timeline.cycle)} placements that take turns)"
            if timeline.replicas
            else None,
            "period": None if timeline.period_ns is None else _period(timeline.period_ns) + within(timeline),
            "lower bound": f"{format_ns(timeline.lower_bound_ns)} (gap {timeline.gap:.2%})"
            if timeline.lower_bound_ns
            else None,
            "best single device": None if measured else single or "the model fits no device",
            "solved in": f"{timeline.solve_seconds:.3g} s" if timeline.solve_seconds else None,
            "times rest on": "this run" if measured else evidence(timeline),
            "note": timeline.provenance.get("reason"),
            "file": out,
        }
    )
    needs = None if measured or timeline.replicas else needs_of(problem, timeline)
    if needs is not None and needs["out_of_memory"]:
        print_text(needs["out_of_memory"])
    print_text()
    busy: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for span in (span for one in timeline.cycle for span in one.spans):
        if span.kind == "operator":
            busy[span.resource] += span.end_ns - span.start_ns
            count[span.resource] += len(span.operators) or 1
    turns = len(timeline.cycle)
    whole, of = timeline.makespan_ns, "makespan"
    if turns > 1 and timeline.period_ns is not None:
        whole, of = turns * timeline.period_ns, f"{turns} periods"
    elif turns > 1:
        whole, of = sum(one.makespan_ns for one in timeline.cycle), f"{turns} makespans"
    used = [device for device in problem.devices if count[device]]
    table = {
        "device": used,
        "operators": [count[device] for device in used],
        "busy": [format_ns(busy[device]) for device in used],
        f"share of {of}": [f"{busy[device] / max(1, whole):.1%}" for device in used],
    }
    if needs is not None:
        table["peak memory"] = [format_bytes(needs["peak_bytes"][device]) for device in used]
        energy = [needs["energy_j"][device] for device in used]
        if any(joules is not None for joules in energy):
            table["energy"] = ["?" if joules is None else f"{joules:.3g} J" for joules in energy]
    print_table(list(table), zip(*table.values(), strict=True))


def needs_of(problem: PlacementProblem, timeline: Timeline) -> dict[str, Any]:
    """Return what a simulated placement needs of its devices: peak bytes (with activations), energy, and what lacks."""
    from moirai_sim.simulation.memory import energy_joules, memory_use

    memory = memory_use(problem, timeline)
    busy: Counter[str] = Counter(dict.fromkeys(problem.devices, 0))
    for span in timeline.spans:
        if span.kind == "operator":
            busy[span.resource] += span.end_ns - span.start_ns
    return {
        "peak_bytes": memory.peak_bytes,
        "out_of_memory": None if memory.out_of_memory is None else str(memory.out_of_memory),
        "energy_j": energy_joules(problem.cluster, busy, timeline.makespan_ns),
    }


def _period(period_ns: int) -> str:
    return format_ns(period_ns) + (f" ({1e9 / period_ns:.4g} requests/s)" if period_ns else "")


def within(timeline: Timeline) -> str:
    """Return the interval of a timeline's objective, for people; nothing where its times are exact."""
    if timeline.low_ns is None or timeline.high_ns is None:
        return ""
    return f" (90 % interval {format_ns(timeline.low_ns)} to {format_ns(timeline.high_ns)})"


def evidence(timeline: Timeline) -> str:
    """Return on what the operator times of a placement rest, e.g. "80% predicted, 20% data sheet (uncalibrated)"."""
    share: dict[str, float] = timeline.provenance.get("cost_share", {})
    return ", ".join(
        f"{part:.0%} {source}{' (uncalibrated)' if source == 'data sheet' else ''}" for source, part in share.items()
    )
