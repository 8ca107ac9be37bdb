"""Devices that slow each other, that waited, and that run parts in turn: first-order corrections.

Cores that share a cache and memory slow each other: a placement is simulated as if devices were alone (`overlap`), each
operator is lengthened by the share of its time in which others computed (`contended`), and the placement is simulated
again. A core that moves bytes over a network computes less meanwhile (`carried`). A device that waited for others finds
its caches cold: it starts later by what that costs (`rested`). One that runs several parts computes in the memory of
each in turn (`split`). What the longer operators overlap with, or make others wait for, is not followed further.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moirai_sim.clusters.routes import Links
from moirai_sim.simulation.engine import simulate_schedule
from moirai_sim.simulation.options import DEFAULT, SimulationOptions
from moirai_sim.simulation.plan import part_heads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from moirai_sim.placement import Placement
    from moirai_sim.problem import PlacementProblem

COOLING_NS = 3e6
"""In which caches of a device that waits lose all but 1/e of what it would need: between 1 and 10 ms in measured
placements on two cores, whatever the backend."""


def overlap(
    problem: PlacementProblem, placement: Placement, *, options: SimulationOptions = DEFAULT
) -> NDArray[np.float64]:
    """Return the share of each operator's time in which each other device computes, [n, devices]."""
    schedule = simulate_schedule(problem, placement, options=options)
    device = np.asarray(placement.device)
    start, end = schedule.operator_start_ns, schedule.operator_end_ns
    busy = np.zeros((problem.n_operators, problem.n_devices))
    for k in range(problem.n_devices):
        mine = device == k
        if mine.any() and not mine.all():
            busy[~mine, k] = _busy(start[mine], end[mine], start[~mine], end[~mine])
    return np.asarray(busy / np.maximum(end - start, 1)[:, None])


def contended(
    problem: PlacementProblem, placement: Placement, share: NDArray[np.float64], factor: NDArray[np.float64]
) -> PlacementProblem:
    """Return a problem whose operators take the time that they take while other devices compute.

    Parameters
    ----------
    placement
        Where the operators are; times elsewhere stay.
    share
        [n, devices] as `overlap` returns it.
    factor
        [devices, devices] time of an operator on one device while the other computes, over its time alone; at least 1.
        What several others add, adds up.
    """
    device = np.asarray(placement.device)
    rows, columns = np.arange(problem.n_operators), problem.device_type[device]
    operator_ns = problem.operator_ns.copy()
    longer = operator_ns[rows, columns] * (1 + ((factor[device] - 1) * share).sum(axis=1))
    operator_ns[rows, columns] = np.rint(longer).astype(np.int64)
    return problem.with_operator_ns(operator_ns)


def carried(
    problem: PlacementProblem,
    placement: Placement,
    core: Sequence[int],
    send_ns_per_byte: float,
    receive_ns_per_byte: float,
    *,
    options: SimulationOptions = DEFAULT,
) -> PlacementProblem:
    """Return a problem whose operators take what they take on cores that send and receive meanwhile.

    What a core spends on a tensor is spread evenly over the time in which its bytes are under way. A core that stands
    still then has it for nothing: the times of transfers were measured so.

    Parameters
    ----------
    placement
        Where the operators are; times elsewhere stay.
    core
        [devices] a number of the core that computes and carries for each.
    send_ns_per_byte, receive_ns_per_byte
        What a core spends on each byte.
    """
    schedule = simulate_schedule(problem, placement, options=options)
    device = np.asarray(placement.device)
    sent = np.flatnonzero((schedule.transfer_start_ns >= 0) & (problem.edge_tensor >= 0))
    if not len(sent):
        return problem
    ends = device[problem.edges[sent]]
    begin, end = schedule.transfer_start_ns[sent], schedule.transfer_end_ns[sent]
    if problem.cluster is not None:
        links = Links(problem.cluster)
        pairs, pair = np.unique(ends, axis=0, return_inverse=True)
        latency = [links.between(problem.devices[s], problem.devices[t])[1] for s, t in pairs.tolist()]
        end = end - np.array(latency, dtype=np.int64)[pair.reshape(-1)]
    end = np.maximum(end, begin + 1)
    size = np.maximum(problem.tensor_bytes[problem.edge_tensor[sent]], 0)
    on_core = np.asarray(core, dtype=np.int64)
    operator_ns = problem.operator_ns.copy()
    for number in np.unique(on_core).tolist():
        spent = size * (
            send_ns_per_byte * (on_core[ends[:, 0]] == number) + receive_ns_per_byte * (on_core[ends[:, 1]] == number)
        )
        at = np.concatenate([begin, end])
        rise = np.concatenate([spent, -spent]) / np.concatenate([end - begin] * 2)
        order = np.argsort(at, kind="stable")
        at, rate = at[order], np.cumsum(rise[order])
        done = np.concatenate([[0.0], np.cumsum(rate[:-1] * np.diff(at))])
        mine = np.flatnonzero(on_core[device] == number)
        until, since = (np.interp(t[mine], at, done) for t in (schedule.operator_end_ns, schedule.operator_start_ns))
        operator_ns[mine, problem.device_type[device[mine]]] += np.rint(until - since).astype(np.int64)
    return problem.with_operator_ns(operator_ns)


def rested(
    problem: PlacementProblem,
    placement: Placement,
    cold_ns: Sequence[int],
    *,
    options: SimulationOptions = DEFAULT,
) -> PlacementProblem:
    """Return a problem whose operators take what they take where their device waited before them.

    Requests are taken to follow each other without a pause: what a device waited for before its first operator began
    after its last one for the request before.

    Parameters
    ----------
    placement
        Where the operators are; times elsewhere stay.
    cold_ns
        [devices] what a start costs after a long wait; after a shorter one less, by `COOLING_NS`.
    """
    schedule = simulate_schedule(problem, placement, options=options)
    device = np.asarray(placement.device)
    start, end = schedule.operator_start_ns, schedule.operator_end_ns
    operator_ns = problem.operator_ns.copy()
    for k in range(problem.n_devices):
        mine = np.flatnonzero((device == k) & (end > start))
        if not len(mine):
            continue
        mine = mine[np.argsort(start[mine], kind="stable")]
        waited = start[mine] - np.concatenate([[end[mine[-1]] - end.max()], end[mine[:-1]]])
        more = cold_ns[k] * -np.expm1(-np.maximum(waited, 0) / COOLING_NS)
        operator_ns[mine, problem.device_type[k]] += np.rint(more).astype(np.int64)
    return problem.with_operator_ns(operator_ns)


def split(
    problem: PlacementProblem, placement: Placement, share: Sequence[float], parts: Sequence[int]
) -> PlacementProblem:
    """Return a problem whose operators take what they take on devices that run several parts of the model.

    Parameters
    ----------
    placement
        Where the operators are; times elsewhere stay.
    share
        [devices] by how much longer operators take where a device runs many parts; see `part_heads`.
    parts
        [devices] from how many parts on it is all of that; it grows in proportion from one part on, which pays nothing.
    """
    device = np.asarray(placement.device)
    order = problem.topological_order if placement.order is None else np.argsort(placement.order, kind="stable")
    heads = part_heads(problem, device, order)
    begun = np.bincount(device[heads], minlength=problem.n_devices)
    paid = share * np.clip((begun - 1) / np.maximum(np.subtract(parts, 1), 1), 0, 1)
    rows, columns = np.arange(problem.n_operators), problem.device_type[device]
    operator_ns = problem.operator_ns.copy()
    longer = operator_ns[rows, columns] * (1 + paid[device])
    operator_ns[rows, columns] = np.rint(longer).astype(np.int64)
    return problem.with_operator_ns(operator_ns)


def _busy(
    start: NDArray[np.int64], end: NDArray[np.int64], since: NDArray[np.int64], until: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return for how long one device, busy from ``start`` to ``end``, was busy in each interval (since, until), ns."""
    order = np.lexsort((end, start))  # what takes no time goes before what begins at the same instant
    begins, ends = start[order], end[order]
    done = np.concatenate([[0], np.cumsum(ends - begins)])

    def before(instant: NDArray[np.int64]) -> NDArray[np.float64]:
        last = np.searchsorted(begins, instant, side="right")
        running = np.maximum(ends[np.maximum(last - 1, 0)] - instant, 0) * (last > 0)
        return np.asarray(done[last] - running, dtype=np.float64)

    return before(until) - before(since)
