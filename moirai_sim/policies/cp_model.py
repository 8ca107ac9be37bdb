"""The same problem as intervals: what OR-Tools CP-SAT solves, for whole problems and for modules of larger ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from math import gcd
from typing import TYPE_CHECKING, Any

import numpy as np

from moirai_sim.placement import Placement, transfer_edges
from moirai_sim.policies.bounds import device_kinds, heads_and_tails
from moirai_sim.problem import UNLIMITED
from moirai_sim.simulation.schedule import Schedule, placement_from_schedule

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.problem import PlacementProblem


@dataclass(frozen=True, eq=False)
class CpAnswer:
    """What CP-SAT says of a problem."""

    status: str
    """``optimal``, ``feasible``, ``infeasible`` (nothing within the horizon) or ``limit``."""
    placement: Placement | None
    makespan_ns: int
    bound_ns: int
    """No answer is better; the horizon plus one step where there is none within it."""


@dataclass
class CpModel:
    """Optional intervals on devices and ports (no-overlap), linked to one start an operator and a transfer.

    Parameters
    ----------
    problem
        Network ``none``, ``one-port`` or ``half-duplex``.
    horizon_ns
        Only answers that end by this time are looked for.
    allowed
        [n, k] devices that an operator may use; None for all that can run it.
    """

    problem: PlacementProblem
    horizon_ns: int
    allowed: NDArray[np.bool_] | None = None
    ports: dict[tuple[str, int], list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Build the model in steps of the greatest common divisor of all times."""
        from ortools.sat.python import cp_model

        p = self.problem
        self.model = cp_model.CpModel()
        times = np.concatenate([p.operator_ns[p.operator_ns > 0], p.transfer_ns[p.transfer_ns > 0]])
        self.step_ns = max(1, gcd(*np.unique(times).tolist()) if len(times) else 1)
        self.horizon = self.horizon_ns // self.step_ns
        self._windows()
        self.feasible = bool(self.usable.any(axis=1).all())
        if self.feasible:
            self._operators()
            self._transfers()
            self._limits()
            self._objective()

    def _windows(self) -> None:
        p = self.problem
        kind = np.unique(device_kinds(p), return_inverse=True)[1]
        head, tail = (table[:, kind] for table in heads_and_tails(p))
        self.usable = (p.device_ns >= 0) & (head + np.maximum(p.device_ns, 0) + tail <= self.horizon_ns)
        if self.allowed is not None:
            self.usable &= self.allowed
        self.duration = np.maximum(p.device_ns, 0) // self.step_ns
        self.head, self.tail = -(-head // self.step_ns), -(-tail // self.step_ns)

    def _operators(self) -> None:
        p, model = self.problem, self.model
        self.start: list[Any] = []
        self.end: list[Any] = []
        self.on: list[dict[int, Any]] = []
        groups: dict[int, dict[int, Any]] = {}
        on_device: list[list[Any]] = [[] for _ in p.devices]
        for i in range(p.n_operators):
            ks = np.flatnonzero(self.usable[i]).tolist()
            group = -1 if p.colocation is None else int(p.colocation[i])
            if group in groups:
                literals = {k: groups[group][k] for k in ks if k in groups[group]}
                for k, literal in groups[group].items():
                    if k not in literals:
                        model.add(literal == 0)
            elif len(ks) == 1:
                literals = {ks[0]: model.new_constant(1)}
            else:
                literals = {k: model.new_bool_var(f"x{i},{k}") for k in ks}
            if group >= 0 and group not in groups:
                groups[group] = literals
            model.add_exactly_one(list(literals.values()))
            start = model.new_int_var(min(int(self.head[i, k]) for k in ks), self.horizon, f"S{i}")
            end = model.new_int_var(0, self.horizon - min(int(self.tail[i, k]) for k in ks), f"C{i}")
            model.add(end == start + sum(int(self.duration[i, k]) * x for k, x in literals.items()))
            for k, x in literals.items():
                size = int(self.duration[i, k])
                on_device[k].append(model.new_optional_fixed_size_interval_var(start, size, x, f"I{i},{k}"))
                if int(self.head[i, k]) > 0:
                    model.add(start >= int(self.head[i, k])).only_enforce_if(x)
                if int(self.tail[i, k]) > 0:
                    model.add(end <= self.horizon - int(self.tail[i, k])).only_enforce_if(x)
            self.start.append(start)
            self.end.append(end)
            self.on.append(literals)
        for intervals in on_device:
            model.add_no_overlap(intervals)

    def _transfers(self) -> None:
        """One start a leg; a route (source, target) of a leg is an optional interval on both ports."""
        p, model = self.problem, self.model
        self.leg_start: dict[tuple[int, int], Any] = {}
        """Start of the transfer of a tensor to a device; device -1 for the one consumer of a tensor."""
        consumers: dict[int, list[int]] = {}
        for e, tensor in enumerate(p.edge_tensor.tolist()):
            i, j = p.edges[e].tolist()
            model.add(self.start[j] >= self.end[i])
            if tensor >= 0:
                consumers.setdefault(tensor, []).append(e)
        for tensor, edges in sorted(consumers.items()):
            i = int(p.edges[edges[0], 0])
            readers = [int(p.edges[e, 1]) for e in edges]
            if len(readers) == 1:
                self._only_reader(tensor, i, readers[0])
            else:
                for target in range(p.n_devices):
                    self._readers_on(tensor, i, readers, target)
        for _, intervals in sorted(self.ports.items()):
            if len(intervals) > 1:
                model.add_no_overlap(intervals)

    def _only_reader(self, tensor: int, i: int, j: int) -> None:
        model = self.model
        start = model.new_int_var(0, self.horizon, f"s{tensor}")
        model.add(start >= self.end[i])
        self.leg_start[tensor, -1] = start
        routes: dict[tuple[int, int], Any] = {}
        for source, x in self.on[i].items():
            for target, y in self.on[j].items():
                length = 0 if source == target else self._length(tensor, source, target)
                if (
                    self.head[i, source]
                    + self.duration[i, source]
                    + length
                    + self.duration[j, target]
                    + self.tail[j, target]
                    > self.horizon
                ):
                    model.add_bool_or(x.negated(), y.negated())
                    continue
                u = model.new_bool_var(f"u{tensor},{source},{target}")
                routes[source, target] = u
                if source != target:
                    model.add(self.start[j] >= start + length).only_enforce_if(u)
                    self._occupy(start, length, u, source, target)
        for source, x in self.on[i].items():
            model.add(sum(u for (a, _), u in routes.items() if a == source) == x)
        for target, y in self.on[j].items():
            model.add(sum(u for (_, b), u in routes.items() if b == target) == y)

    def _readers_on(self, tensor: int, i: int, readers: list[int], target: int) -> None:
        model = self.model
        there = [(j, self.on[j][target]) for j in readers if target in self.on[j]]
        sources = [source for source in self.on[i] if source != target]
        if not there or not sources:
            return
        start = model.new_int_var(0, self.horizon, f"s{tensor},{target}")
        model.add(start >= self.end[i])
        self.leg_start[tensor, target] = start
        for source in sources:
            x = self.on[i][source]
            u = model.new_bool_var(f"u{tensor},{source},{target}")
            length = self._length(tensor, source, target)
            model.add_implication(u, x)
            model.add_bool_or([u.negated(), *(y for _, y in there)])
            for j, y in there:
                model.add_bool_or(u, x.negated(), y.negated())
                model.add(self.start[j] >= start + length).only_enforce_if([u, y])
            self._occupy(start, length, u, source, target)

    def _length(self, tensor: int, source: int, target: int) -> int:
        return self.problem.transfer_time_ns(tensor, source, target) // self.step_ns

    def _occupy(self, start: Any, length: int, present: Any, source: int, target: int) -> None:  # noqa: ANN401
        network = self.problem.network
        if network == "none":
            return
        interval = self.model.new_optional_fixed_size_interval_var(start, length, present, "")
        kinds = ("port", "port") if network == "half-duplex" else ("send", "receive")
        for kind, k in zip(kinds, (source, target), strict=True):
            self.ports.setdefault((kind, k), []).append(interval)

    def _limits(self) -> None:
        p = self.problem
        total = int(p.weight_bytes.sum())
        for k, limit in enumerate(p.memory_bytes.tolist()):
            if limit != UNLIMITED and limit < total:
                held = [
                    int(p.weight_bytes[i]) * literals[k]
                    for i, literals in enumerate(self.on)
                    if k in literals and p.weight_bytes[i]
                ]
                self.model.add(sum(held) <= limit)

    def _objective(self) -> None:
        p, model = self.problem, self.model
        self.makespan = model.new_int_var(0, self.horizon, "T")
        indptr = p.successors[0]
        for i, literals in enumerate(self.on):
            if indptr[i] == indptr[i + 1]:
                model.add(self.makespan >= self.end[i])
            for k, x in literals.items():
                if self.tail[i, k] > 0:
                    model.add(self.makespan >= self.end[i] + int(self.tail[i, k])).only_enforce_if(x)
        for k in range(p.n_devices):
            load = [int(self.duration[i, k]) * on[k] for i, on in enumerate(self.on) if k in on and self.duration[i, k]]
            if load:
                model.add(self.makespan >= sum(load))
        model.minimize(self.makespan)

    def hold_at_least(self, device: int, weight_bytes: int) -> None:
        """Let a device hold at least so much; before it is solved."""
        if self.feasible:
            held = [int(self.problem.weight_bytes[i]) * on[device] for i, on in enumerate(self.on) if device in on]
            self.model.add(sum(held) >= weight_bytes)

    def keep_order(self, device: NDArray[np.int64], schedule: Schedule, kept: NDArray[np.bool_]) -> None:
        """Let operators (``kept`` [n]) that share a device keep the order of a schedule; before it is solved."""
        if not self.feasible:
            return
        for k in range(self.problem.n_devices):
            there = np.flatnonzero(kept & (device == k))
            order = there[np.lexsort((schedule.operator_end_ns[there], schedule.operator_start_ns[there]))].tolist()
            for first, then in pairwise(order):
                self.model.add(self.start[then] >= self.end[first])

    def hint(self, placement: Placement, schedule: Schedule) -> None:
        """Tell the solver a known answer; it need not fit into the horizon."""
        if not self.feasible:
            return
        for i, literals in enumerate(self.on):
            for k, x in literals.items():
                if len(literals) > 1 and (self.problem.colocation is None or self.problem.colocation[i] < 0):
                    self.model.add_hint(x, int(placement.device[i] == k))
            self.model.add_hint(self.start[i], int(schedule.operator_start_ns[i]) // self.step_ns)

    def solve(self, time_limit_s: float, *, seed: int = 0, workers: int = 1, work: float | None = None) -> CpAnswer:
        """Solve within a time limit; with one worker equal seeds give equal answers if the limit is not met.

        ``work`` limits CP-SAT's deterministic time, which equals seconds roughly and is the same on every machine.
        """
        from ortools.sat.python import cp_model

        beyond = (self.horizon + 1) * self.step_ns
        if not self.feasible:
            return CpAnswer("infeasible", None, 0, beyond)
        solver = cp_model.CpSolver()
        solver.parameters.max_time_in_seconds = max(0.01, time_limit_s)
        solver.parameters.random_seed = seed % 2**31
        solver.parameters.num_workers = workers
        if work is not None:
            solver.parameters.max_deterministic_time = work
        if workers > 1:
            solver.parameters.interleave_search = True  # deterministic, unlike a race of threads
        code = solver.solve(self.model)
        status = {cp_model.OPTIMAL: "optimal", cp_model.FEASIBLE: "feasible", cp_model.INFEASIBLE: "infeasible"}.get(
            code, "limit"
        )
        if status == "infeasible":
            return CpAnswer(status, None, 0, beyond)
        bound = max(0, round(solver.best_objective_bound)) * self.step_ns
        if status == "limit":
            return CpAnswer(status, None, 0, bound)
        makespan = round(solver.objective_value) * self.step_ns
        return CpAnswer(status, self._placement(solver), makespan, makespan if status == "optimal" else bound)

    def _placement(self, solver: Any) -> Placement:  # noqa: ANN401
        p = self.problem
        device = np.array(
            [next(k for k, x in literals.items() if solver.boolean_value(x)) for literals in self.on], dtype=np.int64
        )
        start = np.array([solver.value(s) for s in self.start], dtype=np.int64)
        end = np.array([solver.value(c) for c in self.end], dtype=np.int64)
        leader = transfer_edges(p, device)
        sent, arrived = np.full(len(p.edges), -1, dtype=np.int64), np.full(len(p.edges), -1, dtype=np.int64)
        for e in np.flatnonzero(leader == np.arange(len(leader))).tolist():
            tensor, (source, target) = int(p.edge_tensor[e]), device[p.edges[e]].tolist()
            leg = self.leg_start.get((tensor, -1), self.leg_start.get((tensor, target)))
            sent[e] = solver.value(leg)
            arrived[e] = sent[e] + self._length(tensor, source, target)
        rough = Schedule(
            operator_ready_ns=start, operator_start_ns=start, operator_end_ns=end,
            transfer_ready_ns=sent, transfer_start_ns=sent, transfer_end_ns=arrived,
        )  # fmt: skip
        return placement_from_schedule(p, Placement(device=device), rough)
