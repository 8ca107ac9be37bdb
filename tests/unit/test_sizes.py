"""The search for a cluster size: the same answer as trying all, with proofs for what it never tried."""

import itertools
import json
import random

import pytest

from moirai_sim.errors import InputError
from moirai_sim.studies.overrides import changed_cluster
from moirai_sim.studies.report import report
from moirai_sim.studies.sizes import answer_of, search, sentence
from moirai_sim.studies.store import Store
from moirai_sim.studies.whatif import ANSWER, whatif


def _world(seed):
    """Random sizes in order of price, with an optimum that falls with every device, a bound below, an answer above."""
    draw = random.Random(seed)
    choices = [sorted(draw.sample(range(7), draw.randint(2, 5))) for _ in range(draw.randint(1, 3))]
    sizes = [counts for counts in itertools.product(*choices) if any(counts)]
    speed = [draw.uniform(0.5, 5) for _ in choices]
    price = [draw.uniform(1, 9) for _ in choices]
    optimum = {s: 1000 / (1 + sum(a * b for a, b in zip(s, speed, strict=True))) for s in sizes}
    bound = {s: optimum[s] * draw.uniform(0.6, 1) for s in sizes}
    answer = {s: optimum[s] * draw.choice([1, 1, 1.3]) for s in sizes}
    sizes.sort(key=lambda s: (sum(a * b for a, b in zip(s, price, strict=True)), s))
    return sizes, optimum, bound, answer, draw.uniform(min(optimum.values()) * 0.8, max(optimum.values()))


@pytest.mark.parametrize("seed", range(60))
def test_the_answer_is_that_of_trying_all_and_every_proof_holds(seed):
    sizes, optimum, bound, answer, target = _world(seed)
    asked = []

    def ask(what, wanted):
        asked.extend((what, size) for size in wanted)
        outcomes = {}
        for s in wanted:
            if bound[s] > target:
                outcomes[s] = {"status": "pruned", "lower_bound_ns": bound[s], "reason": "bound"}
            elif what == "bound":
                outcomes[s] = {"status": "bounded", "lower_bound_ns": bound[s]}
            else:
                outcomes[s] = {
                    "status": "feasible", "objective_ns": answer[s], "lower_bound_ns": bound[s], "log_spread": {}
                }  # fmt: skip
        return outcomes

    found = search(sizes, target, ask)
    assert list(found) == sizes
    best = next((s for s in sizes if answer[s] <= target and found[s].status != "ruled out"), None)
    assert best == next((s for s in sizes if answer[s] <= target), None)  # nothing that reaches it is ruled out
    chosen = next((s for s in sizes if found[s].status == "reached"), None)
    assert chosen == best
    for s in sizes:
        if found[s].status == "ruled out":
            by = found[s].by
            assert optimum[s] > target
            assert bound[by] > target
            assert all(a <= b for a, b in zip(s, by, strict=True))
        if found[s].status == "dearer":
            assert sizes.index(s) > sizes.index(chosen)
    assert len(asked) == len(set(asked))
    record = answer_of(["x"] * len(sizes[0]), found, dict.fromkeys(sizes), {s: sum(s) for s in sizes}, "20 ms")
    unsure = [s for s in sizes[: len(sizes) if chosen is None else sizes.index(chosen)] if found[s].status == "missed"]
    assert record["unsure"] == len(unsure)
    expected = "reached" if chosen else "open" if unsure else "out of reach"
    assert record["status"] == expected
    assert {"reached": "reaches", "open": "nothing rules it out", "out of reach": "proven"}[expected] in sentence(
        record
    )


def test_one_bound_settles_what_no_size_can_reach():
    sizes = sorted(itertools.product(range(5), range(1, 5)))
    asked = []

    def ask(what, wanted):
        asked.extend(wanted)
        return {size: {"status": "pruned", "lower_bound_ns": 9} for size in wanted}

    assert {finding.status for finding in search(sizes, 5, ask).values()} == {"ruled out"}
    assert asked == [(4, 4)]


DEVICE = """\
name: {name}
kind: gpu
memory: 8 GiB
memory_bandwidth: 100 GB/s
peak_flops: {{float32: {rate} TFLOP/s}}
"""
CLUSTER = """\
name: mixed
devices: [{name: a, device: slow.yaml, count: 2}, {name: b, device: fast.yaml, count: 2}]
switches: [s]
links: [{name: left, ends: [a, s], bandwidth: 10 GB/s}, {name: right, ends: [b, s], bandwidth: 10 GB/s}]
"""
SERVERS = """\
servers:
  - {name: node, count: 2, devices: [{name: c, device: slow.yaml, count: 2}],
     links: [{name: pair, ends: [c, c], bandwidth: 1 GB/s}]}
"""


@pytest.fixture
def cluster(tmp_path):
    (tmp_path / "slow.yaml").write_text(DEVICE.format(name="slow", rate=0.1))
    (tmp_path / "fast.yaml").write_text(DEVICE.format(name="fast", rate=1))
    path = tmp_path / "mixed.yaml"
    path.write_text(CLUSTER)
    return path


def test_a_count_of_zero_takes_devices_and_their_links_away(cluster):
    left = changed_cluster(str(cluster), {"devices.b.count": 0, "devices.a.count": 3})
    assert [device.name for device in left.devices] == ["a0", "a1", "a2"]
    assert {link.name.rstrip("0123456789") for link in left.links} == {"left"}
    with pytest.raises(InputError, match="no device"):
        changed_cluster(str(cluster), {"devices.b.count": 0, "devices.a.count": 0})


def test_a_server_or_a_part_of_it_goes_with_the_links_that_lead_there(cluster):
    up = ", {name: up, ends: [node.c, s], bandwidth: 1 GB/s}]\n"
    cluster.write_text(CLUSTER.rstrip("]\n") + up + SERVERS)
    whole = changed_cluster(str(cluster), {})
    assert len(whole.devices) == 8
    for key in ("servers.node.count", "servers.node.devices.c.count"):
        left = changed_cluster(str(cluster), {key: 0})
        assert len(left.devices) == 4
        assert {link.name.rstrip("0123456789") for link in left.links} == {"left", "right"}


STUDY = """\
kind: whatif
models: ["zoo:ws-32?seed=1"]
cluster: mixed.yaml
policy: heft
network: one-port
target: {target}
prices: {{slow: 100, fast: 1000}}
sizes:
  devices.a.count: {{from: 0, to: 4, step: 1}}
  devices.b.count: [0, 1, 2, 3]
"""


def _answer(folder):
    return next(r["outcome"] for r in Store(folder).read() if r["key"]["scenario"] == ANSWER)


def test_an_answer_to_an_earlier_target_is_not_shown(cluster, tmp_path):
    study = tmp_path / "study.yaml"
    for target in ("1 s", "2 s"):
        study.write_text(STUDY.format(target=target))
        whatif(study, tmp_path / "out", jobs=1)
        targets = {(r["key"]["scenario"], r["key"]["target_ns"]) for r in Store(tmp_path / "out").read()}
        assert {ns for _, ns in targets} == {int(target[0]) * 10**9}
        assert ANSWER in {scenario for scenario, _ in targets}


def test_a_study_finds_the_cheapest_size_and_its_report_says_why(cluster, tmp_path):
    study = tmp_path / "study.yaml"
    study.write_text(STUDY.format(target="1 s"))
    summary = whatif(study, tmp_path / "easy", jobs=1)
    assert summary["failed"] == 0
    easy = _answer(tmp_path / "easy")
    assert (easy["status"], easy["counts"], easy["price_eur"], easy["sizes"]) == ("reached", [1, 0], 100, 19)
    assert summary["sizes"]["zoo:ws-32?seed=1"]["counts"] == [1, 0]

    alone = easy["objective_ns"]
    study.write_text(STUDY.format(target=f"{alone // 4} ns"))
    whatif(study, tmp_path / "hard", jobs=1)
    hard = _answer(tmp_path / "hard")
    assert hard["status"] == "reached"
    assert hard["objective_ns"] <= alone // 4
    assert hard["ruled_out"] >= 4  # at most a quarter of the time: never with one, two or three slow ones
    before = (tmp_path / "hard" / "results").glob("*.json")
    bytes_before = {path.name: path.read_bytes() for path in before}
    assert whatif(study, tmp_path / "hard", jobs=2)["runs"] > 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "hard" / "results").glob("*.json")} == bytes_before

    built = report(tmp_path / "hard", tmp_path / "hard.html")
    (section,) = [s for s in built.sections if s.title.startswith("How many")]
    assert "Cheapest" in section.text
    assert set(section.rows["finding"]) >= {"reached", "ruled out"}


def test_the_command_says_the_answer(cli, cluster, tmp_path):
    study = tmp_path / "study.yaml"
    study.write_text(STUDY.format(target="1 s"))
    shown = cli("whatif", study, "-o", tmp_path / "out", "--jobs", "1")
    assert (
        "zoo:ws-32?seed=1: Cheapest, 100 EUR, that reaches 1 s: devices.a.count = 1, devices.b.count = 0" in shown.out
    )
    answer = json.loads(cli("whatif", study, "-o", tmp_path / "out", "--jobs", "1", "--json").out)
    assert answer["sizes"]["zoo:ws-32?seed=1"]["counts"] == [1, 0]
    assert answer["resumed"] == answer["runs"]


def test_sizes_need_a_target_and_whole_numbers(cluster, tmp_path):
    study = tmp_path / "study.yaml"
    for old, new, message in (
        ("target: 1 s\n", "", "needs a target"),
        ("devices.b.count: [0,", "devices.b.memory: [0,", "ends in '.count'"),
        ("[0, 1, 2, 3]", "[-1, 2]", "whole numbers"),
        ("[0, 1, 2, 3]", "{from: 0, to: 9000, step: 1}", "more than"),
    ):
        study.write_text(STUDY.format(target="1 s").replace(old, new))
        with pytest.raises(InputError, match=message):
            whatif(study, tmp_path / "out", jobs=1)
    assert not (tmp_path / "out").exists()
