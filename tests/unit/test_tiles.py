"""The tile model: what it says of work and devices, and how it carries over to a GPU that was not measured."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from moirai_sim.clusters.cluster import DeviceType
from moirai_sim.costs import kriging, tiles
from moirai_sim.costs.catalog_model import load_cost_model, save_cost_model
from moirai_sim.costs.estimator import TimeEstimator
from moirai_sim.costs.families import COLUMNS, describe
from moirai_sim.costs.kernels import Rows, expect, predict_rows, rows_of
from moirai_sim.graphs.work import make_operator
from moirai_sim.profiling.published.table import device_json, profile


def gpu(name: str, flops: float, bandwidth: float, units: int) -> DeviceType:
    """A GPU of so many FLOP/s on matrix units, and a sixteenth of that on vector units."""
    return DeviceType(
        name, "gpu", 2**35, bandwidth, {"bfloat16": flops, "float32": flops / 16}, units, 1.5e9, 4 * 10**7
    )


OLD, NEW = gpu("old", 300e12, 2e12, 108), gpu("new", 1000e12, 3e12, 132)
LAUNCH = np.array([2.7e-6])
LIKE = np.log([0.93, 0.85, 0.8, 0.7, 1.5, 1.0, 2.0, 3.0, 0.6, 0.05])


def table(m, n, k):
    m, n, k = (np.atleast_1d(np.asarray(x, dtype=float)) for x in (m, n, k))
    found = {"batch": 1, "m": m, "n": n, "k": k, "read_bytes": 2 * (m * k + k * n), "write_bytes": 2 * m * n}
    return np.column_stack([np.broadcast_to(found.get(c, 0.0), m.shape) for c in COLUMNS])


def sizes(rows: int, seed: int):
    return (2 ** np.random.default_rng(seed).uniform(4, 13, (3, rows))).astype(int)


def measured(device: DeviceType, rows: int, seed: int, parameters=LIKE, dtype: str = "bfloat16") -> pd.DataFrame:
    m, n, k = sizes(rows, seed)
    noise = 0.05 * np.random.default_rng(seed).standard_normal(rows)
    time = np.exp(tiles.log_seconds(parameters, table(m, n, k), dtype, device, LAUNCH) + noise)
    columns = {
        "name": "x", "op_type": "MatMul", "family": "gemm", "dtype": dtype, "device": device.name,
        "device_type": device_json(device), "backend": "b", "stack": "s 1", "source": "synthetic",
        "input_shapes": [f"[[{a}, {c}], [{c}, {b}]]" for a, b, c in zip(m, n, k, strict=True)],
        "output_shapes": [f"[[{a}, {b}]]" for a, b in zip(m, n, strict=True)], "flops": 2 * m * n * k,
        "read_bytes": 2 * (m * k + k * n), "write_bytes": 2 * m * n, "time_s": time,
    }  # fmt: skip
    return profile(columns, rows)


def test_times_stay_above_the_launch_and_near_the_limit_of_what_is_large():
    small, large = np.exp(tiles.log_seconds(LIKE, table([1, 8192], [32, 8192], [32, 8192]), "bfloat16", OLD, LAUNCH))
    assert 2.5e-6 < small < 10e-6
    assert 1.0 < large * 0.85 * 300e12 / (2 * 8192**3) < 1.3


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_more_work_never_takes_less_time(axis):
    m, n, k = (np.full(12, 512) for _ in range(3))
    grown = [m, n, k]
    grown[axis] = 2 ** np.arange(4, 16)
    assert (np.diff(tiles.log_seconds(LIKE, table(*grown), "bfloat16", NEW, LAUNCH)) > -0.02).all()


def test_a_split_contraction_keeps_idle_units_busy():
    narrow, wide = tiles.log_seconds(LIKE, table([64, 64], [64, 8192], [16384, 16384]), "bfloat16", OLD, LAUNCH)
    assert narrow < wide
    whole = 16384 / 64 * np.hypot(2 * 64**3 / (300e12 / 108 * 0.85), 0.7 * 2 * 64**3 / (300e12 / 108))
    assert np.exp(narrow) < 0.5 * whole


def test_a_fit_explains_what_the_model_itself_made():
    points = table(*sizes(300, 1))
    time = tiles.log_seconds(LIKE, points, "bfloat16", OLD, LAUNCH)
    found = tiles.log_seconds(
        tiles.fit(points, time, "bfloat16", OLD, np.full(len(points), LAUNCH)), points, "bfloat16", OLD, LAUNCH
    )
    assert np.abs(found - time).mean() < 0.03


def test_devices_that_are_not_known_take_after_those_that_are_and_after_the_prior():
    known = {"a|bfloat16": list(LIKE), "a|float8": list(LIKE + 1)}
    prior = np.log([value for value, _ in tiles.PARAMETERS.values()])
    assert tiles.parameters_of(known, "a", "bfloat16") == list(LIKE)
    assert np.allclose(tiles.parameters_of(known, "b", "bfloat16"), (LIKE + prior) / 2)
    spread = np.array([spread for _, spread in tiles.PARAMETERS.values()])
    near = np.minimum(LIKE + 1, prior + 3 * spread)  # what is strange counts as three spreads away
    assert np.allclose(tiles.parameters_of(known, "b", "int8"), (LIKE + near + prior) / 3)
    assert np.allclose(tiles.parameters_of({}, "b", "int8"), prior)


@pytest.mark.parametrize(("size", "slower"), [((64, 64, 8192), False), ((16384, 16384, 256), True)])
def test_many_waves_of_tiles_read_operands_again(size, slower):
    """A product of one wave reads nothing twice."""
    starved = gpu("starved", 300e12, 1e11, 108)
    never, always = LIKE.copy(), LIKE.copy()
    never[-1], always[-1] = np.log([1e-9, 1.0])
    once, again = (np.exp(tiles.log_seconds(p, table(*size), "bfloat16", starved, LAUNCH))[0] for p in (never, always))
    assert again > 1.2 * once if slower else again == pytest.approx(once)


@pytest.mark.parametrize("count", [2, 3])
def test_a_shared_ensemble_has_half_of_the_say_once_it_has_met_three_devices(count):
    known = [gpu(f"d{i}", (100 + 60 * i) * 1e12, (1 + i / 2) * 1e12, 60 + 20 * i) for i in range(count)]
    profiles = [measured(device, 200, i, dtype="float32") for i, device in enumerate(known)]
    estimator = TimeEstimator(trees=10, leaves=6, sharp_trees=0, intervals=False).fit(pd.concat(profiles))
    asked = measured(NEW, 50, 9, dtype="float32")
    (rows,) = rows_of(asked)["gemm-vector"]
    known = expect(estimator.models_, estimator.devices_, "gemm-vector", rows)
    parameters = tiles.parameters_of(known.model.tiles, NEW.name, "float32")
    by_tiles = tiles.log_seconds(parameters, rows.table, "float32", NEW, np.full(len(rows.table), known.launch_s))
    expected = by_tiles if count == 2 else (by_tiles + known.log_time) / 2
    found = np.log(estimator.predict(asked))
    assert not np.allclose(by_tiles, known.log_time)
    assert np.isclose(found, expected).mean() > 0.9  # others are raised to what the data sheet allows
    assert (found > expected - 1e-6).all()


@pytest.fixture(scope="module")
def fitted():
    return TimeEstimator(trees=10, leaves=6, sharp_trees=0, intervals=False).fit(measured(OLD, 400, 0))


def test_it_carries_over_and_a_few_points_narrow_the_interval(fitted, tmp_path):
    other = LIKE + np.array([0.1, -0.1, 0.1, 0.5, -0.5, 0.3, -0.5, 0.2, 0.0, 0.0])
    points, rest = measured(NEW, 40, 2, other), measured(NEW, 300, 3, other)
    truth = rest["median_s"].to_numpy()
    before, low, high, flag = fitted.predict_interval(rest)
    assert flag.all()
    adapted = TimeEstimator(**fitted.get_params()).fit(measured(OLD, 400, 0)).adapt(points)
    after, new_low, new_high, flag = adapted.predict_interval(rest)
    assert flag.all()
    assert np.abs(after / truth - 1).mean() < min(0.08, 0.7 * np.abs(before / truth - 1).mean())
    assert (new_high / new_low).max() < (high / low).min()
    assert 0.8 < ((new_low <= truth) & (truth <= new_high)).mean() < 1.0

    save_cost_model(adapted, tmp_path / "m", {"name": "m"})
    operators = [make_operator("x", "MatMul", [(64, 512), (512, 256)], [(64, 256)], dtype="bfloat16")]
    stored = load_cost_model(tmp_path / "m").predict(operators, NEW).latency_s
    model, one = adapted.models_["gemm-tensor"], table(64, 256, 512)
    more, _ = kriging.krige(model.points["new|bfloat16"], one, "", NEW)
    (floor,) = model.launch_s.values()
    own = model.tiles["new|bfloat16"]
    expected = np.exp(tiles.log_seconds(own, one, "bfloat16", NEW, np.array([floor])) + more)
    assert stored == pytest.approx(expected, rel=1e-6)


POINTS = {
    "at": kriging._positions(table([64, 4096], 512, 512), NEW).tolist(),
    "stack": ["a", "a"],
    "missed": [0.1, -0.2],
}


def test_what_is_missed_is_carried_to_neighbours_and_no_further():
    near, far = table([64, 70, 4096], 512, 512), table(1, 65536, 65536)
    more, share = kriging.krige(POINTS, near, "a", NEW)
    assert 0.02 < more[1] <= more[0] < 0.1
    assert more[2] < -0.04
    assert (share < 0.9).all()
    more, share = kriging.krige(POINTS, far, "b", NEW)
    assert abs(more[0]) < 0.005
    assert 0.98 < share[0] <= 1.0


def test_another_software_stack_learns_less_and_no_stack_means_that_of_most_points():
    one = table(64, 512, 512)
    own, other, default = (kriging.krige(POINTS, one, stack, NEW) for stack in ("a", "b", ""))
    assert 0 < other[0] < own[0] == default[0]
    assert own[1] < other[1]


def test_an_outlier_moves_its_neighbours_no_further_than_a_large_miss():
    wild, large = ({**POINTS, "missed": [missed, 0.0]} for missed in (3.0, kriging._OUTLIER))
    one = table(64, 512, 512)
    assert kriging.krige(wild, one, "a", NEW)[0] == kriging.krige(large, one, "a", NEW)[0]


def test_many_rows_are_priced_as_each_by_itself():
    many = np.repeat(table([64, 200, 3000], 512, 512), 3000, axis=0)
    together, alone = (kriging.krige(POINTS, rows, "a", NEW)[0] for rows in (many, many[::3000]))
    assert np.allclose(together[::3000], alone, rtol=0, atol=1e-12)


def test_more_points_tell_more_of_what_the_tile_model_cannot(fitted):
    def bent(rows, seed):
        profile = measured(NEW, rows, seed)
        k = np.log2(sizes(rows, seed)[2])
        return profile.assign(median_s=profile["median_s"] * np.exp(0.12 * np.sin(1.5 * k)))

    rest = bent(400, 3)
    truth = rest["median_s"].to_numpy()
    errors, covered = [], []
    for points in (20, 200):
        adapted = TimeEstimator(**fitted.get_params()).fit(measured(OLD, 400, 0)).adapt(bent(points, 2))
        found, low, high, _ = adapted.predict_interval(rest)
        errors.append(np.abs(found / truth - 1).mean())
        covered.append(((low <= truth) & (truth <= high)).mean())
    assert errors[1] < 0.85 * errors[0]
    assert 0.8 < covered[1] < 0.98


def test_points_of_a_device_that_was_measured_change_nothing(fitted):
    rest = measured(OLD, 50, 4)
    before = fitted.predict(rest)
    assert (fitted.adapt(measured(OLD, 20, 5)).predict(rest) == before).all()


def test_fewer_than_ten_points_tell_no_interval(fitted):
    adapted = TimeEstimator(**fitted.get_params()).fit(measured(OLD, 400, 0)).adapt(measured(NEW, 9, 2))
    assert "new|bfloat16" in adapted.models_["gemm-tensor"].tiles
    assert len(adapted.models_["gemm-tensor"].points["new|bfloat16"]["missed"]) == 9
    assert not adapted.models_["gemm-tensor"].point_widths


def test_points_that_were_measured_twice_tell_no_narrower_interval(fitted):
    """A twin in another fold would tell what its double is off by, which nothing tells of a new size."""
    bent = measured(NEW, 40, 2)
    bent = bent.assign(median_s=bent["median_s"] * np.exp(np.random.default_rng(0).normal(0, 0.15, 40)))
    widths = []
    for points in (bent, pd.concat([bent, bent], ignore_index=True)):
        adapted = TimeEstimator(**fitted.get_params()).fit(measured(OLD, 400, 0)).adapt(points)
        widths.append(adapted.models_["gemm-tensor"].point_widths["new|bfloat16"])
    assert widths[1] > 0.85 * widths[0]


def test_types_of_one_size_and_rate_are_alike():
    known = {"a|bfloat16": list(LIKE), "a|int8": list(LIKE + 2)}
    assert tiles.parameters_of(known, "a", "float16") == list(LIKE)
    assert tiles.parameters_of(known, "b", "float16") == tiles.parameters_of(known, "b", "bfloat16")


def test_a_row_times_a_matrix_goes_as_fast_as_memory_where_there_are_no_matrix_units():
    """Tiles of 64 rows would compute 63 of them for nothing."""
    plain = DeviceType("plain", "gpu", 2**33, 700e9, {"float16": 20e12, "float32": 10e12}, 56, 1.3e9, 4 * 10**6)
    one = np.exp(tiles.log_seconds(LIKE, table(1, 8192, 8192), "float16", plain, LAUNCH))[0]
    least = 2 * 8192**2 / 700e9
    assert least < one < 1.6 * least


def test_what_nobody_measured_is_never_faster_than_the_data_sheet_allows(fitted):
    """Whatever the parameters say: not than its arithmetic, not than its memory."""
    sheet = replace(NEW, l2_cache_bytes=10**6)
    greedy = {"new|bfloat16": list(LIKE + np.array([-9, 1.0, 1.0, 1.0, -9, -9, -9, 0, -9, -9]))}
    models = {"gemm-tensor": replace(fitted.models_["gemm-tensor"], tiles=greedy)}
    operators = [
        make_operator("x", "MatMul", [(m, 8192), (8192, 8192)], [(m, 8192)], dtype="bfloat16") for m in (1, 8192)
    ]
    table_ = describe(operators)[1]
    rows = Rows(table_, np.array(["MatMul"] * 2), sheet, "bfloat16", "", np.arange(2))
    seconds, low, _, _ = predict_rows(models, fitted.devices_, "gemm-tensor", rows)
    least = [2 * (8192 * 8193 + 8192) / 3e12, 2 * 8192**3 / 1000e12]
    assert seconds == pytest.approx(least)
    assert (low >= seconds * 0.999).all()


def test_a_batch_of_products_is_priced_by_tiles_where_only_single_ones_were_measured(fitted):
    def price(op_type, shapes):
        operators = [make_operator("x", op_type, shapes, [(*shapes[0][:-1], shapes[1][-1])], dtype="bfloat16")]
        key = "batched-matmul-tensor" if len(shapes[1]) > 2 else "gemm-tensor"
        rows = Rows(describe(operators)[1], np.array([op_type]), OLD, "bfloat16", "", np.arange(1))
        return predict_rows(fitted.models_, fitted.devices_, key, rows)

    (two,), _, _, (flag,) = price("MatMul", [(2, 128, 64), (2, 64, 128)])
    (one,), _, _, _ = price("MatMul", [(128, 64), (64, 128)])
    assert flag
    assert two < 2 * one


def test_a_size_that_no_row_of_which_begins_on_a_boundary_is_flagged():
    data = measured(OLD, 300, 0)
    aligned = data[data["input_shapes"].map(lambda text: all(n % 2 == 0 for n in json.loads(text)[1]))]
    model = TimeEstimator(trees=5, leaves=6, sharp_trees=5, sharp_leaves=6, intervals=False).fit(
        aligned.reset_index(drop=True)
    )
    assert model.models_["gemm-tensor"].alignment == 2
    operators = [make_operator("x", "MatMul", [(512, k), (k, 512)], [(512, 512)], dtype="bfloat16") for k in (512, 511)]
    rows = Rows(describe(operators)[1], np.array(["MatMul"] * 2), OLD, "bfloat16", "", np.arange(2))
    assert predict_rows(model.models_, model.devices_, "gemm-tensor", rows)[3].tolist() == [False, True]


def test_a_type_that_another_device_was_measured_in_is_flagged_on_this_one():
    new = replace(NEW, peak_flops={**NEW.peak_flops, "float8": 2000e12})
    other = measured(new, 200, 1).assign(dtype="float8")
    both = pd.concat([measured(OLD, 200, 0), other], ignore_index=True)
    model = TimeEstimator(trees=5, leaves=6, sharp_trees=5, sharp_leaves=6, intervals=False).fit(both)
    sheet = replace(OLD, peak_flops={**OLD.peak_flops, "float8": 600e12})
    rows = {
        dtype: Rows(
            describe([make_operator("x", "MatMul", [(512, 512), (512, 512)], [(512, 512)], dtype=dtype)])[1],
            np.array(["MatMul"]), device, dtype, "", np.arange(1),
        )
        for dtype, device in (("bfloat16", OLD), ("float8", new))
    }  # fmt: skip
    for known in rows.values():
        assert predict_rows(model.models_, model.devices_, "gemm-tensor", known)[3].tolist() == [False]
    swapped = replace(rows["bfloat16"], device=new), replace(rows["float8"], device=sheet)
    for strange in swapped:
        assert predict_rows(model.models_, model.devices_, "gemm-tensor", strange)[3].tolist() == [True]
