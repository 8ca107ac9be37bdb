"""Every command that needs no measuring, with text and with JSON, and the exit codes."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moirai_sim import catalog
from moirai_sim.clusters.schema import ClusterFile, DeviceFile
from moirai_sim.timeline_schema import TimelineFile
from moirai_sim.yaml_files import YamlDocument

PARTITIONING = {
    "maxFPGAs": 2,
    "maxCPUs": 0,
    "maxSizePerFPGA": 12,
    "nodes": [
        {"id": i, "name": name, "fpgaLatency": time, "cpuLatency": 9, "size": size}
        for i, (name, time, size) in enumerate([("a", 1, 4), ("b", 3, 8), ("c", 3, 8), ("d", 1, 4)])
    ],
    "edges": [{"sourceId": i, "destId": j, "cost": 0.25, "size": 64} for i, j in [(0, 1), (0, 2), (1, 3), (2, 3)]],
}  # a fork and join that fits no single device


@pytest.fixture
def instance(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fork.json").write_text(json.dumps(PARTITIONING))
    return "fork.json"


def test_place_simulate_and_verify_agree(cli, instance, tmp_path):
    placed = cli("place", instance, "--policy", "milp", "-o", "placed.json", "--json")
    assert placed.code == 0
    document = json.loads(placed.out)
    assert document == json.loads((tmp_path / "placed.json").read_text())
    TimelineFile.model_validate(document)
    # a and b here, c and d there: a ends at 1 ms, reaches c at 1.5, c ends and b's output arrives at 4.5, d ends at 5.5
    assert (document["status"], document["makespan_ns"], document["gap"]) == ("optimal", 5_500_000, 0.0)
    for engine in ("simpy", "replay"):
        options = ["--placement", "placed.json", "--engine", engine, "-o", f"{engine}.json", "--trace", "trace.json"]
        assert cli("simulate", instance, *options).code == 0
        assert json.loads((tmp_path / f"{engine}.json").read_text())["makespan_ns"] == 5_500_000
        assert cli("verify", instance, f"{engine}.json").code == 0
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_verify_lists_every_violation_and_exits_1(cli, instance, tmp_path):
    cli("place", instance, "--policy", "heft", "-o", "placed.json")
    document = json.loads((tmp_path / "placed.json").read_text())
    for span in document["spans"]:
        span["start_ns"] = span["ready_ns"] = 0
    (tmp_path / "wrong.json").write_text(json.dumps(document))
    answer = cli("verify", instance, "wrong.json")
    assert answer.code == 1
    assert len(answer.out.splitlines()) > 2
    as_json = cli("verify", instance, "wrong.json", "--json")
    assert as_json.code == 1
    assert json.loads(as_json.out)["violations"] == answer.out.splitlines()


def test_verify_takes_network_and_memory_from_the_file_unless_told_otherwise(cli, instance):
    cli("place", instance, "--policy", "single", "--no-memory", "--network", "half-duplex", "-o", "placed.json")
    assert cli("verify", instance, "placed.json").code == 0
    assert "network" in cli("verify", instance, "placed.json", "--network", "one-port").out
    assert "bytes of weights" in cli("verify", instance, "placed.json", "--memory-scale", "0.5").out


@pytest.mark.parametrize("memory", [["--no-memory"], ["--memory-scale", "1.5"]])
def test_verify_takes_the_memory_of_a_simulated_placement_from_the_file_too(cli, instance, memory):
    assert cli("place", instance, "--policy", "single", *memory, "-o", "placed.json").code == 0
    assert cli("simulate", instance, *memory, "--placement", "placed.json", "-o", "simulated.json").code == 0
    assert cli("verify", instance, "simulated.json").code == 0


def test_verify_takes_the_fusions_from_the_file(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = ["zoo:ws-32?seed=1", "--cluster", "diviml-server"]
    assert cli("place", *where, "--policy", "heft", "--fuse", "none", "-o", "placed.json").code == 0
    assert cli("verify", *where, "placed.json").code == 0
    assert cli("verify", *where, "--fuse", "onnxruntime", "placed.json").code == 1


def test_files_say_how_to_make_them_again(cli, instance, tmp_path):
    cli("place", instance, "--policy", "heft", "--no-memory", "--seed", "3", "-o", "placed.json")
    options = ["--no-memory", "--placement", "placed.json", "--spread", "0.1", "--seed", "7"]
    assert cli("simulate", instance, *options, "-o", "simulated.json").code == 0
    assert cli("simulate", instance, *options, "--requests", "5", "-o", "stream.json").code == 0
    placed, simulated, stream = (
        json.loads((tmp_path / f"{name}.json").read_text())["provenance"] for name in ("placed", "simulated", "stream")
    )
    assert placed["request"]["seed"] == 3
    assert simulated["engine"] == "simpy"
    assert (stream["requests"], stream["in_flight"]) == (5, 1)
    digest = hashlib.sha256((tmp_path / "placed.json").read_bytes()).hexdigest()
    for made_by in (simulated, stream):
        assert made_by["placement"] == {"path": "placed.json", "sha256": digest}
        assert made_by["options"]["seed"] == 7
        assert made_by["options"]["spread"] == 0.1
    for made_by in (placed, simulated, stream):
        assert made_by["problem"]["sha256"] == hashlib.sha256((tmp_path / instance).read_bytes()).hexdigest()
        assert made_by["problem"]["memory"] == "unlimited"
        assert {"moirai-sim", "numpy", "highspy", "ortools", "simpy"} <= set(made_by["versions"])


def test_place_exits_3_without_an_answer(cli, instance):
    answer = cli("place", instance, "--policy", "single", "--json")  # the model fits no single device
    assert answer.code == 3
    assert json.loads(answer.out)["status"] in ("infeasible", "limit")
    assert json.loads(answer.out)["spans"] == []
    assert json.loads(answer.out)["gap"] == 1  # 0 would say proven optimal


def test_a_huge_memory_scale_lifts_the_limit(cli, instance):
    assert cli("place", instance, "--policy", "single", "--memory-scale", "1e300").code == 0


def test_place_shows_the_bound_and_the_best_single_device(cli, instance):
    answer = cli("place", instance, "--policy", "heft", "--no-memory")
    assert "lower bound" in answer.out
    assert "best single device  8 ms on acc0" in answer.out


def test_the_same_call_writes_the_same_bytes(cli, instance, tmp_path):
    texts = []
    for name in ("one.json", "two.json"):
        cli("place", instance, "--policy", "heft", "-o", name)
        document = json.loads((tmp_path / name).read_text())
        document.pop("solve_seconds")
        texts.append(json.dumps(document))
    assert texts[0] == texts[1]


def test_neither_the_hash_seed_nor_the_order_of_the_yaml_shows_in_a_result(tmp_path):
    parts = [
        "devices:\n  - {name: b, device: nvidia-t4}\n  - {name: a, device: nvidia-l4, count: 2}\n",
        "switches: [s]\n",
    ]
    parts += ["links:\n  - {ends: [a, s], bandwidth: 10 GB/s}\n  - {ends: [b, s], bandwidth: 5 GB/s}\n", "name: c\n"]
    documents = []
    for seed, order in (("1", parts), ("2", parts[::-1])):
        (tmp_path / "cluster.yaml").write_text("".join(order))
        command = [sys.executable, "-m", "moirai_sim", "place", "zoo:ws-32?seed=1"]
        options = ["--cluster", "cluster.yaml", "--policy", "heft", "--json"]
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(
            command + options, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        documents.append(json.loads(done.stdout) | {"solve_seconds": 0})
    assert json.dumps(documents[0]) == json.dumps(documents[1])


def test_graph(cli, instance):
    assert json.loads(cli("graph", instance, "--json").out)["operators"] == 4
    assert "fork" in cli("graph", instance).out
    answer = cli("graph", "zoo:ws-32?seed=1", "--fuse", "onnxruntime", "--json")
    summary = json.loads(answer.out)
    assert summary["fusion"]["operators"] < summary["operators"]
    assert summary["fusion"]["flops"] == summary["flops"]
    assert 0 < summary["peak_activation_bytes"] <= summary["activation_bytes"]
    assert "become" in cli("graph", "zoo:ws-32?seed=1", "--fuse", "onnxruntime").out


def test_predict_repeats_each_line_with_its_price(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [
        {"name": "fc1", "op_type": "MatMul", "dtype": "float32", "input_shapes": [[512, 1024], [1024, 4096]],
         "output_shapes": [[512, 4096]], "attributes": {}, "note": "kept"},
        {"op_type": "Add", "input_shapes": [[8], []], "output_shapes": [[8]]},
    ]  # fmt: skip
    (tmp_path / "operators.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = ["operators.jsonl", "--cost-model", "roofline", "--device", "nvidia-h100-sxm"]
    printed = [json.loads(line) for line in cli("predict", *options).out.splitlines()]
    assert [{key: line[key] for key in given} for line, given in zip(printed, lines, strict=True)] == lines
    assert printed[0]["latency_s"] == pytest.approx(2 * 512 * 1024 * 4096 / 66.9e12 + 5e-6, rel=0.01)
    assert all(
        line["low_s"] <= line["latency_s"] <= line["high_s"] and line["extrapolated"] is True for line in printed
    )
    assert json.loads(cli("predict", *options, "--json").out) == printed
    assert cli("predict", *options, "-o", "priced.jsonl").out == ""
    assert [json.loads(line) for line in (tmp_path / "priced.jsonl").read_text().splitlines()] == printed


@pytest.mark.parametrize("kind", ["policies", "devices", "topologies", "cost-models", "models"])
def test_catalog(cli, kind):
    rows = json.loads(cli("catalog", kind, "--json").out)
    text = cli("catalog", kind).out
    assert all(row["name"] in text for row in rows)
    assert not [row for row in rows if "cannot be used" in row.get("about", "")]
    assert rows or kind == "cost-models"


def test_a_users_broken_file_does_not_hide_the_others(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("MOIRAI_SIM_HOME", str(tmp_path))
    (tmp_path / "topologies").mkdir()
    (tmp_path / "topologies" / "broken.yaml").write_text("name: [")
    rows = {row["name"]: row for row in json.loads(cli("catalog", "topologies", "--json").out)}
    assert "cannot be used" in rows["broken"]["about"]
    assert rows["edge"]["links"] == 4


@pytest.mark.parametrize("kind", ["cluster", "device", "study", "timeline", "operators"])
def test_schema(cli, kind):
    schema = json.loads(cli("schema", kind).out)
    assert json.loads(cli("schema", kind, "--json").out) == schema
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert "properties" in schema or "oneOf" in schema


def test_shipped_files_follow_their_schemas():
    for path in catalog.entries("topologies").values():
        YamlDocument(path).validate(ClusterFile)
    for path in catalog.entries("devices").values():
        YamlDocument(path).validate(DeviceFile)


def test_doctor(cli):
    found = json.loads(cli("doctor", "--json").out)
    assert found["broken"] == []
    assert found["cpu"]["cores"]
    assert "HiGHS" in cli("doctor").out


@pytest.mark.parametrize("arguments", [["--help"], ["place", "--help"], ["profile", "--help"], ["place", "-h"]])
def test_help_is_no_error(cli, arguments):
    answer = cli(*arguments)
    assert answer.code == 0
    assert "Usage" in answer.out


def test_the_reference_names_every_command_and_option():
    import typer

    from moirai_sim.cli import app

    text = (Path(__file__).parents[2] / "docs" / "reference" / "commands.md").read_text(encoding="utf-8")
    root = typer.main.get_command(app)
    commands = {**root.commands, **{f"profile {name}": c for name, c in root.commands["profile"].commands.items()}}
    for name, command in commands.items():
        line = next(line for line in text.splitlines() if line.startswith("| ") and f"`{name}" in line)
        options = {option for p in command.params for option in p.opts if option.startswith("-") and option != "--out"}
        missing = {option for option in options if not re.search(rf"`{option}\b", line)} - {"--help", "-h"}
        assert not missing, (name, missing)


@pytest.mark.parametrize("arguments", [[], ["profile"]])
def test_a_bare_call_shows_the_help(cli, arguments):
    answer = cli(*arguments)
    assert answer.err.startswith("Usage:") or answer.out.startswith("Usage:")
    assert answer.code in (0, 2)  # depends on the version of click


def test_simulate_explains_a_priced_model(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = ["zoo:ws-32?seed=1", "--cluster", "diviml-server"]
    assert cli("place", *where, "--policy", "heft", "-o", "placed.json").code == 0
    answer = cli("simulate", *where, "--placement", "placed.json", "--explain", "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["explanation"]


def test_simulate_takes_the_memory_of_the_placement_that_it_plays(cli, instance):
    assert cli("place", instance, "--policy", "single", "--no-memory", "-o", "placed.json").code == 0
    assert cli("simulate", instance, "--placement", "placed.json", "-o", "simulated.json").code == 0
    assert cli("verify", instance, "simulated.json").code == 0


def test_a_limit_on_the_period_holds_for_a_file_of_one_request(cli, instance):
    assert cli("place", instance, "--policy", "heft", "-o", "placed.json").code == 0
    assert cli("verify", instance, "placed.json", "--min-throughput", "1/s").code == 0
    answer = cli("verify", instance, "placed.json", "--max-period", "1us")
    assert answer.code == 1
    assert "asked for at most 1000 ns" in answer.out


def test_place_and_simulate_say_what_it_needs_of_memory(cli, instance):
    cli("place", instance, "--policy", "heft", "-o", "placed.json")
    assert "peak memory" in cli("simulate", instance, "--placement", "placed.json").out
    document = json.loads(cli("simulate", instance, "--placement", "placed.json", "--json").out)
    assert set(document["peak_bytes"]) == {"acc0", "acc1"}
    assert max(document["peak_bytes"].values()) == 12 + 3 * 64, "weights, what was made, and what comes"
    assert "out of memory" in document["out_of_memory"], "12 bytes hold the weights alone"
    assert document["energy_j"] == {"acc0": None, "acc1": None}


def test_replicas_and_waits_that_change_nothing_are_refused(cli, instance):
    assert cli("place", instance, "--replicas", "2").code == 2
    cli("place", instance, "--policy", "heft", "-o", "placed.json")
    assert cli("simulate", instance, "--placement", "placed.json", "--launch-waits").code == 2


def test_a_result_may_go_to_a_device_file(cli, instance):
    assert cli("place", instance, "--policy", "heft", "-o", os.devnull).code == 0
    assert Path(os.devnull).is_char_device()


@pytest.mark.parametrize(
    ("key", "value"), [("fpgaLatency", 1e13), ("size", 10**400), ("cost", 1e13), ("maxSizePerFPGA", 1e30)]
)
def test_numbers_beyond_any_clock_are_input_errors(cli, instance, key, value):
    document = json.loads(Path(instance).read_text())
    where = {"cost": document["edges"][0], "maxSizePerFPGA": document}.get(key, document["nodes"][0])
    where[key] = value
    Path(instance).write_text(json.dumps(document))
    answer = cli("graph", instance)
    assert answer.code == 2
    assert f'"{key}" must be a number between 0 and' in answer.err


def test_a_yaml_file_that_holds_itself_is_an_input_error(cli, tmp_path):
    (tmp_path / "round.yaml").write_text("--- &r\nname: c\ndevices: *r\n")
    answer = cli("place", "zoo:resnet18", "--cluster", tmp_path / "round.yaml")
    assert answer.code == 2, answer.err


def test_a_language_model_answers_requests(cli, tmp_path):
    options = ["--cluster", "dgx-a100-nccl", "--policy", "single", "--prompt", "100-200", "--answer", "8"]
    options += ["--requests", "6", "--max-batch", "2"]
    answer = cli("generate", "zoo:llama3-8b?layers=1", *options, "-o", tmp_path / "answers.json", "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert found == json.loads((tmp_path / "answers.json").read_text())
    assert found["steps"] == 3 * 8, "three batches of two, each a prefill and seven steps"
    assert 0 < found["first_token_p50_ns"] < found["latency_p50_ns"]
    token = 2 * 8 * 128 * 2  # keys and values of 8 heads in half precision
    assert found["peak_cache_bytes"] % token == 0
    assert found["peak_cache_bytes"] <= 2 * 208 * token
    assert "first token" in cli("generate", "zoo:llama3-8b?layers=1", *options).out
    assert cli("generate", "zoo:resnet18", *options).code == 2
    assert cli("generate", "zoo:llama3-8b?layers=1", *options[:-6], "--prompt", "5-4").code == 2
