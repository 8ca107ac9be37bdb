"""m-SCT of Baechi: small communication times, with memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moirai_sim.policies.earliest_start import earliest_start_schedule
from moirai_sim.policies.groups import no_room
from moirai_sim.policies.ranks import mean_operator_ns, mean_transfer_ns

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.placement import Placement
    from moirai_sim.policies.base import Request
    from moirai_sim.problem import PlacementProblem


class MSct:
    """Earliest task first, where a device waits for the favourite child of what it just ran.

    Jeon et al., "Baechi", SoCC 2020, section 3.2.3, after Hanen and Munier, "An Approximation Algorithm for Scheduling
    Dependent Tasks on m Processors with Small Communication Delays", ETFA 1995. A linear programme over e[i, j] in
    [0, 1], where 0 makes j the favourite child of i, minimises w under

    - s_i + p_i + c_ij e_ij <= s_j for every edge, s_i + p_i <= w,
    - sum_j e_ij >= outdegree_i - 1 and sum_i e_ij >= indegree_j - 1: at most one favourite each way;

    e below 1/2 is rounded to 0. A device that ran i then serves its favourite child, or an urgent operator (one whose
    inputs could be anywhere by then).

    Extensions: p and c are means over devices and pairs of devices, because the paper's devices are equal; of several
    consumers or producers that rounding favours, the smallest e and then the smallest edge wins; the rest as `m-etf`.
    """

    name: ClassVar[str] = "m-sct"

    def place(self, problem: PlacementProblem, request: Request) -> Placement:
        """Return the placement and the order in which pairs were taken; ``limit`` if the programme takes too long."""
        favourite = favourite_children(problem, request.time_limit_s)
        if favourite is None:
            return no_room("the linear programme of favourite children was not solved within the time limit")
        return earliest_start_schedule(problem, favourite=favourite)


def favourite_children(problem: PlacementProblem, time_limit_s: float) -> NDArray[np.int64] | None:
    """Return the favourite child of each operator, [n], -1 for none; None if the time limit was too short."""
    from scipy.optimize import linprog
    from scipy.sparse import coo_array

    n, m = problem.n_operators, len(problem.edges)
    favourite = np.full(n, -1, dtype=np.int64)
    if m == 0:
        return favourite
    producer, consumer = problem.edges.T
    scale = max(1.0, float(mean_operator_ns(problem).max()))  # keeps the solver's tolerances meaningful
    time, delay = mean_operator_ns(problem) / scale, mean_transfer_ns(problem) / scale
    edge, node = np.arange(m), np.arange(n)
    # Columns: s [n], e [m], w. Rows: one an edge, one an operator, one an operator with consumers, one with producers.
    rows = [edge, edge, edge, m + node, m + node, m + n + producer, m + 2 * n + consumer]
    columns = [producer, consumer, n + edge, node, np.full(n, n + m), n + edge, n + edge]
    values = [np.ones(m), -np.ones(m), delay, np.ones(n), -np.ones(n), -np.ones(m), -np.ones(m)]
    matrix = coo_array(
        (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape=(m + 3 * n, n + m + 1)
    )
    limit = np.concatenate(
        [-time[producer], -time, 1 - np.bincount(producer, minlength=n), 1 - np.bincount(consumer, minlength=n)]
    )
    cost = np.zeros(n + m + 1)
    cost[-1] = 1
    bounds = np.zeros((n + m + 1, 2))
    bounds[:, 1] = np.inf
    bounds[n : n + m, 1] = 1
    solved = linprog(
        cost,
        A_ub=matrix.tocsr(),
        b_ub=limit,
        bounds=bounds,
        method="highs-ds",
        options={"time_limit": time_limit_s},
    )
    if solved.x is None or solved.status != 0:
        return None
    share = np.round(solved.x[n : n + m], 9)  # so that equal shares tie
    chosen = np.zeros(n, dtype=bool)
    for e in np.lexsort((edge, share)).tolist():
        if share[e] >= 0.5:
            break
        i, j = int(producer[e]), int(consumer[e])
        if favourite[i] < 0 and not chosen[j]:
            favourite[i] = j
            chosen[j] = True
    return favourite
