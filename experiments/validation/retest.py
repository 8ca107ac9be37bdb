"""How well a machine agrees with itself: ``python experiments/validation/retest.py EARLIER.csv LATER.csv ...``.

Takes two runs of one study as ``report.py`` keeps them, in pairs, and compares what the same placements (same parts and
transfers) took in both: the rank correlation of the two measurements, and those of each run's prediction with its own
measurement and with the other's. If errors of both runs are alike and independent, no prediction can be expected to
correlate with a run by more than the square root of what the runs do with each other (Spearman 1904).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

KEY = ["model", "placement", "parts", "transfers"]


def retest(earlier: Path, later: Path) -> pd.DataFrame:
    """Return a row a model."""
    one, two = (pd.read_csv(path).query("status == 'measured'") for path in (earlier, later))
    both = one.merge(two, on=KEY, suffixes=("_1", "_2"))
    rows = []
    for model, own in both.groupby("model"):
        again = _rank(own, "measured_ms_1", "measured_ms_2")
        change = own["measured_ms_2"] / own["measured_ms_1"]
        rows.append(
            {
                "model": model,
                "placements": len(own),
                "measured_again": again,
                "ceiling": max(again, 0.0) ** 0.5,
                "predicted_earlier": _rank(own, "predicted_ms_1", "measured_ms_1"),
                "predicted_later": _rank(own, "predicted_ms_2", "measured_ms_2"),
                "earlier_of_later": _rank(own, "predicted_ms_1", "measured_ms_2"),
                "later_of_earlier": _rank(own, "predicted_ms_2", "measured_ms_1"),
                "change_median": float(np.median(np.abs(change / change.median() - 1))),
                "change_p90": float(np.quantile(np.abs(change / change.median() - 1), 0.9)),
            }
        )
    return pd.DataFrame(rows).round(3)


def _rank(rows: pd.DataFrame, a: str, b: str) -> float:
    return float(spearmanr(rows[a], rows[b]).statistic)


def main(files: Sequence[str]) -> None:
    """Print a table a pair of runs, and keep all of them in ``results/retest.csv``."""
    tables = []
    paths = [Path(name) for name in files]
    for earlier, later in zip(paths[::2], paths[1::2], strict=True):
        table = retest(earlier, later)
        print(f"\n{earlier.stem}\n{table.to_string(index=False)}")
        tables.append(table.assign(study=later.stem))
    pd.concat(tables).to_csv(Path(__file__).parent / "results/retest.csv", index=False)


if __name__ == "__main__":
    main(sys.argv[1:])
