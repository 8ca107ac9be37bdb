"""Times the operators of models on real hardware, as the backend really runs them.

Each distinct kernel of the graph that the backend executes is timed alone; the times are then booked on the operators
of the user's graph (fused as the backend fuses them) and held against the time of the whole model, which nothing
disturbed. ``docs/design.md``, "What an operator's measured time is", says why.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moirai_sim.errors import InputError
from moirai_sim.profiling.schema import operator_key, operator_row, statistics

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from moirai_sim.graphs.operator import OperatorGraph
    from moirai_sim.profiling.backends.onnxruntime import KernelGraph

_WARM_UP = 2
_MIN_REPEATS, _MAX_REPEATS = 5, 2000
_STABLE = 0.01
_STATISTICS = ("min_s", "p10_s", "median_s", "mean_s", "p90_s")


def time_until_stable(run: Callable[[], object], budget_s: float) -> NDArray[np.float64]:
    """Return repeated timings of ``run``, seconds.

    After the warm-up it repeats until the 95 % interval of the median (by order statistics) is within 1 % of it, or
    the budget is spent; never fewer than five times.
    """
    for _ in range(_WARM_UP):
        run()
    samples: list[float] = []
    deadline = time.perf_counter() + budget_s
    while len(samples) < _MAX_REPEATS:
        start = time.perf_counter()
        run()
        end = time.perf_counter()
        samples.append(end - start)
        n = len(samples)
        if n < _MIN_REPEATS:
            continue
        if end > deadline:
            break
        if n >= 20 and n % 10 == 0:
            ordered = np.sort(samples)
            half = 0.98 * np.sqrt(n)
            low, high = ordered[int(n / 2 - half)], ordered[min(int(np.ceil(n / 2 + half)), n - 1)]
            if high - low <= 2 * _STABLE * ordered[n // 2]:
                break
    return np.array(samples)


@dataclass(frozen=True)
class _Loaded:
    source: str
    graph: OperatorGraph
    executed: KernelGraph
    owner: tuple[str, ...]
    """[nodes of ``executed``] the operator of ``graph`` that a node's time is booked on."""


def profile_operators(
    models: Sequence[str | Path],
    device: str = "cpu:0",
    *,
    backend: str = "onnxruntime",
    budget_s: float = 60.0,
) -> pd.DataFrame:
    """Time every distinct operator of some models on one device.

    Parameters
    ----------
    models
        ONNX files or ``zoo:NAME``.
    device
        ``cpu:CORE`` (pinned to that core, one thread), ``cpu:FIRST-LAST`` (as many threads), or ``cuda:INDEX``.
    backend
        ``onnxruntime`` (CPU) or ``torch`` (CPU and CUDA; optional extra).
    budget_s
        Time to spend on repeats, seconds; reading and preparing models comes on top.

    Returns
    -------
    pandas.DataFrame
        Columns of ``schema.OPERATOR_COLUMNS``, one row an operator and model; times are those of isolated kernels.
        ``attrs["metadata"]`` holds telemetry and, under ``models``, the statistics of each whole model, the sum of its
        operators, and the ratio of the two.

    Raises
    ------
    InputError
        If the device, the backend or a model cannot be used here.
    """
    if not models:
        raise InputError("no model to profile; give ONNX files or zoo:NAME")
    if backend not in ("onnxruntime", "torch"):
        raise InputError(f"unknown backend '{backend}'; known: onnxruntime, torch")
    if not hasattr(os, "sched_setaffinity"):
        raise InputError("profiling pins itself to cores, which this system cannot do; use Linux")
    before = os.sched_getaffinity(0)
    cores = before if backend == "torch" and not device.startswith("cpu") else parse_cores(device)
    os.sched_setaffinity(0, cores)
    try:
        if backend == "torch":
            from moirai_sim.profiling.backends.torch import profile_models

            return profile_models(models, device, budget_s=budget_s)
        return _profile(models, threads=len(cores), budget_s=budget_s)
    finally:
        os.sched_setaffinity(0, before)


def parse_cores(device: str) -> set[int]:
    """Return the cores of ``cpu:FIRST[-LAST]``.

    Raises
    ------
    InputError
        If the text has another form or this process may not use a core.
    """
    match = re.fullmatch(r"cpu:(\d+)(?:-(\d+))?", device)
    if match is None:
        raise InputError(f"device '{device}': write cpu:CORE, cpu:FIRST-LAST, or cuda:INDEX with --backend torch")
    cores = range(int(match[1]), int(match[2] or match[1]) + 1)
    usable = os.sched_getaffinity(0)
    if not cores or any(core not in usable for core in cores):
        raise InputError(f"device '{device}': this process may use the cores {sorted(usable)}")
    return set(cores)


def _profile(models: Sequence[str | Path], *, threads: int, budget_s: float) -> pd.DataFrame:
    import pandas as pd

    from moirai_sim.graphs.load import model_names
    from moirai_sim.profiling import telemetry
    from moirai_sim.profiling.backends.onnxruntime import kernel_key
    from moirai_sim.profiling.cpu import measure_device_type
    from moirai_sim.profiling.schema import device_type_json
    from moirai_sim.progress import progress

    names = model_names(map(str, models))
    loaded = [load(str(source), threads) for source in models]
    started = telemetry.snapshot()
    device_type = measure_device_type(threads)
    timer = _KernelTimer(threads, device_type.l2_cache_bytes or 1 << 21)
    remaining = len({kernel_key(node, one.executed) for one in loaded for node in one.executed.nodes})
    deadline = time.perf_counter() + budget_s
    rows: list[dict[str, Any]] = []
    reconciled = {}
    with progress("operators", remaining) as step:
        for index, one in enumerate(loaded):
            whole_s = (deadline - time.perf_counter()) * 0.2 / (len(loaded) - index)
            run_whole = timer.whole_model(one)
            whole = [time_until_stable(run_whole, whole_s / 2)]
            known = len(timer.known)
            for node in one.executed.nodes:
                if kernel_key(node, one.executed) not in timer.known:
                    left = (deadline - time.perf_counter()) * 0.8 / max(remaining, 1)
                    timer.time(node, one.executed, float(np.clip(left, 0.003, 0.3)))
                    remaining -= 1
                    step()
            whole.append(time_until_stable(run_whole, whole_s / 2))
            del run_whole
            booked = _book(one, timer, names[one.source])
            rows += booked
            facts = _reconcile(one, np.concatenate(whole) - timer.overhead_s, timer)
            reconciled[names[one.source]] = facts | {"new_kernels": len(timer.known) - known}
    frame = pd.DataFrame(rows)
    stack = telemetry.versions()
    frame["device"], frame["device_type"] = device_type.name, device_type_json(device_type)
    frame["backend"], frame["stack"] = "onnxruntime", f"ONNX Runtime {stack['onnxruntime']}"
    frame["kernel"], frame["energy_j"], frame["source"] = "", np.nan, "measured"
    frame.attrs["metadata"] = {
        "hardware": telemetry.hardware(),
        "versions": stack,
        "telemetry": {"before": started, "after": telemetry.snapshot()},
        "threads": threads,
        "run_overhead_s": timer.overhead_s,
        "models": reconciled,
    }
    return frame


def load(source: str, threads: int = 1) -> _Loaded:
    """Read a model for the user's operators, and have ONNX Runtime say what it makes of it."""
    from moirai_sim.graphs.fusion import fuse
    from moirai_sim.graphs.load import load_graph
    from moirai_sim.profiling.backends.onnxruntime import kernel_graph

    fused = fuse(load_graph(source), "onnxruntime")
    executed = kernel_graph(model_bytes(source), threads)
    return _Loaded(source, fused.graph, executed, _book_on(executed, fused.graph))


def model_bytes(source: str) -> bytes:
    """Return the serialised model as the executor runs it: weights that nodes make are random, not all equal.

    Equal weights would let ONNX Runtime merge equal convolutions into one.
    """
    from moirai_sim.execution.weights import with_random_weights
    from moirai_sim.graphs.load import load_model

    return bytes(with_random_weights(load_model(source)).SerializeToString())


def _book_on(executed: KernelGraph, graph: OperatorGraph) -> tuple[str, ...]:
    """Return the operator of the fused ``graph`` that each executed node is booked on."""
    from moirai_sim.profiling.backends.onnxruntime import owners

    writer = {tensor.name: operator.name for operator in graph for tensor in operator.outputs}
    for operator in graph:  # the runtime may fuse less than we think: what is inside of a kernel is booked on it
        for part in operator.parts:
            writer = {tensor.name: operator.name for tensor in part.outputs} | writer
    by_node = {part.name: operator.name for operator in graph for part in (*operator.parts, operator)}
    first = next(iter(graph)).name
    return tuple(name or first for name in owners(executed.nodes, executed.weights, writer, by_node))


class _KernelTimer:
    """Times distinct kernels once, whichever model they occur in."""

    def __init__(self, threads: int, cache_bytes: int) -> None:
        from moirai_sim.profiling.backends.onnxruntime import make_session, probe_model, random_feeds

        self.threads, self.cache_bytes = threads, cache_bytes
        self.known: dict[tuple[object, ...], dict[str, float]] = {}
        probe = make_session(probe_model(), threads)
        feeds = random_feeds(probe)
        self.overhead_s = float(np.median(time_until_stable(lambda: probe.run(None, feeds), 0.1)))

    def time(self, node: Any, executed: KernelGraph, budget_s: float) -> None:  # noqa: ANN401  # NodeProto, untyped
        """Time one kernel, without what its session costs besides."""
        from moirai_sim.profiling.backends.onnxruntime import kernel_key, kernel_model, make_session, random_array

        model, copies = kernel_model(node, executed, 2 * self.cache_bytes)
        session = make_session(model, self.threads, optimize=False)
        feeds = {name: random_array(*executed.tensors[name]) for name in node.input if name in executed.tensors}
        wanted = {value.name for value in session.get_inputs()}
        feeds = {name: value for name, value in feeds.items() if name in wanted}
        feeds |= {name: np.ones(1, np.float32) for name in sorted(wanted - feeds.keys())}
        samples = time_until_stable(lambda: session.run(None, feeds), budget_s)
        # A view may be lost in the noise of the overhead: a nanosecond stands for "nothing that a clock could see".
        alone = np.maximum((samples - self.overhead_s) / copies, 1e-9)
        self.known[kernel_key(node, executed)] = statistics(alone)

    def whole_model(self, one: _Loaded) -> Callable[[], object]:
        """Return a function that runs a whole model once."""
        from moirai_sim.profiling.backends.onnxruntime import make_session, random_feeds

        session = make_session(model_bytes(one.source), self.threads)
        feeds = random_feeds(session)
        return lambda: session.run(None, feeds)


def _book(one: _Loaded, timer: _KernelTimer, model: str) -> list[dict[str, Any]]:
    """Return a row for every distinct operator: its occurrences' executed nodes added up, their mean taken."""
    from moirai_sim.profiling.backends.onnxruntime import kernel_key

    booked: dict[str, list[dict[str, float]]] = {operator.name: [] for operator in one.graph}
    for node, owner in zip(one.executed.nodes, one.owner, strict=True):
        booked[owner].append(timer.known[kernel_key(node, one.executed)])
    groups: dict[str, list[str]] = {}
    for operator in one.graph:
        groups.setdefault(operator_key(operator), []).append(operator.name)
    rows = []
    for names in groups.values():
        nodes = [stats for name in names for stats in booked[name]]
        times = {column: max(sum(stats[column] for stats in nodes) / len(names), 1e-9) for column in _STATISTICS}
        count = min((int(stats["count"]) for stats in nodes), default=1)
        rows.append(operator_row(one.graph[names[0]]) | times | {"count": count, "model": model})
    return rows


def _reconcile(one: _Loaded, whole: NDArray[np.float64], timer: _KernelTimer) -> dict[str, Any]:
    from moirai_sim.profiling.backends.onnxruntime import kernel_key

    total = sum(timer.known[kernel_key(node, one.executed)]["median_s"] for node in one.executed.nodes)
    stats = statistics(whole)
    return {
        **stats,
        "operators_s": total,
        "ratio": total / stats["median_s"],
        "operators": len(one.graph),
        "executed_nodes": len(one.executed.nodes),
    }
