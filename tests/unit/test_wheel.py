"""The wheel works where the repository is not: installed into a fresh environment, called from another folder."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A fresh environment that holds our wheel and borrows the libraries of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("*.whl")
    environment = folder / "environment"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
        str(wheel),
    ]
    subprocess.run(pip, check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files are not followed
    return environment


def run(environment, folder, *arguments):
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MOIRAI"))}
    clean["MOIRAI_SIM_HOME"] = str(folder / "home")
    command = [str(environment / "bin" / "moirai-sim"), *arguments]
    return subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, check=True).stdout


def test_the_package_comes_from_the_wheel(installed, tmp_path):
    code = "import moirai_sim.catalog as c; print(c.__file__, c.shipped_folder(), sep='\\n')"
    done = subprocess.run(
        [installed / "bin" / "python", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert all(str(installed) in line for line in done.stdout.splitlines())


def test_catalogs_are_found(installed, tmp_path):
    for kind, folder in (("topologies", "topologies"), ("devices", "topologies/devices")):
        found = {row["name"] for row in json.loads(run(installed, tmp_path, "catalog", kind, "--json"))}
        assert {path.stem for path in (ROOT / folder).glob("*.yaml")} <= found
    found = {row["name"] for row in json.loads(run(installed, tmp_path, "catalog", "cost-models", "--json"))}
    assert {path.parent.name for path in (ROOT / "cost_models").glob("*/card.json")} == found


def test_policies_are_found_and_commands_work(installed, tmp_path):
    policies = {row["name"] for row in json.loads(run(installed, tmp_path, "catalog", "policies", "--json"))}
    assert {"single", "heft", "milp"} <= policies
    (tmp_path / "operators.jsonl").write_text('{"op_type": "Relu", "input_shapes": [[9]], "output_shapes": [[9]]}\n')
    options = ["--cost-model", "roofline", "--device", "nvidia-t4"]
    (line,) = run(installed, tmp_path, "predict", "operators.jsonl", *options).splitlines()
    assert json.loads(line)["latency_s"] > 0
