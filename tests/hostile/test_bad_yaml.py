"""Broken and malicious cluster and device files: every problem at once, each with its place, nothing executed."""

import pytest

from moirai_sim.clusters.reader import read_cluster, read_device_type
from moirai_sim.errors import InputError

SHEET = "name: x\nkind: gpu\nmemory: 1 GiB\nmemory_bandwidth: 1 GB/s\npeak_flops: {float32: 1 TFLOP/s}\n"


def problems(tmp_path, text, read=read_cluster):
    path = tmp_path / "file.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as caught:
        read(path)
    return [problem.removeprefix(f"{path}:") for problem in caught.value.problems]


def test_all_mistakes_of_a_file_are_reported_at_once_with_their_places(tmp_path):
    found = problems(
        tmp_path,
        """name: a
colour: red
name: b
devices:
  - {name: x, device: nvidia-t5, memory: -3 GiB}
  - {name: x, device: nvidia-t4, count: 0}
  - {device: nvidia-l4}
  - {name: z, device: nvidia-l4, cost_model: nope, threads: two}
switches: [s, s]
links:
  - {ends: [x, q], bandwidth: 10}
  - {ends: [x], bandwidth: 0 GB/s}
  - {bandwidth: 10 GB/s}
  - {ends: [z, z], bandwidth: 10 Gpbs, latency: 1}
  - {ends: [z, s], bandwith: 10 GB/s}
""",
    )
    expected = [
        ("3:1", "key 'name' is given in line 1 already"),
        ("2:1", "unknown key 'colour'"),
        ("5:34", "'-3 GiB' is negative"),
        ("6:34", "0 is no count"),
        ("7:5", "missing key 'name'"),
        ("8:52", "threads"),
        ("11:20", "missing unit in 10"),
        ("12:6", "a link has two ends"),
        ("12:17", "'0 GB/s' is not above zero"),
        ("13:5", "missing key 'ends'"),
        ("14:20", "unknown unit 'Gpbs'"),
        ("14:40", "missing unit in 1"),
        ("15:5", "missing key 'bandwidth'"),
        ("15:20", "did you mean 'bandwidth'?"),
        ("5:15", "did you mean 'nvidia-t4'?"),
        ("8:34", "unknown name in 'catalog cost-models'"),
        ("6:6", "'x' is the name of the entry"),
        ("9:15", "'s' is the name of the entry"),
        ("11:16", "unknown end 'q'"),
        ("14:6", "joins 'z' with itself"),
    ]
    for place, text in expected:
        assert any(line.startswith(f"{place}: ") and text in line for line in found), (place, text, found)
    assert len(found) == len(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "must be a mapping"),
        ("- 1", "must be a mapping"),
        ("name: a", "there is no device"),
        ("name: a\ndevices: [", "repair the YAML here"),
        ("name: a\n\tdevices: []", "repair the YAML here"),
        (b"\x00\x01\xff", "cannot read it"),
        ("[" * 3000, "nested too deeply"),
        ("name: !!python/object/apply:os.system ['touch pwned']\ndevices: []", "valid string"),
        ("name: a\ndevices: [{name: x, device: nvidia-t4, memory: 1e999999999 B}]", "is too large"),
        ("name: a\ndevices: [{name: x, device: nvidia-t4, memory: nan GiB}]", "cannot read the quantity"),
        ("name: 2024-02-30\ndevices: [{name: x, device: nvidia-t4}]", "put quotes around it"),
        ("name: a\ndevices: [{name: x, device: nvidia-t4, memory: true}]", "must be a quantity"),
        ("name: a\ndevices: [{name: 'a->b', device: nvidia-t4}]", "is no name"),
        ("name: a\ndevices: [{name: x, device: absent/x.yaml}]", "there is no such file"),
        ("name: a\ndevices: [{name: x, device: nvidia-t4, count: 3}]", "no link joins x1 with x0"),
        (
            "name: a\ndevices: [{name: x, device: nvidia-t4, count: 2}]\n"
            "links: [{ends: [x, x], bandwidth: 1 GB/s}, {ends: [x1, x0], bandwidth: 1 GB/s}]",
            "'x0--x1' and 'x0--x1' both join 'x0' and 'x1'",
        ),
        (
            "name: a\nservers: [{name: s, count: 100000, devices: [{name: x, device: nvidia-t4, count: 100000}]}]",
            "more than 100000 members",
        ),
        (
            "name: a\ndevices: [{name: x, device: nvidia-t4, count: 90000}]\nlinks: [{ends: [x, x], bandwidth: 1 B/s}]",
            "more than 1000000 links",
        ),
    ],
)
def test_one_clear_error(tmp_path, text, expected):
    found = problems(tmp_path, text)
    assert len(found) <= 2
    assert expected in "\n".join(found)
    assert [path.name for path in tmp_path.iterdir()] == ["file.yaml"]


def test_aliases_of_aliases_are_refused_before_they_are_written_out(tmp_path):
    lines = ["a: &a [x,x,x,x,x,x,x,x,x]"]
    lines += [f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefghi", "bcdefghij", strict=True)]
    assert "values with its aliases" in problems(tmp_path, "\n".join(lines))[0]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("float32", "fp32", "unknown data type 'fp32'"),
        ("float32", "float23", "did you mean 'float32'?"),
        ("{float32: 1 TFLOP/s}", "{}", "at least 1 item"),
        ("kind: gpu", "kind: tpu", "'cpu', 'gpu', 'npu' or 'fpga'"),
        ("memory: 1 GiB\n", "", "missing key 'memory'"),
        ("memory: 1 GiB", "memory: 0 GiB", "not above zero"),
        ("1 GB/s", "1 GHz", "unknown unit 'GHz'"),
        ("name: x", "name: x\nmemery: 1 GiB", "did you mean 'memory'?"),
    ],
)
def test_device_files(tmp_path, old, new, expected):
    found = problems(tmp_path, SHEET.replace(old, new, 1), read_device_type)
    assert expected in found[0]
