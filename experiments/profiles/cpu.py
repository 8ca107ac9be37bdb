"""Profile one core with ONNX Runtime: real models, and random networks that fill the space between them.

    python experiments/profiles/cpu.py --core 0 -o my-cpu
    moirai-sim calibrate my-cpu/*.parquet -o my-model

Every group of models becomes a file of its own; one that is there already is not measured again, so a run that was
stopped is taken up where it was, and ``--only`` measures one group.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import onnx

from moirai_sim.profiling.operators import profile_operators
from moirai_sim.profiling.schema import write_profile
from moirai_sim.profiling.sweep import PREFIX, sweep_model, sweep_transformer
from moirai_sim.studies.quickstart import light_models

ZOO = {
    "zoo-language": ("zoo:bert-base?batch=1&seq=128", "zoo:gpt2?batch=1&seq=64"),
    "zoo-images": ("zoo:vit-b?batch=1", "zoo:resnet18?batch=1", "zoo:googlenet?batch=1"),
}
GROUP = 20
"""Random networks in a file."""


def groups(networks: int, transformers: int, folder: Path) -> dict[str, list[str]]:
    """Return the models of each file by its name; random networks are written into ``folder``."""
    found = {"light": [str(path) for path in light_models().values()], **{name: list(m) for name, m in ZOO.items()}}
    for name, draw, count in (("images", sweep_model, networks), ("transformers", sweep_transformer, transformers)):
        for first in range(0, count, GROUP):
            paths = []
            for seed in range(first, min(first + GROUP, count)):
                paths.append(str(folder / f"{PREFIX}{name}-{seed}.onnx"))
                onnx.save(draw(seed), paths[-1])
            found[f"{name}-{first // GROUP}"] = paths
    return found


def main() -> None:
    """Read the command line, profile, write the files that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--networks", type=int, default=120, help="random image networks")
    parser.add_argument("--transformers", type=int, default=40, help="random blocks of transformers")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of repeats for each file")
    parser.add_argument("--only", nargs="*", default=[], help="names of files to measure; all if none is named")
    parser.add_argument("-o", "--out", type=Path, required=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, models in groups(given.networks, given.transformers, Path(folder)).items():
            path = given.out / f"{name}.parquet"
            if path.exists() or (given.only and name not in given.only):
                continue
            frame = profile_operators(models, f"cpu:{given.core}", budget_s=given.budget)
            write_profile(frame, path, metadata=frame.attrs["metadata"])
            print(f"{name}: {len(frame)} operators")


if __name__ == "__main__":
    main()
