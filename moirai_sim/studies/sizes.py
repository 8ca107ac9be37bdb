"""How many of which device: the cheapest size of a cluster that reaches a target, and why no cheaper one is the answer.

More devices never hurt the best placement, because it may leave them idle. So a size that a bound rules out rules out
every size that has no more of anything. Bounds are asked first, by bisection along one kind of device for all numbers
of the others at once; what they leave open is placed, cheapest first, until a placement reaches the target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moirai_sim.evidence import interval

if TYPE_CHECKING:
    from numpy.typing import NDArray

Counts = tuple[int, ...]
Ask = Callable[[Literal["bound", "place"], list[Counts]], dict[Counts, Mapping[str, Any]]]
"""Returns the outcomes of sizes: ``bound`` only bounds them, ``place`` places them."""

MAX_SIZES = 10_000
"""Every size is read once to price it, at some milliseconds each."""
BATCH = 4
"""Sizes placed at once. A constant, so that the results do not depend on the number of workers."""


@dataclass(frozen=True)
class Finding:
    """What became of one size.

    ``reached``: a placement meets the target. ``ruled out``: proven to miss it, by its own bound or that of ``by``.
    ``missed``: placed, the answer misses the target, but no proof says that every placement does. ``dearer``: not
    looked at, as a cheaper size reaches the target. ``failed``: the run ended with an error.
    """

    status: Literal["reached", "ruled out", "missed", "dearer", "failed"]
    by: Counts | None = None
    outcome: Mapping[str, Any] | None = None


def search(sizes: Sequence[Counts], target_ns: int, ask: Ask) -> dict[Counts, Finding]:
    """Return what became of every size; the first ``reached`` one in the order given is the answer.

    Parameters
    ----------
    sizes
        All sizes to choose from, cheapest first.
    target_ns
        The objective to reach, ns.
    ask
        Bounds or places sizes.
    """
    table = _Table(sizes)
    asked = [table.largest()]
    while asked:
        for size, outcome in _answers(ask, "bound", table, asked):
            table.rule_out(size, outcome) if outcome["status"] == "pruned" else table.leave_open(size)
        asked = table.middles()
    waiting = [i for i in range(len(sizes)) if not table.ruled_out(i)]
    while waiting:
        batch, waiting = waiting[:BATCH], waiting[BATCH:]
        for size, outcome in _answers(ask, "place", table, batch):
            table.note(size, outcome, target_ns)
        if any(table.found[i].status == "reached" for i in batch if i in table.found):
            break
        waiting = [i for i in waiting if not table.ruled_out(i)]
    return {size: table.found.get(i, Finding("dearer")) for i, size in enumerate(sizes)}


def _answers(
    ask: Ask, what: Literal["bound", "place"], table: _Table, indices: list[int]
) -> list[tuple[int, Mapping[str, Any]]]:
    outcomes = ask(what, [table.sizes[i] for i in indices])
    return [(i, outcomes[table.sizes[i]]) for i in indices]


class _Table:
    """What is known of each size."""

    def __init__(self, sizes: Sequence[Counts]) -> None:
        self.sizes = list(sizes)
        self.counts: NDArray[np.int64] = np.array(sizes, dtype=np.int64).reshape(len(sizes), -1)
        self.open = np.zeros(len(sizes), dtype=bool)
        self.found: dict[int, Finding] = {}
        axis = int(np.argmax([len(np.unique(column)) for column in self.counts.T]))
        others = np.delete(self.counts, axis, axis=1)
        rows: dict[Counts, list[int]] = {}
        for i in np.argsort(self.counts[:, axis], kind="stable").tolist():
            rows.setdefault(tuple(others[i].tolist()), []).append(i)
        self.rows = list(rows.values())

    def largest(self) -> int:
        """Return a size with most devices: where even its bound misses the target, every smaller one is done."""
        return int(np.argmax(self.counts.sum(axis=1)))

    def ruled_out(self, i: int) -> bool:
        """Tell whether a size is proven to miss the target."""
        return i in self.found and self.found[i].status == "ruled out"

    def rule_out(self, i: int, outcome: Mapping[str, Any]) -> None:
        """Rule out a size, and with it every size that has no more of anything."""
        for smaller in np.flatnonzero((self.counts <= self.counts[i]).all(axis=1)).tolist():
            if not self.ruled_out(smaller):
                self.found[smaller] = Finding("ruled out", self.sizes[i], outcome if smaller == i else None)

    def leave_open(self, i: int) -> None:
        """Ask no more bounds of a size, nor of any that has at least as many of everything."""
        self.open |= (self.counts >= self.counts[i]).all(axis=1)

    def middles(self) -> list[int]:
        """Return the middle of the sizes of each row whose bounds are neither known nor implied."""
        left = [[i for i in row if not self.open[i] and i not in self.found] for row in self.rows]
        return [row[len(row) // 2] for row in left if row]

    def note(self, i: int, outcome: Mapping[str, Any], target_ns: int) -> None:
        """Keep what a placement of a size showed."""
        status = outcome["status"]
        if status in ("optimal", "feasible") and outcome["objective_ns"] <= target_ns:
            self.found[i] = Finding("reached", None, outcome)
        elif status == "error":
            self.found[i] = Finding("failed", None, outcome)
        elif status in ("pruned", "infeasible") or (outcome.get("lower_bound_ns") or 0) > target_ns:
            self.rule_out(i, outcome)
        else:
            self.found[i] = Finding("missed", None, outcome)


def answer_of(
    names: Sequence[str],
    findings: Mapping[Counts, Finding],
    prices: Mapping[Counts, float | None],
    devices: Mapping[Counts, int],
    target: str,
) -> dict[str, Any]:
    """Return the answer as a result: the chosen size, whether it is proven the cheapest, and all findings.

    ``status`` is ``reached``, ``out of reach`` (proven for every size) or ``open``.
    """
    rows: list[dict[str, Any]] = [
        {
            "counts": list(size),
            "price_eur": prices[size],
            "devices": devices[size],
            "finding": finding.status,
            "by": None if finding.by is None else list(finding.by),
            "reason": (finding.outcome or {}).get("reason") or (finding.outcome or {}).get("error"),
            "lower_bound_ns": (finding.outcome or {}).get("lower_bound_ns"),
            "objective_ns": _placed_ns(finding.outcome or {}),
            "log_spread": (finding.outcome or {}).get("log_spread"),
        }
        for size, finding in findings.items()
    ]
    chosen = next((row for row in rows if row["finding"] == "reached"), None)
    low, high = interval(chosen["log_spread"] or {}) if chosen else (1.0, 1.0)
    before = rows if chosen is None else rows[: rows.index(chosen)]
    unsure = sum(row["finding"] in ("missed", "failed") for row in before)
    return {
        "status": "reached" if chosen else "open" if unsure else "out of reach",
        "target": target,
        "names": list(names),
        "counts": chosen and chosen["counts"],
        "price_eur": chosen and chosen["price_eur"],
        "devices": chosen and chosen["devices"],
        "objective_ns": chosen and chosen["objective_ns"],
        "low_ns": chosen and round(low * chosen["objective_ns"]),
        "high_ns": chosen and round(high * chosen["objective_ns"]),
        "sizes": len(rows),
        "ruled_out": sum(row["finding"] == "ruled out" for row in rows),
        "bounds_asked": sum(row["by"] == row["counts"] for row in rows),
        "placed": sum(row["objective_ns"] is not None for row in rows),
        "unsure": unsure,
        "findings": rows,
    }


def _placed_ns(outcome: Mapping[str, Any]) -> int | None:
    """Return the objective of a placement that was found."""
    return outcome.get("objective_ns") if outcome.get("status") in ("optimal", "feasible") else None


def sentence(answer: Mapping[str, Any]) -> str:
    """Return the answer in words: what to take, what rules out the others, and what stays unknown."""
    target = answer["target"]
    looked = (
        f"Of {answer['sizes']:,} sizes, proofs for {answer['bounds_asked']:,} rule out {answer['ruled_out']:,}; "
        f"{answer['placed']:,} were placed."
    )
    if answer["status"] == "out of reach":
        return f"No size reaches {target}: proven. {looked}"
    unsure = f"{answer['unsure']:,} {'sizes' if answer['unsure'] > 1 else 'size'}"
    if answer["status"] == "open":
        return f"No size was found to reach {target}; for {unsure} nothing rules it out. {looked}"
    taken = ", ".join(f"{name} = {count}" for name, count in zip(answer["names"], answer["counts"], strict=True))
    what = "Fewest devices" if answer["price_eur"] is None else f"Cheapest, {answer['price_eur']:,.0f} EUR"
    value, low, high = (answer[name] / 1e6 for name in ("objective_ns", "low_ns", "high_ns"))
    span = f"{value:.4g} ms" + (f", 90 % interval {low:.4g} to {high:.4g} ms" if low < high else "")
    sure = (
        "every one before it is proven to miss"
        if not answer["unsure"]
        else f"{unsure} before it missed when placed, which proves nothing"
    )
    return f"{what}, that reaches {target}: {taken} ({span}); {sure}. {looked}"
