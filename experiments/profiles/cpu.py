"""Profile one core with ONNX Runtime: real models, and random networks that fill the space between them.

python experiments/profiles/cpu.py --core 0 -o my-cpu
moirai-sim calibrate my-cpu/*.parquet -o my-model
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import onnx

from moirai_sim.profiling.operators import profile_operators
from moirai_sim.profiling.schema import write_profile
from moirai_sim.profiling.sweep import sweep_model
from moirai_sim.studies.quickstart import light_models

ZOO = ("zoo:bert-base?batch=1&seq=128", "zoo:gpt2?batch=1&seq=64", "zoo:vit-b?batch=1", "zoo:resnet18?batch=1",
       "zoo:googlenet?batch=1")  # fmt: skip


def main() -> None:
    """Read the command line, profile, write three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--networks", type=int, default=60, help="random networks")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of repeats for each of the three files")
    parser.add_argument("-o", "--out", type=Path, required=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        drawn = []
        for seed in range(given.networks):
            drawn.append(str(Path(folder) / f"sweep-{seed}.onnx"))
            onnx.save(sweep_model(seed), drawn[-1])
        light = [str(path) for path in light_models().values()]
        for name, models in (("light", light), ("zoo", ZOO), ("sweep", drawn)):
            frame = profile_operators(models, f"cpu:{given.core}", budget_s=given.budget)
            write_profile(frame, given.out / f"{name}.parquet", metadata=frame.attrs["metadata"])
            print(f"{name}: {len(frame)} operators")


if __name__ == "__main__":
    main()
