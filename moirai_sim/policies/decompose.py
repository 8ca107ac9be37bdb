"""Exact placement by series decomposition: a shortest path over (cut vertex, device), one small exact solve an arc.

Between two cut vertices lies a module; its best time depends on the devices of the two alone. So the optimum is a
shortest path whose nodes are (cut vertex, device) and whose arc lengths are optima of modules. Arcs are solved lazily:
all start with a proven lower bound; the arcs of the shortest path under these bounds are worked on, and again, until
the shortest path consists of solved arcs (then it is an optimum) or reaches a known answer (then that is one). The
shortest path under the bounds is at any time a proven lower bound of the whole, however many arcs were solved.

An arc is worked on destructively: the solver looks for a module's answer at most a few percent above the arc's bound.
Either it finds an optimum, or the bound rises by those few percent. Such narrow questions are answered within
milliseconds where the whole question ("what is the optimum?") takes minutes, because most choices do not fit.

Before it is worked on, a moment of search gives an arc a first answer. So there is soon a path of known answers, which
is an answer to the whole: it stops the solver from looking for what is no better, and is what is left if time runs out.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from moirai_sim.placement import Placement
from moirai_sim.policies.bounds import FAR, critical_path_ns, heads_and_tails, load_ns
from moirai_sim.policies.cp_model import CpModel
from moirai_sim.policies.modules import Module, ancestors, assemble, cut_vertices, modules_of, restrict
from moirai_sim.policies.search import improve
from moirai_sim.policies.starts import too_wide
from moirai_sim.simulation.replay import replay

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.problem import PlacementProblem


STEP = 0.05
"""How far above an arc's bound an answer is looked for, as a share of the bound."""


DROPPED_SHARES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
"""Shares of the work that a bound by near-cuts may leave out."""
LARGEST = 120
"""Modules of more operators than this keep their first bounds: the solver would not raise them in time."""


@dataclass(eq=False)
class Arcs:
    """What is known of one kind of module: arc lengths between the devices of its entry and its exit, ns."""

    module: Module
    bound: NDArray[np.int64]
    """[s, t] proven lower bound; one row where there is no entry, one column where there is no exit."""
    known: NDArray[np.int64]
    """[s, t] length of the best answer found, FAR for none."""
    spent: NDArray[np.float64]
    """[s, t] seconds of the last solve that hit its limit."""
    placements: dict[tuple[int, int], Placement] = field(default_factory=dict)
    """Placements of the module that take ``known``, by position; links need none."""

    @property
    def exact(self) -> NDArray[np.bool_]:
        """[s, t] whether the bound is the optimum."""
        return self.bound >= self.known

    def learn(self, where: tuple[int, int], placement: Placement, value_ns: int) -> None:
        """Keep an answer if it is better than what is known."""
        if value_ns < self.known[where]:
            self.known[where] = value_ns
            self.placements[where] = placement


@dataclass(eq=False)
class Decomposition:
    """The outcome, memory and co-location aside: a proven bound, and an answer that is an optimum if it is as long."""

    bound_ns: int
    placement: Placement | None
    """The best path of modules' answers; None where none is better than what was known before."""
    value_ns: int
    """Makespan of ``placement``, else of what was known before."""
    modules: int
    solves: int


def decompose(
    problem: PlacementProblem,
    *,
    upper_ns: int,
    time_limit_s: float,
    workers: int = 1,
    seed: int = 0,
    solve_limit_s: float = 30.0,
) -> Decomposition:
    """Look for a placement below ``upper_ns`` and prove a bound, memory and co-location ignored.

    Parameters
    ----------
    upper_ns
        Makespan of a known answer; nothing that is not better is looked for.
    solve_limit_s
        Time of the first solve of an arc; an arc that needs more is given four times as much when it is met again.
    """
    deadline = time.perf_counter() + time_limit_s
    modules = modules_of(problem, cut_vertices(problem))
    chain = _chain(modules)
    solves = 0
    best: list[int] | None = None
    with ThreadPoolExecutor(max_workers=workers) as pool:
        while True:
            lengths = [arcs.bound for arcs in chain]
            forward = _forward(lengths)
            bound = int(min(forward[-1].min(), FAR))
            stitched = _forward([arcs.known for arcs in chain])
            if int(stitched[-1].min()) < upper_ns:
                upper_ns, best = int(stitched[-1].min()), _path([arcs.known for arcs in chain], stitched)
            path = _path(lengths, forward)
            todo = [
                c
                for c in _unsolved(chain, path)
                if len(modules[c].operators) <= LARGEST or chain[c].known[path[c], path[c + 1]] >= FAR
            ]
            left = deadline - time.perf_counter()
            if bound >= upper_ns or left <= 0.05 or not todo:
                break
            backward = _forward([length.T for length in reversed(lengths)])[::-1]
            jobs = _jobs(chain, path, todo, forward, backward, upper_ns)
            solves += len(jobs)
            list(pool.map(lambda job: _work_on(job[0], job[1], job[2], deadline, solve_limit_s, seed), jobs))
    placement = None if best is None else assemble(problem, modules, _parts(problem, modules, chain, best))
    return Decomposition(min(bound, upper_ns), placement, upper_ns, len(modules), solves)


def near_cut_bound_ns(
    problem: PlacementProblem, *, upper_ns: int, time_limit_s: float, workers: int = 1, seed: int = 0
) -> int:
    """Return a proven bound from the series structure that remains when a little work is left out, ns.

    Operators off the main line (a branch beside many modules) keep its operators from being cut vertices. Without them
    the rest decomposes, and its optimum bounds the whole from below. Several shares of work to leave out are compared
    by what they promise; the best is then worked on.
    """
    before = ancestors(problem)
    related = before | before.T | np.eye(problem.n_operators, dtype=bool)
    deadline = time.perf_counter() + time_limit_s
    best, most = problem, -1
    for share in DROPPED_SHARES:
        if time.perf_counter() > deadline - time_limit_s / 2:
            break
        smaller, _ = restrict(problem, ~_off_the_line(problem, related, share))
        promise = sum(_promise(module) for module in modules_of(smaller, cut_vertices(smaller)))
        if promise > most:
            best, most = smaller, promise
    time_limit_s = deadline - time.perf_counter()
    outcome = decompose(
        best, upper_ns=upper_ns, time_limit_s=time_limit_s, workers=workers, seed=seed, solve_limit_s=2.0
    )
    return min(outcome.bound_ns, upper_ns)


def _promise(module: Module) -> int:
    """Return what a module may add to a bound, ns: its best single device if it can be solved, else its first bound."""
    if len(module.operators) > LARGEST:
        return critical_path_ns(module.problem)
    duration = module.problem.operator_ns
    return int(np.where((duration < 0).any(axis=0), FAR, duration.sum(axis=0)).min())


def _off_the_line(problem: PlacementProblem, related: NDArray[np.bool_], share: float) -> NDArray[np.bool_]:
    """Choose a line of operators to become cut vertices; return what must be left out for that, [n].

    Greedily by the work that an operator is unrelated to, as long as all that is left out stays within the share.
    """
    work = np.where(problem.operator_ns < 0, FAR, problem.operator_ns).min(axis=1)
    beside = ~related
    dropped = np.zeros(problem.n_operators, dtype=bool)
    kept = np.zeros(problem.n_operators, dtype=bool)
    for i in np.argsort(beside @ work, kind="stable").tolist():
        if dropped[i] or (beside[i] & kept).any():
            continue
        more = dropped | beside[i]
        if work[more].sum() <= share * work.sum():
            dropped = more
            kept[i] = True
    return dropped


def _first_bounds(module: Module) -> Arcs:
    """Bound every arc of a module by its cheapest paths and its work; a link between two operators is known at once."""
    k = module.problem.n_devices
    sources = range(k) if module.entry else [-1]
    last = len(module.operators) - 1
    rows = []
    work = load_ns(module.problem) if len(module.operators) > 2 else 0
    for source in sources:
        fixed = module.between(source, -1)
        if (fixed.operator_ns.max(axis=1) < 0).any():
            rows.append(np.full(k if module.exit else 1, FAR))
            continue
        head, tail = heads_and_tails(fixed)
        duration = np.where(fixed.operator_ns < 0, FAR, fixed.operator_ns)
        if module.exit:
            rows.append(np.minimum(head[last] + duration[last], FAR))
        else:
            rows.append(np.array([int(np.minimum(head + duration + tail, FAR).min(axis=1).max())]))
    bound = np.maximum(np.stack(rows), work)
    known = bound.copy() if module.is_link else np.full_like(bound, FAR)
    return Arcs(module, bound, known, np.zeros(bound.shape))


def _chain(modules: list[Module]) -> list[Arcs]:
    """Return the arcs of each module; equal modules share theirs."""
    kinds: dict[bytes, Arcs] = {}
    chain = []
    for module in modules:
        key = module.key()
        if key not in kinds:
            kinds[key] = _first_bounds(module)
        chain.append(kinds[key])
    return chain


def _forward(lengths: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """Return the least distance from the start to each side of each module, ns."""
    forward = [np.zeros(lengths[0].shape[0], dtype=np.int64)]
    for length in lengths:
        forward.append(np.minimum((forward[-1][:, None] + length).min(axis=0), FAR))
    return forward


def _path(lengths: list[NDArray[np.int64]], forward: list[NDArray[np.int64]]) -> list[int]:
    """Return the positions that a shortest path visits, one more than there are modules; ties by smaller index."""
    at = int(forward[-1].argmin())
    path = [at]
    for length, distance in zip(reversed(lengths), reversed(forward[:-1]), strict=True):
        at = int((distance + length[:, at]).argmin())
        path.append(at)
    return path[::-1]


def _unsolved(chain: list[Arcs], path: list[int]) -> list[int]:
    return [c for c, arcs in enumerate(chain) if not arcs.exact[path[c], path[c + 1]]]


def _jobs(
    chain: list[Arcs],
    path: list[int],
    todo: list[int],
    forward: list[NDArray[np.int64]],
    backward: list[NDArray[np.int64]],
    upper_ns: int,
) -> list[tuple[Arcs, tuple[int, int], int]]:
    """Return the arcs to solve, each kind of module once, and the length above which each is of no use."""
    jobs: dict[tuple[int, int, int], tuple[Arcs, tuple[int, int], int]] = {}
    for c in todo:
        where = (path[c], path[c + 1])
        slack = upper_ns - 1 - int(forward[c][where[0]]) - int(backward[c + 1][where[1]])
        key = (id(chain[c]), *where)
        if key not in jobs or jobs[key][2] < slack:
            jobs[key] = (chain[c], where, slack)
    return list(jobs.values())


def _work_on(
    arcs: Arcs, where: tuple[int, int], slack_ns: int, deadline: float, time_limit_s: float, seed: int
) -> None:
    """Work on one arc: find its optimum, or raise its bound by a step; lengths above ``slack_ns`` are of no use."""
    module = arcs.module
    problem = module.between(where[0] if module.entry else -1, where[1] if module.exit else -1)
    if arcs.known[where] >= FAR:
        placement = improve(problem, _on_one_device(problem), rounds=1, seed=seed)
        arcs.learn(where, placement, replay(problem, placement).makespan_ns)
    bound, known = int(arcs.bound[where]), int(arcs.known[where])
    limit = min(max(time_limit_s, 4 * float(arcs.spent[where])), deadline - time.perf_counter())
    if bound >= known or limit <= 0 or len(module.operators) > LARGEST or too_wide(problem):
        return
    step = max(int(bound * STEP), slack_ns // 1000) + 1
    answer = CpModel(problem, min(slack_ns, bound + step, known - 1)).solve(limit, seed=seed)
    arcs.bound[where] = min(max(bound, answer.bound_ns), known)
    if answer.placement is not None:
        arcs.learn(where, answer.placement, answer.makespan_ns)
    if answer.status not in ("optimal", "infeasible"):
        arcs.spent[where] = limit


def _on_one_device(problem: PlacementProblem) -> list[Placement]:
    """Return a start a device: everything that it can run on it, the rest where it runs fastest."""
    duration = np.where(problem.device_ns < 0, FAR, problem.device_ns)
    fastest = duration.argmin(axis=1)
    return [Placement(device=np.where(duration[:, k] < FAR, k, fastest)) for k in range(problem.n_devices)]


def _parts(problem: PlacementProblem, modules: list[Module], chain: list[Arcs], path: list[int]) -> list[Placement]:
    """Return the placements of the modules along a path."""
    parts = []
    for c, module in enumerate(modules):
        if module.is_link:
            crosses = path[c] != path[c + 1] and problem.edge_tensor[module.edges[0]] >= 0
            ends, sent = np.array([path[c], path[c + 1]]), np.array([1 if crosses else -1])
            parts.append(Placement(device=ends, order=np.array([0, 2]), transfer_order=sent))
        else:
            parts.append(chain[c].placements[path[c], path[c + 1]])
    return parts
