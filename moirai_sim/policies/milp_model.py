"""The mixed-integer models of Moirai (latency, arXiv 2312.04025) and DiviML (throughput), as sparse matrices.

Sets: operators i, j; devices k; *legs* l, the ways on which tensors may travel. A tensor with one consumer has one leg
to wherever that consumer sits; one with several consumers has a leg to each device, because it is sent once to each.

Binary columns
    ``x[i,k]`` operator i runs on k; ``u[l,k,h]`` leg l goes from k to h; ``d[a,b]`` a ends before b starts, for two
    operators or two legs that could meet on a device or a port.
Continuous columns
    ``S``, ``C`` start and completion of operators, ``s``, ``c`` of legs; ``T`` the makespan, or the period.

For throughput nothing is ordered: a saturated pipeline works on many requests at once, and its period ``T`` is the
largest load of a device or port. Then only ``x``, ``u`` and ``T`` have rows.

Times are in units that make the horizon about 10^4 or less, and no constant M exceeds what its row needs: the window
between the earliest and the latest time that an incumbent leaves open. Pairs that precedence or these windows order
anyway get no rows. Each method that adds rows states its inequality.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from math import gcd
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from scipy.sparse import coo_array, csr_array

from moirai_sim.policies.bounds import device_kinds, heads_and_tails
from moirai_sim.policies.symmetry import interchangeable_devices
from moirai_sim.problem import UNLIMITED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from moirai_sim.policies.base import Objective
    from moirai_sim.problem import PlacementProblem

Ints: TypeAlias = "NDArray[np.int64]"
Term: TypeAlias = "tuple[NDArray[np.int64], float | NDArray[np.float64]]"


@dataclass
class Rows:
    """One family of constraints, ``matrix @ columns <= right`` (or ``==``)."""

    matrix: csr_array
    right: NDArray[np.float64]
    equal: bool = False


@dataclass
class MilpModel:
    """Columns, rows and windows of one problem.

    Parameters
    ----------
    problem
        Network ``none``, ``one-port`` or ``half-duplex``.
    horizon_ns
        Makespan (or period) of a known answer, or any time by which an optimum surely ends.
    """

    problem: PlacementProblem
    horizon_ns: int
    objective: Objective = "latency"
    families: dict[str, Rows] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Build the model: number the columns, then add every family of constraints."""
        self._windows()
        self._columns()
        self._assignment()
        self._memory()
        self._colocation()
        self._routes()
        self._at_most_goal("load", self.device_loads())
        if self.objective == "throughput":
            self._at_most_goal("port_load", self.port_loads())
            self._interchangeable_devices()
            return
        self._completion()
        self._precedence()
        self._makespan()
        self._devices_do_one_thing()
        self._ports_do_one_thing()

    # --- sets and columns ------------------------------------------------------------------------------------------

    def _windows(self) -> None:
        p = self.problem
        times = np.concatenate([p.operator_ns[p.operator_ns > 0], p.transfer_ns[p.transfer_ns > 0]])
        step = gcd(*np.unique(times).tolist()) if len(times) else 1
        self.step_ns = max(1, step)
        """Every makespan is a multiple of this: the greatest common divisor of all times."""
        self.unit_ns = float(max(self.step_ns, self.horizon_ns / 1e4))
        self.horizon = self.horizon_ns / self.unit_ns
        duration = np.where(p.device_ns < 0, 0, p.device_ns)
        self.duration = duration / self.unit_ns
        kind = np.unique(device_kinds(p), return_inverse=True)[1]
        head, tail = (table[:, kind] for table in heads_and_tails(p))
        if self.objective == "throughput":
            head, tail = np.zeros_like(head), np.zeros_like(tail)
        self.usable = (p.device_ns >= 0) & (head + duration + tail <= self.horizon_ns)
        far = np.iinfo(np.int64).max // 4
        start = np.where(self.usable, head, far).min(axis=1) / self.unit_ns
        end = (self.horizon_ns - np.where(self.usable, tail, far).min(axis=1)) / self.unit_ns
        self.earliest, self.latest = np.minimum(start, self.horizon), np.clip(end, 0, self.horizon)
        self._reach()

    def _reach(self) -> None:
        p = self.problem
        n = p.n_operators
        self.before = np.zeros((n, n), dtype=bool)
        """[n, n] i is an ancestor of j."""
        indptr, edge_ids = p.predecessors
        for j in p.topological_order.tolist():
            for e in edge_ids[indptr[j] : indptr[j + 1]].tolist():
                i = p.edges[e, 0]
                self.before[:, j] |= self.before[:, i]
                self.before[i, j] = True

    def _columns(self) -> None:
        p = self.problem
        n, k = p.n_operators, p.n_devices
        self._make_legs()
        legs = len(self.leg_tensor)
        anywhere, given = np.flatnonzero(self.leg_target < 0), np.flatnonzero(self.leg_target >= 0)
        source, target = np.divmod(np.arange(k * k), k)
        leg = np.concatenate([np.repeat(anywhere, k * k), np.repeat(given, k)])
        source = np.concatenate([np.tile(source, len(anywhere)), np.tile(np.arange(k), len(given))])
        target = np.concatenate([np.tile(target, len(anywhere)), np.repeat(self.leg_target[given], k)])
        open_ = np.flatnonzero((source != target) & self.usable[self.leg_producer[leg], source])
        open_ = open_[np.lexsort((target[open_], source[open_], leg[open_]))]
        self.route_leg, self.route_source, self.route_target = leg[open_], source[open_], target[open_]
        route = p.route_class[self.route_source, self.route_target]
        self.route_time = p.transfer_ns[self.leg_tensor[self.route_leg], route] / self.unit_ns
        self._make_pairs()
        sizes = {
            "x": n * k, "u": len(self.route_leg), "d": 2 * len(self.operator_pairs) + 2 * len(self.leg_pairs),
            "S": n, "C": n, "s": legs, "c": legs, "T": 1,
        }  # fmt: skip
        starts = np.concatenate([[0], np.cumsum(list(sizes.values()))])
        self.at = {name: int(start) for name, start in zip(sizes, starts[:-1], strict=True)}
        """First column of each block."""
        self.n_columns = int(starts[-1])
        self.n_binary = self.at["S"]
        lower, upper = np.zeros(self.n_columns), np.ones(self.n_columns)
        upper[self.n_binary :] = self.horizon
        upper[: n * k] = self.usable.reshape(-1)
        lower[self.at["S"] : self.at["S"] + n] = self.earliest
        upper[self.at["C"] : self.at["C"] + n] = self.latest
        self.lower, self.upper = lower, upper

    def _make_legs(self) -> None:
        p = self.problem
        tensors, producers, targets, self.leg_edges = [], [], [], list[list[int]]()
        carried = np.flatnonzero(p.edge_tensor >= 0)
        consumers: dict[int, list[int]] = {}
        for e in carried.tolist():
            consumers.setdefault(int(p.edge_tensor[e]), []).append(e)
        for tensor, edges in sorted(consumers.items()):
            for target in [-1] if len(edges) == 1 else range(p.n_devices):
                tensors.append(tensor)
                producers.append(int(p.edges[edges[0], 0]))
                targets.append(target)
                self.leg_edges.append(edges)
        self.leg_tensor = np.array(tensors, dtype=np.int64)
        self.leg_producer = np.array(producers, dtype=np.int64)
        self.leg_target = np.array(targets, dtype=np.int64)
        """Device that a leg goes to; -1: to wherever its one consumer sits."""

    def _make_pairs(self) -> None:
        """Find the pairs that could meet: neither before the other by precedence or by windows."""
        n = self.problem.n_operators
        first, second = np.triu_indices(n, 1)
        unrelated = ~(self.before | self.before.T)[first, second]
        meet = unrelated & (self.latest[first] > self.earliest[second]) & (self.latest[second] > self.earliest[first])
        meet &= (self.usable[first] & self.usable[second]).any(axis=1)
        self.operator_pairs = np.column_stack([first[meet], second[meet]])
        legs = len(self.leg_tensor)
        self.leg_pairs = np.zeros((0, 2), dtype=np.int64)
        if self.objective == "throughput":
            self.operator_pairs = self.leg_pairs
        if self.problem.network == "none" or not legs or self.objective == "throughput":
            return
        ends = np.zeros((legs, n), dtype=bool)  # operators that wait for a leg whatever the placement
        for leg, edges in enumerate(self.leg_edges):
            if len(edges) == 1:
                ends[leg, self.problem.edges[edges[0], 1]] = True
        # a leg is before another if its consumer is, or is an ancestor of, the other's producer
        reach = self.before | np.eye(n, dtype=bool)
        earlier = (ends.astype(np.float32) @ reach.astype(np.float32))[:, self.leg_producer] > 0
        a, b = np.triu_indices(legs, 1)
        late = np.array([max(self.latest[self.problem.edges[e, 1]] for e in edges) for edges in self.leg_edges])
        ready = self.earliest[self.leg_producer]
        meet = ~(earlier | earlier.T)[a, b] & (late[a] > ready[b]) & (late[b] > ready[a])
        self.leg_pairs = np.column_stack([a[meet], b[meet]])

    # --- constraints -----------------------------------------------------------------------------------------------

    def _add(
        self, name: str, row: Ints, column: Ints, value: NDArray[np.float64], right: NDArray[np.float64],
        *, equal: bool = False,
    ) -> None:  # fmt: skip
        if len(right):
            shape = (len(right), self.n_columns)
            where = row.astype(np.int32), column.astype(np.int32)
            matrix = coo_array((value, where), shape=shape).tocsr()
            self.families[name] = Rows(matrix, np.asarray(right, dtype=np.float64), equal)

    def _add_terms(
        self, name: str, terms: Sequence[Term],
        right: float | NDArray[np.float64],
    ) -> None:  # fmt: skip
        """Add ``sum of value * column <= right`` with one column a term in each row."""
        height, width = len(terms[0][0]), len(terms)
        if height:
            columns, values = np.empty((height, width), dtype=np.int32), np.empty((height, width))
            for t, (column, value) in enumerate(terms):
                columns[:, t], values[:, t] = column, value
            indptr = np.arange(0, height * width + 1, width)
            matrix = csr_array((values.reshape(-1), columns.reshape(-1), indptr), shape=(height, self.n_columns))
            self.families[name] = Rows(matrix, np.broadcast_to(np.asarray(right, dtype=np.float64), height))

    def _completion(self) -> None:
        """``C[i] = S[i] + sum_k p[i,k] x[i,k]`` and ``c[l] = s[l] + sum_kh pc[l,k,h] u[l,k,h]``."""
        n, k = self.duration.shape
        i = np.arange(n)
        self._add(
            "operator_completion",
            np.concatenate([i, i, np.repeat(i, k)]),
            np.concatenate([self.at["C"] + i, self.at["S"] + i, np.arange(n * k)]),
            np.concatenate([np.ones(n), -np.ones(n), -self.duration.reshape(-1)]),
            np.zeros(n),
            equal=True,
        )
        leg = np.arange(len(self.leg_tensor))
        self._add(
            "transfer_completion",
            np.concatenate([leg, leg, self.route_leg]),
            np.concatenate([self.at["c"] + leg, self.at["s"] + leg, self.at["u"] + np.arange(len(self.route_leg))]),
            np.concatenate([np.ones(len(leg)), -np.ones(len(leg)), -self.route_time]),
            np.zeros(len(leg)),
            equal=True,
        )

    def _assignment(self) -> None:
        """``sum_k x[i,k] = 1``."""
        n, k = self.duration.shape
        self._add("assignment", np.repeat(np.arange(n), k), np.arange(n * k), np.ones(n * k), np.ones(n), equal=True)

    def _precedence(self) -> None:
        """``C[i] <= S[j]`` on every edge; ``C[i] <= s[l]``; ``c[l] <= S[j] + M (1 - x[j,h])``.

        The last term stands only for a leg to one device h, which concerns its consumer j only if j sits there.
        """
        p = self.problem
        edges = np.unique(p.edges, axis=0) if len(p.edges) else np.zeros((0, 2), dtype=np.int64)
        self._add_terms("precedence", [(self.at["C"] + edges[:, 0], 1), (self.at["S"] + edges[:, 1], -1)], 0)
        leg = np.arange(len(self.leg_tensor))
        self._add_terms("sent_after", [(self.at["C"] + self.leg_producer, 1), (self.at["s"] + leg, -1)], 0)
        readers = [(l, p.edges[e, 1]) for l, edges in enumerate(self.leg_edges) for e in edges]  # noqa: E741
        leg, consumer = np.array(readers, dtype=np.int64).reshape(-1, 2).T
        fixed = self.leg_target[leg] >= 0
        big: NDArray[np.float64] = np.where(fixed, np.maximum(self.horizon - self.earliest[consumer], 0.0), 0.0)
        x = self.at["x"] + consumer * p.n_devices + np.maximum(self.leg_target[leg], 0)
        terms: list[Term] = [(self.at["c"] + leg, 1.0), (self.at["S"] + consumer, -1.0), (x, big)]
        self._add_terms("received_before", terms, big)

    def _memory(self) -> None:
        """``sum_i m[i] x[i,k] <= M[k]``, as shares of the model."""
        p = self.problem
        n, k = self.duration.shape
        total = float(p.weight_bytes.sum())
        limited = np.flatnonzero((p.memory_bytes != UNLIMITED) & (p.memory_bytes < total))
        row = np.repeat(np.arange(len(limited)), n)
        column = (np.arange(n)[None, :] * k + limited[:, None]).reshape(-1)
        value = np.tile(p.weight_bytes / max(total, 1.0), len(limited))
        self._add("memory", row, column, value, p.memory_bytes[limited] / max(total, 1.0))

    def _colocation(self) -> None:
        """``x[i,k] = x[j,k]`` for operators that must share a device."""
        p = self.problem
        if p.colocation is None:
            return
        tied = np.flatnonzero(p.colocation >= 0)
        tied = tied[np.argsort(p.colocation[tied], kind="stable")]
        same = p.colocation[tied][1:] == p.colocation[tied][:-1]
        a, b, k = tied[:-1][same], tied[1:][same], p.n_devices
        row = np.arange(len(a) * k)
        column_a = (a[:, None] * k + np.arange(k)).reshape(-1)
        column_b = (b[:, None] * k + np.arange(k)).reshape(-1)
        self._add(
            "colocation", np.concatenate([row, row]), np.concatenate([column_a, column_b]),
            np.concatenate([np.ones(len(row)), -np.ones(len(row))]), np.zeros(len(row)), equal=True,
        )  # fmt: skip

    def _routes(self) -> None:
        """``u[l,k,h] >= x[i,k] + x[j,h] - 1``; ``sum_h u[l,k,h] <= x[i,k]``; ``sum_k u[l,k,h] <= sum_j x[j,h]``.

        For every consumer j of the leg. With these ``sum u = z``, Moirai's cut variable.
        """
        p, k = self.problem, self.problem.n_devices
        u = np.arange(len(self.route_leg))
        producer = self.leg_producer[self.route_leg]
        edges = np.array([e for leg in self.leg_edges for e in leg], dtype=np.int64)
        size = np.array([len(leg) for leg in self.leg_edges], dtype=np.int64)
        each = size[self.route_leg]
        r = np.repeat(u, each)
        within = np.arange(len(r)) - np.repeat(np.cumsum(each) - each, each)
        j = p.edges[edges[(np.cumsum(size) - size)[self.route_leg[r]] + within], 1]
        terms = [
            (self.at["x"] + producer[r] * k + self.route_source[r], 1.0),
            (self.at["x"] + j * k + self.route_target[r], 1.0),
            (self.at["u"] + r, -1.0),
        ]
        self._add_terms("route", terms, 1)
        key, group = np.unique(self.route_leg * k + self.route_source, return_inverse=True)
        leg, source = np.divmod(key, k)
        self._add(
            "leaves_its_producer",
            np.concatenate([group, np.arange(len(key))]),
            np.concatenate([self.at["u"] + u, self.at["x"] + self.leg_producer[leg] * k + source]),
            np.concatenate([np.ones(len(u)), -np.ones(len(key))]),
            np.zeros(len(key)),
        )
        key, group = np.unique(self.route_leg * k + self.route_target, return_inverse=True)
        leg, target = np.divmod(key, k)
        reader = [(row, p.edges[e, 1]) for row, l in enumerate(leg.tolist()) for e in self.leg_edges[l]]  # noqa: E741
        row, j = np.array(reader, dtype=np.int64).reshape(-1, 2).T
        self._add(
            "reaches_a_consumer",
            np.concatenate([group, row]),
            np.concatenate([self.at["u"] + u, self.at["x"] + j * k + target[row]]),
            np.concatenate([np.ones(len(u)), -np.ones(len(row))]),
            np.zeros(len(key)),
        )

    def _makespan(self) -> None:
        """``C[i] <= T``."""
        n = self.problem.n_operators
        self._add_terms("makespan", [(self.at["C"] + np.arange(n), 1.0), (np.full(n, self.at["T"]), -1.0)], 0)

    def device_loads(self) -> csr_array:
        """Return ``sum_i p[i,k] x[i,k]`` for each device, [k, columns]."""
        n, k = self.duration.shape
        entries = self.duration.reshape(-1), (np.tile(np.arange(k), n), np.arange(n * k))
        return coo_array(entries, shape=(k, self.n_columns)).tocsr()

    def port_loads(self) -> csr_array:
        """Return ``sum_lh pc[l,k,h] u[l,k,h]`` for each send port, likewise receive ports; half-duplex: both together.

        [ports, columns], none without contention.
        """
        k = self.problem.n_devices
        ports, height = np.concatenate([self.route_source, k + self.route_target]), 2 * k
        if self.problem.network == "half-duplex":
            ports, height = np.concatenate([self.route_source, self.route_target]), k
        if self.problem.network == "none" or not len(self.route_leg):
            return csr_array((0, self.n_columns))
        u = self.at["u"] + np.arange(len(self.route_leg))
        entries = np.tile(self.route_time, 2), (ports, np.tile(u, 2))
        return coo_array(entries, shape=(height, self.n_columns)).tocsr()

    def _at_most_goal(self, name: str, loads: csr_array) -> None:
        """``load <= T``: no device or port works longer than the makespan, or than the period."""
        height = loads.shape[0]
        entries = loads.tocoo()
        self._add(
            name,
            np.concatenate([entries.coords[0], np.arange(height)]),
            np.concatenate([entries.coords[1], np.full(height, self.at["T"])]),
            np.concatenate([entries.data, -np.ones(height)]),
            np.zeros(height),
        )

    def _interchangeable_devices(self) -> None:
        """``sum_i p[i,k] x[i,k] >= sum_i p[i,h] x[i,h]`` for k before h that can be swapped."""
        n, k = self.duration.shape
        pairs = [(a, b) for group in interchangeable_devices(self.problem) for a, b in pairwise(group)]
        first, second = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        row = np.repeat(np.arange(len(pairs)), n)
        i = np.tile(np.arange(n), len(pairs))
        self._add(
            "interchangeable",
            np.concatenate([row, row]),
            np.concatenate([i * k + np.repeat(second, n), i * k + np.repeat(first, n)]),
            np.concatenate([self.duration[:, second].T.reshape(-1), -self.duration[:, first].T.reshape(-1)]),
            np.zeros(len(pairs)),
        )

    def _devices_do_one_thing(self) -> None:
        """``d[i,j] + d[j,i] >= x[i,k] + x[j,k] - 1`` for each k, and ``C[i] <= S[j] + M (1 - d[i,j])`` both ways."""
        k = self.problem.n_devices
        i, j = self.operator_pairs.T
        pair, device = np.repeat(np.arange(len(i)), k), np.tile(np.arange(k), len(i))
        shared = self.usable[i[pair], device] & self.usable[j[pair], device]
        pair, device = pair[shared], device[shared]
        d = self.at["d"]
        terms = [
            (self.at["x"] + i[pair] * k + device, 1.0), (self.at["x"] + j[pair] * k + device, 1.0),
            (d + 2 * pair, -1.0), (d + 2 * pair + 1, -1.0),
        ]  # fmt: skip
        self._add_terms("same_device", terms, 1)
        self._ordered("operator_order", d, i, j, "S", "C", self.earliest, self.latest)

    def _ports_do_one_thing(self) -> None:
        """``d[r,q] + d[q,r] >= (r uses port) + (q uses port) - 1`` and ``c[r] <= s[q] + M (1 - d[r,q])``.

        ``one-port``: r uses the send port of k for ``sum_h u[r,k,h]`` and the receive port of h for ``sum_k u[r,k,h]``.
        ``half-duplex``: the one port of k for both sums together.
        """
        if not len(self.leg_pairs):
            return
        k = self.problem.n_devices
        r, q = self.leg_pairs.T
        begin = np.searchsorted(self.route_leg, np.arange(len(self.leg_tensor) + 1))
        d = self.at["d"] + 2 * len(self.operator_pairs)
        ends: dict[str, tuple[NDArray[np.int64], ...]] = {"send": (self.route_source,), "receive": (self.route_target,)}
        if self.problem.network == "half-duplex":
            ends = {"port": (self.route_source, self.route_target)}
        for name, sides in ends.items():
            rows, columns, used = [], [], np.zeros((len(r), k, 2), dtype=bool)
            for side, leg in enumerate((r, q)):
                count = begin[leg + 1] - begin[leg]
                pair = np.repeat(np.arange(len(leg)), count)
                column = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count - begin[leg], count)
                for end in sides:
                    rows.append(pair * k + end[column])
                    columns.append(self.at["u"] + column)
                    used[pair, end[column], side] = True
            row, column = np.concatenate(rows), np.concatenate(columns)
            both = used.all(axis=2).reshape(-1)
            number = np.cumsum(both) - 1
            row, column = row[both[row]], column[both[row]]
            pair = np.flatnonzero(both) // k
            line = np.arange(len(pair))
            self._add(
                f"same_{name}",
                np.concatenate([number[row], line, line]),
                np.concatenate([column, d + 2 * pair, d + 2 * pair + 1]),
                np.concatenate([np.ones(len(row)), -np.ones(2 * len(line))]),
                np.ones(len(line)),
            )
        late = np.full(len(self.leg_tensor), self.horizon)
        self._ordered("transfer_order", d, r, q, "s", "c", self.earliest[self.leg_producer], late)

    def _ordered(
        self, name: str, d: int, a: Ints, b: Ints, start: str, end: str,
        earliest: NDArray[np.float64], latest: NDArray[np.float64],
    ) -> None:  # fmt: skip
        """``end[a] <= start[b] + M (1 - d[a,b])`` and the reverse, M the latest end of one less the earliest start."""
        pair = np.arange(len(a))
        first, second = np.concatenate([a, b]), np.concatenate([b, a])
        column = np.concatenate([d + 2 * pair, d + 2 * pair + 1])
        big = np.maximum(latest[first] - earliest[second], 0.0)
        self._add_terms(name, [(self.at[end] + first, 1.0), (self.at[start] + second, -1.0), (column, big)], big)

    # --- names -----------------------------------------------------------------------------------------------------

    def column_names(self) -> list[str]:
        """Return a readable name for each column, in LP file syntax."""
        p = self.problem
        ops, devices = p.operators, p.devices
        legs = [
            f"{ops[i]}.{t}" + (f".{devices[h]}" if h >= 0 else "")
            for i, t, h in zip(
                self.leg_producer.tolist(), self.leg_tensor.tolist(), self.leg_target.tolist(), strict=True
            )
        ]
        names = [f"x({i},{k})" for i in ops for k in devices]
        names += [
            f"u({legs[leg]},{devices[a]},{devices[b]})"
            for leg, a, b in zip(
                self.route_leg.tolist(), self.route_source.tolist(), self.route_target.tolist(), strict=True
            )
        ]
        for pairs, label in ((self.operator_pairs, ops), (self.leg_pairs, legs)):
            names += [f"d({label[a]},{label[b]})" for i, j in pairs.tolist() for a, b in ((i, j), (j, i))]
        names += [f"S({i})" for i in ops] + [f"C({i})" for i in ops]
        return [*names, *(f"s({leg})" for leg in legs), *(f"c({leg})" for leg in legs), "T"]
