"""Figures of a ``validate`` study: errors with intervals, ranks, regret, the machine's noise, and where errors sit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moirai_sim.graphs.load import model_names

if TYPE_CHECKING:
    from numpy.typing import NDArray

PERCENTILES = {"p50": 50, "p95": 95}
"""Of latencies in a stream. Rarer ones would need longer streams."""
FORESEEN = ("before", "profile")
"""Earlier predictions of a case; see `summarise`."""
_RESAMPLES = 1000
_MIN_RANKED = 3
"""Ranks of fewer placements say nothing."""
_GOOD_RANKS = 0.95
_DRAWS = 200


def interval(groups: Sequence[Sequence[float]], seed: int, level: float = 0.9) -> tuple[float, float]:
    """Return a bootstrap interval of the median (percentile method; Efron, Annals of Statistics 1979).

    Whole groups are drawn, since values within one are alike (a model's placements share its prices); of a single group
    its values are.
    """
    rng = np.random.default_rng(seed)
    drawn_from = groups if len(groups) > 1 else [[value] for value in groups[0]]
    draws = rng.integers(0, len(drawn_from), (_RESAMPLES, len(drawn_from)))
    medians = [np.median(np.concatenate([drawn_from[i] for i in draw])) for draw in draws]
    low, high = np.quantile(medians, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def cases_of(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the table of cases, one line a result; models go by the short names that tell them apart."""
    names = model_names(result["key"]["model"] for result in results)
    return [_case(result, names[result["key"]["model"]]) for result in results]


def _case(result: Mapping[str, Any], model: str) -> dict[str, Any]:
    key, outcome = result["key"], result["outcome"]
    placement = ", ".join([key["placement"], *outcome.get("also", [])])
    case = {"model": model, "cluster": key["cluster"], "placement": placement}
    if outcome["status"] != "measured":
        return case | {"status": outcome["status"], "error": outcome.get("error") or outcome.get("reason", "")}
    predicted, measured = outcome["predicted_ns"], outcome["measured_ns"]
    latencies = {
        f"latency_{name}_{side}_ms": ns / 1e6
        for name, both in outcome.get("latency_ns", {}).items()
        for side, ns in zip(("predicted", "measured"), both, strict=True)
    }
    return case | {
        "status": "measured",
        "devices_used": outcome["devices_used"],
        "parts": outcome["parts"],
        "transfers": outcome["transfers"],
        "predicted_ms": predicted / 1e6,
        "measured_ms": measured / 1e6,
        "low_ms": outcome["low_ns"] / 1e6,
        "high_ms": outcome["high_ns"] / 1e6,
        "error": predicted / measured - 1,
        "noise_ape": _noise(outcome),
        "disturbed": outcome["disturbed"],
        **latencies,
    }


def summarise(results: Iterable[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """Return the summary of a study's results; figures are null where nothing was measured.

    Errors are absolute percentage errors as fractions; of streams, they are of the time between two answers, and
    ``latency_p50_median_ape`` and ``latency_p95_median_ape`` of the percentiles of their requests' latencies.
    ``rank_correlation`` is Spearman's, the mean over models (and clusters). ``regret`` says by how much the placement
    that is predicted best is really slower than the best measured one, the mean over models. ``noise_median_ape`` is
    the median over cases of the difference between the times of the even and of the odd rounds, which run on a load of
    the placement each. From the ranks of these two follows ``rank_ceiling``: the rank correlation to be expected of a
    prediction without fault (Spearman and Brown 1910), and by model ``rank_needs``: the median error that a rank
    correlation of 0.95 allows. ``disturbed`` is the share of rounds in which, in spite of several attempts, something
    else slowed a worker's core. Figures that begin with ``undisturbed`` are of the cases that met a quiet moment; the
    others tell of the machine's load.
    """
    results = list(results)
    names = model_names(result["key"]["model"] for result in results)
    measured = [result for result in results if result["outcome"]["status"] == "measured"]
    summary: dict[str, Any] = {"cases": len(measured), **_errors(measured, seed)}
    split = [result for result in measured if result["outcome"]["devices_used"] > 1]
    summary["split_cases"] = len(split)
    errors = _errors(split, seed)
    summary |= {f"split_{name}": errors[name] for name in ("median_ape", "p95_ape")}
    quiet = [result for result in measured if result["outcome"]["disturbed"] < 1]
    errors = _errors(quiet, seed)
    summary["undisturbed_cases"] = len(quiet)
    summary |= {f"undisturbed_{name}": errors[name] for name in ("median_ape", "p95_ape")}
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for result in measured:
        groups[result["key"]["model"], result["key"]["cluster"]].append(result)
    models = [
        {
            "model": names[source],
            "cluster": cluster,
            "cases": len(own),
            **_errors(own, seed),
            **_ranks(own),
            "disturbed": _disturbed(own),
        }
        for (source, cluster), own in sorted(groups.items(), key=lambda item: (names[item[0][0]], item[0][1]))
    ]
    for figure in ("rank_correlation", "rank_ceiling", "regret"):
        summary[figure] = _mean(row[figure] for row in models)
    regrets = [row["regret"] for row in models if row["regret"] is not None]
    summary["max_regret"] = max(regrets, default=None)
    for when in FORESEEN:
        summary |= {f"{when}_{name}": value for name, value in _foreseen(groups.values(), when, seed).items()}
    summary["inside"] = _mean(
        float(one["low_ns"] <= one["predicted_ns"] <= one["high_ns"]) for one in (r["outcome"] for r in measured)
    )
    noise = [_noise(result["outcome"]) for result in measured]
    summary["noise_median_ape"] = float(np.median(noise)) if noise else None
    summary["disturbed"] = _disturbed(measured)
    summary |= _latencies(measured)
    clusters = sorted({cluster for _, cluster in groups})
    summary["clusters"] = [
        {"cluster": name, **_errors([r for r in measured if r["key"]["cluster"] == name], seed)} for name in clusters
    ]
    summary["models"] = models
    summary["families"] = _residuals(measured, "families", "family")
    summary["links"] = _residuals(measured, "links", "link")
    return summary


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _foreseen(models: Iterable[Sequence[Mapping[str, Any]]], when: str, seed: int) -> dict[str, float | None]:
    """Return the figures of an earlier prediction, by model; nothing of results that do not hold it."""
    earlier = [
        [
            {**result, "outcome": result["outcome"] | {"predicted_ns": result["outcome"]["foreseen_ns"][when]}}
            for result in own
            if "foreseen_ns" in result["outcome"]
        ]
        for own in models
    ]
    every = [result for own in earlier for result in own]
    if not every:
        return {}
    errors, ranks = _errors(every, seed), [_ranks(own) for own in earlier if own]
    found = {name: errors[name] for name in ("median_ape", "p95_ape")}
    return found | {name: _mean(rank[name] for rank in ranks) for name in ("rank_correlation", "regret")}


def _latencies(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the median error of each percentile of latency; nothing where no stream was measured."""
    errors: dict[str, list[float]] = defaultdict(list)
    for result in results:
        for name, (predicted, measured) in result["outcome"].get("latency_ns", {}).items():
            errors[name].append(abs(predicted / measured - 1))
    return {f"latency_{name}_median_ape": float(np.median(known)) for name, known in errors.items()}


def _disturbed(results: Sequence[Mapping[str, Any]]) -> float | None:
    shares = [result["outcome"]["disturbed"] for result in results]
    return float(np.mean(shares)) if shares else None


def _noise(outcome: Mapping[str, Any]) -> float:
    even, odd = outcome["halves_ns"]
    return float(abs(even - odd) / max(odd, 1))


def _errors(results: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    names = ("median_ape", "mean_ape", "p95_ape", "max_ape", "bias", "median_ape_low", "median_ape_high")
    if not results:
        return dict.fromkeys(names)
    ratio = np.array([r["outcome"]["predicted_ns"] / r["outcome"]["measured_ns"] for r in results])
    errors = np.abs(ratio - 1)
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for result, error in zip(results, errors.tolist(), strict=True):
        groups[result["key"]["model"], result["key"]["cluster"]].append(error)
    low, high = interval(list(groups.values()), seed)
    found = (np.median(errors), errors.mean(), np.quantile(errors, 0.95), errors.max(), np.median(ratio) - 1, low, high)
    return dict(zip(names, map(float, found), strict=True))


def _ranks(results: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    predicted = np.array([r["outcome"]["predicted_ns"] for r in results], dtype=np.float64)
    measured = np.array([r["outcome"]["measured_ns"] for r in results], dtype=np.float64)
    even, odd = np.array([r["outcome"]["halves_ns"] for r in results], dtype=np.float64).T
    return {
        "rank_correlation": _rank_correlation(predicted, measured),
        "rank_ceiling": _ceiling(_rank_correlation(even, odd)),
        "rank_needs": _needs(measured),
        "regret": float(measured[int(predicted.argmin())] / measured.min() - 1),
    }


def _rank_correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float | None:
    """Return Spearman's rank correlation, if there is any."""
    if len(one) < _MIN_RANKED or not np.ptp(one) or not np.ptp(other):
        return None
    from scipy.stats import spearmanr

    return float(spearmanr(one, other).statistic)


def _needs(measured: NDArray[np.float64]) -> float | None:
    """Return the largest median error with which random errors keep the ranks well (Spearman's 0.95), as a share.

    Where placements lie close together it is small, perhaps below what can be measured. At most 1.
    """
    if _rank_correlation(measured, measured) is None:
        return None
    errors = np.random.default_rng(0).standard_normal((_DRAWS, len(measured)))
    errors /= np.median(np.abs(errors))
    true = measured.argsort().argsort()

    def kept(median_ape: float) -> float:
        drawn = (np.log(measured) + errors * median_ape).argsort(axis=1).argsort(axis=1)
        return float(1 - 6 * ((drawn - true) ** 2).sum(axis=1).mean() / (len(true) ** 3 - len(true)))

    low, high = 0.0, 1.0
    for _ in range(12):
        half = (low + high) / 2
        low, high = (half, high) if kept(half) >= _GOOD_RANKS else (low, half)
    return low


def _ceiling(halves: float | None) -> float | None:
    """Return the correlation of what was measured with what is true, from that between halves of the measurements."""
    return None if halves is None else float(np.sqrt(2 * max(halves, 0.0) / (1 + max(halves, 0.0))))


def _residuals(results: Sequence[Mapping[str, Any]], field: str, label: str) -> list[dict[str, Any]]:
    """Return predicted against measured time by family or link, largest share of the measured time first."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0])
    for result in results:
        for name, (predicted, measured, count) in result["outcome"][field].items():
            row = sums[name]
            row[0] += predicted
            row[1] += measured
            row[2] += count
    total = sum(row[1] for row in sums.values()) or 1.0
    rows = [
        {
            label: name,
            "count": count,
            "share": measured / total,
            "predicted_ms": predicted / 1e6,
            "measured_ms": measured / 1e6,
            "error": predicted / measured - 1 if measured else None,
        }
        for name, (predicted, measured, count) in sums.items()
    ]
    return sorted(rows, key=lambda row: (-row["share"], row[label]))
