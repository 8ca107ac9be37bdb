"""How far a predicted objective may be off because the cost model is, with shared errors so that scenarios compare."""

from __future__ import annotations

import hashlib
from pathlib import PurePath
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from moirai_sim.problem import PlacementProblem
    from moirai_sim.timeline import Timeline

Z90 = 1.6449
"""Half width of a 90 % interval in standard deviations of a normal distribution."""


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
    low, high = problem.operator_low_ns, problem.operator_high_ns
    if low is None or high is None:
        return {}
    where = {name: k for k, name in enumerate(problem.devices)}
    index = {name: i for i, name in enumerate(problem.operators)}
    operators = np.array([index[name] for name in timeline.placement], dtype=np.int64)
    types = problem.device_type[np.array([where[name] for name in timeline.placement.values()], dtype=np.int64)]
    cost = problem.operator_ns[operators, types].astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        sigma = np.log(high[operators, types] / low[operators, types]) / (2 * Z90)
    sigma = np.where(np.isfinite(sigma), sigma, 0.0)
    total = max(1.0, float(cost.sum()))
    names = _type_names(problem)
    return {names[t]: float((cost * sigma)[types == t].sum()) / total for t in np.unique(types).tolist()}


def interval(log_spreads: dict[str, float]) -> tuple[float, float]:
    """Return the 90 % interval of the objective as factors of the prediction; types err independently."""
    sigma = float(np.sqrt(sum(spread**2 for spread in log_spreads.values())))
    return float(np.exp(-Z90 * sigma)), float(np.exp(Z90 * sigma))


def difference_interval(a: dict[str, float], b: dict[str, float]) -> tuple[float, float]:
    """Return the 90 % interval of the ratio of two objectives as factors of the predicted ratio.

    A device type that both rest on errs the same way in both, so that error cancels as far as their shares are equal.
    """
    sigma = float(np.sqrt(sum((a.get(name, 0.0) - b.get(name, 0.0)) ** 2 for name in sorted({*a, *b}))))
    return float(np.exp(-Z90 * sigma)), float(np.exp(Z90 * sigma))


def _type_names(problem: PlacementProblem) -> list[str]:
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
