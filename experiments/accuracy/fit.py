"""Fits the shipped multi-device model to published GPU measurements and writes it with its card.

MOIRAI_SIM_DATA=FOLDER python experiments/accuracy/fit.py OUT [--card]

``--card`` writes the card alone, with the figures that ``run.py`` left.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pandas as pd

from moirai_sim.costs.card import gpu_card, write_card
from moirai_sim.costs.catalog_model import save_cost_model
from moirai_sim.costs.estimator import TimeEstimator
from moirai_sim.profiling.published import import_published

HERE = Path(__file__).parent
SETTINGS = {"trees": 120, "sharp_trees": 180, "max_rows": 20_000, "interval_rows": 2_000}


def read(data: Path) -> pd.DataFrame:
    """NeuSight, and of each stack, operator and type of aiconfigurator 700 rows; at most 25,000 rows a family."""
    sweeps, report = import_published("neusight", data / "neusight/train")
    print(*report.lines(), sep="\n")
    stacks, report = import_published("aiconfigurator", data / "aiconfigurator")
    print(*report.lines(), sep="\n")
    stacks = stacks.sample(frac=1, random_state=0).groupby(["device", "stack", "op_type", "dtype"]).head(700)
    whole = pd.concat([sweeps, stacks], ignore_index=True).sample(frac=1, random_state=0)
    return whole.groupby(["family", "dtype"]).head(25_000).reset_index(drop=True)


def rows(name: str) -> list[dict[str, object]]:
    """Figures that ``run.py`` left."""
    file = HERE / name
    return pd.read_csv(file).round(4).to_dict("records") if file.is_file() else []


def main(out: Path) -> None:
    frame = read(Path(os.environ["MOIRAI_SIM_DATA"]))
    if "--card" not in sys.argv:
        estimator = TimeEstimator(**SETTINGS).fit(frame)
        card = gpu_card(out.name, frame, rows("splits.csv"), rows("transfer.csv"))
        card["settings"] = SETTINGS
        card["held_out_p90_abs_log_error"] = {key: model.widths for key, model in estimator.models_.items()}
        save_cost_model(estimator, out, card)
    else:
        write_card(out, gpu_card(out.name, frame, rows("splits.csv"), rows("transfer.csv")))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
