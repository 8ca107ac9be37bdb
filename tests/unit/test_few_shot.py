"""What a few measurements of a new GPU are worth where no tile model has a say: of batches, and of other boards."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from moirai_sim.clusters.cluster import DeviceType
from moirai_sim.costs import kriging
from moirai_sim.costs.catalog_model import LearnedModel, save_cost_model
from moirai_sim.costs.estimator import TimeEstimator
from moirai_sim.errors import InputError
from moirai_sim.profiling.published.table import device_json, profile

OLD, NEW = (
    DeviceType(name, "gpu", 2**34, rate / 20, {"float32": rate}, units, 1.5e9, 4 * 10**6)
    for name, rate, units in (("old", 10e12, 56), ("new", 15e12, 80))
)


def batches(device: DeviceType, rows: int, seed: int, bend: float = 0.0) -> pd.DataFrame:
    """Batched products at half of the device's rate; ``bend``: by how much their log time swings with the size."""
    generator = np.random.default_rng(seed)
    b, m, n, k = (2 ** generator.uniform(4, 10, (4, rows))).astype(int)
    flops = 2.0 * b * m * n * k
    swing = bend * np.sin(1.2 * np.log2(k))
    time = (2e-5 + 2 * flops / device.peak_flops["float32"]) * np.exp(swing + 0.03 * generator.standard_normal(rows))
    columns = {
        "name": "x", "op_type": "MatMul", "family": "batched-matmul", "dtype": "float32", "device": device.name,
        "device_type": device_json(device), "backend": "b", "stack": "s 1", "source": "synthetic",
        "input_shapes": [f"[[{w}, {x}, {z}], [{w}, {z}, {y}]]" for w, x, y, z in zip(b, m, n, k, strict=True)],
        "output_shapes": [f"[[{w}, {x}, {y}]]" for w, x, y in zip(b, m, n, strict=True)], "flops": flops,
        "read_bytes": 4 * b * (m * k + k * n), "write_bytes": 4 * b * m * n, "time_s": time,
    }  # fmt: skip
    return profile(columns, rows)


def fit() -> TimeEstimator:
    return TimeEstimator(trees=20, leaves=6, sharp_trees=0, intervals=False).fit(batches(OLD, 500, 0))


def test_what_the_ridge_misses_of_a_batch_is_carried_to_its_neighbours():
    rest = batches(NEW, 300, 3, bend=0.3)
    truth = rest["median_s"].to_numpy()
    errors, covered, widths = [], [], []
    for points in (15, 300):
        adapted = fit().adapt(batches(NEW, points, 2, bend=0.3))
        assert list(adapted.models_["batched-matmul-vector"].points) == ["new|float32"]
        found, low, high, _ = adapted.predict_interval(rest)
        errors.append(np.abs(found / truth - 1).mean())
        covered.append(((low <= truth) & (truth <= high)).mean())
        widths.append(np.median(high / low))
    assert errors[1] < 0.7 * errors[0]
    assert widths[1] < widths[0]
    assert min(covered) > 0.8


def test_points_of_a_later_time_replace_those_of_an_earlier_one():
    rest = batches(NEW, 50, 3)
    twice = fit().adapt(batches(NEW, 40, 2, bend=0.3)).adapt(batches(NEW, 20, 4))
    assert (twice.predict(rest) == fit().adapt(batches(NEW, 20, 4)).predict(rest)).all()


def test_too_many_points_are_thinned():
    adapted = fit().adapt(batches(NEW, kriging.MOST_POINTS + 100, 2))
    assert len(adapted.models_["batched-matmul-vector"].points["new|float32"]["missed"]) == kriging.MOST_POINTS


def test_models_whose_fields_have_names_of_an_earlier_version_can_be_read(tmp_path):
    adapted = fit().adapt(batches(NEW, 20, 2))
    save_cost_model(adapted, tmp_path, {"name": "m"})
    file = tmp_path / "model.json"
    content = json.loads(file.read_text())
    for family in content["families"].values():
        family |= {"tile_points": family.pop("points"), "tile_widths": family.pop("point_widths")}
    file.write_text(json.dumps(content))
    read, own = LearnedModel(tmp_path).families["batched-matmul-vector"], adapted.models_["batched-matmul-vector"]
    assert read.points == own.points != {}
    assert read.point_widths == own.point_widths != {}


def test_another_board_with_a_known_chip_learns_from_neighbours_too():
    faster = DeviceType(
        "board", "gpu", 2**34, 0.9 * OLD.memory_bandwidth_bytes_per_s, {"float32": 10e12}, 56, 1.5e9, 4 * 10**6
    )
    estimator = TimeEstimator(trees=20, leaves=6, sharp_trees=20, sharp_leaves=8, intervals=False)
    estimator.fit(batches(OLD, 500, 0))
    rest = batches(faster, 200, 3, bend=0.3)
    truth = rest["median_s"].to_numpy()
    before = np.abs(estimator.predict(rest) / truth - 1).mean()
    after = np.abs(estimator.adapt(batches(faster, 300, 2, bend=0.3)).predict(rest) / truth - 1).mean()
    assert after < 0.7 * before


def streams(op_type: str, device: DeviceType, rows: int, seed: int, slow: float) -> pd.DataFrame:
    """Sums or exponentials that take so many times what the device's bandwidth says, wide ones more."""
    generator = np.random.default_rng(seed)
    m, k = (2 ** generator.uniform(6, 13, (2, rows))).astype(int)
    written = m if op_type == "ReduceSum" else m * k
    size = 4.0 * (m * k + written)
    noise = np.exp(0.03 * generator.standard_normal(rows))
    columns = {
        "name": "x", "op_type": op_type, "family": "reduction" if op_type == "ReduceSum" else "elementwise",
        "dtype": "float32", "device": device.name, "device_type": device_json(device), "backend": "b", "stack": "s 1",
        "source": "synthetic", "input_shapes": [f"[[{x}, {z}]]" for x, z in zip(m, k, strict=True)],
        "output_shapes": [f"[[{x}, {z}]]" for x, z in zip(m, written // m, strict=True)], "flops": m * k,
        "read_bytes": 4 * m * k, "write_bytes": 4 * written,
        "time_s": (2e-5 + size / device.memory_bandwidth_bytes_per_s) * slow * (k / 512) ** 0.1 * noise,
    }  # fmt: skip
    return profile(columns, rows)


def test_points_of_a_family_without_an_ensemble_correct_what_stands_in_for_it(tmp_path):
    def fitted() -> TimeEstimator:
        return TimeEstimator(trees=20, leaves=6, sharp_trees=0, intervals=False).fit(streams("Exp", OLD, 300, 0, 1.2))

    rest, other, own = (
        streams("ReduceSum", NEW, 300, 3, 4.0),
        streams("Exp", NEW, 50, 4, 1.2),
        streams("Exp", NEW, 40, 5, 1.2),
    )
    truth = rest["median_s"].to_numpy()
    before = fitted().predict(rest)
    both = pd.concat([streams("ReduceSum", NEW, 40, 2, 4.0), own], ignore_index=True)
    adapted = fitted().adapt(both)
    after, low, high, flag = adapted.predict_interval(rest)
    assert np.abs(after / truth - 1).mean() < min(0.15, 0.3 * np.abs(before / truth - 1).mean())
    assert ((low <= truth) & (truth <= high)).mean() > 0.8
    assert flag.all()
    alone = fitted().adapt(own)
    assert (adapted.predict(other) == alone.predict(other)).all(), "exponentials have points of their own"
    assert (adapted.adapt(both).predict(rest) == after).all(), "the same points again change nothing"
    save_cost_model(adapted, tmp_path, {"name": "m"})
    read = TimeEstimator()
    read.models_, read.devices_ = LearnedModel(tmp_path).families, adapted.devices_
    assert read.predict(rest) == pytest.approx(after, rel=1e-3)
    assert not (adapted.adapt(streams("ReduceSum", NEW, 20, 9, 4.0)).predict(rest) == after).all()
    assert (adapted.predict(other) == alone.predict(other)).all(), "points of sums are forgotten alone"


def halves(device: DeviceType, rows: int, seed: int, batch: int, efficiency: float) -> pd.DataFrame:
    """Products of 16 bits on matrix units, four times as fast as single precision, or batches of them."""
    generator = np.random.default_rng(seed)
    m, n, k = (2 ** generator.uniform(7, 12, (3, rows))).astype(int)
    flops = 2.0 * batch * m * n * k
    of = f"{batch}, " if batch > 1 else ""
    columns = {
        "name": "x", "op_type": "MatMul", "family": "batched-matmul" if batch > 1 else "gemm", "dtype": "float16",
        "device": device.name, "device_type": device_json(device), "backend": "b", "stack": "s 1",
        "source": "synthetic",
        "input_shapes": [f"[[{of}{x}, {z}], [{of}{z}, {y}]]" for x, y, z in zip(m, n, k, strict=True)],
        "output_shapes": [f"[[{of}{x}, {y}]]" for x, y in zip(m, n, strict=True)], "flops": flops,
        "read_bytes": 2 * batch * (m * k + k * n), "write_bytes": 2 * batch * m * n,
        "time_s": (2e-5 + flops / device.peak_flops["float16"] / efficiency)
        * np.exp(0.03 * generator.standard_normal(rows)),
    }  # fmt: skip
    return profile(columns, rows)


@pytest.mark.parametrize("chip", ["another", "the same"])
def test_batches_on_matrix_units_learn_from_points_where_products_stand_in_for_them(chip):
    """Batches reach a third of what products do; those of the new board are corrected, its products are not."""
    rates = {"float32": 10e12, "float16": 80e12}
    old = replace(OLD, peak_flops=rates)
    new = replace(old, name="new", memory_bandwidth_bytes_per_s=0.9 * old.memory_bandwidth_bytes_per_s)
    if chip == "another":
        new = replace(new, compute_units=80, peak_flops={name: 1.5 * rate for name, rate in rates.items()})
    estimator = TimeEstimator(trees=20, leaves=6, sharp_trees=20, sharp_leaves=6, intervals=False)
    estimator.fit(halves(old, 400, 0, 1, 0.7))
    rest, products = halves(new, 200, 3, 16, 0.25), halves(new, 50, 4, 1, 0.7)
    truth = rest["median_s"].to_numpy()
    before, of_products = np.abs(estimator.predict(rest) / truth - 1).mean(), estimator.predict(products)
    adapted = estimator.adapt(halves(new, 40, 2, 16, 0.25))
    assert np.abs(adapted.predict(rest) / truth - 1).mean() < min(0.25, 0.5 * before)
    assert (adapted.predict(products) == of_products).all()


@pytest.mark.parametrize("bad", [{"at": [[0, 0, 0]]}, {"missed": ["x"]}, {"stack": ["a", "b"]}])
def test_points_that_are_none_are_refused_with_the_model(tmp_path, bad):
    save_cost_model(fit().adapt(batches(NEW, 1, 2)), tmp_path, {"name": "m"})
    file = tmp_path / "model.json"
    content = json.loads(file.read_text())
    content["families"]["batched-matmul-vector"]["points"]["new|float32"] |= bad
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="whole cost model"):
        LearnedModel(tmp_path)
