"""Fit link models to published transfers and collectives, and write how wrong they are on what they did not see.

MOIRAI_SIM_DATA=DATA python experiments/links/run.py -o cost_models
"""

from __future__ import annotations

import argparse
import csv
import os
from dataclasses import asdict
from pathlib import Path

from moirai_sim.costs.calibrate import calibrate
from moirai_sim.profiling.published import import_published
from moirai_sim.profiling.schema import write_profile

MODELS = {
    "nccl-servers": [("vidur", "vidur/network")],
    "nccl-nvlink": [("aiconfigurator", f"aiconfigurator/data/{kind}/comm") for kind in ("a100_sxm", "h100_sxm")],
}
COLUMNS = ("model", "split", "family", "n", "median_ape", "mean_ape", "time_weighted_ape")


def main() -> None:
    """Read the command line, fit, write models and figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("MOIRAI_SIM_DATA"))
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the models")
    given = parser.parse_args()
    if given.data is None:
        parser.error("name the folder of published data: --data or MOIRAI_SIM_DATA")
    rows = []
    for name, parts in MODELS.items():
        profiles = []
        for kind, folder in parts:
            frame, report = import_published(kind, Path(given.data) / folder)
            profiles.append(given.out / f".{name}-{len(profiles)}.parquet")
            write_profile(frame, profiles[-1], kind="links", metadata=asdict(report))
            print("\n".join(report.lines()))
        card = calibrate(profiles, given.out / name)
        for profile in profiles:
            profile.unlink()
        rows += [{"model": name, **row} for row in card["splits"]]
        rows += [{"model": name, "family": row["group"], **{k: row[k] for k in ("split", *COLUMNS[3:])}}
                 for row in card["links"]["groups"]]  # fmt: skip
    with (Path(__file__).parent / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.4f}" if isinstance(value, float) else value for key, value in row.items()})


if __name__ == "__main__":
    main()
