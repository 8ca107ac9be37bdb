"""The validation study run again in its folder, with other models or on another machine, and after failures."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from moirai_sim.errors import InputError
from moirai_sim.execution import measure, workers
from moirai_sim.studies import validate as module
from moirai_sim.studies.in_place import priced_as_it_is
from moirai_sim.studies.validate import validate
from moirai_sim.studies.validate_prices import in_place_file

Study = Callable[..., Path]


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Return what writes a study of models ``a``, ``b``, or both, beside their files."""
    for seed, model in enumerate("ab"):
        rng = np.random.default_rng(seed)
        weights = [numpy_helper.from_array(rng.standard_normal((48, 48)).astype(np.float32), f"w{i}") for i in range(3)]
        nodes = [helper.make_node("MatMul", [f"t{i}", f"w{i}"], [f"t{i + 1}"], name=f"mm{i}") for i in range(3)]
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [8, 48]) for name in ("t0", "t3")]
        graph = helper.make_graph(nodes, model, ends[:1], ends[1:], weights)
        opset = [helper.make_opsetid("", 17)]
        onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / f"{model}.onnx")
    cores = sorted(os.sched_getaffinity(0))
    (tmp_path / "two.yaml").write_text(
        "name: two\ndevices:\n"
        + "".join(f"  - {{name: c{i}, device: local-core, address: 'cpu:{cores[i % len(cores)]}'}}\n" for i in range(2))
        + "links:\n  - {ends: [c0, c1], bandwidth: 4 GB/s, latency: 20 us}\n"
    )

    def write(models: str, budget: str = "null") -> Path:
        path = tmp_path / "study.yaml"
        path.write_text(
            f"kind: validate\nname: small\nmodels: [{', '.join(f'{model}.onnx' for model in models)}]\n"
            "clusters: [two.yaml]\npolicies: [single]\nrandom_placements: 0\nbad_placements: 1\n"
            f"calibrate: {budget}\nrepeats: 3\npatience: 1 ms\nbudget: 1 ms\n"
        )
        return path

    return write


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by one entry for every batch of placements that is really measured."""
    found: list[int] = []
    inner = module._interleaved

    def counted(loaded, *arguments):
        found.append(len(loaded))
        return inner(loaded, *arguments)

    monkeypatch.setattr(module, "_interleaved", counted)
    return found


def models_of(found: dict) -> list[str]:
    return sorted({case["model"] for case in found["cases"] if case["status"] == "measured"})


def test_models_that_leave_a_study_and_come_back_are_not_measured_again(study: Study, tmp_path: Path, timed: list[int]):
    out = tmp_path / "out"
    for models, batches in (("ab", 2), ("ab", 2), ("a", 2), ("ab", 2)):
        found = validate(study(models), out)
        assert models_of(found) == list(models)
        assert found["failed"] == 0
        assert len(timed) == batches


def test_another_machine_measures_anew(study: Study, tmp_path: Path, timed: list[int], monkeypatch: pytest.MonkeyPatch):
    validate(study("a"), tmp_path / "out")
    monkeypatch.setattr(module, "machine", lambda: {"hardware": "another"})
    validate(study("a"), tmp_path / "out")
    assert len(timed) == 2


def test_all_models_of_a_study_have_one_calibration(
    study: Study, tmp_path: Path, timed: list[int], monkeypatch: pytest.MonkeyPatch
):
    """The calibration is a folder that is made anew for other models, and nothing else: a real one takes minutes."""
    folder = tmp_path / "out" / "calibration" / "two"
    note = folder / "made-from.json"

    def calibrated(cluster, sources, *_):
        text = json.dumps([Path(source).name for source in sources])
        if not note.is_file() or note.read_text() != text:
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "model" / "in-place").mkdir(parents=True)
            note.write_text(text)
        return cluster

    def kept_in_place(_, source):
        return in_place_file(folder / "model", source)

    def price_in_place(problem, cluster, in_place, source):
        kept_in_place(cluster, source).write_text("{}")
        return priced_as_it_is(problem, cluster)

    for fake in (calibrated, kept_in_place, price_in_place):
        monkeypatch.setattr(module, fake.__name__, fake, raising=False)
    monkeypatch.setattr(module, "made_from", lambda _: note.read_text(), raising=False)

    def measured(models: str) -> int:
        """Run the study; return how many batches were measured since the beginning."""
        assert validate(study(models, "1 s"), tmp_path / "out")["failed"] == 0
        assert all(kept_in_place(None, str(tmp_path / f"{model}.onnx")).is_file() for model in models)
        return len(timed)

    assert [measured(models) for models in ("a", "ab", "ab")] == [1, 3, 3]
    kept_in_place(None, str(tmp_path / "b.onnx")).unlink()
    assert measured("ab") == 4


def test_a_study_that_is_broken_off_leaves_no_older_summary(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    validate(study("a"), tmp_path / "out")
    monkeypatch.setattr(module, "_run_cluster", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        validate(study("ab"), tmp_path / "out")
    assert not (tmp_path / "out" / "summary.json").exists()


def test_workers_do_not_keep_what_a_failed_model_loaded(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    begun: list[workers.Workers] = []
    used: list[workers.Workers] = []
    load = measure.load

    class Listed(workers.Workers):
        def __init__(self, cluster):
            super().__init__(cluster)
            begun.append(self)

    def second_fails(crew, *arguments, **options):
        used.append(crew)
        if len(used) == 2:
            raise InputError("no such placement")
        return load(crew, *arguments, **options)

    monkeypatch.setattr(workers, "Workers", Listed)
    monkeypatch.setattr(measure, "load", second_fails)
    found = validate(study("ab"), tmp_path / "out")
    assert models_of(found) == ["b"]
    assert {case["error"] for case in found["cases"] if case["model"] == "a"} == {"no such placement"}
    assert len(begun) == 2
    assert used[2] is not used[1]


def test_a_model_without_placements_is_one_failure(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    inner, asked = module._candidates, []

    def first_refuses(*arguments):
        asked.append(arguments)
        if len(asked) <= 2:
            raise InputError(f"does not fit, {len(asked)}")
        return inner(*arguments)

    monkeypatch.setattr(module, "_candidates", first_refuses)
    found = validate(study("ab"), tmp_path / "out")
    assert models_of(found) == ["b"]
    assert found["failed"] == 1
    assert [case["error"] for case in found["cases"] if case["model"] == "a"] == ["does not fit, 1"]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["cases"] == 2


def test_a_study_that_cannot_run_here_leaves_the_older_one(study: Study, tmp_path: Path):
    validate(study("a"), tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json")}
    cluster = tmp_path / "two.yaml"
    cluster.write_text(cluster.read_text().replace("device: local-core", "device: local-core, backend: abacus"))
    with pytest.raises(InputError, match="abacus") as error:
        validate(study("ab"), tmp_path / "out")
    assert len(error.value.problems) == 2
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json")} == before


def test_clusters_of_one_name_are_refused(study: Study, tmp_path: Path):
    (tmp_path / "again.yaml").write_text((tmp_path / "two.yaml").read_text())
    path = study("a")
    path.write_text(path.read_text().replace("[two.yaml]", "[two.yaml, again.yaml]"))
    with pytest.raises(InputError, match="two are called 'two'"):
        validate(path, tmp_path / "out")


def test_a_model_that_is_named_twice_counts_once(study: Study, tmp_path: Path):
    found = validate(study("aab"), tmp_path / "out")
    assert found["summary"]["cases"] == len({(case["model"], case["placement"]) for case in found["cases"]})


def test_a_model_that_shows_a_bug_does_not_end_the_study(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    load = measure.load_subject

    def first_breaks(source, graph):
        return load(source, graph) if source.endswith("b.onnx") else {}["c0"]

    monkeypatch.setattr(measure, "load_subject", first_breaks)
    found = validate(study("ab"), tmp_path / "out")
    assert models_of(found) == ["b"]
    assert {case["error"] for case in found["cases"] if case["model"] == "a"} == {"KeyError: 'c0'"}
