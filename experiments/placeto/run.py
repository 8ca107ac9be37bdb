"""Train one Placeto agent on a family of randomly wired networks and test it on unseen networks of the family.

Writes ``learning_curve.csv`` and ``results.json`` beside this file. Run: ``python experiments/placeto/run.py``.
"""

from __future__ import annotations

import csv
import io
import json
import time
from pathlib import Path

import numpy as np

from moirai_sim.files import write_whole
from moirai_sim.instances.random_graphs import wired_problem
from moirai_sim.policies.base import Request
from moirai_sim.policies.heft import Heft
from moirai_sim.policies.placeto_agent import Agent, Family, train
from moirai_sim.policies.random import Random
from moirai_sim.policies.single import Single
from moirai_sim.problem import PlacementProblem
from moirai_sim.simulation.list_scheduling import Evaluator
from moirai_sim.simulation.replay import replay

HERE = Path(__file__).parent
NODES, DEVICES, UPDATES, DEADLINE_S = 8, 2, 240, 180
TRAINING, UNSEEN = range(6), range(100, 112)


def _problem(seed: int) -> PlacementProblem:
    return wired_problem("watts-strogatz", NODES, DEVICES, seed=seed)


def _start(problem: PlacementProblem, seed: int) -> np.ndarray:
    return Random().place(problem, Request(seed=seed)).device


def main() -> None:
    """Train, test, and write both files."""
    problems = {seed: _problem(seed) for seed in TRAINING}
    family = Family(list(problems.values()), [_start(problem, seed) for seed, problem in problems.items()])
    agent = Agent(DEVICES, seed=0)
    untrained = _mean_ratios(agent)
    curve = train(agent, family, iterations=UPDATES, seed=0, deadline=time.perf_counter() + DEADLINE_S)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["update", "end_over_start"])
    writer.writerows([update, f"{value:.4f}"] for update, value in enumerate(curve))
    write_whole(HERE / "learning_curve.csv", text.getvalue())
    results = {
        "family": f"watts-strogatz, {NODES} operators, {DEVICES} devices",
        "trained_on": len(TRAINING),
        "updates": len(curve),
        "first_30_updates": round(float(np.mean(curve[:30])), 4),
        "last_30_updates": round(float(np.mean(curve[-30:])), 4),
        "unseen": len(UNSEEN),
        "unseen_over_random_start": {"untrained": untrained, "trained": _mean_ratios(agent)},
    }
    write_whole(HERE / "results.json", json.dumps(results, indent=1) + "\n")


def _mean_ratios(agent: Agent) -> dict[str, float]:
    """Return mean makespans of agent, HEFT and best single device on the unseen networks, over a random start's."""
    rows = []
    for seed in UNSEEN:
        problem = _problem(seed)
        start = _start(problem, seed)
        evaluator = Evaluator(problem)
        placed = evaluator.makespan_ns(agent.place(problem, start))
        others = [replay(problem, policy().place(problem, Request())).makespan_ns for policy in (Heft, Single)]
        rows.append(np.array([placed, *others]) / evaluator.makespan_ns(start))
    means = np.mean(rows, axis=0).round(4).tolist()
    return dict(zip(("placeto", "heft", "single"), means, strict=True))


if __name__ == "__main__":
    main()
