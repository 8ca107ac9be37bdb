"""A model priced by what it took on the workers that run it: the file, and what is played of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from moirai_sim.clusters.reader import read_cluster
from moirai_sim.errors import InputError
from moirai_sim.evidence import cost_share
from moirai_sim.placement import Placement
from moirai_sim.profiling.telemetry import cpu_model
from moirai_sim.simulation.engine import simulate
from moirai_sim.studies.in_place import CrossingTimes, DeviceTimes, InPlaceTimes, Priced, load_in_place
from moirai_sim.studies.runs import source_digest

READ_NS = 8 * 48 * 4 // 2  # a tensor at half a nanosecond a byte
PART_NS, EXCHANGE_NS, HAND_OVER_NS = 10, 5, 100


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A chain of three products, and a cluster of two cores beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    weights = [numpy_helper.from_array(np.eye(48, dtype=np.float32), f"w{i}") for i in range(3)]
    nodes = [helper.make_node("MatMul", [f"t{i}", f"w{i}"], [f"t{i + 1}"], name=f"mm{i}") for i in range(3)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [8, 48]) for name in ("t0", "t3")]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), "chain.onnx")
    Path("two.yaml").write_text(
        "name: two\ndevices:\n  - {name: c0, device: local-core, address: 'cpu:0'}\n"
        "  - {name: c1, device: local-core, address: 'cpu:1'}\n"
        "links:\n  - {ends: [c0, c1], bandwidth: 1 MB/s, latency: 1 s}\n"
    )
    return "chain.onnx"


def times(source: str, **changes: Any) -> InPlaceTimes:
    crossing = CrossingTimes(exchange_ns=EXCHANGE_NS, hand_over_ns=HAND_OVER_NS, read_ns_per_byte=0.5)
    device = {
        "type": "local-core", "backend": "onnxruntime", "threads": 1, "whole_ns": 7000,
        "operator_ns": {"mm0": 1000, "mm1": 2000, "mm2": 4000},
        "part_ns": PART_NS, "split_share": 0.0, "split_parts": 3, "cold_ns": 0, "crossing": crossing,
    }  # fmt: skip
    content = {"model": source_digest(source), "cpu": cpu_model(), "versions": {}, "contention": 1.0}
    content |= {name: changes[name] for name in changes if name not in device}
    device |= {name: changes[name] for name in changes if name in device}
    return InPlaceTimes(devices=[DeviceTimes.model_validate(device)], **content)


def load(source: str, **changes: Any) -> Priced:
    times(source, **changes).write(Path("times.json"))
    return load_in_place(source, read_cluster("two.yaml"), Path("times.json"))


BACK_AND_FORTH = Placement(np.array([0, 1, 0]))


def test_a_placement_takes_its_operators_hand_overs_readings_and_parts(model: str):
    priced = load(model)
    one_part = PART_NS + EXCHANGE_NS
    found = priced.predict(BACK_AND_FORTH)
    assert found.makespan_ns == 7000 + 2 * (HAND_OVER_NS + READ_NS) + 3 * one_part, (
        "the links' figures count for nothing"
    )
    spans = {span.name: span.end_ns - span.start_ns for span in found.spans if span.kind == "operator"}
    assert spans == {"mm0": 1000 + one_part, "mm1": 2000 + READ_NS + one_part, "mm2": 4000 + READ_NS + one_part}
    assert cost_share(priced.as_run(BACK_AND_FORTH), found) == {"measured": 1.0}
    # Policies, which know no parts, pay for one with every tensor that crosses.
    assert simulate(priced.problem, BACK_AND_FORTH).makespan_ns == found.makespan_ns - one_part
    assert priced.predict(Placement(np.zeros(3, dtype=np.int64))).makespan_ns == 7000 + one_part


def test_devices_that_wait_run_several_parts_or_compute_together_are_slower(model: str):
    assert load(model, split_share=0.1).predict(BACK_AND_FORTH).makespan_ns == load(model).predict(
        BACK_AND_FORTH
    ).makespan_ns + round(0.05 * (1000 + 4000)), "c0 alone runs two parts, and three would pay all"
    cold = load(model, cold_ns=10**9).predict(BACK_AND_FORTH).makespan_ns
    assert cold > load(model).predict(BACK_AND_FORTH).makespan_ns + 10**5
    apart = load(model).predict_stream(BACK_AND_FORTH, in_flight=3, requests=30)
    together = load(model, contention=1.5).predict_stream(BACK_AND_FORTH, in_flight=3, requests=30)
    assert together.throughput_per_s < apart.throughput_per_s


def test_commands_take_the_times(model: str, cli):
    times(model).write(Path("times.json"))
    options = ("--cluster", "two.yaml", "--in-place", "times.json")
    assert cli("place", model, *options, "--policy", "single", "-o", "one.json").code == 0
    assert json.loads(Path("one.json").read_text())["makespan_ns"] == 7000
    assert cli("verify", model, "one.json", *options).code == 0
    assert cli("verify", model, "one.json", "--cluster", "two.yaml").code == 1
    split = load(model).predict(BACK_AND_FORTH)
    split.write(Path("split.json"))
    answer = cli("simulate", model, *options, "--placement", "split.json", "--json")
    document = json.loads(answer.out)
    assert document["makespan_ns"] == split.makespan_ns
    assert document["provenance"]["options"]["part_ns"] == [PART_NS + EXCHANGE_NS] * 2
    made_of = document["provenance"]["problem"]
    assert made_of["links"] == "in place"
    assert document["provenance"]["cost_share"] == {"measured": 1.0}
    assert "low_ns" not in document, "what was measured is not unsure"
    stream = cli(
        "simulate", model, *options, "--placement", "split.json", "--requests", "9", "--in-flight", "1", "--json"
    )
    assert json.loads(stream.out)["figures"]["p50_ns"] == pytest.approx(split.makespan_ns)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--fuse", "none"), "--fuse: has no effect with --in-place"),
        (("--requests", "9", "--rate", "10"), "--rate: has no effect with --in-place"),
        (("--in-place", "none.json"), "none.json: cannot read it (No such file or directory); '"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_refused(model: str, cli, arguments, words: str):
    load(model).predict(BACK_AND_FORTH).write(Path("split.json"))
    options = ("--cluster", "two.yaml", "--in-place", "times.json", "--placement", "split.json")
    answer = cli("simulate", model, *options, *arguments)
    assert answer.code == 2
    assert len(answer.errors) == 1
    assert words in answer.errors[0]


def test_times_of_another_model_machine_and_device_are_refused_together(model: str):
    with pytest.raises(InputError) as error:
        load(model, model="0" * 64, cpu="Z80", backend="torch")
    assert [problem.split(": ")[1][:24] for problem in error.value.problems] == [
        "is of another model than", "was made on 'Z80', this ", "holds no times on local-",
    ]  # fmt: skip


def test_times_of_an_operator_that_the_model_lacks_are_refused(model: str):
    with pytest.raises(InputError, match="times operator 'mm9', which the model lacks"):
        load(model, operator_ns={"mm0": 1, "mm9": 1})


def test_every_fault_of_a_broken_file_is_named(model: str):
    document = times(model).model_dump()
    document["contention"] = 0.5
    document["devices"][0] |= {"part_ns": -1, "cold": 3}
    Path("times.json").write_text(json.dumps(document))
    with pytest.raises(InputError) as error:
        load_in_place(model, read_cluster("two.yaml"), Path("times.json"))
    assert [problem.split(": ")[1] for problem in error.value.problems] == [
        "contention", "devices.0.part_ns", "devices.0.cold",
    ]  # fmt: skip
    Path("times.json").write_text("{")
    with pytest.raises(InputError, match="Invalid JSON"):
        load_in_place(model, read_cluster("two.yaml"), Path("times.json"))
