"""Does a rival ever beat ``auto``? All policies with one time limit, on random problems and published instances."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from benchmarks.row import Row, data_folder, without_data
from moirai_sim.errors import InputError
from moirai_sim.instances.random_graphs import Wiring, layered_edges, random_problem, random_wiring
from moirai_sim.policies.base import Request
from moirai_sim.policies.registry import policy_names
from moirai_sim.policies.run import place
from moirai_sim.progress import progress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from moirai_sim.policies.base import Objective
    from moirai_sim.problem import PlacementProblem

RIVALS = (
    "single", "random", "m-topo", "m-etf", "m-sct", "getf", "heft", "heft-blind", "cpop", "met", "pipeline-dp",
    "placeto",
)  # fmt: skip
"""Other people's policies: ``auto`` must never be behind one of them."""
RELATIVES = ("milp", "milp-throughput", "moirai", "diviml", "cp", "search")
"""What ``auto`` is made of; with the same seconds each may now and then find more than a mixture of all."""
PROBLEMS = 200
QUICK = 20
KINDS: tuple[Wiring | Literal["layered", "random"], ...] = (
    "erdos-renyi", "watts-strogatz", "barabasi-albert", "layered", "random",
)  # fmt: skip
LIMIT_S = 2.0
"""Seconds that every policy has for a problem, ``auto`` among them."""
PROCESSES = 2


def random_instance(seed: int) -> PlacementProblem:
    """Return one of an endless series of problems: five kinds of graph, 20 to 300 operators, 2 to 8 devices.

    Half have binding memory; transfers take a tenth to twice the mean time of an operator; all three exact networks.
    """
    rng = np.random.default_rng(seed)
    nodes, devices = round(float(np.exp(rng.uniform(np.log(20), np.log(300))))), int(rng.integers(2, 9))
    kind: Wiring | Literal["layered", "random"] = KINDS[seed % len(KINDS)]
    if kind == "layered":
        edges = layered_edges(nodes, width=int(rng.integers(2, 17)), seed=seed)
    elif kind == "random":  # each operator reads one to three of the twenty before it
        pairs = {
            (max(0, j - int(rng.integers(1, 21))), j) for j in range(1, nodes) for _ in range(int(rng.integers(1, 4)))
        }
        edges = np.array(sorted(pairs), dtype=np.int64)
    else:
        edges = random_wiring(kind, nodes, seed=seed)
    return random_problem(
        edges,
        nodes,
        devices,
        communication=float(np.exp(rng.uniform(np.log(0.1), np.log(2.0)))),
        memory_scale=float(rng.uniform(1.2, 2.0)) / devices if rng.random() < 0.5 else None,
        network=("none", "one-port", "half-duplex")[int(rng.integers(3))],
        seed=seed,
        name=f"{kind}-{nodes}-{devices}-{seed}",
    )


def answers(
    problem: PlacementProblem, others: Sequence[str] = RIVALS, objective: Objective = "latency"
) -> dict[str, int]:
    """Return what ``auto`` and others make of a problem, ns; 0 for no answer. Those that refuse it are left out."""
    values = {}
    for name in ("auto", *(name for name in others if name in policy_names())):
        try:
            timeline = place(problem, name, Request(objective, time_limit_s=LIMIT_S))
            values[name] = timeline.objective_ns if timeline.spans else 0
        except InputError:
            continue
    return values


def _random_answers(others: Sequence[str], seed: int) -> tuple[str, dict[str, int]]:
    problem = random_instance(seed)
    return problem.name, answers(problem, others)


def _published_answers(name: str) -> tuple[str, dict[str, int]]:
    folder = data_folder()
    if folder is None:
        raise ValueError("the data went away")
    return name, answers(_published(folder, name), RIVALS, "throughput" if "throughput" in name else "latency")


def _published(folder: Path, name: str) -> PlacementProblem:
    from moirai_sim.clusters.reader import read_cluster
    from moirai_sim.sources import load_problem

    file, _, scale = name.partition("@")
    cluster = read_cluster("diviml-server") if file.endswith(".txt") else None
    problem = load_problem(str(folder / file), cluster)
    problem = replace(problem, network="one-port") if problem.network == "fair" else problem
    return problem.with_memory_scale(float(scale)) if scale else problem


def published_names(folder: Path) -> list[str]:
    """Return the instances of Moirai, dnn-partitioning and PipeDream, and Moirai's with memory for 0.4 of the model."""
    moirai = [f"moirai/{path.name}" for path in sorted(folder.glob("moirai/*.xls"))]
    others = sorted([*folder.glob("dnn-partitioning/*/*/*.json"), *folder.glob("pipedream/**/graph.txt")])
    return [*moirai, *(f"{name}@0.4" for name in moirai), *(str(path.relative_to(folder)) for path in others)]


def _row(name: str, jobs: Sequence[object], run: Callable[..., tuple[str, dict[str, int]]]) -> Row:
    """Run the jobs in processes of their own, as many as there are cores to measure on; count the lost problems."""
    lost, won, answered = [], Counter[str](), 0
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, mp_context=spawn) as pool, progress(name, len(jobs)) as step:
        for problem, values in pool.map(run, jobs):
            step()
            ours = values.pop("auto")
            rivals = {rival: value for rival, value in values.items() if value > 0}
            answered += bool(rivals)
            better = {rival: value for rival, value in rivals.items() if not 0 < ours <= value}
            won.update(better.keys())
            if better:
                best, value = min(better.items(), key=lambda pair: pair[1])
                margin = f"{100 * (ours / value - 1):.2f} %" if ours else "auto has no answer"
                lost.append(f"{problem} to {best} ({margin})")
    note = f"{answered} problems with an answer of a rival, {LIMIT_S:g} s a policy"
    if lost:
        note += f"; better: {dict(won.most_common())}; lost: {'; '.join(lost)}"
    return Row(name, len(lost), "problems lost", "0", not lost, note)


def _published_row() -> Row:
    folder = data_folder()
    if folder is None:
        return without_data("rivals-published", "problems lost", "0")
    return _row("rivals-published", published_names(folder), _published_answers)


BENCHMARKS: dict[str, Callable[[], Row]] = {
    "rivals": partial(_row, "rivals", range(PROBLEMS), partial(_random_answers, RIVALS)),
    "rivals-published": _published_row,
    "relatives": partial(_row, "relatives", range(10_000, 10_000 + QUICK), partial(_random_answers, RELATIVES)),
}
