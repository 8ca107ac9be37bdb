"""How near simulated streams come to the periods of the comparison: ``python experiments/diviml/streamed.py``.

The period of a placement is the largest load of a device or port. A stream reaches it if the busiest never waits.
Each network's best answer for throughput, with free memory, serves 300 requests of which 16 are in flight, and so does
the best single device. Writes ``streamed.csv`` beside this file. About two minutes.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import yaml

import moirai_sim as ms
from moirai_sim.placement import placement_from_timeline
from moirai_sim.policies.base import Request
from moirai_sim.progress import progress
from moirai_sim.simulation.workloads import serve

HERE = Path(__file__).parent
IN_FLIGHT, REQUESTS = 16, 300


def main() -> None:
    """Place, serve, and write a row a network."""
    study = yaml.safe_load((HERE / "study.yaml").read_text(encoding="utf-8"))
    cluster = ms.read_cluster("diviml-server")
    rows = []
    with progress("streams", len(study["models"])) as step:
        for model in study["models"]:
            problem = ms.load_problem(model, cluster, network="one-port")
            row: dict[str, object] = {"model": model}
            for policy in ("single", "auto"):
                request = Request(objective="throughput", time_limit_s=6, workers=1)
                timeline = ms.place(problem, policy, request)
                service = serve(
                    problem, placement_from_timeline(problem, timeline), in_flight=IN_FLIGHT, requests=REQUESTS
                )
                row |= {
                    f"{policy}_per_s": 1e9 / (timeline.period_ns or 1),
                    f"{policy}_streamed_per_s": service.throughput_per_s,
                    f"{policy}_devices": len(set(timeline.placement.values())),
                }
            rows.append(row)
            step()
    frame = pd.DataFrame(rows)
    for what in ("", "streamed_"):
        frame[f"{what}gain"] = frame[f"auto_{what}per_s"] / frame[f"single_{what}per_s"]
    frame.to_csv(HERE / "streamed.csv", index=False, float_format="%.4g")
    print(frame.to_string(index=False))


if __name__ == "__main__":
    main()
