"""The validation study: its figures against hand-made results, and one real small run from file to report."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from moirai_sim.clusters.cluster import Cluster, Device, DeviceType, Link
from moirai_sim.errors import InputError
from moirai_sim.execution.measure import Run
from moirai_sim.execution.worker import Record
from moirai_sim.graphs.onnx_reader import read_model
from moirai_sim.sources import build_problem
from moirai_sim.studies.feedback import calibrate_from_runs
from moirai_sim.studies.in_place import CrossingTimes, _with_crossings
from moirai_sim.studies.validate import Measured, served, validate
from moirai_sim.studies.validate_prices import in_place_file
from moirai_sim.studies.validate_summary import cases_of, interval, summarise
from moirai_sim.timeline import read_timeline


def result(model: str, placement: str, predicted: int, measured: int, *, devices: int = 2, noise: float = 0.01) -> dict:
    outcome = {
        "status": "measured", "predicted_ns": predicted, "measured_ns": measured, "devices_used": devices,
        "halves_ns": [measured, round(measured / (1 + noise))], "disturbed": 0.0,
        "low_ns": 0.95 * measured, "high_ns": 1.2 * measured,
        "families": {"conv": [predicted, measured, 3]}, "links": {},
    }  # fmt: skip
    return {"key": {"model": model, "cluster": "two", "placement": placement}, "outcome": outcome}


def test_figures_of_hand_made_results():
    results = [
        result("a.onnx", "p", 90, 100, devices=1),
        result("a.onnx", "q", 110, 100),
        result("a.onnx", "r", 240, 200),
        result("a.onnx", "s", 300, 300, noise=0.05),
        {"key": {"model": "a.onnx", "cluster": "two", "placement": "t"}, "outcome": {"status": "error"}},
    ]
    summary = summarise(results, seed=0)
    assert summary["cases"] == 4
    assert summary["median_ape"] == pytest.approx(0.1)
    assert summary["mean_ape"] == pytest.approx(0.1)
    assert summary["max_ape"] == pytest.approx(0.2)
    assert summary["p95_ape"] == pytest.approx(np.quantile([0, 0.1, 0.1, 0.2], 0.95))
    assert summary["split_cases"] == 3
    assert summary["rank_correlation"] == pytest.approx(np.sqrt(0.9))  # one tie: ranks 1.5 1.5 3 4 against 1 2 3 4
    assert summary["regret"] == 0
    assert summary["noise_median_ape"] == pytest.approx(0.01, rel=0.02)
    assert summary["rank_ceiling"] == pytest.approx(1.0)
    assert summary["families"][0]["error"] == pytest.approx(740 / 700 - 1)
    assert summary["undisturbed_cases"] == 4
    results[0]["outcome"]["disturbed"] = 1.0
    results[1]["outcome"]["disturbed"] = 0.9
    summary = summarise(results, seed=0)
    assert summary["undisturbed_cases"] == 3
    assert summary["disturbed"] == pytest.approx(1.9 / 4)


def test_regret_is_what_the_choice_by_simulation_costs():
    results = [result("a.onnx", "p", 90, 130), result("a.onnx", "q", 110, 100), result("b.onnx", "p", 1, 1)]
    summary = summarise(results, seed=0)
    assert summary["regret"] == pytest.approx(0.15)  # mean of 0.3 and 0
    assert summary["max_regret"] == pytest.approx(0.3)
    assert summary["rank_correlation"] is None


def test_what_was_predicted_earlier_has_figures_of_its_own():
    results = [result("a.onnx", "p", 90, 130), result("a.onnx", "q", 110, 100), result("a.onnx", "r", 210, 200)]
    for one, before in zip(results, (120, 100, 180), strict=True):
        one["outcome"]["foreseen_ns"] = {"before": before, "profile": 2 * one["outcome"]["measured_ns"]}
    summary = summarise(results, seed=0)
    assert summary["regret"] == pytest.approx(0.3)
    assert summary["before_regret"] == 0
    assert summary["before_rank_correlation"] == pytest.approx(1)
    assert summary["before_median_ape"] == pytest.approx(1 - 120 / 130)
    assert summary["profile_median_ape"] == pytest.approx(1)
    assert summary["inside"] == pytest.approx(2 / 3)
    assert "before_regret" not in summarise([result("a.onnx", "p", 90, 130)], seed=0), "of an earlier version"


def test_crossings_cost_what_readers_of_each_kind_need():
    core = {kind: DeviceType(kind, "cpu", 2**33, 1e10, {"float32": 1e11}) for kind in ("fast", "slow")}
    devices = tuple(Device(f"d{i}", core[kind]) for i, kind in enumerate(("fast", "slow", "fast")))
    links = tuple(Link(f"l{i}", (f"d{i}", "hub"), 1e10) for i in range(3))
    nodes = [helper.make_node("Relu", ["x"], ["y"], name="a"), helper.make_node("Tanh", ["y"], ["z"], name="b")]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [250]) for name in "xz"]
    model = helper.make_model(
        helper.make_graph(nodes, "n", ends[:1], ends[1:]), opset_imports=[helper.make_opsetid("", 17)], ir_version=10
    )
    problem = build_problem(read_model(model, name="n"), Cluster("three", devices, links, ("hub",)))
    assert problem.devices[1] == "d1"
    assert problem.device_type.tolist() == [0, 1, 0]
    crossing = [
        CrossingTimes(exchange_ns=0, hand_over_ns=hand_over_ns, read_ns_per_byte=read)
        for hand_over_ns, read in ((3000, 0.5), (1000, 2.0))
    ]
    found, share = _with_crossings(problem, crossing)
    (q,) = set(found.edge_tensor.tolist())
    times = {(s, t): found.transfer_time_ns(q, s, t) for s in range(3) for t in range(3)}
    assert [times[0, 2], times[1, 0], times[2, 0]] == [3000 + 500] * 3
    assert [times[0, 1], times[2, 1]] == [1000 + 2000] * 2
    assert share == pytest.approx((500 + 2000) / (3500 + 3000))


def test_models_of_one_file_name_are_judged_apart():
    """Each is ranked right by itself; together they would look ranked wrongly, and the wrong one chosen."""
    models = ("a/net.onnx", "b/net.onnx", "zoo:gpt3-1.3b?seq=64", "zoo:gpt3-1.3b?seq=128")
    results = [
        result(model, str(i), predicted + i, measured + i)
        for model, predicted, measured in zip(models, (100, 200, 100, 200), (200, 100, 200, 100), strict=True)
        for i in range(4)
    ]
    summary = summarise(results, seed=0)
    assert (summary["rank_correlation"], summary["regret"]) == (pytest.approx(1), 0)
    assert [row["model"] for row in summary["models"]] == ["a/net", "b/net", models[3], models[2]]
    unmeasured = [one | {"outcome": {"status": "infeasible", "reason": "no room"}} for one in results]
    assert {case["model"] for case in cases_of(unmeasured)} == {"a/net", "b/net", *models[2:]}
    assert {case["error"] for case in cases_of(unmeasured)} == {"no room"}


def test_ranks_can_be_told_as_well_as_measurements_agree_with_themselves():
    """Halves that order four placements 1 2 3 4 and 2 1 4 3 correlate by 0.6."""
    results = [result("a.onnx", str(i), i, i) for i in (1, 2, 3, 4)]
    for one, halves in zip(results, ([10, 20], [20, 10], [30, 40], [40, 30]), strict=True):
        one["outcome"]["halves_ns"] = halves
    assert summarise(results, seed=0)["rank_ceiling"] == pytest.approx(np.sqrt(2 * 0.6 / 1.6))


@pytest.mark.parametrize("apart", [0.001, 0.01, 0.1])
def test_the_closer_placements_lie_the_smaller_errors_their_ranks_need(apart: float):
    """Twenty placements, each so much slower than the one before: their ranks hang on errors of that size."""
    results = [result("a.onnx", str(i), 1, round(1e9 * (1 + apart) ** i)) for i in range(20)]
    (row,) = summarise(results, seed=0)["models"]
    assert apart < row["rank_needs"] < 2 * apart


def test_nothing_measured_is_no_number():
    summary = summarise([{"key": {"model": "a", "cluster": "c", "placement": "p"}, "outcome": {"status": "error"}}], 0)
    assert summary["cases"] == 0
    assert summary["median_ape"] is None


@pytest.mark.parametrize(("groups", "spread"), [(1, 0.0), (12, 0.0), (12, 0.2)])
def test_the_interval_covers_the_median_as_often_as_it_says(groups: int, spread: float):
    """Also where values of a group are alike, which as many independent ones would make look far surer."""
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(200):
        middles = rng.normal(1, spread, groups)
        low, high = interval([rng.normal(middle, 0.1, 25 if groups == 1 else 8).tolist() for middle in middles], 1)
        hits += low <= 1.0 <= high
    assert 0.8 < hits / 200 < 0.98


@pytest.fixture
def study(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for i in range(4):
        weights.append(numpy_helper.from_array(rng.standard_normal((64, 64)).astype(np.float32), f"w{i}"))
        nodes.append(helper.make_node("MatMul", [last, f"w{i}"], [f"m{i}"], name=f"mm{i}"))
        nodes.append(helper.make_node("Tanh", [f"m{i}"], [f"t{i}"], name=f"tanh{i}"))
        last = f"t{i}"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [8, 64]) for name in ("x", last)]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, tmp_path / "net.onnx")
    cores = sorted(os.sched_getaffinity(0))
    (tmp_path / "two.yaml").write_text(
        "name: two\ndevices:\n"
        + "".join(f"  - {{name: c{i}, device: local-core, address: 'cpu:{cores[i % len(cores)]}'}}\n" for i in range(2))
        + "links:\n  - {ends: [c0, c1], bandwidth: 4 GB/s, latency: 20 us}\n"
    )
    path = tmp_path / "study.yaml"
    path.write_text(
        "kind: validate\nname: small\nmodels: [net.onnx]\nclusters: [two.yaml]\npolicies: [single, heft]\n"
        "random_placements: 1\nbad_placements: 1\ncalibrate: null\nrepeats: 3\n"
    )
    return path


@pytest.mark.parametrize("in_flight", [1, 3])
def test_a_study_runs_from_file_to_summary(study: Path, tmp_path: Path, in_flight: int):
    study.write_text(study.read_text() + f"in_flight: {in_flight}\n")
    out = tmp_path / "out"
    found = validate(study, out)
    assert found["failed"] == 0
    names = [name for case in found["cases"] for name in case["placement"].split(", ")]
    assert sorted(names) == ["alternate-2", "heft", "random-1", "single"]
    assert json.loads((out / "summary.json").read_text())["cases"] == len(found["cases"])
    for path in (out / "results").glob("*.json"):
        predicted, measured = (
            read_timeline(out / "timelines" / f"{path.stem}-{s}.json") for s in ("predicted", "measured")
        )
        assert predicted.placement == measured.placement
        assert measured.status == "measured"
        outcome = json.loads(path.read_text())["outcome"]
        assert outcome["low_ns"] <= outcome["measured_ns"] <= outcome["high_ns"]
        assert 3 <= len(outcome["repeats_ns"]) <= 3 * 8
        assert ("latency_ns" in outcome) == (in_flight > 1)
    assert ("latency_p95_median_ape" in found["summary"]) == (in_flight > 1)
    assert all(("latency_p95_measured_ms" in case) == (in_flight > 1) for case in found["cases"])


@pytest.mark.parametrize(("budget", "rounds"), [("1 ms", 3), ("null", 3 * 8)])
def test_a_machine_that_is_never_quiet_costs_no_more_than_the_budget(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: str, rounds: int
):
    monkeypatch.setattr(Measured, "undisturbed", lambda self: 0)
    study.write_text(study.read_text() + f"budget: {budget}\npatience: 5 ms\n")
    validate(study, tmp_path / "out")
    for path in (tmp_path / "out" / "results").glob("*.json"):
        assert len(json.loads(path.read_text())["outcome"]["repeats_ns"]) == rounds


def test_latencies_of_a_stream_count_from_admission_to_answer():
    """Two under way at once: request 2 is admitted when request 0 is answered."""
    runs = {"a": [(0, 0, 0, 0, 10), (1, 0, 0, 10, 20), (2, 0, 30, 30, 40), (3, 0, 50, 50, 60)]}
    runs["b"] = [(0, 0, 10, 10, 30), (1, 0, 20, 30, 50), (2, 0, 40, 50, 70), (3, 0, 60, 70, 100)]
    run = Run(0, {name: Record(0, own) for name, own in runs.items()}, 0.0)
    stream = served(run, 2)
    assert stream.latency_ns.tolist() == [70 - 30, 100 - 50]
    assert stream.throughput_per_s == pytest.approx(2e9 / (100 - 50))


def test_latencies_are_summarised_by_percentile():
    results = [result("a.onnx", str(i), 10, 10) for i in range(3)]
    for one, predicted in zip(results, (9, 10, 14), strict=True):
        one["outcome"]["latency_ns"] = {"p50": [predicted, 10], "p95": [10, 10]}
    summary = summarise(results, seed=0)
    assert summary["latency_p50_median_ape"] == pytest.approx(0.1)
    assert summary["latency_p95_median_ape"] == 0


def test_placements_that_are_alike_are_measured_once_and_a_policy_that_refuses_is_a_case(study: Path, tmp_path: Path):
    study.write_text(
        study.read_text().replace("[single, heft]", "[single, met, cp]").replace("placements: 1", "placements: 0")
    )
    found = validate(study, tmp_path / "out")
    cases = {case["placement"]: case for case in found["cases"]}
    assert found["failed"] == 1
    assert "one-port" in cases["cp"]["error"]
    assert cases["single, met"]["devices_used"] == 1


@pytest.mark.slow
def test_feedback_corrects_a_model_that_is_wrong_by_a_factor(study: Path, tmp_path: Path):
    """Calibrate for real, then halve every price: what was measured must bring the prices back."""
    rng = np.random.default_rng(0)
    widths = [32 + 8 * i for i in range(37)]
    nodes, weights = [], []
    for i in range(36):
        weights.append(
            numpy_helper.from_array(rng.standard_normal((widths[i], widths[i + 1])).astype(np.float32), f"w{i}")
        )
        nodes.append(helper.make_node("MatMul", [f"t{i}", f"w{i}"], [f"m{i}"], name=f"mm{i}"))
        nodes.append(helper.make_node("Tanh", [f"m{i}"], [f"t{i + 1}"], name=f"tanh{i}"))
    ends = [helper.make_tensor_value_info(f"t{i}", TensorProto.FLOAT, [256, widths[i]]) for i in (0, 36)]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, tmp_path / "net.onnx")
    text = study.read_text().replace("calibrate: null", "calibrate: 4 s").replace("placements: 1", "placements: 6")
    study.write_text(text + "budget: 5 s\n")
    out = tmp_path / "out"
    assert validate(study, out)["failed"] == 0
    table = out / "calibration" / "two" / "model" / "measured.json"
    content = json.loads(table.read_text())
    for times in content["devices"].values():
        for key in times:
            times[key] = [value / 2 for value in times[key]]
    table.write_text(json.dumps(content))
    in_place = in_place_file(table.parent, str(tmp_path / "net.onnx"))
    content = json.loads(in_place.read_text())
    for device in content["devices"]:
        device["operator_ns"] = {name: ns // 2 for name, ns in device["operator_ns"].items()}
    in_place.write_text("{}")
    with pytest.raises(InputError, match="time the model in place again"):
        calibrate_from_runs(out, tmp_path / "none")
    in_place.write_text(json.dumps(content))
    for path in (out / "results").glob("*.json"):
        document = json.loads(path.read_text())
        for row in document["outcome"]["families"].values():
            row[0] /= 2
        path.write_text(json.dumps(document))
    report = calibrate_from_runs(out, tmp_path / "better")
    assert report["after"]["median_ape"] < report["before"]["median_ape"]
    assert report["used"] + report["after"]["cases"] == report["cases"]
    assert json.loads((tmp_path / "better" / "card.json").read_text())["from_runs"]["factors"] == report["factors"]
    with pytest.raises(InputError, match="no study"):
        calibrate_from_runs(tmp_path, tmp_path / "none")
    (out / "summary.json").unlink()
    with pytest.raises(InputError, match="not finished"):
        calibrate_from_runs(out, tmp_path / "none")
