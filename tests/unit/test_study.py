"""Study files: what they expand to, and what is refused."""

import pytest

from moirai_sim.errors import InputError
from moirai_sim.studies import evaluate, whatif
from moirai_sim.studies.study import Range, read_study

EVALUATE = """\
kind: evaluate
models: ["zoo:resnet18", "zoo:gpt2"]
clusters: [edge]
policies: [single, heft, milp]
seeds: [0, 1]
exclude:
  - {model: "zoo:gpt2", policy: milp}
"""

WHATIF = """\
kind: whatif
models: ["zoo:gpt2"]
cluster: edge
overrides:
  fast: {links.0.latency: [1 us, 2 us]}
  more: {devices.a.count: {from: 1, to: 3, step: 1}}
scenarios:
  fast: [fast]
  both: [fast, more]
"""


def _write(tmp_path, text):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    return path


def test_evaluate_is_the_product_less_what_is_excluded(tmp_path):
    keys = evaluate.expand(read_study(_write(tmp_path, EVALUATE), "evaluate"))
    assert len(keys) == 2 * 3 * 2 - 2
    assert len({str(sorted(key.items(), key=str)) for key in keys}) == len(keys)
    assert not [key for key in keys if key["model"] == "zoo:gpt2" and key["policy"] == "milp"]


def test_include_keeps_only_what_it_names(tmp_path):
    study = read_study(_write(tmp_path, EVALUATE + "include: [{policy: 'h*'}]\n"), "evaluate")
    assert {key["policy"] for key in evaluate.expand(study)} == {"heft"}


@pytest.mark.parametrize("pattern", ["net.onnx", "n?t.onnx", "{folder}/net.onnx"])
def test_rules_name_files_as_the_study_does(tmp_path, pattern):
    (tmp_path / "net.onnx").write_bytes(b"x")
    rule = pattern.format(folder=tmp_path)
    text = EVALUATE.replace('zoo:gpt2", "', 'net.onnx", "').replace('["zoo:resnet18", "zoo:gpt2"]', "[net.onnx]")
    text = text.replace('{model: "zoo:gpt2", policy: milp}', f'{{model: "{rule}", policy: milp}}')
    study = read_study(_write(tmp_path, text), "evaluate")
    assert {rule.policy for rule in study.exclude if rule.matches(
        model=study.models[0], cluster="edge", policy="milp", network=None, objective="latency"
    )} == {"milp"}  # fmt: skip


def test_a_range_that_falls_is_empty():
    assert Range.model_validate({"from": 10, "to": 9, "step": 5}).values() == []
    assert Range.model_validate({"from": 1, "to": 2, "step": 0.5}).values() == [1, 1.5, 2]


def test_whatif_combines_values_of_overrides(tmp_path):
    variants = whatif.expand(read_study(_write(tmp_path, WHATIF), "whatif"))
    assert variants[0] == ("base", {})
    assert [scenario for scenario, _ in variants].count("fast") == 2
    assert [scenario for scenario, _ in variants].count("both") == 2 * 3
    assert ("both", {"links.0.latency": "2 us", "devices.a.count": 3}) in variants


@pytest.mark.parametrize(
    ("text", "kind", "complaints"),
    [
        (EVALUATE, "whatif", ["study.yaml:1:1: kind: must be 'whatif'"]),
        (
            EVALUATE + "polices: []\n",
            "evaluate",
            ["study.yaml:8:1: polices: unknown key 'polices'; did you mean 'policies'"],
        ),
        (
            "kind: validate\nmodels: [a.onnx]\npatience: 5\n",
            "validate",
            ["study.yaml:3:1: patience: missing unit in '5'"],
        ),
        (EVALUATE + "time_limit: 10\n", "evaluate", ["study.yaml:8:1: time_limit: missing unit in '10'"]),
        ("kind: evaluate\nmodels: []\n", "evaluate", ["study.yaml:2:1: models", "missing key 'policies'"]),
        (WHATIF.replace("to: 3", "to: .inf"), "whatif", ["should be a finite number"]),
    ],
)
def test_every_mistake_has_its_line(tmp_path, text, kind, complaints):
    with pytest.raises(InputError) as caught:
        read_study(_write(tmp_path, text), kind)
    for complaint in complaints:
        assert complaint in str(caught.value)


@pytest.mark.parametrize(("kind", "cluster"), [("whatif", "cluster: edge"), ("validate", "clusters: [edge]")])
def test_instances_with_devices_of_their_own_are_for_evaluate_alone(tmp_path, kind, cluster):
    (tmp_path / "fork.json").write_text("{}")
    text = f"kind: {kind}\n{cluster}\nmodels:\n  - zoo:gpt2\n  - fork.json\n"
    with pytest.raises(InputError, match=r"study\.yaml:5:5: models\.1: .*fork\.json") as caught:
        read_study(_write(tmp_path, text), kind)
    assert len(caught.value.problems) == 1


def test_models_are_found_beside_the_study(tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"x")
    study = read_study(_write(tmp_path, "kind: evaluate\nmodels: [net.onnx]\npolicies: [single]\n"), "evaluate")
    assert study.models == [str(tmp_path / "net.onnx")]


def test_sizes_behind_a_model_are_kept_when_it_is_found_beside_the_study(tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"x")
    text = "kind: evaluate\nmodels: ['net.onnx?batch=8']\npolicies: [single]\n"
    assert read_study(_write(tmp_path, text), "evaluate").models == [f"{tmp_path}/net.onnx?batch=8"]


@pytest.mark.parametrize(
    ("text", "kind", "complaint"),
    [
        (EVALUATE.replace("heft", "hefft"), "evaluate", "study.yaml:4:20: policies.1: unknown policy 'hefft'; did you"),
        (EVALUATE.replace("[edge]", "[egde]"), "evaluate", "study.yaml:3:12: clusters.0: egde: unknown name"),
        (EVALUATE.replace("zoo:resnet18", "zoo:resnet81"), "evaluate", "study.yaml:2:10: models.0: zoo:resnet81: "),
        (EVALUATE.replace("zoo:resnet18", "zoo:resnet18?bach=2"), "evaluate", "unknown parameter 'bach'; did you mean"),
        (EVALUATE.replace("zoo:resnet18", "resnet18"), "evaluate", "beside the study; did you mean 'zoo:resnet18'?"),
        (EVALUATE.replace("zoo:resnet18", "nett.onnx"), "evaluate", "did you mean 'net.onnx'?"),
        (EVALUATE.replace("zoo:resnet18", "light_zfnet512"), "evaluate", "light_zfnet512: there is no such file"),
        (
            "kind: validate\nmodels:\n  - light_zfnet512\n  - light_zfnet521\n",
            "validate",
            "study.yaml:4:5: models.1: light_zfnet521: there is no such file, here or beside the study; did you mean "
            "'light_zfnet512'?",
        ),
        (WHATIF.replace("cluster: edge", "cluster: egde"), "whatif", "study.yaml:3:1: cluster: egde: unknown name"),
        (WHATIF + "policy: hefft\n", "whatif", "study.yaml:10:1: policy: unknown policy 'hefft'; did you mean 'heft'?"),
        (
            WHATIF.replace("both: [fast, more]", "both: [more, fats]"),
            "whatif",
            "study.yaml:9:16: scenarios.both.1: unknown override 'fats'; did you mean 'fast'?",
        ),
    ],
)
def test_what_a_study_names_must_exist(tmp_path, text, kind, complaint):
    (tmp_path / "net.onnx").write_bytes(b"x")
    with pytest.raises(InputError) as caught:
        read_study(_write(tmp_path, text), kind)
    assert complaint in str(caught.value)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("values", ["[]", "{from: 3, to: 1, step: 1, unit: us}"])
def test_an_override_without_a_value_is_refused(tmp_path, values):
    study = read_study(_write(tmp_path, WHATIF.replace("[1 us, 2 us]", values)), "whatif")
    with pytest.raises(InputError, match=r"override 'fast': 'links\.0\.latency' has no value"):
        whatif.expand(study)


@pytest.mark.parametrize("name", ["base", "sizes"])
def test_names_of_the_studys_own_results_are_refused(tmp_path, name):
    study = read_study(_write(tmp_path, WHATIF.replace("  both:", f"  {name}:")), "whatif")
    with pytest.raises(InputError, match=f"scenario '{name}'"):
        whatif.expand(study)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("servers: [{devices: [{name: a, device: nvidia-t4}]}]", "servers.0.name"),
        ("servers: [node]", "servers.0"),
        ("devices: [{device: nvidia-t4, count: 0}]", "devices.0.name"),
        ("devices: [{name: a, device: nvidia-t4, count: 0}]\nlinks: [bus, {ends: 7}]", "links.0"),
    ],
)
def test_a_malformed_cluster_is_refused_by_its_reader(tmp_path, text, complaint):
    (tmp_path / "bad.yaml").write_text(f"name: bad\n{text}\n")
    with pytest.raises(InputError, match=complaint):
        whatif.changed_cluster(str(tmp_path / "bad.yaml"), {"source": "me"})


def test_a_changed_key_leads_somewhere(tmp_path):
    cluster = tmp_path / "pair.yaml"
    cluster.write_text(
        "name: pair\ndevices: [{name: a, device: nvidia-t4, count: 2}, {name: b, device: nvidia-v100-pcie-32gb}]\n"
        "links: [{name: bus, ends: [a, b], bandwidth: 16 GB/s}]\n"
    )
    changed = whatif.changed_cluster(str(cluster), {"links.bus.bandwidth": "32 GB/s", "devices.a.count": 3})
    assert len(changed.devices) == 4
    assert {link.bandwidth_bytes_per_s for link in changed.links} == {32e9}
    with pytest.raises(InputError, match="no entry 'bsu' in 'links'; did you mean 'bus'"):
        whatif.changed_cluster(str(cluster), {"links.bsu.bandwidth": "32 GB/s"})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("seeds: [-1]", "seeds.0"),
        ("time_limit: 0 s", "time_limit"),
        ("clusters: []", "clusters"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(tmp_path, change, complaint):
    text = "".join(line for line in EVALUATE.splitlines(keepends=True) if not line.startswith(change.partition(":")[0]))
    with pytest.raises(InputError, match=complaint):
        read_study(_write(tmp_path, f"{text}{change}\n"), "evaluate")


@pytest.mark.parametrize("values", ["{from: 1, to: 1e12, step: 1}", "{from: 0, to: 1e308, step: 1e-10}"])
def test_a_range_without_end_is_refused(tmp_path, values):
    with pytest.raises(InputError, match="larger step"):
        read_study(_write(tmp_path, WHATIF.replace("{from: 1, to: 3, step: 1}", values)), "whatif")


def test_too_many_variants_are_refused(tmp_path):
    many = "{from: 1, to: 1000, step: 1}"
    text = WHATIF.replace("{from: 1, to: 3, step: 1}", many).replace("[1 us, 2 us]", f"{many[:-1]}, unit: us}}")
    with pytest.raises(InputError, match="variants"):
        whatif.expand(read_study(_write(tmp_path, text), "whatif"))
