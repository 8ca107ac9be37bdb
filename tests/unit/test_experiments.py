"""The experiments run at a smoke size, and their results become the tables of their pages."""

import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from moirai_sim.studies.evaluate import evaluate
from moirai_sim.studies.store import Store
from moirai_sim.studies.study import read_study

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.mark.parametrize("name", ["moirai", "diviml"])
def test_smoke_size_runs_and_is_summarised(name, tmp_path):
    summary = evaluate(EXPERIMENTS / name / "smoke.yaml", tmp_path / "out", jobs=1)
    assert summary["runs"] > 5
    assert summary["failed"] == 0, [r["outcome"].get("error") for r in Store(tmp_path / "out").read()]
    command = [sys.executable, EXPERIMENTS / "summarise.py", tmp_path / "out", tmp_path / "kept"]
    subprocess.run(command, check=True)
    assert "| policy | runs |" in (tmp_path / "kept" / "results.md").read_text()
    assert len((tmp_path / "kept" / "results.csv").read_text().splitlines()) == summary["runs"] + 1


def test_one_command_runs_all_studies_of_an_experiment(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    from run import parts

    assert {path.stem for path in parts(EXPERIMENTS / "diviml")} == {"study", "stream", "limits", "llm"}
    assert {path.stem for path in parts(EXPERIMENTS / "moirai")} - {"placeto"} == {"study"}


def test_the_tables_of_an_experiment_hold_the_runs_of_all_its_studies_and_no_others(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    from run import run
    from summarise import summarise

    studies = [tmp_path / f"{policy}.yaml" for policy in ("single", "heft", "random")]
    for path in studies:
        path.write_text(
            f"kind: evaluate\nmodels: ['zoo:ws-32?seed=1']\nclusters: [diviml-server]\npolicies: [{path.stem}]\n"
        )
    run(studies, tmp_path / "out", 1)
    run(studies[:2], tmp_path / "out", 1)
    summarise(tmp_path / "out", tmp_path)
    assert sorted(pd.read_csv(tmp_path / "results.csv")["policy"]) == ["heft", "single"]


@pytest.mark.parametrize("name", ["study", "stream", "limits", "llm"])
def test_every_part_of_diviml_runs_with_one_model_and_two_policies(name, tmp_path):
    folder = EXPERIMENTS / "diviml"
    whole = yaml.safe_load((folder / f"{name}.yaml").read_text())
    model = next((one for one in whole["models"] if "ws-32" in one), whole["models"][0])
    small = whole | {"models": [model], "policies": ["heft", "diviml"], "time_limit": "1 s"}
    small.pop("exclude", None)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(small))
    shutil.copy(folder / "servers.yaml", tmp_path)
    summary = evaluate(tmp_path / "study.yaml", tmp_path / "out", jobs=1)
    assert summary["runs"] > 2
    assert summary["failed"] == 0, [r["outcome"].get("error") for r in Store(tmp_path / "out").read()]


STUDIES = [path for path in sorted(EXPERIMENTS.glob("*/*.yaml")) if "models:" in path.read_text()]  # not the clusters


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_study_file_is_right(path):
    kind = path.read_text().split("kind: ", 1)[1].split()[0]
    assert read_study(path, kind).models
