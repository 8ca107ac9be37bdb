"""The exact model of a stream (DiviML, arXiv 2308.00127): R copies of the model of one request, and one period.

The copies are the placements that take turns. Each is a `milp_model.MilpModel`: of a request alone, with starts and
orders, where the latency matters, else of its loads only. Rows that join them:

``period``
    ``sum over copies of the load of a device or port <= P``: P is the period of the cycle, R times that of a request.
``held``, ``memory``
    ``x[r,i,k] <= held[i,k]`` and ``sum_i m[i] held[i,k] <= M[k]``: weights are held once for all copies.
``turns``
    Copies can be swapped: their load on the first device falls from one to the next.
``interchangeable``
    Devices that can be swapped are told apart by their load in all copies (models of loads only).

All copies have one makespan ``T``, the longest; either it or ``P`` is minimised, the other may have an upper bound.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import coo_array, csr_array, vstack

from moirai_sim.policies.loads import device_loads_ns, memory_binds, resource_loads_ns
from moirai_sim.policies.milp_model import MilpModel, Rows
from moirai_sim.policies.symmetry import interchangeable_devices, relabel_by_load
from moirai_sim.problem import UNLIMITED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from moirai_sim.placement import Placement
    from moirai_sim.policies.base import Objective
    from moirai_sim.problem import PlacementProblem

OF_LOADS = ("assignment", "memory", "colocation", "route", "leaves_its_producer", "reaches_a_consumer")
"""Rows of a copy that say where things are, not when."""


@dataclass
class StreamModel:
    """Columns and rows of a cycle of placements.

    Parameters
    ----------
    problem
        Network ``none``, ``one-port`` or ``half-duplex``.
    turns
        Number of copies, R.
    objective
        What is minimised: ``latency``, the longest makespan, or ``throughput``, the period.
    makespan_ns
        Upper bound of the makespans; None leaves starts and orders out, so that only loads matter.
    period_ns
        Upper bound of the period of the cycle: of R requests together.
    """

    problem: PlacementProblem
    turns: int
    objective: Objective
    makespan_ns: int | None
    period_ns: int
    families: dict[str, Rows] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Build one copy, number the columns of all, and add the rows of each and those that join them."""
        self.timed = self.makespan_ns is not None
        copy = MilpModel(
            self.problem, self.makespan_ns if self.makespan_ns is not None else self.period_ns,
            "latency" if self.timed else "throughput",
        )  # fmt: skip
        self.copy = copy
        self.unit_ns, self.step_ns = copy.unit_ns, copy.step_ns
        self._columns()
        for name, rows in copy.families.items():
            if self.timed or name in OF_LOADS:
                matrix = vstack([self._spread(rows.matrix, r) for r in range(self.turns)], format="csr")
                self.families[name] = Rows(matrix, np.tile(rows.right, self.turns), rows.equal)
        self._period()
        if self.turns > 1:
            self._memory()
            self._take_turns()
        if not self.timed:
            self._interchangeable()

    def _columns(self) -> None:
        """Place the binaries of every copy, the times of every copy, the held weights, then T and P, the goal last."""
        copy, turns = self.copy, self.turns
        own = copy.n_binary
        times = copy.at["T"] - copy.n_binary if self.timed else 0
        n, k = copy.duration.shape
        weights = n * k if turns > 1 and memory_binds(self.problem) else 0
        self.n_binary = turns * own
        self._held = slice(self.n_binary + turns * times, self.n_binary + turns * times + weights)
        ends = self._held.stop
        last = 1 if self.timed else 0
        self.n_columns = ends + 1 + last
        period_last = self.objective == "throughput"
        self.at_period = ends + last if period_last else ends
        self.at_makespan = ends if period_last else ends + last
        self.map = np.empty((turns, copy.n_columns), dtype=np.int64)
        """[R, columns of a copy] column here; -1 for times that a model of loads leaves out."""
        self.map[:] = -1
        turn = np.arange(turns)[:, None]
        self.map[:, :own] = turn * own + np.arange(own)
        self.map[:, own : own + times] = self.n_binary + turn * times + np.arange(times)
        self.lower, self.upper = np.zeros(self.n_columns), np.ones(self.n_columns)
        kept = self.map >= 0
        self.lower[self.map[kept]] = np.broadcast_to(copy.lower, kept.shape)[kept]
        self.upper[self.map[kept]] = np.broadcast_to(copy.upper, kept.shape)[kept]
        if self.timed:
            self.map[:, copy.at["T"]] = self.at_makespan
            self.upper[self.at_makespan] = copy.horizon
        self.upper[self.at_period] = self.period_ns / self.unit_ns
        self.horizon = float(self.upper[self.n_columns - 1])

    def _spread(self, matrix: csr_array, turn: int) -> csr_array:
        """Return rows of a copy over the columns of this model."""
        entries = matrix.tocoo()
        row, column = entries.coords
        place = self.map[turn, column]
        if (place < 0).any():
            raise ValueError("a row speaks of times that the model leaves out")
        return coo_array((entries.data, (row, place)), shape=(matrix.shape[0], self.n_columns)).tocsr()

    def _total(self, loads: csr_array) -> csr_array:
        """Return the sum of loads over the copies."""
        total = csr_array((loads.shape[0], self.n_columns))
        for r in range(self.turns):
            total = total + self._spread(loads, r)
        return csr_array(total)

    def _less(self, loads: csr_array, column: NDArray[np.int64]) -> csr_array:
        height = loads.shape[0]
        minus = coo_array((-np.ones(height), (np.arange(height), column)), shape=loads.shape).tocsr()
        return csr_array(loads + minus)

    def _period(self) -> None:
        """``sum_r load[r] <= P`` for every device and port."""
        loads = vstack([self.copy.device_loads(), self.copy.port_loads()], format="csr")
        height = loads.shape[0]
        rows = self._less(self._total(loads), np.full(height, self.at_period))
        self.families["period"] = Rows(rows, np.zeros(height))

    def _memory(self) -> None:
        """``x[r,i,k] <= held[i,k]`` and ``sum_i m[i] held[i,k] <= M[k]``, as shares of the model."""
        if not memory_binds(self.problem):
            return
        p = self.problem
        n, k = self.copy.duration.shape
        x = np.arange(n * k)
        row = np.arange(self.turns * n * k)
        shape = (len(row), self.n_columns)
        uses = coo_array((np.ones(len(row)), (row, self.map[:, x].reshape(-1))), shape=shape).tocsr()
        self.families["held"] = Rows(self._less(uses, self._held.start + np.tile(x, self.turns)), np.zeros(len(row)))
        total = float(p.weight_bytes.sum())
        limited = np.flatnonzero((p.memory_bytes != UNLIMITED) & (p.memory_bytes < total))
        column = self._held.start + np.arange(n)[None, :] * k + limited[:, None]
        entries = np.tile(p.weight_bytes / total, len(limited)), (np.repeat(np.arange(len(limited)), n), column.ravel())
        matrix = coo_array(entries, shape=(len(limited), self.n_columns)).tocsr()
        self.families["held_memory"] = Rows(matrix, p.memory_bytes[limited] / total)

    def _take_turns(self) -> None:
        """``load of device 0 in copy r + 1 <= that in copy r``."""
        first = self.copy.device_loads()[[0]]
        falls = [self._spread(first, b) - self._spread(first, a) for a, b in pairwise(range(self.turns))]
        self.families["turns"] = Rows(csr_array(vstack(falls)), np.zeros(len(falls)))

    def _interchangeable(self) -> None:
        """``load of h <= load of k`` in all copies, for k before h that can be swapped."""
        pairs = [(a, b) for group in interchangeable_devices(self.problem) for a, b in pairwise(group)]
        if not pairs:
            return
        first, second = np.array(pairs, dtype=np.int64).T
        total = self._total(self.copy.device_loads())
        self.families["interchangeable"] = Rows(csr_array(total[second] - total[first]), np.zeros(len(pairs)))

    def column_names(self) -> list[str]:
        """Return a readable name for each column, in LP file syntax."""
        p = self.problem
        names = [""] * self.n_columns
        for r in range(self.turns):
            for column, name in zip(self.map[r].tolist(), self.copy.column_names(), strict=True):
                if column >= 0:
                    names[column] = f"{name}.{r}"
        names[self._held] = [f"held({i},{k})" for i in p.operators for k in p.devices][: len(names[self._held])]
        names[self.at_period] = "P"
        if self.timed:
            names[self.at_makespan] = "T"
        return names

    def arranged(self, cycle: Sequence[Placement]) -> list[Placement]:
        """Return an equally good cycle that keeps the rows that tell copies and devices apart."""
        given = list(cycle)
        if not self.timed:
            loads = np.sum([device_loads_ns(self.problem, one.device) for one in given], axis=0)
            given = [replace(one, device=relabel_by_load(self.problem, one.device, loads)) for one in given]
        return sorted(given, key=lambda one: -int(device_loads_ns(self.problem, one.device)[0]))

    def columns_of(self, cycle: Sequence[Placement]) -> NDArray[np.float64]:
        """Return the columns that describe a known cycle: the solver's first solution."""
        from moirai_sim.policies.milp import columns_of

        values = np.zeros(self.n_columns)
        n, k = self.copy.duration.shape
        total = np.zeros(1)
        for r, one in enumerate(self.arranged(cycle)):
            own = columns_of(self.copy, one)
            kept = self.map[r] >= 0
            makespan = max(values[self.at_makespan], own[self.copy.at["T"]]) if self.timed else 0.0
            values[self.map[r, kept]] = own[kept]
            if self.timed:
                values[self.at_makespan] = makespan
            if self._held.stop > self._held.start:
                values[self._held] = np.maximum(values[self._held], own[: n * k])
            total = total + resource_loads_ns(self.problem, one.device)
        values[self.at_period] = total.max(initial=0) / self.unit_ns
        return values
