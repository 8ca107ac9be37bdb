"""What-if studies: a faster part never hurts, bounds prune, prices and errors are judged as they should be."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from moirai_sim import catalog
from moirai_sim.clusters.cluster import Cluster, Device, DeviceType, Link
from moirai_sim.errors import InputError
from moirai_sim.evidence import Z90, difference_interval, interval, log_spread
from moirai_sim.graphs.load import load_graph
from moirai_sim.placement import Placement
from moirai_sim.simulation.engine import simulate
from moirai_sim.sources import build_problem
from moirai_sim.studies import runs
from moirai_sim.studies.overrides import changed_cluster
from moirai_sim.studies.prices import parts, price_eur
from moirai_sim.studies.store import Store
from moirai_sim.studies.whatif import whatif
from moirai_sim.studies.whatif_report import NO_DIFFERENCE, breaks, build, pareto, variants_table

DEVICE = """\
name: {name}
kind: gpu
memory: 8 GiB
memory_bandwidth: {bandwidth} GB/s
peak_flops: {{float32: {rate} TFLOP/s}}
idle_power: 10 W
peak_power: 110 W
price_eur: {price}
"""
CLUSTER = """\
name: pair
devices: [{name: a, device: slow.yaml}, {name: b, device: slow.yaml}]
links: [{name: bus, ends: [a, b], bandwidth: 1 GB/s}]
"""
STUDY = """\
kind: whatif
models: ["zoo:ws-32?seed=1"]
cluster: pair.yaml
policy: heft
network: one-port
target: {target}
overrides:
  bus: {{links.bus.bandwidth: [2 GB/s, 4 GB/s, 64 GB/s]}}
  swap: {{devices.a.device: fast.yaml}}
"""


@pytest.fixture
def study(tmp_path):
    (tmp_path / "slow.yaml").write_text(DEVICE.format(name="slow", rate=1, bandwidth=100, price=1000))
    (tmp_path / "fast.yaml").write_text(DEVICE.format(name="fast", rate=1000, bandwidth=1000, price=3000))
    (tmp_path / "pair.yaml").write_text(CLUSTER)
    path = tmp_path / "study.yaml"
    path.write_text(STUDY.format(target="1 h"))
    return path


def test_variants_against_the_base(study, tmp_path):
    assert whatif(study, tmp_path / "out", jobs=1)["runs"] == 5
    table = variants_table(Store(tmp_path / "out")).set_index(["scenario", "changes"])
    base = table.loc[("base", "")]
    assert base["speed_up"] == 1
    assert base["price_eur"] == 2000
    assert table.loc[("swap", "devices.a.device = fast.yaml"), "price_eur"] == 4000
    assert table.loc[("swap", "devices.a.device = fast.yaml"), "objective_ms"] < base["objective_ms"]
    assert (table["low_ms"] < table["objective_ms"]).all()
    assert (table["energy_j"] > 0).all()
    # The same devices in the same shares err alike, so what a wider bus brings is not hidden by their error.
    wide = table.loc[("bus", "links.bus.bandwidth = 64 GB/s")]
    assert wide["speed_up_low"] == pytest.approx(wide["speed_up"], rel=0.2)
    titles = [section.title for section in build({"name": "s", "target": "1 h"}, Store(tmp_path / "out")).sections]
    assert "Tornado" in titles
    assert "Cost against time" in titles
    assert "As links.bus.bandwidth changes" in titles


def test_layers_that_pipedream_profiled_are_placed_anew_too(study, tmp_path):
    layer = "node{} -- Linear() -- forward_compute_time=1, activation_size=64e6, parameter_size=4e9\n"
    edges = "\tnode0 -- node1\n\tnode1 -- node2\n"  # 12 GB of layers on two devices of 8 GiB
    (tmp_path / "graph.txt").write_text("".join(map(layer.format, range(3))) + edges)
    study.write_text(study.read_text().replace("zoo:ws-32?seed=1", "graph.txt"))
    assert whatif(study, tmp_path / "out", jobs=1)["failed"] == 0
    table = variants_table(Store(tmp_path / "out")).set_index("changes")["objective_ms"]
    assert table["links.bus.bandwidth = 64 GB/s"] == 3 + 1 < table["links.bus.bandwidth = 2 GB/s"] == 3 + 32


def test_a_bound_above_the_target_spares_the_placement(study, tmp_path):
    study.write_text(STUDY.format(target="1 ns"))
    whatif(study, tmp_path / "out", jobs=1)
    results = {r["key"]["scenario"]: r["outcome"] for r in Store(tmp_path / "out").read()}
    assert results["swap"]["status"] == "pruned"
    assert results["swap"]["lower_bound_ns"] > 1
    assert results["base"]["status"] == "feasible"


def test_prices_of_the_study_go_before_those_of_the_files_and_run_nothing_again(study, tmp_path):
    whatif(study, tmp_path / "out", jobs=1)
    study.write_text(study.read_text() + "prices: {slow: 10, bus: 7}\n")
    assert whatif(study, tmp_path / "out", jobs=1)["resumed"] == 5
    table = variants_table(Store(tmp_path / "out"), {"slow": 10, "bus": 7}).set_index(["scenario", "changes"])
    assert table.loc[("base", ""), "price_eur"] == 27
    assert table.loc[("swap", "devices.a.device = fast.yaml"), "price_eur"] == 3000 + 10 + 7
    study.write_text(study.read_text().replace("slow: 10", "slwo: 10"))
    with pytest.raises(InputError, match="did you mean 'slow'"):
        whatif(study, tmp_path / "out", jobs=1)


def test_parts_of_one_name_keep_their_own_prices():
    kind = DeviceType("t", "gpu", 1, 1.0, {"float32": 1.0}, price_eur=10)
    devices = tuple(Device(name, kind) for name in "abc")
    links = (Link("wire1", ("a", "b"), 1.0, price_eur=100), Link("wire2", ("b", "c"), 1.0, price_eur=500))
    found = parts(Cluster("c", devices, links))
    assert price_eur(found, {}) == 3 * 10 + 100 + 500
    assert price_eur(found, {"wire": 7}) == 3 * 10 + 2 * 7


def test_the_placement_of_the_base_is_kept_beside_the_new_one(study, tmp_path):
    study.write_text(
        study.read_text().replace("[2 GB/s, 4 GB/s, 64 GB/s]", "{from: 0.04, to: 1, step: 0.24, unit: GB/s}")
    )
    whatif(study, tmp_path / "out", jobs=1)
    table = variants_table(Store(tmp_path / "out"))
    slowest = table[table["changes"] == "links.bus.bandwidth = 0.04 GB/s"].iloc[0]
    fastest = table[table["changes"] == "links.bus.bandwidth = 1 GB/s"].iloc[0]
    assert slowest["held_ms"] > 1.01 * slowest["objective_ms"]
    assert fastest["held_ms"] == fastest["objective_ms"]  # the base itself
    (row,) = breaks(table).to_dict("records")
    assert row["holds to"] == "1 GB/s"
    assert row["breaks below"] in ("0.04 GB/s", "0.28 GB/s", "0.52 GB/s", "0.76 GB/s")
    assert row["cost below"] > 1.01


def test_nothing_is_written_for_an_override_that_leads_nowhere(study, tmp_path):
    study.write_text(study.read_text().replace("links.bus.bandwidth", "links.bsu.bandwidth"))
    with pytest.raises(InputError, match="did you mean 'bus'"):
        whatif(study, tmp_path / "out", jobs=1)
    assert not (tmp_path / "out").exists()


def test_a_wrong_value_is_the_overrides_and_not_the_files(study, tmp_path):
    study.write_text(study.read_text().replace("[2 GB/s, 4 GB/s, 64 GB/s]", "[2 GB/s, 4]"))
    with pytest.raises(InputError) as caught:
        whatif(study, tmp_path / "out", jobs=1)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{study}: override links.bus.bandwidth = 4: ")
    assert "missing unit in 4" in problem


def test_a_mistake_of_the_file_is_told_once_and_blames_no_override(study, tmp_path):
    (tmp_path / "pair.yaml").write_text(CLUSTER.replace("1 GB/s", "1"))
    with pytest.raises(InputError) as caught:
        whatif(study, tmp_path / "out", jobs=1)
    (problem,) = caught.value.problems
    assert "pair.yaml:3:" in problem.split(": ")[0]


def test_a_model_that_was_calibrated_again_runs_everything_again(study, tmp_path):
    model = shutil.copytree(catalog.find("cost-models", "nccl-servers"), tmp_path / "links")
    (tmp_path / "pair.yaml").write_text(f"{CLUSTER}link_model: {model}\n")
    for content, resumed in (("{}", 0), ("{}", 5), ('{"format": "another"}', 0)):
        (model / "card.json").write_text(content)
        runs.model_files.cache_clear()
        assert whatif(study, tmp_path / "out", jobs=1)["resumed"] == resumed


def test_another_base_runs_everything_again_since_its_placement_is_tried_on_every_variant(study, tmp_path):
    whatif(study, tmp_path / "out", jobs=1)
    (tmp_path / "pair.yaml").write_text(CLUSTER.replace("1 GB/s", "3 GB/s"))
    assert whatif(study, tmp_path / "out", jobs=1)["resumed"] == 0


def test_a_study_that_was_moved_runs_nothing_again(study, tmp_path):
    whatif(study, tmp_path / "out", jobs=1)
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in tmp_path.glob("*.yaml"):
        path.rename(moved / path.name)
    assert whatif(moved / "study.yaml", tmp_path / "out", jobs=1)["resumed"] == 5


def test_pareto_front():
    table = pd.DataFrame({"cost": [1, 2, 3, 2], "time": [5, 3, 3, 4]})
    assert pareto(table, ["cost", "time"]).tolist() == [True, True, False, False]


def test_shared_errors_cancel_and_others_add():
    assert difference_interval({"t": 0.2}, {"t": 0.2}) == (1.0, 1.0)
    low, high = difference_interval({"t": 0.3}, {"u": 0.4})
    assert (low, high) == pytest.approx((np.exp(-Z90 * 0.5), np.exp(Z90 * 0.5)))
    assert interval({}) == (1.0, 1.0)


def test_a_difference_within_the_error_is_called_that():
    from moirai_sim.studies.whatif_report import _against

    base = {"objective_ns": 100, "log_spread": {"t": 0.3}, "price_eur": 10}
    near = {"objective_ns": 90, "log_spread": {"u": 0.3}, "price_eur": 20}
    assert _against(base, near)["verdict"] == NO_DIFFERENCE
    sure = _against(base, near | {"log_spread": {"t": 0.3}})
    assert sure["verdict"] == "faster"
    assert sure["euro_per_ms_saved"] == pytest.approx(10 / 10e-6)


def test_values_with_units_are_swept_in_order():
    table = pd.DataFrame(
        {
            "model": "m", "overrides": [{"bus": value} for value in ("500 Mbps", "10 Gbps", "1 Gbps")],
            "held_ms": [1.0, 3.0, 1.0], "objective_ms": 1.0, "target_ms": float("nan"),
        }
    )  # fmt: skip
    row = breaks(table).iloc[0]
    assert [row["holds from"], row["holds to"], row["breaks above"]] == ["500 Mbps", "1 Gbps", "10 Gbps"]


def test_each_model_has_its_own_smallest_variant(study, tmp_path):
    study.write_text(STUDY.format(target="5 ms").replace('["zoo:ws-32?seed=1"]', '["zoo:ws-32?seed=1", "zoo:gpt2"]'))
    whatif(study, tmp_path / "out", jobs=1)
    text = build(json.loads((tmp_path / "out" / "study.json").read_text()), Store(tmp_path / "out")).sections[0].text
    assert "zoo:ws-32?seed=1: Smallest that reaches 5 ms: " in text
    assert "zoo:gpt2: No variant reaches 5 ms." in text


def test_a_cost_model_may_be_the_roofline(study, tmp_path):
    (tmp_path / "pair.yaml").write_text(CLUSTER.replace("device: slow.yaml", "device: slow.yaml, cost_model: roofline"))
    assert whatif(study, tmp_path / "out", jobs=1)["failed"] == 0


def test_devices_of_one_type_that_are_priced_by_two_models_err_independently():
    sheet = DeviceType("t", "gpu", 2**33, 1e11, {"float32": 1e12}, source="test")
    devices = (Device("a", sheet), Device("b", sheet, cost_model="nvidia-gpus"))
    problem = build_problem(
        load_graph("zoo:ws-32?seed=1"), Cluster("c", devices, (Link("l", ("a", "b"), 1e10),)), network="one-port"
    )
    device = (np.arange(problem.n_operators) % 2).astype(np.int64)
    assert len(log_spread(problem, simulate(problem, Placement(device=device)))) == 2


def test_a_report_of_nothing_says_so(tmp_path):
    store = Store(tmp_path)
    store.open({"kind": "whatif", "name": "s"})
    assert build({"name": "s"}, store).subtitle == "no variant has finished"


def test_an_entry_of_a_like_name_keeps_its_links(tmp_path):
    cluster = """\
name: names
devices: [{name: a100, device: nvidia-t4}, {name: a1000, device: nvidia-t4}, {name: b, device: nvidia-t4}]
links: [{ends: [a100, b], bandwidth: 1 GB/s}, {ends: [a1000, b], bandwidth: 1 GB/s}]
"""
    (tmp_path / "names.yaml").write_text(cluster)
    left = changed_cluster(str(tmp_path / "names.yaml"), {"devices.a100.count": 0})
    assert [device.name for device in left.devices] == ["a1000", "b"]
    assert [link.ends for link in left.links] == [("a1000", "b")]
