"""Results folders that a study left in the middle, or that something damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moirai_sim.errors import InputError
from moirai_sim.studies.evaluate import evaluate
from moirai_sim.studies.report import report
from moirai_sim.studies.store import Store
from moirai_sim.studies.tables import runs_table


def test_no_report_of_a_validate_study_that_was_broken_off(tmp_path: Path):
    Store(tmp_path / "out").open({"kind": "validate", "name": "half"})
    with pytest.raises(InputError, match="'validate' was broken off"):
        report(tmp_path / "out", tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("content", [b'{"kind": "eval', b"[]", b"{}", b"\xff"])
def test_a_damaged_study_is_named(tmp_path: Path, content: bytes):
    (tmp_path / "study.json").write_bytes(content)
    with pytest.raises(InputError, match=r"study\.json: is damaged"):
        Store(tmp_path).open({"kind": "evaluate", "name": "again"})
    with pytest.raises(InputError, match=r"study\.json: is damaged"):
        report(tmp_path, tmp_path / "report.html")


@pytest.mark.parametrize("out", ["taken", "taken/below"])
def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path, out: str):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(InputError, match=f"{out}: cannot be a results folder"):
        Store(tmp_path / out).open({"kind": "evaluate", "name": "again"})
    assert (tmp_path / "taken").read_text() == "mine"


def test_only_runs_of_the_study_as_it_is_now_are_shown_and_the_others_kept(tmp_path: Path):
    path, out = tmp_path / "study.yaml", tmp_path / "out"
    for policies, resumed in ((["single", "heft"], 0), (["single"], 1), (["single", "heft"], 2)):
        path.write_text(
            "kind: evaluate\nmodels: ['zoo:ws-32?seed=1']\nclusters: [diviml-server]\n"
            f"policies: [{', '.join(policies)}]\n"
        )
        assert evaluate(path, out, jobs=1)["resumed"] == resumed
        assert sorted(runs_table(Store(out))["policy"]) == sorted(policies)


def test_quickstart_overwrites_no_other_study(tmp_path):
    from moirai_sim.studies.quickstart import STUDY, quickstart

    mine = tmp_path / "study.yaml"
    mine.write_text("kind: evaluate\n")
    with pytest.raises(InputError, match="another study"):
        quickstart(tmp_path)
    assert mine.read_text() == "kind: evaluate\n"
    other = json.dumps(["/elsewhere/light_squeezenet.onnx", "my-own.onnx"])
    mine.write_text(STUDY.format(models=other))
    with pytest.raises(InputError, match="another study"):
        quickstart(tmp_path)
    assert other in mine.read_text()
    mine.unlink()
    Store(tmp_path).open({"kind": "evaluate", "name": "s"})
    with pytest.raises(InputError, match="kind 'evaluate'"):
        quickstart(tmp_path)
    assert not mine.exists()
