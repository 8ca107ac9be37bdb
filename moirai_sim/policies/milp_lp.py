"""A `MilpModel` as a text in LP format: to be read by eye, and by other solvers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moirai_sim.policies.milp_model import MilpModel
    from moirai_sim.policies.stream_model import StreamModel


def lp_text(model: MilpModel | StreamModel, families: Sequence[str] | None = None) -> str:
    """Return the model, or the named families of its constraints only, in LP format."""
    names = model.column_names()
    chosen = list(model.families) if families is None else list(families)
    goal = names[-1]
    lines = ["Minimize", f" {'period' if goal == 'P' else 'makespan'}: {goal}", "Subject To"]
    for family in chosen:
        rows = model.families[family]
        matrix = rows.matrix.sorted_indices()
        for row in range(len(rows.right)):
            span = slice(matrix.indptr[row], matrix.indptr[row + 1])
            terms = [
                f"{'+' if value > 0 else '-'} {_coefficient(abs(value))}{names[column]}"
                for column, value in zip(matrix.indices[span].tolist(), matrix.data[span].tolist(), strict=True)
                if value
            ]
            if terms:
                sense = "=" if rows.equal else "<="
                lines.append(f" {family}({row}): {' '.join(terms)} {sense} {_number(rows.right[row])}")
    if families is None:
        bounds = zip(names, model.lower.tolist(), model.upper.tolist(), strict=True)
        lines += ["Bounds", *(f" {_number(low)} <= {name} <= {_number(high)}" for name, low, high in bounds)]
        lines += ["Binaries", *(f" {name}" for name in names[: model.n_binary])]
    return "\n".join([*lines, "End", ""])


def _number(value: float) -> str:
    return f"{value:.15g}"


def _coefficient(value: float) -> str:
    return "" if value == 1 else f"{_number(value)} "
