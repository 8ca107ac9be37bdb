"""Fits the shipped multi-device model to published GPU measurements and writes it with its card.

MOIRAI_SIM_DATA=FOLDER python experiments/accuracy/fit.py OUT [--card]

``--card`` writes the card alone, with the figures that ``run.py`` left.
"""

from __future__ import annotations

import json
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

UNKNOWN = (
    "Errors by split of this very fit were not measured, so splits is empty and the model is not called calibrated. "
    "Known are, of hold-outs from thinned fits (random thirds, the largest tenth, each device in turn), the 90 % "
    "quantiles of |log(measured / predicted)| in four bins of load: held_out_p90_abs_log_error. Errors of other fits "
    "are in experiments/accuracy/README.md."
)


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


def card(name: str, frame: pd.DataFrame, widths: dict[str, dict[str, list[float]]]) -> dict[str, object]:
    """What is known of the model; where ``run.py`` left no splits, the card says so."""
    found = gpu_card(name, frame, rows("splits.csv"), rows("transfer.csv"), widths) | {"settings": SETTINGS}
    return found if found["splits"] else found | {"known_errors": UNKNOWN}


def main(out: Path) -> None:
    frame = read(Path(os.environ["MOIRAI_SIM_DATA"]))
    if "--card" not in sys.argv:
        estimator = TimeEstimator(**SETTINGS).fit(frame)
        widths = {key: model.widths for key, model in estimator.models_.items()}
        save_cost_model(estimator, out, card(out.name, frame, widths))
    else:
        families = json.loads((out / "model.json").read_text(encoding="utf-8"))["families"]
        write_card(out, card(out.name, frame, {key: family["widths"] for key, family in families.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
