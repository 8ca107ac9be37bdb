"""Placeto: learns, keeps to memory, repeats itself, and says how to be installed."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from moirai_sim.errors import InputError
from moirai_sim.instances.random_graphs import wired_problem
from moirai_sim.policies.base import Request
from moirai_sim.policies.loads import fits
from moirai_sim.policies.placeto import Placeto
from moirai_sim.policies.random import Random
from moirai_sim.policies.run import time_placement
from moirai_sim.policies.starts import find_starts


def test_without_torch_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "moirai_sim.policies.placeto_agent", raising=False)
    with pytest.raises(InputError, match=r"pip install 'moirai-sim\[torch\]'"):
        Placeto().place(wired_problem("erdos-renyi", 6, 2), Request())


def test_training_on_one_problem_improves_its_episodes() -> None:
    pytest.importorskip("torch")
    from moirai_sim.policies.placeto_agent import Agent, Family, train

    problem = wired_problem("watts-strogatz", 8, 2, seed=1)
    start = Random().place(problem, Request(seed=1)).device
    family = Family([problem], [start])
    curve = train(Agent(2, seed=0), family, iterations=60, seed=0)
    assert np.mean(curve[-10:]) < np.mean(curve[:10]) - 0.1
    assert family.best_ns[0] <= min(curve) * family.views[0].evaluator.makespan_ns(start) + 1


def test_answers_fit_the_memory_and_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr("moirai_sim.policies.placeto.ITERATIONS", 8)
    problem = wired_problem("barabasi-albert", 3, 3, memory_scale=0.5, seed=2)
    one, same = (Placeto().place(problem, Request(seed=5, time_limit_s=1000)) for _ in range(2))
    assert one.device.tolist() == same.device.tolist()
    assert fits(problem, one.device)
    assert time_placement(problem, one, Request()).spans


def test_large_graphs_are_grouped_first_and_the_answer_is_never_worse_than_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr("moirai_sim.policies.placeto.ITERATIONS", 3)
    monkeypatch.setattr("moirai_sim.policies.placeto.GROUPS", 12)
    problem = wired_problem("watts-strogatz", 16, 3, seed=3)
    assert problem.n_operators > 12
    request = Request(seed=5, time_limit_s=1000)
    answer = Placeto().place(problem, request)
    groups = answer.provenance["groups"]
    assert isinstance(groups, int)
    assert groups < problem.n_operators
    assert answer.provenance["updates"] == 3
    assert time_placement(problem, answer, request).makespan_ns <= find_starts(problem, request)[0].value_ns
