"""Write the study of the instances that Moirai's authors released, as their files are not ours to ship.

MOIRAI_SIM_DATA=FOLDER python experiments/moirai/published.py published.yaml
moirai-sim evaluate published.yaml -o out/moirai-published
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from moirai_sim.files import write_whole

POLICIES = ["single", "random", "m-topo", "m-etf", "m-sct", "getf", "heft", "cpop", "met", "search", "placeto"]
POLICIES += ["milp", "moirai", "auto"]


def main() -> None:
    """Write one study over every table of the folder."""
    tables = sorted(Path(os.environ["MOIRAI_SIM_DATA"], "moirai").resolve().glob("*.xls"))
    study = {
        "kind": "evaluate",
        "name": "moirai-published",
        "description": "The instances of Moirai on the devices and with the costs that they bring.",
        "models": [str(table) for table in tables],
        "clusters": [None],
        "policies": POLICIES,
        "networks": ["one-port"],
        "time_limit": "30 s",
    }
    write_whole(Path(sys.argv[1]), json.dumps(study, indent=1) + "\n")


if __name__ == "__main__":
    main()
