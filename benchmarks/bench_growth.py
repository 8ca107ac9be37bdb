"""Growth of every policy: time to answer, and gap at the end, against the number of operators and of devices.

Every policy gets the same limit on its time, and a process of its own: one that ignores the limit is ended at
`ENDED_S`, one that asks for too much memory fails alone. Either way it leaves the curve, as does one that overran by
more than half. The gap is to the best bound that any policy proved for the same problem and objective.
"""

from __future__ import annotations

import csv
import io
import multiprocessing
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

from benchmarks.row import CURVES, Row
from moirai_sim.files import write_whole

LIMIT_S = 5.0
ENDED_S = 20.0
OVERRUN = 1.5
"""A call may take this many times its limit."""
MEMORY_BYTES = 6 * 2**30
"""Address space of a process."""
START_S = 120.0
"""For imports, compiling and making the problem."""
FAMILIES = {
    "list": ("single", "random", "met", "m-topo", "m-etf", "heft", "heft-blind", "cpop", "m-sct", "getf"),
    "anytime": ("search", "auto", "moirai", "diviml", "placeto"),
    "exact": ("cp", "milp", "milp-throughput", "pipeline-dp"),
}
"""Policies by kind; `diviml` is asked for latency."""
THROUGHPUT = ("milp-throughput", "pipeline-dp")
KEPT = ("auto", "search")
"""Policies that must keep the limit."""


@dataclass(frozen=True)
class Point:
    """One call: ``status`` is the policy's own word, or ``ended`` or ``failed``; nothing was answered then."""

    policy: str
    size: int
    seconds: float
    status: str
    value_ns: int = 0
    bound_ns: int = 0


def _measure(policy: str, sizes: Sequence[tuple[int, int, int]], pipe: Connection) -> None:
    """Answer problems of (size, operators, devices) one after the other; send a word before each call, a point after.

    A problem is what `layered_problem` draws with seed 0.
    """
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    from moirai_sim.instances.random_graphs import layered_problem
    from moirai_sim.policies.base import Request
    from moirai_sim.policies.bounds import lower_bound_ns
    from moirai_sim.policies.loads import period_ns
    from moirai_sim.policies.registry import load_policy
    from moirai_sim.simulation.replay import replay

    request = Request(objective="throughput" if policy in THROUGHPUT else "latency", time_limit_s=LIMIT_S)
    load_policy(policy).place(layered_problem(30, 2), Request(request.objective, time_limit_s=1.0))  # compile
    for size, operators, devices in sizes:
        problem = layered_problem(operators, devices)
        pipe.send("begin")
        started = time.perf_counter()
        answer = load_policy(policy).place(problem, request)
        seconds = time.perf_counter() - started
        pipe.send("end")
        value = 0
        if len(answer.device):
            late = policy in THROUGHPUT
            value = period_ns(problem, answer.devices) if late else replay(problem, answer).makespan_ns
        known = lower_bound_ns(problem, request.objective) if operators * devices <= 20_000 else 0
        pipe.send(Point(policy, size, seconds, answer.status, value, max(answer.lower_bound_ns, known)))


def _points(policy: str, sizes: Sequence[tuple[int, int, int]]) -> list[Point]:
    """Return the points of one policy, up to the first that it fails or overruns."""
    here, there = multiprocessing.get_context("spawn").Pipe(duplex=False)
    child = multiprocessing.get_context("spawn").Process(target=_measure, args=(policy, sizes, there), daemon=True)
    child.start()
    there.close()
    found: list[Point] = []
    for size, _, _ in sizes:
        status = "failed"
        point: object = None
        try:
            for allowed in (START_S, ENDED_S, START_S):  # ready, answered, checked
                if not here.poll(allowed):
                    status = "failed" if allowed == START_S else "ended"
                    break
                point = here.recv()
        except EOFError:
            pass
        found.append(point if isinstance(point, Point) else Point(policy, size, float("nan"), status))
        if found[-1].status in ("ended", "failed", "limit", "error") or found[-1].seconds > OVERRUN * LIMIT_S:
            break
    child.kill()
    child.join()
    return found


def _gaps(points: Sequence[Point]) -> dict[Point, float]:
    """Return the gap of each answer: 1 - bound / value."""
    best: dict[tuple[bool, int], int] = {}
    for point in points:
        key = (point.policy in THROUGHPUT, point.size)
        best[key] = max(best.get(key, 0), point.bound_ns)
    return {
        point: 1 - best[point.policy in THROUGHPUT, point.size] / point.value_ns
        for point in points
        if point.value_ns and best[point.policy in THROUGHPUT, point.size]
    }


def _growth(what: str, sizes: Sequence[tuple[int, int, int]], title: str) -> Callable[[], Row]:
    def run() -> Row:
        points = [point for names in FAMILIES.values() for name in names for point in _points(name, sizes)]
        gaps = _gaps(points)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow((what, "policy", "seconds", "status", "value_ms", "gap"))
        for point in points:
            value = f"{point.value_ns / 1e6:.6f}" if point.value_ns else ""
            gap = f"{gaps[point]:.4f}" if point in gaps else ""
            writer.writerow((point.size, point.policy, f"{point.seconds:.6f}", point.status, value, gap))
        write_whole(CURVES / f"policies-by-{what}.csv", text.getvalue())
        _draw(what, title, points, gaps)
        kept = [point for point in points if point.policy in KEPT]
        worst = max(kept, key=lambda point: point.seconds)
        done = {(point.policy, point.size) for point in kept if point.value_ns}
        met = worst.seconds <= OVERRUN * LIMIT_S and len(done) == len(KEPT) * len(sizes)
        proven = {name: max((p.size for p in points if p.policy == name and p.status == "optimal"), default=0)
                  for names in FAMILIES.values() for name in names}  # fmt: skip
        note = f"slowest {worst.policy} at {worst.size} {what}; proven optimal up to: "
        note += ", ".join(f"{name} {size}" for name, size in proven.items() if size) or "none"
        return Row(f"growth-{what}", worst.seconds / LIMIT_S, "of the limit", f"<= {OVERRUN}", met, note)

    return run


def _draw(what: str, title: str, points: Sequence[Point], gaps: dict[Point, float]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.5), constrained_layout=True)
    styles = {"list": (":", "o"), "anytime": ("-", "s"), "exact": ("--", "^")}
    colours = {"list": "tab10", "anytime": "Set1", "exact": "Dark2"}
    legend: list[Line2D] = []
    for kind, names in FAMILIES.items():
        legend.append(Line2D([], [], linestyle="", label=f"$\\bf{{{kind}}}$"))
        line, marker = styles[kind]
        for index, name in enumerate(names):
            colour = plt.get_cmap(colours[kind])(index)
            mine = [point for point in points if point.policy == name and point.status not in ("ended", "failed")]
            wide = 1.0 if kind == "list" else 1.8
            for axes, shown in ((left, mine), (right, [point for point in mine if point in gaps])):
                heights = [point.seconds if axes is left else 100 * gaps[point] for point in shown]
                axes.plot([point.size for point in shown], heights, line, color=colour, linewidth=wide)
                for point, height in zip(shown, heights, strict=True):
                    full = colour if point.status == "optimal" else "white"
                    axes.plot(point.size, height, marker, color=colour, markerfacecolor=full, markersize=5)
            legend += left.plot(
                [], [], line + marker, color=colour, markerfacecolor="white", linewidth=wide, label=name
            )
    left.axhline(LIMIT_S, color="black", linewidth=0.8, linestyle=":")
    left.annotate(
        f"limit {LIMIT_S:g} s", (0.01, 1.15 * LIMIT_S), xycoords=("axes fraction", "data"), va="bottom", fontsize=8
    )
    left.set_yscale("log")
    right.sharex(left)
    left.set_ylim(bottom=1e-5)
    right.set_ylim(-3, 103)
    left.set_title(f"Time to answer, s ({title})")
    right.set_title("Gap to the best proven bound, % (filled: proven optimal)")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel(what)
        axes.grid(visible=True, alpha=0.3)
    figure.legend(handles=legend, loc="outside right center", fontsize=9, frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
    plt.close(figure)
    write_whole(CURVES / f"policies-by-{what}.png", picture.getvalue())


BENCHMARKS = {
    "growth-operators": _growth("operators", [(n, n, 4) for n in (20, 100, 1_000, 10_000, 100_000)], "4 devices"),
    "growth-devices": _growth("devices", [(k, 1_000, k) for k in (2, 16, 64, 256)], "1,000 operators"),
}
