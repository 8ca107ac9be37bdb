"""Wrong input on the command line: one clear error a mistake, exit code 2, nothing written, no traceback."""

import json
import subprocess
import sys

import onnx
import pytest
from onnx import TensorProto, helper

TIMELINE = {"format": "moirai-sim/timeline@1", "placement": {"a": "core0"}, "spans": [], "network": "fair"}


def chain():
    """A model of two operators."""
    value = helper.make_tensor_value_info
    nodes = [helper.make_node("Relu", ["x"], ["y"], "a"), helper.make_node("Relu", ["y"], ["z"], "b")]
    shape = [1, 8]
    graph = helper.make_graph(
        nodes, "chain", [value("x", TensorProto.FLOAT, shape)], [value("z", TensorProto.FLOAT, shape)]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


@pytest.fixture
def folder(tmp_path):
    onnx.save(chain(), tmp_path / "chain.onnx")
    (tmp_path / "truncated.onnx").write_bytes((tmp_path / "chain.onnx").read_bytes()[:-20])
    bomb = chain()
    bomb.graph.initializer.append(TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[10**12], raw_data=b""))
    bomb.graph.node[1].op_type = "Add"
    bomb.graph.node[1].input.append("w")
    (tmp_path / "bomb.onnx").write_bytes(bomb.SerializeToString())
    outside = chain()
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[8], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../etc/passwd")
    outside.graph.initializer.append(tensor)
    (tmp_path / "outside.onnx").write_bytes(outside.SerializeToString())
    (tmp_path / "twice.yaml").write_text("name: c\ndevices: [{name: x, device: nvidia-t4}]\nname: d\n")
    (tmp_path / "unknown.yaml").write_text("name: c\ndevices: [{name: x, device: nvidia-t5}]\n")
    (tmp_path / "loose.yaml").write_text(
        "name: c\ndevices: [{name: x, device: nvidia-t4}]\nlinks: [{bandwidth: 1 GB/s}]\n"
    )
    (tmp_path / "missing.json").write_text(json.dumps(TIMELINE | {"placement": {"a": "core0", "zz": "core0"}}))
    (tmp_path / "partial.json").write_text(json.dumps(TIMELINE))
    (tmp_path / "whole.json").write_text(json.dumps(TIMELINE | {"placement": {"a": "core0", "b": "core0"}}))
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "table.xls").write_bytes(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600))
    (tmp_path / "lines.jsonl").write_text('{"op_type": "Relu"}\n{\n{"op_type": "Relu", "dtype": "fp32"}\n')
    shapes = '"input_shapes": [[1, 3, 8, 8], [4, 3, 3, 3]], "output_shapes": [[1, 4, 6, 6]]'
    (tmp_path / "nan.jsonl").write_text(f'{{"op_type": "Conv", {shapes}, "attributes": {{"group": NaN}}}}\n')
    return tmp_path


LOCAL = ["--cluster", "local-cpu", "--policy", "single"]
SIMULATE = ["simulate", "chain.onnx", "--cluster", "local-cpu", "--placement", "whole.json"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["place", "truncated.onnx", *LOCAL], "truncated.onnx"),
        (["place", "empty.onnx", *LOCAL], "empty.onnx"),
        (["place", "bomb.onnx", *LOCAL], "bomb.onnx"),
        (["place", "notes.txt", *LOCAL], "notes.txt"),
        (["place", "absent.onnx", *LOCAL], "absent.onnx: cannot read it"),
        (["place", ".", *LOCAL], "cannot read it"),
        (["place", "table.xls", "--policy", "single"], "table.xls"),
        (["place", "other.json", "--policy", "single"], "nodes"),
        (["place", "chain.onnx", "--policy", "single"], "name a cluster"),
        (
            ["place", "chain.onnx", "--cluster", "twice.yaml", "--policy", "single"],
            "twice.yaml:3:1: key 'name' is given in line 1",
        ),
        (
            ["place", "chain.onnx", "--cluster", "unknown.yaml", "--policy", "single"],
            "unknown.yaml:2:21: unknown device type 'nvidia-t5'",
        ),
        (
            ["place", "chain.onnx", "--cluster", "loose.yaml", "--policy", "single"],
            "loose.yaml:3:9: links.0.ends: missing key 'ends'",
        ),
        (["place", "chain.onnx", "--cluster", "local-cpo", "--policy", "single"], "did you mean 'local-cpu'?"),
        (["place", "chain.onnx", "--cluster", "local-cpu", "--policy", "heftt"], "did you mean 'heft'?"),
        (["place", "chain.onnx", *LOCAL, "--network", "one-prt"], "did you mean 'one-port'?"),
        (["place", "chain.onnx", *LOCAL, "--objective", "speed"], "known: latency, throughput"),
        (["place", "chain.onnx", *LOCAL, "--memory-scale", "-1"], "must be above 0"),
        (["place", "chain.onnx", *LOCAL, "--memory-scale", "nan"], "must be above 0"),
        (["place", "chain.onnx", *LOCAL, "--memory-scale", "0.5", "--no-memory"], "give one of the two"),
        (["place", "chain.onnx", *LOCAL, "--time-limit", "soon"], "--time-limit"),
        (["place", "chain.onnx", *LOCAL, "--seed", "-1"], "--seed"),
        (["place", "chain.onnx", *LOCAL, "--fuse", "onnxruntim"], "onnxruntim"),
        (["place", "other.json", "--policy", "single", "--fuse", "onnxruntime"], "leave out --fuse"),
        (["graph", "other.json", "--fuse", "onnxruntime"], "leave out --fuse"),
        (["simulate", "chain.onnx", "--cluster", "local-cpu", "--placement", "missing.json"], "unknown operator 'zz'"),
        (
            ["simulate", "chain.onnx", "--cluster", "local-cpu", "--placement", "partial.json"],
            "no device for 'b'",
        ),
        (["simulate", "chain.onnx", "--cluster", "local-cpu", "--placement", "other.json"], "not a timeline"),
        (["simulate", "chain.onnx", "--cluster", "local-cpu", "--placement", "notes.txt"], "notes.txt:1:1: not JSON"),
        ([*SIMULATE, "--requests", "5", "--trace", "t.json"], "--trace: has no effect on a stream"),
        ([*SIMULATE, "--requests", "5", "--explain"], "--explain: has no effect on a stream"),
        ([*SIMULATE, "--requests", "5", "--engine", "replay"], "--engine: has no effect on a stream"),
        ([*SIMULATE, "--rate", "10"], "--rate: has no effect without --requests"),
        ([*SIMULATE, "--in-flight", "2"], "--in-flight: has no effect without --requests"),
        ([*SIMULATE, "--requests", "5", "--rate", "9", "--in-flight", "2"], "--in-flight: has no effect with --rate"),
        ([*SIMULATE, "--trace", "t.json", "--gantt", "g.bmp"], "g.bmp: a Gantt chart is written as .html or .png"),
        ([*SIMULATE, "--spread", "0.1", "--seed", "-1"], "--seed"),
        ([*SIMULATE, "--spread", "-0.1"], "--spread"),
        ([*SIMULATE, "--requests", "-5", "--rate", "10"], "--requests"),
        ([*SIMULATE, "--launch", "5"], "--launch: missing unit in '5'"),
        ([*SIMULATE, "--fault", "core0@3"], "--fault: missing unit in '3'"),
        (["measure", "chain.onnx", "--cluster", "local-cpu", "--placement", "missing.json"], "unknown operator 'zz'"),
        (["predict", "lines.jsonl", "--cost-model", "roofline", "--device", "nvidia-t4"], "lines.jsonl:3: dtype"),
        (["predict", "nan.jsonl", "--cost-model", "roofline", "--device", "nvidia-t4"], "nan.jsonl:1: not JSON (NaN"),
        (["predict", "lines.jsonl", "--cost-model", "nope", "--device", "nvidia-t4"], "lines.jsonl:2"),
        (["graph", "zoo:gpt9"], "gpt9"),
        (["catalog", "polices"], "did you mean 'policies'?"),
        (["schema", "clusters"], "did you mean 'cluster'?"),
        (["report", "."], "study"),
        (["report", ".", "--format", "png"], "--format: has no effect without --pictures"),
        (["report", ".", "--pictures", "drawn", "--format", "bmp"], "unknown format 'bmp'"),
        (["evaluate", "notes.txt"], "notes.txt"),
        (["evaluate", "notes.txt", "--jobs", "2", "--ray", "auto"], "--jobs: has no effect with --ray"),
        (["whatif", "notes.txt", "--jobs", "2", "--ray", "auto"], "--jobs: has no effect with --ray"),
        (["calibrate", "mine.parquet", "--from-runs", "."], "profile mine.parquet: has no effect with --from-runs"),
        (["profile", "operators", "chain.onnx", "--device", "cpu:999"], "cpu:999"),
        (["place", "chain.onnx", "--colour", "red"], "--colour"),
        (["plaice"], "plaice"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_written(cli, folder, monkeypatch, arguments, expected):
    monkeypatch.chdir(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    write = ("place", "simulate", "measure", "predict", "report", "evaluate", "whatif", "calibrate", "profile")
    needs_out = arguments[0] in write
    answer = cli(*arguments, *(["-o", "result"] if needs_out else []))
    assert answer.code == 2, answer
    assert answer.out == ""
    assert expected in "\n".join(answer.errors), answer.err
    assert "Traceback" not in answer.err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_tensors_outside_the_model_file_are_never_read(cli, folder, monkeypatch):
    monkeypatch.chdir(folder)
    answer = cli("graph", "outside.onnx", "--json")
    assert answer.code in (0, 2)  # weights by their declared size, or a clear refusal: never the other file's content
    assert "root:" not in answer.out + answer.err


def test_a_bug_of_ours_is_called_one_and_exits_4(cli, monkeypatch):
    def broken():
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("moirai_sim.doctor.examine", broken)
    answer = cli("doctor")
    assert (answer.code, answer.out) == (4, "")
    assert "ZeroDivisionError" in answer.err
    assert "--debug" in answer.err
    assert "Traceback" not in answer.err


@pytest.mark.parametrize("command", ["catalog devices", "catalog devices --json"])
def test_a_reader_that_has_enough_is_no_error(command):
    """Both what a pipe holds at once and what is written when the program ends."""
    text = f"{sys.executable} -m moirai_sim {command} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_debug_shows_the_traceback(monkeypatch):
    import sys

    from moirai_sim.cli import main
    from moirai_sim.errors import InputError

    monkeypatch.setattr(sys, "argv", ["moirai-sim", "catalog", "nothing", "--debug"])
    with pytest.raises(InputError):
        main()
