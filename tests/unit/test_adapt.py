"""A stored model sharpened by a few points of a device that it lacks: nearer, said so, and asked for by name."""

import json

import numpy as np
import pandas as pd
import pytest

from moirai_sim.clusters.cluster import DeviceType
from moirai_sim.clusters.reader import read_device_type
from moirai_sim.costs.adapt import adapt
from moirai_sim.costs.card import known_errors
from moirai_sim.costs.catalog_model import load_cost_model, save_cost_model
from moirai_sim.costs.estimator import TimeEstimator
from moirai_sim.errors import InputError
from moirai_sim.graphs.work import make_operator
from moirai_sim.profiling.schema import device_type_json, operator_row, row_operator, statistics, write_profile

KNOWN = DeviceType("known", "gpu", 2**33, 500e9, {"float32": 10e12}, 40, 1.5e9, 4_000_000)
NEW = DeviceType("new", "gpu", 2**33, 700e9, {"float32": 15e12}, 60, 1.5e9, 8_000_000, source="measured")


def profile(path, device, rows, seed, efficiency, stack="torch 2", launch_s=5e-6):
    """Write a profile of a device that does what its data sheet says at one efficiency, with 3 % of noise."""
    generator = np.random.default_rng(seed)
    found = []
    for m, n, k in (2 ** generator.uniform(4, 11, (rows, 3))).astype(int).tolist():
        op = make_operator("x", "MatMul", [(m, k), (k, n)], [(m, n)])
        size = op.read_bytes + op.write_bytes
        limit = max(op.flops / device.peak_flops["float32"], size / device.memory_bandwidth_bytes_per_s)
        time = (launch_s + limit / efficiency) * np.exp(0.03 * generator.standard_normal())
        found.append(operator_row(op) | statistics([time]))
    frame = pd.DataFrame(found).assign(
        device=device.name, device_type=device_type_json(device), backend="torch", stack=stack, model="",
        source="measured", energy_j=np.nan,
    )  # fmt: skip
    write_profile(frame, path, metadata={})
    return frame


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Hold a base model of two stacks, one of which starts kernels much slower, and twelve points of a new device."""
    folder = tmp_path_factory.mktemp("adapt")
    frames = [
        profile(folder / "a.parquet", KNOWN, 200, 0, 0.7),
        profile(folder / "b.parquet", KNOWN, 250, 1, 0.7, stack="other 1", launch_s=40e-6),
    ]
    estimator = TimeEstimator(trees=30, leaves=6, sharp_trees=15, sharp_leaves=6, intervals=False, min_leaf=3)
    splits = [{"split": "random", "family": "all", "n": 9, "mean_ape": 0.1, "median_ape": 0.1, "coverage": 0.9}]
    card = {"name": "base", "splits": splits, "hardware": {"known": {}}, "stack": ["other 1", "torch 2"]}
    save_cost_model(estimator.fit(pd.concat(frames, ignore_index=True)), folder / "base", card)
    profile(folder / "points.parquet", NEW, 12, 2, 0.3)
    return folder


def error(model, device, frame):
    priced = load_cost_model(model).predict([row_operator(row) for row in frame.to_dict("records")], device)
    return float(np.median(np.abs(priced.latency_s / frame["median_s"].to_numpy() - 1)))


def test_a_few_points_sharpen_a_copy_that_knows_the_device(folder, tmp_path, cli):
    out = tmp_path / "mine"
    called = cli("calibrate", folder / "points.parquet", "--adapt", folder / "base", "-o", out, "--json")
    card = json.loads(called.out)
    assert card == json.loads((out / "card.json").read_text())
    rest = profile(tmp_path / "rest.parquet", NEW, 100, 3, 0.3)
    asked = read_device_type("new", cost_model=out)
    assert asked == NEW
    assert error(out, asked, rest) < min(0.2, 0.5 * error(folder / "base", asked, rest))
    points = pd.read_parquet(folder / "points.parquet")
    assert error(out, asked, points) < 1e-3  # answered by the measurement itself

    facts = card["adapted"]["new"]
    assert (facts["points"], facts["ignored"]) == (12, 0)
    rows = {row["family"]: row for row in card["splits"] if row["split"] == "left-out points of new"}
    assert rows["all"]["n"] == 12
    assert rows["all"]["median_ape"] < 0.8 * facts["unadapted_median_ape"]
    assert "random 10%" in known_errors(card)
    assert "left-out points of new" in known_errors(card)


def test_the_model_that_was_adapted_stays_as_it_is(folder, tmp_path):
    before = {path.name: path.read_bytes() for path in (folder / "base").iterdir()}
    adapt([folder / "points.parquet"], folder / "base", tmp_path / "mine")
    assert {path.name: path.read_bytes() for path in (folder / "base").iterdir()} == before
    frame = profile(tmp_path / "p.parquet", KNOWN, 20, 5, 0.7)
    assert error(tmp_path / "mine", KNOWN, frame) == error(folder / "base", KNOWN, frame)


def test_points_of_a_second_device_leave_those_of_the_first(folder, tmp_path):
    other = DeviceType("other", "gpu", 2**33, 300e9, {"float32": 5e12}, 20, 1.5e9, 2_000_000)
    profile(tmp_path / "other.parquet", other, 10, 6, 0.5)
    adapt([folder / "points.parquet"], folder / "base", tmp_path / "one")
    card = adapt([tmp_path / "other.parquet"], tmp_path / "one", tmp_path / "two")
    assert sorted(card["adapted"]) == ["new", "other"]
    rest = profile(tmp_path / "rest.parquet", NEW, 50, 3, 0.3)
    assert error(tmp_path / "two", NEW, rest) == error(tmp_path / "one", NEW, rest)


def test_points_of_the_same_device_are_replaced_and_those_of_others_kept(folder, tmp_path):
    other = DeviceType("other", "gpu", 2**33, 300e9, {"float32": 5e12}, 20, 1.5e9, 2_000_000)
    profile(tmp_path / "other.parquet", other, 10, 6, 0.5)
    once = adapt([folder / "points.parquet"], folder / "base", tmp_path / "one")
    adapt([tmp_path / "other.parquet"], tmp_path / "one", tmp_path / "two")
    again = adapt([folder / "points.parquet"], tmp_path / "two", tmp_path / "three")
    assert again["adapted"]["new"] == once["adapted"]["new"], "errors without points are those of the base"
    assert [row for row in again["splits"] if "new" in row["split"]] == [
        row for row in once["splits"] if "new" in row["split"]
    ]
    points = pd.read_parquet(tmp_path / "three" / "points.parquet")
    assert points["device"].value_counts().to_dict() == {"new": 12, "other": 10}


def test_what_cannot_be_adapted_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="was fitted to known; calibrate a model from the profile alone"):
        adapt([folder / "a.parquet"], folder / "base", tmp_path / "out")
    profile(tmp_path / "one.parquet", NEW, 1, 0, 0.3)
    with pytest.raises(InputError, match=r"1 operators of 'new' .* at least 2"):
        adapt([tmp_path / "one.parquet"], folder / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_points_that_nothing_in_the_model_answers_for_are_refused(folder, tmp_path):
    """A model of softmax alone says nothing of products."""
    frame = profile(tmp_path / "p.parquet", KNOWN, 40, 0, 0.7)
    ops = [make_operator("s", "Softmax", [(n, 64)], [(n, 64)], {"axis": -1}) for n in range(8, 48)]
    frame = frame.assign(**{key: [operator_row(op)[key] for op in ops] for key in operator_row(ops[0])})
    estimator = TimeEstimator(trees=5, sharp_trees=0, intervals=False)
    save_cost_model(estimator.fit(frame), tmp_path / "softmax", {"name": "softmax", "splits": []})
    with pytest.raises(InputError, match=r"0 operators of 'new' .* can price"):
        adapt([folder / "points.parquet"], tmp_path / "softmax", tmp_path / "out")
    assert not (tmp_path / "out").exists()
