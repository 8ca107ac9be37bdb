"""How sure the times of a problem are: what each rests on, and what that says of a timeline made of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import TYPE_CHECKING

import numpy as np

from moirai_sim.costs.model import SOURCES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from moirai_sim.problem import PlacementProblem
    from moirai_sim.timeline import Timeline

GIVEN = "given"
"""What the times of a problem without evidence rest on: an instance brings its own, exact by definition."""
Z90 = 1.6449
"""Half width of a 90 % interval in standard deviations of a normal distribution."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """How sure each time of a `PlacementProblem` is; [n, t] as its ``operator_ns``."""

    low_ns: NDArray[np.int64]
    """Lower end of the 90 % interval."""
    high_ns: NDArray[np.int64]
    """Upper end of the 90 % interval."""
    source: NDArray[np.uint8]
    """Position in `moirai_sim.costs.model.SOURCES`."""

    def scaled(self, before: NDArray[np.int64], after: NDArray[np.int64]) -> Evidence:
        """Return what is known of times that were ``before`` and are ``after``: as sure, relative to the time."""
        factor = after / np.where(before > 0, before, 1)
        low, high = (np.rint(np.where(before > 0, ns * factor, ns)) for ns in (self.low_ns, self.high_ns))
        return replace(self, low_ns=low.astype(np.int64), high_ns=high.astype(np.int64))


def with_evidence(problem: PlacementProblem, timeline: Timeline) -> Timeline:
    """Return a predicted timeline that says what its times rest on, with the 90 % interval of its objective."""
    if not timeline.spans:
        return timeline
    provenance = {**timeline.provenance, "cost_share": cost_share(problem, timeline)}
    low, high = _interval_ns(problem, timeline) or (None, None)
    return replace(timeline, low_ns=low, high_ns=high, provenance=provenance)


def cost_share(problem: PlacementProblem, timeline: Timeline) -> dict[str, float]:
    """Return the share of the operators' time in a timeline by what it rests on: `SOURCES`, or `GIVEN`."""
    if problem.evidence is None:
        return {GIVEN: 1.0}
    rows, columns = _placed(problem, timeline)
    spent = problem.operator_ns[rows, columns].astype(np.float64)
    by_source = np.bincount(problem.evidence.source[rows, columns], weights=spent, minlength=len(SOURCES))
    total = max(1.0, float(spent.sum()))
    return {name: round(ns / total, 9) for name, ns in zip(SOURCES, by_source.tolist(), strict=True) if ns}


def log_spread(problem: PlacementProblem, timeline: Timeline) -> dict[str, float]:
    """Return the standard deviation of log(objective) that the cost error of each kind of device causes.

    First order: an error of a kind of device (type, cost model, backend, threads) scales all its operators together
    (errors of one kind are taken as wholly correlated, the pessimistic side), and moves the objective by the kind's
    share of the busy time.

    Returns
    -------
    dict
        Kind of device -> standard deviation; empty where the problem carries no intervals.
    """
    return {name: (down + up) / (2 * Z90) for name, (down, up) in _log_reach(problem, timeline).items()}


def interval(log_spreads: Mapping[str, float]) -> tuple[float, float]:
    """Return the 90 % interval of the objective as factors of the prediction; types err independently."""
    sigma = float(np.sqrt(sum(spread**2 for spread in log_spreads.values())))
    return float(np.exp(-Z90 * sigma)), float(np.exp(Z90 * sigma))


def difference_interval(a: Mapping[str, float], b: Mapping[str, float]) -> tuple[float, float]:
    """Return the 90 % interval of the ratio of two objectives as factors of the predicted ratio.

    A device type that both rest on errs the same way in both, so that error cancels as far as their shares are equal.
    """
    sigma = float(np.sqrt(sum((a.get(name, 0.0) - b.get(name, 0.0)) ** 2 for name in sorted({*a, *b}))))
    return float(np.exp(-Z90 * sigma)), float(np.exp(Z90 * sigma))


def _interval_ns(problem: PlacementProblem, timeline: Timeline) -> tuple[int, int] | None:
    """Return the 90 % interval of the objective; None where nothing is known to be unsure.

    As `log_spread` has it, but each side by itself: a data sheet is a limit, so what rests on it only takes longer.
    """
    reach = _log_reach(problem, timeline).values()
    down, up = (float(np.sqrt(sum(one[side] ** 2 for one in reach))) for side in (0, 1))
    if not down and not up:
        return None
    return round(timeline.objective_ns * np.exp(-down)), round(timeline.objective_ns * np.exp(up))


def _log_reach(problem: PlacementProblem, timeline: Timeline) -> dict[str, tuple[float, float]]:
    """Return by kind of device how far down and up in log(objective) its 90 % intervals reach."""
    if problem.evidence is None:
        return {}
    rows, columns = _placed(problem, timeline)
    cost = problem.operator_ns[rows, columns].astype(np.float64)
    total = max(1.0, float(cost.sum()))
    sides = []
    with np.errstate(divide="ignore", invalid="ignore"):
        for far in (cost / problem.evidence.low_ns[rows, columns], problem.evidence.high_ns[rows, columns] / cost):
            log = np.log(far)
            sides.append(cost * np.where(np.isfinite(log), log, 0.0) / total)
    down, up = sides
    names = _kinds(problem)
    return {
        names[t]: (float(down[columns == t].sum()), float(up[columns == t].sum())) for t in np.unique(columns).tolist()
    }


def _placed(problem: PlacementProblem, timeline: Timeline) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return operators and the columns of their times, for all placements that take turns."""
    where = {name: k for k, name in enumerate(problem.devices)}
    index = {name: i for i, name in enumerate(problem.operators)}
    pairs = [(index[name], where[device]) for one in timeline.cycle for name, device in one.placement.items()]
    both = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return both[:, 0], problem.device_type[both[:, 1]]


def _kinds(problem: PlacementProblem) -> list[str]:
    """Return a name for each column of ``operator_ns`` that is the same in every scenario."""
    if problem.cluster is not None:
        kinds = dict(zip(problem.device_type.tolist(), problem.devices, strict=True))
        device = problem.cluster.device
        found = {t: device[name] for t, name in kinds.items()}
        names = {  # wherever the model lies
            t: f"{d.type.name}|{PurePath(d.cost_model or '').name}|{d.backend}|{d.threads}" for t, d in found.items()
        }
        return [names.get(t, f"type{t}") for t in range(problem.operator_ns.shape[1])]
    columns = range(problem.operator_ns.shape[1])
    return [hashlib.sha256(problem.operator_ns[:, t].tobytes()).hexdigest()[:8] for t in columns]
