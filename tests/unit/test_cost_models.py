"""The estimator, its physical limits, its storage, and the honesty of its intervals and flags."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone

from moirai_sim.clusters.cluster import DeviceType
from moirai_sim.clusters.reader import read_device_type
from moirai_sim.costs.card import gpu_held_out
from moirai_sim.costs.catalog_model import Ensemble, LearnedModel, load_cost_model, save_cost_model
from moirai_sim.costs.estimator import TimeEstimator
from moirai_sim.costs.families import describe, dimensions, family
from moirai_sim.costs.features import allowed_flops, generation, kernel_traits, peak_flops, sustained_flops
from moirai_sim.costs.kernels import design_of, launch_of, stand_in_for
from moirai_sim.costs.measured import read_table
from moirai_sim.costs.model import Prediction
from moirai_sim.costs.roofline import LAUNCH_S, Roofline
from moirai_sim.errors import CheckError, InputError
from moirai_sim.graphs.load import load_graph
from moirai_sim.graphs.operator import DTYPE_BITS, Operator
from moirai_sim.graphs.work import make_operator
from moirai_sim.profiling.published.table import device_json, profile
from moirai_sim.testing import check_cost_model

SMALL = TimeEstimator(
    trees=30, leaves=6, sharp_trees=15, sharp_leaves=6, learning_rate=0.15, min_leaf=3, interval_rows=2000
)


def gpu(name: str = "a", flops: float = 10e12, bandwidth: float = 500e9, **more) -> DeviceType:
    return DeviceType(name, "gpu", 2**33, bandwidth, {"float32": flops}, 40, 1.5e9, 4_000_000, **more)


def synthetic(device: DeviceType, rows: int = 400, seed: int = 0, efficiency: float = 0.7, largest: int = 2048):
    """A device that does what its data sheet says at one efficiency, with 3 % of noise."""
    generator = np.random.default_rng(seed)
    m, n, k = (2 ** generator.uniform(4, np.log2(largest), (3, rows))).astype(int)
    flops, size = 2 * m * n * k, 4 * (m * k + k * n + m * n)
    time = (
        5e-6 + np.maximum(flops / device.peak_flops["float32"], size / device.memory_bandwidth_bytes_per_s) / efficiency
    )
    columns = {
        "name": "x", "op_type": "MatMul", "family": "gemm", "dtype": "float32", "device": device.name,
        "device_type": device_json(device), "backend": "b", "stack": "s 1", "source": "synthetic",
        "input_shapes": [f"[[{a}, {c}], [{c}, {b}]]" for a, b, c in zip(m, n, k, strict=True)],
        "output_shapes": [f"[[{a}, {b}]]" for a, b in zip(m, n, strict=True)], "flops": flops,
        "read_bytes": 4 * (m * k + k * n), "write_bytes": 4 * m * n,
        "time_s": time * np.exp(0.03 * generator.standard_normal(rows)),
    }  # fmt: skip
    return profile(columns, rows)


def test_the_same_fit_is_stored_as_the_same_bytes(fitted, tmp_path):
    for name in ("one", "two"):
        save_cost_model(fitted, tmp_path / name, {"name": "x"})
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert any(name.endswith(".onnx.gz") for name in files)
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_an_unknown_device_starts_kernels_as_others_do_with_the_same_software():
    known = {"a|x 1.0": 1.0, "b|x 2.0": 3.0, "a|x 1.0 int8": 9.0, "b|y 1": 20.0}
    asked = {"a|x 1.0": 1.0, "c|x 3.0": 2.0, "c|x 3 int8": 9.0, "c|x 3 int4": 3.0, "c|y": 20.0, "c|z 1": 6.0, "c|": 6.0}
    assert {group: launch_of(known, group) for group in asked} == asked


@pytest.mark.parametrize("arithmetic", ["vector", "tensor", "cpu"])
def test_a_batch_of_products_is_priced_as_products_where_no_batches_were_measured(arithmetic):
    models = [f"{name}-{arithmetic}" for name in ("elementwise", "conv", "gemm")]
    assert stand_in_for(models, f"batched-matmul-{arithmetic}") == f"gemm-{arithmetic}"


def test_more_shapes_than_are_remembered_are_described_alike(monkeypatch):
    operators = [matmul(m, 8, 16) for m in (1, 2, 3, 1, 2, 3)]
    whole = describe(operators)
    monkeypatch.setattr("moirai_sim.costs.families._REMEMBERED", 1)
    again = describe(operators)
    assert whole[0] == again[0]
    assert (whole[1] == again[1]).all()


@pytest.fixture(scope="module")
def fitted():
    return clone(SMALL).fit(pd.concat([synthetic(gpu()), synthetic(gpu("b", 20e12, 900e9), seed=1)], ignore_index=True))


def matmul(m: int, n: int, k: int):
    return make_operator("x", "MatMul", [(m, k), (k, n)], [(m, n)])


def test_it_learns_and_its_intervals_cover(fitted):
    test = synthetic(gpu(), seed=7)
    seconds, low, high, flag = fitted.predict_interval(test)
    truth = test["median_s"]
    assert np.median(np.abs(seconds / truth - 1)) < 0.06
    inside = ((low <= truth) & (truth <= high)).mean()
    assert 0.85 <= inside <= 0.99
    assert flag.mean() < 0.1


def test_an_unseen_device_is_flagged_and_its_interval_is_wider(fitted):
    new = gpu("c", 15e12, 700e9)
    known = fitted.predict_interval(synthetic(gpu(), seed=3))
    unseen = fitted.predict_interval(synthetic(new, seed=3))
    assert unseen[3].all()
    assert (unseen[2] / unseen[1]).mean() > (known[2] / known[1]).mean()
    same_name_other_sheet = fitted.predict_interval(synthetic(gpu("a", 99e12), seed=3))
    assert same_name_other_sheet[3].all()


def test_what_does_not_say_how_fast_a_device_is_changes_no_price(fitted):
    known, again = synthetic(gpu(), seed=3), synthetic(gpu(price_eur=9.0, source="elsewhere"), seed=3)
    for ours, theirs in zip(fitted.predict_interval(known), fitted.predict_interval(again), strict=True):
        assert (ours == theirs).all()


def test_a_board_with_a_measured_chip_is_priced_as_that_one_within_its_own_limits():
    """What the library does is the chip's; other memory and another clock are in the limits."""
    rows = [synthetic(gpu(), efficiency=0.3), synthetic(gpu("b", 20e12, 900e9), seed=1, efficiency=0.9)]
    fitted = clone(SMALL).fit(pd.concat(rows, ignore_index=True))

    def error(device: DeviceType, efficiency: float = 0.3) -> float:
        truth = synthetic(device, seed=7, efficiency=efficiency)
        seconds, *_, flag = fitted.predict_interval(truth)
        assert flag.all() == (device.name != "a")
        return float(np.median(np.abs(seconds / truth["median_s"] - 1)))

    board = gpu("board", bandwidth=800e9, peak_watts=400.0)
    assert error(gpu()) < error(board) < 0.1
    assert error(replace(board, compute_units=41)) > 1.2 * error(board)
    before = error(board, 0.5)
    fitted.adapt(synthetic(board, rows=30, seed=8, efficiency=0.5))  # points of its own correct what the chip says
    assert error(board, 0.5) < 0.5 * before


def test_larger_shapes_are_flagged(fitted):
    larger = synthetic(gpu(), seed=5, largest=16384)
    beyond = larger["flops"] > 2 * 2048**3 * 1.01
    assert beyond.any()
    assert fitted.predict_interval(larger)[3][beyond].all()


def test_a_few_points_move_the_price_of_a_new_device_towards_its_own(fitted):
    slow = synthetic(gpu("slow", 15e12, 700e9), rows=230, seed=11, efficiency=0.35)
    before = np.abs(fitted.predict(slow.iloc[30:].reset_index(drop=True)) / slow["median_s"].iloc[30:].to_numpy() - 1)
    adapted = (
        clone(SMALL).set_params(intervals=False).fit(synthetic(gpu())).adapt(slow.iloc[:30].reset_index(drop=True))
    )
    rest = slow.iloc[30:].reset_index(drop=True)
    after = np.abs(adapted.predict(rest) / rest["median_s"] - 1)
    assert after.mean() < 0.6 * before.mean()


def test_fused_kernels_and_data_types_that_a_device_lacks_are_flagged_where_none_was_measured(fitted, tmp_path: Path):
    save_cost_model(fitted, tmp_path / "m", {"name": "m"})
    model, plain = load_cost_model(tmp_path / "m"), matmul(100, 100, 100)
    kinds = [plain, replace(plain, parts=("MatMul", "Add")), replace(plain, dtype="float64")]
    assert model.predict(kinds, gpu()).extrapolated.tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("op", "shapes", "attributes"),
    [("Softmax", [(4, 8)], {"axis": 9}), ("Conv", [(1, 3, 8, 8), (4, 3, 3, 3)], {"strides": ["a"]})],
)
def test_what_does_not_fit_together_is_an_input_error_that_names_the_operator(
    fitted, tmp_path: Path, op, shapes, attributes
):
    save_cost_model(fitted, tmp_path / "m", {"name": "m"})
    wrong = replace(make_operator("odd", op, shapes, [shapes[0]]), attributes=attributes)
    with pytest.raises(InputError, match="'odd'"):
        load_cost_model(tmp_path / "m").predict([matmul(8, 8, 8), wrong], gpu())


def test_more_queries_than_keys_never_take_less():
    one, more = (
        make_operator("a", "Attention", [(1, 8, q, 64), (1, 8, 512, 64), (1, 8, 512, 64)], [(1, 8, q, 64)])
        for q in (512, 2048)
    )
    device = gpu()
    limits = [design_of("attention-tensor", describe([op])[1], "float32", device).limit_s[0] for op in (one, more)]
    assert limits[1] > limits[0]


def limits(*operators, dtype="float16"):
    design = design_of("attention-tensor", describe(operators)[1], dtype, gpu())
    return design.limit_s


def test_a_decoding_step_reads_and_attends_to_the_whole_cache():
    step, alone = (
        next(op for op in load_graph(f"zoo:llama3-8b?seq=1{past}") if op.op_type == "Attention")
        for past in ("&past=2047", "")
    )
    batch, queries, keys, depth, heads, kv_heads = describe([step])[1][0][:6]
    assert (batch, queries, keys, depth, heads, kv_heads) == (1, 1, 2048, 128, 32, 8)
    assert step.write_bytes == 2 * (32 * 128 + 2 * 8 * 128), "the token's own, not the cache once more"
    longer, shorter = limits(step, alone)
    assert longer > 100 * shorter


def test_attention_that_masks_nothing_computes_twice_what_causal_attention_does():
    shapes = [(4, 8, 4096, 64)] * 3
    whole, causal = (make_operator("a", "Attention", shapes, shapes[:1], {"is_causal": i}) for i in (0, 1))
    every, half = limits(whole, causal)
    assert every == pytest.approx(2 * half)


def test_the_projection_of_packed_attention_is_work_too():
    attributes = {"num_heads": 16}
    packed = make_operator("a", "Attention", [(8, 16, 1024), (1024, 3072), (3072,)], [(8, 16, 1024)], attributes)
    assert limits(packed)[0] >= 2 * 8 * 16 * 1024 * 3072 / 10e12


def attended(device: DeviceType, attributes: str, rows: int = 60):
    lengths = 16 * (1 + np.arange(rows))
    flops = 8 * lengths * lengths * (4 * 64 + 7)
    columns = {
        "name": "x", "op_type": "Attention", "family": "attention", "dtype": "float32", "device": device.name,
        "device_type": device_json(device), "backend": "b", "stack": "s 1", "source": "synthetic",
        "attributes": attributes, "input_shapes": [f"[{', '.join([f'[1, 8, {n}, 64]'] * 3)}]" for n in lengths],
        "output_shapes": [f"[[1, 8, {n}, 64]]" for n in lengths], "flops": flops,
        "read_bytes": 3 * 4 * 8 * 64 * lengths, "write_bytes": 4 * 8 * 64 * lengths, "time_s": 5e-6 + flops / 5e12,
    }  # fmt: skip
    return profile(columns, rows)


@pytest.mark.parametrize("measured", ['{"is_causal": 1}', "{}"])
def test_prefill_that_masks_nothing_is_flagged_where_none_was_measured(measured):
    fitted = clone(SMALL).set_params(intervals=False).fit(attended(gpu(), measured))
    assert not fitted.predict_interval(attended(gpu(), '{"is_causal": 1}'))[3].any()
    assert fitted.predict_interval(attended(gpu(), "{}"))[3].all() == (measured != "{}")


def test_stored_and_fitted_estimators_agree(fitted, tmp_path: Path):
    save_cost_model(fitted, tmp_path / "m", {"name": "m"})
    model = load_cost_model(tmp_path / "m")
    test = synthetic(gpu(), seed=9)
    operators = [matmul(*(json.loads(i)[0][0], json.loads(o)[0][1], json.loads(i)[0][1]))
                 for i, o in zip(test["input_shapes"], test["output_shapes"], strict=True)]  # fmt: skip
    assert model.predict(operators, gpu()).latency_s == pytest.approx(fitted.predict(test), rel=1e-3)
    check_cost_model(model, gpu())
    check_cost_model(model, gpu("unseen", 3e12))
    assert {p.suffix for p in (tmp_path / "m").iterdir()} == {".json", ".gz"}
    assert sum(p.stat().st_size for p in (tmp_path / "m").iterdir()) < 5 * 2**20


def chosen(rows: int, seed: int = 0, *, told: bool = True, noise: float = 0.4):
    """A noisy device whose library takes a kernel of a third of the speed where the result is large or the sum long."""
    frame = synthetic(gpu(), rows=rows, seed=seed)
    m, k = np.array([json.loads(shape)[0] for shape in frame["input_shapes"]]).T
    n = np.array([json.loads(shape)[0][1] for shape in frame["output_shapes"]])
    slow = (m * n > 90_000) ^ (k > 180)
    spread = np.exp(np.random.default_rng(seed + 100).normal(0, noise, rows))
    frame[["min_s", "p10_s", "median_s", "mean_s", "p90_s"]] *= (np.where(slow, 3.0, 1.0) * spread)[:, None]
    return frame.assign(kernel=np.where(slow, "x_sgemm_32x32_sliced1x4_nn*2", "x_sgemm_128x64_nn") if told else "")


def test_the_name_of_a_kernel_gives_away_its_tile():
    assert kernel_traits("ampere_sgemm_32x128_tn") == (5, 7, 0)
    assert kernel_traits("volta_sgemm_64x32_sliced1x4_tn*2") == (6, 5, 3)
    assert kernel_traits("ampere_fp16_s16816gemm_fp16_128x256_ldg8_f2f_stages_64x3_tn") == (7, 8, 0)
    assert np.isnan(kernel_traits("softmax_warp_forward")).all()


def test_knowing_which_kernels_ran_helps_and_is_stored(tmp_path: Path):
    few = clone(SMALL).set_params(intervals=False, sharp_leaves=31, kernel_leaves=31)
    test = chosen(2000, seed=7, noise=0.0)

    def error(*, told: bool) -> tuple[TimeEstimator, float]:
        found = clone(few).fit(chosen(800, told=told))
        return found, float(np.median(np.abs(found.predict(test) / test["median_s"] - 1)))

    (told, better), (untold, worse) = error(told=True), error(told=False)
    assert better < 0.92 * worse
    assert list(told.models_["gemm-vector"].kernels) == ["columns", "rows", "cuts"]
    assert not untold.models_["gemm-vector"].kernels
    # What was fitted reads no kernel: the answer is the same for a profile that names none.
    assert (told.predict(test.drop(columns="kernel")) == told.predict(test)).all()

    save_cost_model(told, tmp_path, {"name": "m"})
    operators = [matmul(*(json.loads(i)[0][0], json.loads(o)[0][1], json.loads(i)[0][1]))
                 for i, o in zip(test["input_shapes"], test["output_shapes"], strict=True)]  # fmt: skip
    model = load_cost_model(tmp_path)
    assert model.predict(operators, gpu()).latency_s == pytest.approx(told.predict(test), rel=1e-3)
    content = json.loads((tmp_path / "model.json").read_text())
    content["families"]["gemm-vector"]["kernels"]["stages"] = "gemm-vector.stages.onnx.gz"
    (tmp_path / "model.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="knows more than columns, rows, cuts"):
        LearnedModel(tmp_path)


def test_rows_that_are_noise_move_prices_little():
    noisy = synthetic(gpu(), rows=1500)
    wrong = np.random.default_rng(1).random(len(noisy)) < 0.1
    noisy.loc[wrong, ["min_s", "p10_s", "median_s", "mean_s", "p90_s"]] *= 5
    test = synthetic(gpu(), seed=7)
    found = clone(SMALL).set_params(intervals=False, sharp_trees=60).fit(noisy).predict(test)
    assert np.median(found / test["median_s"]) < 1.05  # the mean of all rows is 1.17 times the time


def test_the_interval_of_a_stranger_is_that_of_the_strangest_device():
    odd = [synthetic(gpu("odd", 12e12), rows=60, efficiency=0.2)]
    alike = [synthetic(gpu(f"d{i}", (8 + i) * 1e12), rows=60, seed=i) for i in range(11)]
    fitted = clone(SMALL).fit(pd.concat(odd + alike, ignore_index=True))
    assert max(fitted.models_["gemm-vector"].widths["device"]) > 0.9 * np.log(0.7 / 0.2)


def test_prices_do_not_depend_on_how_many_are_asked_for(fitted, tmp_path: Path):
    save_cost_model(fitted, tmp_path, {"name": "m"})
    ensemble = Ensemble(tmp_path / "gemm-vector.sharp.onnx.gz")
    width = fitted.models_["gemm-vector"].sharp.__self__.n_features_in_
    x = np.random.default_rng(0).normal(size=(9000, width)).astype(np.float32)
    assert (ensemble(x) == np.concatenate([ensemble(x[i : i + 100]) for i in range(0, 9000, 100)])).all()


@pytest.mark.parametrize("broken", ["{", '{"format": "other"}', '{"format": "moirai-sim/cost-model@1"}'])
def test_a_broken_model_is_an_input_error(tmp_path: Path, broken: str):
    (tmp_path / "card.json").write_text("{}")
    (tmp_path / "model.json").write_text(broken)
    with pytest.raises(InputError, match=r"model|format"):
        LearnedModel(tmp_path)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("widths",), {}), (("bins",), None), (("domain",), []), (("widths", "random"), [0.1]), (("parts",), "many"),
        (("launch_s",), {}), (("groups",), [1]), (("ops",), {"MatMul": None}),
    ],
)  # fmt: skip
def test_a_family_that_lacks_a_number_is_an_input_error(fitted, tmp_path: Path, where, value):
    save_cost_model(fitted, tmp_path, {"name": "m"})
    content = json.loads((tmp_path / "model.json").read_text())
    inner = content["families"]["gemm-vector"]
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    (tmp_path / "model.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="does not hold a whole cost model"):
        LearnedModel(tmp_path)


@pytest.mark.parametrize("card", ["[]", '{"splits": [{}]}', "[" * 100_000])
def test_a_broken_card_is_an_input_error(fitted, tmp_path: Path, card: str):
    save_cost_model(fitted, tmp_path, {"name": "m"})
    (tmp_path / "card.json").write_text(card)
    with pytest.raises(InputError, match=r"card\.json: cannot be read"):
        _ = LearnedModel(tmp_path).card


@pytest.mark.parametrize(
    ("devices", "complaint"),
    [("[]", "devices: "), ('{"d": {"k": "abc"}}', "devices.d.k"), ('{"d": {"k": [1, -1, 1]}}', "devices.d.k.1: ")],
)
def test_a_broken_table_of_measurements_is_an_input_error(tmp_path: Path, devices: str, complaint: str):
    text = f'{{"format": "moirai-sim/measured@1", "cpus": {{}}, "devices": {devices}}}'
    (tmp_path / "measured.json").write_text(text)
    with pytest.raises(InputError, match=complaint):
        read_table(tmp_path)


def test_a_longer_cache_is_another_operator():
    def step(length: int) -> Operator:
        attributes = {"num_heads": 32, "kv_num_heads": 8}
        cache = (1, 8, length, 128)
        return make_operator(
            "a", "GroupQueryAttention", [(1, 1, 4096), (1, 1, 1024), (1, 1, 1024)], [(1, 1, 4096), cache, cache],
            attributes,
        )  # fmt: skip

    assert describe([step(128), step(8192)])[1][:, 2].tolist() == [128, 8192]


def test_a_model_whose_sharp_ensembles_correct_shared_ones_is_refused(fitted, tmp_path: Path):
    save_cost_model(fitted, tmp_path, {"name": "m"})
    content = json.loads((tmp_path / "model.json").read_text())
    content["format"] = "moirai-sim/cost-model@1"
    (tmp_path / "model.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="calibrate it again"):
        LearnedModel(tmp_path)
    for plain in content["families"].values():
        plain["sharp"] = None
    (tmp_path / "model.json").write_text(json.dumps(content))
    LearnedModel(tmp_path)


@pytest.mark.parametrize("part", ["shared", "sharp"])
def test_worse_limits_never_make_a_kernel_faster_nor_alignment_slower(fitted, part: str):
    design = design_of("gemm-vector", describe([matmul(300, 500, 700)])[1], "float32", gpu())
    model = getattr(fitted.models_["gemm-vector"], part)
    inputs = np.random.default_rng(0).uniform(0, 3, (50, model.__self__.n_features_in_)).astype(np.float32)
    for name, sign in (("limit_64x64", 1), ("pad_128x64", 1), ("quantisation", 1), ("align_k", -1)):
        more = inputs.copy()
        more[:, design.names.index(name)] += 2
        assert (sign * (model(more) - model(inputs)) >= -1e-9).all()


def test_pages_of_a_wave_do_not_saturate_and_are_not_read_for_a_device_never_seen(fitted):
    sizes = [matmul(4096, 4096, k) for k in (1000, 10_000, 100_000)]
    design = design_of("gemm-vector", describe(sizes)[1], "float32", gpu())
    for name in ("pages_64x64", "pages_left", "pages_right"):
        pages = design.features[:, design.names.index(name)]
        assert np.diff(pages) == pytest.approx(np.log(10), rel=1e-3)
    shared = fitted.models_["gemm-vector"].shared
    inputs = np.random.default_rng(0).uniform(0, 3, (50, shared.__self__.n_features_in_)).astype(np.float32)
    more = inputs.copy()
    more[:, [name.startswith("pages_") for name in design.names] + [False] * 2] += 2
    assert (shared(more) == shared(inputs)).all()


def test_a_model_cannot_name_files_outside_its_folder(fitted, tmp_path: Path):
    save_cost_model(fitted, tmp_path, {"name": "m"})
    content = json.loads((tmp_path / "model.json").read_text())
    content["families"]["gemm-vector"]["shared"] = "../x.onnx"
    (tmp_path / "model.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="impossible file name"):
        LearnedModel(tmp_path)


def test_a_model_of_other_features_is_an_input_error(fitted, tmp_path: Path):
    save_cost_model(fitted, tmp_path, {"name": "m"})
    inputs = fitted.models_["gemm-vector"].shared.__self__.n_features_in_
    ensemble = Ensemble(tmp_path / "gemm-vector.shared.onnx.gz")
    assert ensemble(np.zeros((1, inputs), np.float32)).shape == (1,)
    with pytest.raises(InputError, match=rf"{tmp_path}: takes {inputs} features .* has {inputs + 1}; .*'calibrate'"):
        ensemble(np.zeros((1, inputs + 1), np.float32))


def test_an_ensemble_that_is_no_onnx_is_an_input_error(fitted, tmp_path: Path):
    save_cost_model(fitted, tmp_path, {"name": "m"})
    (tmp_path / "gemm-vector.sharp.onnx.gz").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="cannot be loaded"):
        LearnedModel(tmp_path).predict([matmul(8, 8, 8)], gpu())


def test_held_out_errors_by_split():
    frame = pd.concat([synthetic(gpu()), synthetic(gpu("b", 20e12, 900e9), seed=1)], ignore_index=True)
    rows = gpu_held_out(frame, clone(SMALL).set_params(interval_rows=500))
    assert {(r["split"], r["family"]) for r in rows} == {
        (s, f) for s in ("random", "larger", "left-out device") for f in ("gemm", "all")
    }
    assert all(0 < r["mean_ape"] < 0.5 and 0.7 <= r["coverage"] <= 1 for r in rows)


def test_the_estimator_refuses_times_that_are_none():
    frame = synthetic(gpu())
    frame.loc[3, "median_s"] = np.nan
    with pytest.raises(InputError, match="positive finite time"):
        clone(SMALL).fit(frame)


def test_roofline_is_its_formula():
    device = gpu()
    bound, launch = matmul(1024, 1024, 1024), LAUNCH_S["gpu"]
    answer = Roofline().predict([bound, matmul(1, 1, 1)], device)
    assert answer.latency_s == pytest.approx([2 * 1024**3 / 10e12 + launch, max(2 / 10e12, 12 / 500e9) + launch])
    assert answer.source == "data sheet"
    assert answer.extrapolated.all()
    check_cost_model(Roofline(), device)


def test_a_power_limit_lowers_what_a_board_sustains():
    rich, poor = gpu(peak_watts=500.0), gpu(peak_watts=50.0)
    assert sustained_flops(rich, "float32") == pytest.approx(10e12)
    assert sustained_flops(poor, "float32") < 7e12
    assert sustained_flops(gpu(), "float32") == pytest.approx(10e12)


def test_a_power_limit_is_averaged_over_more_than_a_kernel():
    flops = np.array([0.0, 1e6, 1e8, 3e9, 3e10, 1e15])
    for rich in (gpu(peak_watts=500.0), gpu()):
        assert allowed_flops(rich, "float32", flops) == pytest.approx(10e12)
    poor = gpu(peak_watts=50.0)
    rate = allowed_flops(poor, "float32", flops)
    assert rate[:3] == pytest.approx(10e12), "short kernels spend what was saved before them"
    assert (np.diff(rate[2:]) < 0).all(), "longer ones less and less"
    assert rate[-1] == pytest.approx(sustained_flops(poor, "float32"))
    assert (np.diff(flops[1:] / rate[1:]) > 0).all(), "more work never takes less time"


def test_generations_by_what_they_compute_in():
    sheet = {"float32": 1e12}
    rates = [{}, {"float16": 8e12}, {"bfloat16": 8e12}, {"bfloat16": 8e12, "float8": 1e13}, {"float4": 1e13}]
    assert [generation(DeviceType("x", "gpu", 1, 1.0, sheet | r)) for r in rates] == [0, 1, 2, 3, 4]


def test_a_type_that_a_chip_lacks_is_computed_in_one_that_it_has():
    ampere, turing, hopper = (read_device_type(f"nvidia-{n}") for n in ("a100-sxm-80gb", "t4", "h100-sxm"))
    assert peak_flops(ampere, "float8") == ampere.peak_flops["bfloat16"] < ampere.peak_flops["int8"]
    assert peak_flops(turing, "bfloat16") == turing.peak_flops["float32"], "its matrix units know float16 alone"
    assert peak_flops(hopper, "float4") == hopper.peak_flops["bfloat16"], "stored only, and widened"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_window_for_each_channel_is_slid_and_no_product_of_padded_tiles(dtype):
    device = read_device_type("nvidia-t4")
    shapes = [(1, 512, 56, 56), (512, 1, 3, 3)]
    kernel = make_operator("x", "Conv", shapes, [shapes[0]], {"group": 512, "pads": [1, 1, 1, 1]}, dtype)
    limit = design_of("conv-vector", describe([kernel])[1], dtype, device).limit_s[0]
    moved = (kernel.read_bytes + kernel.write_bytes) / device.memory_bandwidth_bytes_per_s
    assert moved <= limit < 1.2 * moved


def test_overlapping_windows_are_read_once():
    device = read_device_type("nvidia-l4")
    shapes = [(32, 64, 56, 56), (64, 64, 3, 3)]
    kernel = make_operator("x", "Conv", shapes, [shapes[0]], {"pads": [1, 1, 1, 1]}, "float16")
    limit = design_of("conv-tensor", describe([kernel])[1], "float16", device).limit_s[0]
    by_bytes = (kernel.read_bytes + kernel.write_bytes) / device.memory_bandwidth_bytes_per_s
    assert max(by_bytes, kernel.flops / allowed_flops(device, "float16", np.array([kernel.flops]))[0]) <= limit
    assert limit < 1.5 * by_bytes


def test_packed_weights_are_read_as_they_lie():
    device = read_device_type("nvidia-h100-sxm")
    packed = make_operator(
        "x", "MatMulNBits", [(1, 8192), (8192, 64, 64), (8192 * 64,)], [(1, 8192)], {"K": 8192, "N": 8192, "bits": 4},
        "bfloat16",
    )  # fmt: skip
    limit = design_of("gemm-tensor", describe([packed])[1], "bfloat16", device).limit_s[0]
    assert limit < 1.5 * packed.read_bytes / device.memory_bandwidth_bytes_per_s


@pytest.mark.parametrize(
    "weights", [[(8, 256, 512), (0,), (8, 512, 256), (0,), (8, 256, 512)], [(8, 512, 512), (0,), (8, 512, 256)]]
)
def test_experts_are_as_large_as_their_weights_in_any_layout(weights):
    """Gate and up apart, or one after the other in the first."""
    kernel = make_operator("x", "MoE", [(64, 512), (64, 8), *weights], [(64, 512)], {"k": 2}, "float16")
    table = describe([kernel])[1]
    assert table[0][:5].tolist() == [8, 64, 256, 512, 2]


@pytest.mark.parametrize(
    ("op", "inputs", "output", "attributes", "expected"),
    [
        ("Gemm", [(4, 8), (16, 8), (16,)], (4, 16), {"transB": 1}, (1, 4, 16, 8, 1, 0)),
        ("Gemm", [(8, 4), (8, 16)], (4, 16), {"transA": 1}, (1, 4, 16, 8, 1, 0)),
        ("MatMul", [(2, 3, 4, 8), (2, 3, 8, 16)], (2, 3, 4, 16), {}, (6, 4, 16, 8, 1, 0)),
        ("MatMul", [(2, 3, 8), (8, 16)], (2, 3, 16), {}, (1, 6, 16, 8, 1, 0)),
        ("Conv", [(2, 8, 10, 10), (16, 4, 3, 3)], (2, 16, 8, 8), {"group": 2}, (2, 128, 8, 36, 9, 1)),
        ("Softmax", [(2, 3, 5)], (2, 3, 5), {}, (1, 6, 1, 5, 5, 0)),
        ("ReduceMean", [(6, 5)], (6, 1), {}, (1, 6, 1, 5, 1, 0)),
        ("MaxPool", [(1, 8, 9, 9)], (1, 8, 4, 4), {"kernel_shape": [3, 3], "strides": [2, 2]}, (1, 128, 8, 9, 9, 2)),
        ("Mul", [(2, 8, 3, 3), (8, 1, 1)], (2, 8, 3, 3), {}, (1, 144, 2, 3, 9, 1)),
        ("Add", [(2, 8, 3, 3), (2, 8, 3, 3)], (2, 8, 3, 3), {}, (1, 144, 2, 3, 144, 0)),
        ("Transpose", [(2, 3, 4, 5)], (3, 2, 4, 5), {"perm": [1, 0, 2, 3]}, (1, 120, 1, 5, 20, 4)),
        ("Concat", [(2, 3, 5), (2, 4, 5)], (2, 7, 5), {"axis": 1}, (1, 70, 2, 5, 15, 3)),
        (
            "MatMulNBits",
            [(2, 16, 512), (1024, 16, 16), (16384,), (8192,)],
            (2, 16, 1024),
            {"K": 512, "N": 1024, "bits": 4, "block_size": 32},
            (1, 32, 1024, 512, 1, 0),
        ),
        ("MatMulNBits", [(8, 512), (512, 1024)], (8, 1024), {"K": 512, "N": 1024}, (1, 8, 1024, 512, 1, 0)),
        ("QLinearMatMul", [(2, 4, 8), (), (), (8, 16), (16,), (16,), (), ()], (2, 4, 16), {}, (1, 8, 16, 8, 1, 0)),
        ("QLinearMatMul", [(2, 4, 8), (), (), (2, 8, 16), (), (), (), ()], (2, 4, 16), {}, (2, 4, 16, 8, 1, 0)),
        (
            "QLinearConv",
            [(2, 8, 10, 10), (), (), (16, 4, 3, 3), (16,), (16,), (), (), (16,)],
            (2, 16, 8, 8),
            {"group": 2},
            (2, 128, 8, 36, 9, 1),
        ),
        ("Attention", [(2, 8, 1, 64), (2, 4, 99, 64)], (2, 8, 1, 64), {"is_causal": 1}, (2, 1, 99, 64, 8, 4)),
        ("Attention", [(2, 8, 9, 64), (2, 4, 99, 64)], (2, 8, 9, 64), {}, (2, 9, 99, 64, 8, -4)),
        (
            "Attention",
            [(2, 1, 512), (2, 1, 256), (2, 1, 256), (0,), (2, 4, 99, 64), (2, 4, 99, 64)],
            (2, 1, 512),
            {"q_num_heads": 8, "kv_num_heads": 4, "is_causal": 1},
            (2, 1, 100, 64, 8, 4),
        ),
        (
            "ConvTranspose",
            [(1, 512, 32, 32), (512, 256, 2, 2)],
            (1, 256, 64, 64),
            {"strides": [2, 2]},
            (1, 32 * 32, 256 * 4, 512, 1, 2),
        ),
        ("MatMul", [(2, 4, 3), (2, 4, 5)], (2, 3, 5), {"transA": 1}, (2, 3, 5, 4, 1, 0)),
        (
            "Einsum",
            [(2, 7, 3, 4), (2, 7, 5, 6)],
            (2, 3, 5, 4, 6),
            {"equation": "bsic,bsjd->bijcd"},
            (2, 12, 30, 7, 1, 0),
        ),
        ("Einsum", [(2, 8, 3, 4), (8, 4, 5)], (2, 8, 3, 5), {"equation": "...ij, ...jk"}, (8, 6, 5, 4, 1, 0)),
        ("Attention", [(2, 5, 512), (512, 1536), (1536,)], (2, 5, 512), {"num_heads": 8}, (2, 5, 5, 64, 8, -8)),
        (
            "Attention",
            [(2, 1, 512), (512, 1536), (1536,), (0,), (2, 2, 8, 99, 64)],
            (2, 1, 512),
            {"num_heads": 8, "unidirectional": 1},
            (2, 1, 100, 64, 8, 8),
        ),
        (
            "MultiHeadAttention",
            [(2, 1, 512), (2, 1, 512), (2, 1, 512), (0,), (0,), (0,), (2, 8, 99, 64), (2, 8, 99, 64)],
            (2, 1, 512),
            {"num_heads": 8},
            (2, 1, 100, 64, 8, -8),
        ),
        ("MultiHeadAttention", [(2, 5, 8, 3, 64)], (2, 5, 512), {"num_heads": 8}, (2, 5, 5, 64, 8, -8)),
        ("MultiHeadAttention", [(2, 5, 512), (2, 7, 8, 2, 64)], (2, 5, 512), {"num_heads": 8}, (2, 5, 7, 64, 8, -8)),
        (
            "GroupQueryAttention",
            [(2, 1, 1024), (0,), (0,), (2, 4, 99, 64), (2, 4, 99, 64)],
            (2, 1, 512),
            {"num_heads": 8, "kv_num_heads": 4},
            (2, 1, 99, 64, 8, 4),
        ),
        (
            "PagedAttention",
            [(5, 512), (5, 256), (5, 256), (9, 16, 4, 64)],
            (5, 512),
            {"num_heads": 8, "kv_num_heads": 4},
            (1, 5, 5, 64, 8, 4),
        ),
    ],
)
def test_dimensions(op, inputs, output, attributes, expected):
    assert dimensions(op, inputs, [output], attributes) == pytest.approx(expected)


def test_a_product_with_a_weight_is_not_batched():
    assert family("MatMul", [(8, 4, 4), (4, 4)]) == "gemm"
    assert family("MatMul", [(8, 4, 4), (8, 4, 4)]) == "batched-matmul"


def test_blocks_scales_and_zero_points_are_no_batch():
    assert family("Einsum", [(4, 5), (5, 6)], {"equation": "ij,jk"}) == "batched-matmul"
    assert family("Einsum", [(4, 5), (4, 5)], {"equation": "ij,ij->ij"}) == "elementwise", "nothing is summed"
    assert family("Einsum", [(4, 5)], {"equation": "ij->ji"}) == "elementwise"
    assert family("MatMulNBits", [(8, 64), (32, 2, 16), (64,)]) == "gemm"
    assert family("QLinearMatMul", [(8, 4, 4), (), (), (4, 4), (), (), (), ()]) == "gemm"
    assert family("QLinearMatMul", [(8, 4, 4), (), (), (8, 4, 4), (), (), (), ()]) == "batched-matmul"


class Liar:
    """Answers by the length of the list, with an interval beside the estimate."""

    name = "liar"
    card = {"data": "none"}

    def predict(self, operators, device):
        times = np.full(len(operators), 1e-3 * len(operators))
        return Prediction(times, times * 2, times * 3, np.zeros(len(operators), dtype=bool))


def test_the_kit_finds_a_liar():
    with pytest.raises(CheckError) as caught:
        check_cost_model(Liar(), gpu())
    assert "low_s <= latency_s" in str(caught.value)
    assert "another time when asked alone" in str(caught.value)


def test_unsigned_bytes_are_as_fast_as_signed_ones():
    sheet = read_device_type("nvidia-h100-sxm")
    assert peak_flops(sheet, "uint8") == peak_flops(sheet, "int8") > 10 * peak_flops(sheet, "float32")


def adds(device: DeviceType, rows: int, dtype: str, efficiency: float, seed: int = 0):
    """Additions on a device that reaches one share of its bandwidth, with 3 % of noise."""
    generator = np.random.default_rng(seed)
    n, width = (2 ** generator.uniform(16, 26, rows)).astype(int), DTYPE_BITS[dtype] // 8
    columns = {
        "name": "x", "op_type": "Add", "family": "elementwise", "dtype": dtype, "device": device.name,
        "device_type": device_json(device), "backend": "b", "stack": "s 1", "source": "synthetic",
        "input_shapes": [f"[[{a}], [{a}]]" for a in n], "output_shapes": [f"[[{a}]]" for a in n], "flops": n,
        "read_bytes": 2 * width * n, "write_bytes": width * n,
        "time_s": (5e-6 + 3 * width * n / device.memory_bandwidth_bytes_per_s / efficiency)
        * np.exp(0.03 * generator.standard_normal(rows)),
    }  # fmt: skip
    return profile(columns, rows)


def test_each_data_type_of_a_new_device_has_a_correction_of_its_own():
    """Half precision is three times as far from its limit here as single precision, whose points came too."""
    known, new = gpu("known"), gpu("new")
    fitted = TimeEstimator(trees=10, sharp_trees=0, intervals=False).fit(adds(known, 200, "float32", 0.5))
    points = [adds(new, 20, "float32", 0.5), adds(new, 20, "float16", 0.17)]
    fitted.adapt(pd.concat(points, ignore_index=True))
    for dtype, share in (("float32", 0.5), ("float16", 0.17)):
        rest = adds(new, 50, dtype, share, seed=1)
        assert np.median(np.abs(fitted.predict(rest) / rest["median_s"].to_numpy() - 1)) < 0.12
