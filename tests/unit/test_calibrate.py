"""Calibration: reconciled, held out, whole or not at all; measured operators are answered by their measurement."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from moirai_sim.clusters.cluster import DeviceType
from moirai_sim.clusters.reader import read_cluster, read_device_type
from moirai_sim.costs.calibrate import calibrate, held_out, learning_curve
from moirai_sim.costs.card import known_errors, licence
from moirai_sim.costs.catalog_model import load_cost_model
from moirai_sim.costs.model import SOURCES
from moirai_sim.errors import InputError
from moirai_sim.files import sha256
from moirai_sim.graphs.work import make_operator
from moirai_sim.profiling.schema import device_type_json, operator_row, statistics, write_profile

SHEET = DeviceType("test-cpu", "cpu", 1 << 30, 1e10, {"float32": 1e11}, compute_units=1, source="test")


def operators(count=60):
    sizes = np.random.default_rng(0).integers(8, 400, (count, 3))
    return [make_operator(f"op{i}", "MatMul", [(m, k), (k, n)], [(m, n)]) for i, (m, n, k) in enumerate(sizes.tolist())]


def write(path, ops, *, ratio=1.0, model="m", **facts_of_machine):
    rows = []
    for op in ops:
        s = 1e-6 + op.flops / 5e10
        rows.append(operator_row(op) | statistics([s * 0.9, s, s * 1.1]))
    frame = pd.DataFrame(rows)
    frame["device"], frame["device_type"], frame["model"] = SHEET.name, device_type_json(SHEET), model
    frame["backend"], frame["stack"], frame["source"], frame["energy_j"] = "onnxruntime", "1", "measured", np.nan
    total = float(frame["median_s"].sum())
    facts = {"models": {model: {"ratio": ratio, "median_s": total / ratio, "operators_s": total}}}
    write_profile(frame, path, metadata=facts | facts_of_machine)
    return frame


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrated")
    frame = write(folder / "p.parquet", operators(), ratio=0.8)
    write(folder / "disturbed.parquet", operators(70)[60:], model="sweep-2", ratio=0.7)
    card = calibrate([folder / "p.parquet", folder / "disturbed.parquet"], folder / "model")
    return folder, frame, card


def test_card_holds_out_and_says_what_it_is_for(calibrated):
    folder, _, card = calibrated
    assert {"random", "larger"} <= {row["split"] for row in card["splits"]}
    for row in card["splits"]:
        assert set(row) >= {"split", "family", "n", "mean_ape", "median_ape", "coverage"}
    assert json.loads((folder / "model" / "card.json").read_text())["not_for"]
    assert not list(folder.glob(".model*"))


def test_card_names_terms_and_what_fewer_rows_would_have_given(calibrated):
    _, _, card = calibrated
    assert "whoever ran 'calibrate'" in card["licence"]
    assert "licences of" not in card["licence"]
    assert licence(["measured", "NeuSight"]).endswith("licences of NeuSight")
    assert card["learning_curve"] == []  # an eighth, a quarter and half of 48 are below what is fitted to


def test_fewer_rows_are_counted_and_no_better(tmp_path):
    frame = write(tmp_path / "p", operators(400))
    curve = learning_curve(frame, np.arange(400).astype(str), 0)
    assert [row["rows"] for row in curve] == [40, 80, 160]
    assert curve[0]["mean_ape"] > curve[-1]["mean_ape"] > 0


def test_only_a_hold_out_makes_a_model_calibrated(calibrated):
    _, _, card = calibrated
    figure = next(row["median_ape"] for row in card["splits"] if (row["split"], row["family"]) == ("random", "all"))
    assert known_errors(card).startswith("calibrated; ")
    assert f"random {figure:.0%}" in known_errors(card)
    assert known_errors({"splits": []}).startswith("uncalibrated")
    widths = {"gemm": {"random": [0.1, 0.2], "larger": [0.3, 0.3], "device": [0.5, 0.7]}}
    quantiles = known_errors({"splits": [], "held_out_p90_abs_log_error": widths})
    assert quantiles.startswith("not calibrated")
    assert "random 1.11 to 1.22, larger 1.35 to 1.35, device 1.65 to 2.01" in quantiles


def test_measured_operators_are_answered_by_their_reconciled_measurement(calibrated):
    folder, frame, _ = calibrated
    model = load_cost_model(folder / "model")
    known = operators()
    found = model.predict(known, SHEET)
    assert found.latency_s == pytest.approx(frame["median_s"].to_numpy() / 0.8, rel=1e-3)
    assert found.measured.all()
    assert not found.extrapolated.any()
    assert {SOURCES[i] for i in found.sources()} == {"measured"}
    other = make_operator("new", "MatMul", [(100, 101), (101, 102)], [(100, 102)])
    mixed = model.predict([known[0], other], SHEET)
    assert mixed.measured.tolist() == [True, False]
    assert {SOURCES[i] for i in mixed.sources()} == {"measured", "predicted"}


def test_a_model_can_be_asked_about_the_device_that_it_was_calibrated_on(calibrated, cli, tmp_path):
    folder, frame, _ = calibrated
    lines = [
        {"op_type": op.op_type, "input_shapes": [t.shape for t in op.inputs], "output_shapes": [op.outputs[0].shape]}
        for op in operators()[:3]
    ]
    (tmp_path / "ops.jsonl").write_text("\n".join(map(json.dumps, lines)))
    asked = "predict", str(tmp_path / "ops.jsonl"), "--cost-model", str(folder / "model"), "--json", "--device"
    found = json.loads(cli(*asked, "test-cpu").out)
    times = [line["latency_s"] for line in found]
    assert times == pytest.approx(frame["median_s"].to_numpy()[:3] / 0.8, rel=1e-3)
    assert not any(line["extrapolated"] for line in found)
    assert "test-cpu" in cli(*asked, "test-cpus").err  # did you mean


def test_a_cluster_names_devices_that_its_cost_model_was_calibrated_on(calibrated, tmp_path):
    folder, _, _ = calibrated
    shutil.copytree(folder / "model", tmp_path / "model")
    path = tmp_path / "cluster.yaml"
    path.write_text("name: c\ndevices: [{name: x, device: test-cpu, cost_model: model}]\n")
    assert read_cluster(path).devices[0].type == SHEET
    path.write_text("name: c\ndevices: [{name: x, device: test-cpu}]\n")
    with pytest.raises(InputError, match="unknown device type 'test-cpu'"):
        read_cluster(path)


def test_a_profiled_device_goes_before_the_catalogs_and_a_published_one_after_it(tmp_path):
    own = replace(read_device_type("nvidia-l4"), memory_bandwidth_bytes_per_s=2.5e11, source="measured")
    (tmp_path / "card.json").write_text("{}")
    (tmp_path / "model.json").write_text(json.dumps({"devices": {"nvidia-l4": asdict(own)}}))
    assert read_device_type("nvidia-l4", cost_model=tmp_path) == read_device_type("nvidia-l4") != own
    (tmp_path / "measured.json").write_text(json.dumps({"devices": {"nvidia-l4": {}}}))
    assert read_device_type("nvidia-l4", cost_model=tmp_path) == own


def test_memory_and_price_do_not_make_another_device(calibrated):
    folder, _, _ = calibrated
    board = replace(SHEET, memory_bytes=1 << 31, price_eur=9.0, source="elsewhere")
    assert load_cost_model(folder / "model").predict(operators()[:3], board).measured.all()


def test_the_table_is_silent_about_other_devices(calibrated):
    folder, _, _ = calibrated
    other = DeviceType("test-cpu", "cpu", 1 << 30, 2e10, {"float32": 2e11}, compute_units=1)
    found = load_cost_model(folder / "model").predict(operators()[:3], other)
    assert found.measured is None


def test_calibrating_again_from_the_kept_profile_changes_no_time(calibrated, tmp_path):
    folder, frame, _ = calibrated
    calibrate([folder / "model" / "profile.parquet"], tmp_path / "again")
    found = load_cost_model(tmp_path / "again").predict(operators(), SHEET)
    assert found.latency_s == pytest.approx(frame["median_s"].to_numpy() / 0.8, rel=1e-3)


def test_a_model_of_several_profiles_calibrated_again_still_knows_its_cpu(tmp_path):
    for i, part in enumerate((operators(60)[:30], operators(60)[30:])):
        write(tmp_path / f"{i}.parquet", part, hardware={"cpu": "Some CPU", "cores": 2})
    calibrate([tmp_path / "0.parquet", tmp_path / "1.parquet"], tmp_path / "first")
    card = calibrate([tmp_path / "first" / "profile.parquet"], tmp_path / "again")
    assert card["machine"] == [{"cpu": "Some CPU", "cores": 2}] * 2
    tables = [json.loads((tmp_path / name / "measured.json").read_text()) for name in ("first", "again")]
    assert tables[1]["cpus"] == tables[0]["cpus"] == {SHEET.name: "Some CPU"}


def test_no_hold_out_no_model(tmp_path):
    write(tmp_path / "few.parquet", operators(10))
    with pytest.raises(InputError, match="hold some out"):
        calibrate([tmp_path / "few.parquet"], tmp_path / "model")
    write(tmp_path / "busy.parquet", operators(), ratio=5.0)
    with pytest.raises(InputError, match="add up to 5"):
        calibrate([tmp_path / "busy.parquet"], tmp_path / "model")
    with pytest.raises(InputError, match="no profile"):
        calibrate([], tmp_path / "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["busy.parquet", "few.parquet"]


def test_nor_where_what_is_left_to_fit_to_is_too_little(tmp_path):
    write(tmp_path / "p.parquet", operators(33))
    with pytest.raises(InputError, match="too few to hold some out"):
        calibrate([tmp_path / "p.parquet"], tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_nothing_but_an_earlier_model_is_replaced(calibrated, tmp_path, monkeypatch):
    write(tmp_path / "work" / "p.parquet", operators())
    (tmp_path / "work" / "thesis.txt").write_text("years")
    monkeypatch.chdir(tmp_path / "work")
    for out in (".", "../work", "thesis.txt"):
        with pytest.raises(InputError, match="name a folder"):
            calibrate([Path("p.parquet")], Path(out))
    assert (tmp_path / "work" / "thesis.txt").read_text() == "years"
    model = tmp_path / "model"
    shutil.copytree(calibrated[0] / "model", model)
    (model / "left-over").touch()
    shutil.copy("p.parquet", model / "mine.parquet")
    with pytest.raises(InputError, match="name a folder"):
        calibrate([model / "mine.parquet"], model)
    calibrate([model / "profile.parquet"], model)
    assert not (model / "left-over").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "work"]


def test_equal_operators_are_never_on_both_sides_of_a_split(tmp_path):
    ops = operators(40)
    frame = pd.concat([write(tmp_path / "a", ops, model="a"), write(tmp_path / "b", ops, model="b")], ignore_index=True)
    keys = np.array([str(i) for i in range(40)] * 2)
    assert all(row["split"] != "model" for row in held_out(frame, keys, 0))


def test_a_device_is_left_out_though_the_other_ran_the_same_operators(tmp_path):
    one = write(tmp_path / "p", operators(40))
    other = replace(SHEET, name="other-cpu", memory_bandwidth_bytes_per_s=2e10)
    two = one.assign(device=other.name, device_type=device_type_json(other))
    keys = np.array([str(i) for i in range(40)] * 2)
    rows = [row for row in held_out(pd.concat([one, two], ignore_index=True), keys, 0) if row["split"] == "device"]
    assert [(row["family"], row["n"]) for row in rows] == [("gemm", 80), ("all", 80)]
    assert all(row["mean_ape"] < 0.5 and 0.5 < row["coverage"] <= 1 for row in rows)


def test_profiles_of_one_name_keep_a_hash_each(tmp_path):
    for folder, part in (("a", operators(60)[:30]), ("b", operators(60)[30:])):
        write(tmp_path / folder / "operators.parquet", part)
    paths = [tmp_path / folder / "operators.parquet" for folder in "ab"]
    card = calibrate(paths, tmp_path / "model")
    assert card["inputs"] == {path.as_posix(): sha256(path) for path in paths}


def test_networks_of_a_sweep_that_were_disturbed_are_left_out_and_named(calibrated):
    _, frame, card = calibrated
    assert card["dropped"] == {"sweep-2": 0.7}
    assert card["models"] == ["m"]
    assert card["rows"] == len(frame)


@pytest.mark.parametrize(("name", "cache", "same"), [("", 0, True), ("-other-simd", 0, False), ("", 1, False)])
def test_a_core_of_this_machine_is_a_measured_one_only_where_units_and_cache_agree(calibrated, name, cache, same):
    from moirai_sim.clusters.local import local_core
    from moirai_sim.profiling.cpu import device_type_name, l2_cache_bytes
    from moirai_sim.profiling.telemetry import cpu_model

    folder, _, _ = calibrated
    measured = device_type_name(1).removesuffix("-1t") + name + "-1t"
    sheet = replace(SHEET, name=measured, l2_cache_bytes=(l2_cache_bytes() or 0) + cache or None)
    model = load_cost_model(folder / "model")
    model.sheets, model.cpus = {measured: sheet}, {measured: cpu_model()}
    model.devices = {measured: model.devices[SHEET.name]}
    assert (model.predict(operators()[:2], local_core()).measured is not None) is same


def test_an_older_table_without_the_shapes_of_outputs_answers_the_same(calibrated, tmp_path):
    folder, frame, _ = calibrated
    shutil.copytree(folder / "model", tmp_path / "m")
    table = json.loads((tmp_path / "m" / "measured.json").read_text())
    shapes = {tuple(json.loads(text)[0]) for text in frame["output_shapes"]}
    assert set(map(tuple, table["outputs"][SHEET.name])) == shapes
    del table["outputs"]
    (tmp_path / "m" / "measured.json").write_text(json.dumps(table))
    asked = [*operators(), make_operator("new", "MatMul", [(100, 101), (101, 102)], [(100, 102)])]
    one, other = (load_cost_model(model).predict(asked, SHEET) for model in (folder / "model", tmp_path / "m"))
    for name in ("latency_s", "low_s", "high_s", "extrapolated", "measured"):
        assert (getattr(one, name) == getattr(other, name)).all()
    assert one.measured.sum() == 60


def test_a_broken_table_is_an_input_error(calibrated, tmp_path):
    folder, _, _ = calibrated
    import shutil

    shutil.copytree(folder / "model", tmp_path / "m")
    (tmp_path / "m" / "measured.json").write_text("{")
    with pytest.raises(InputError, match=r"measured\.json"):
        load_cost_model(tmp_path / "m")
