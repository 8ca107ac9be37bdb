"""Clusters from YAML: forms, groups, servers, routes."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moirai_sim import catalog
from moirai_sim.clusters.cluster import Cluster, Device, DeviceType, Link
from moirai_sim.clusters.local import local_core, local_cores
from moirai_sim.clusters.reader import device_names, read_cluster, read_device_type
from moirai_sim.clusters.routes import route, route_classes
from moirai_sim.errors import InputError
from moirai_sim.policies.run import place
from moirai_sim.sources import load_problem, transfer_table
from moirai_sim.verify import _way

SERVERS = """
name: two-racks
servers:
  - name: node
    count: 3
    devices:
      - {name: gpu, device: nvidia-t4, count: 2, memory: 8 GiB}
      - {name: cpu, device: raspberry-pi-5, threads: 4}
    switches: [bus]
    links:
      - {ends: [gpu, bus], bandwidth: 10 GB/s, latency: 2 us}
      - {ends: [cpu, bus], bandwidth: 5 GB/s, latency: 1 us}
switches: [spine]
links:
  - {ends: [node.bus, spine], bandwidth: 100 Gbps, latency: 10 us}
"""


def read(tmp_path, text):
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return read_cluster(path)


@pytest.mark.parametrize("name", catalog.list_names("topologies"))
def test_every_shipped_cluster_reads_and_names_its_sources(name):
    cluster = read_cluster(name)
    assert cluster.name == name
    assert cluster.source
    assert all(device.type.source for device in cluster.devices)
    for a, b in itertools.permutations(cluster.devices, 2):
        assert route(cluster, a.name, b.name).bandwidth_bytes_per_s > 0


@pytest.mark.parametrize("name", device_names())
def test_every_shipped_device_type_reads_and_names_its_source(name):
    sheet = read_device_type(name)
    assert sheet.name == name
    assert sheet.source
    assert "float32" in sheet.peak_flops


def test_the_device_file_of_the_interface_is_read_as_written(tmp_path):
    path = tmp_path / "h100.yaml"
    path.write_text(
        "name: nvidia-h100-sxm\nkind: gpu\nmemory: 80 GiB\nmemory_bandwidth: 3350 GB/s\n"
        "peak_flops: {float32: 66.9 TFLOP/s, tf32: 494 TFLOP/s, bfloat16: 989 TFLOP/s, float8: 1979 TFLOP/s}\n"
        "compute_units: 132\nclock: 1980 MHz\nl2_cache: 50 MB\nsource: vendor data sheet\n"
    )
    sheet = read_device_type(path)
    assert sheet == DeviceType(
        name="nvidia-h100-sxm",
        kind="gpu",
        memory_bytes=80 * 2**30,
        memory_bandwidth_bytes_per_s=3350e9,
        peak_flops={"float32": 66.9e12, "tf32": 494e12, "bfloat16": 989e12, "float8": 1979e12},
        compute_units=132,
        clock_hz=1.98e9,
        l2_cache_bytes=50_000_000,
        source="vendor data sheet",
    )


def test_servers_and_groups_expand_to_their_members(tmp_path):
    cluster = read(tmp_path, SERVERS)
    assert [d.name for d in cluster.devices[:4]] == ["node0.cpu", "node0.gpu0", "node0.gpu1", "node1.cpu"]
    assert len(cluster.devices) == 9
    assert len(cluster.links) == 3 * 3 + 3
    gpu = cluster.device["node2.gpu1"]
    assert (gpu.server, gpu.address, gpu.memory_bytes) == ("node2", "cuda:1", 8 * 2**30)
    assert cluster.device["node1.cpu"].address == "cpu:0-3"
    far = route(cluster, "node0.gpu0", "node2.cpu")
    assert far.nodes == ("node0.gpu0", "node0.bus", "spine", "node2.bus", "node2.cpu")
    assert (far.latency_ns, far.bandwidth_bytes_per_s) == (23_000, 5e9)


def test_a_group_named_twice_joins_every_two_members(tmp_path):
    cluster = read(
        tmp_path,
        "name: mesh\ndevices: [{name: g, device: nvidia-t4, count: 4}]\nlinks: [{ends: [g, g], bandwidth: 1 GB/s}]\n",
    )
    assert {link.ends for link in cluster.links} == set(itertools.combinations(["g0", "g1", "g2", "g3"], 2))


def test_the_order_of_the_yaml_does_not_show(tmp_path):
    lines = [
        "  - {name: b, device: nvidia-t4}",
        "  - {name: a10, device: nvidia-l4}",
        "  - {name: a9, device: nvidia-l4}",
    ]
    ends = ["  - {ends: [a9, s], bandwidth: 1 GB/s}", "  - {ends: [s, b], bandwidth: 2 GB/s}"]
    ends.append("  - {bandwidth: 1 GB/s, ends: [s, a10]}")
    one, other = (
        read(tmp_path, "\n".join(["name: c", "switches: [s]", "devices:", *devices, "links:", *links]))
        for devices, links in ((lines, ends), (lines[::-1], ends[::-1]))
    )
    assert one == other
    assert [device.name for device in one.devices] == ["a9", "a10", "b"]
    assert one.provenance["sha256"] == other.provenance["sha256"]


def test_the_digest_changes_with_every_figure(tmp_path):
    base = read(tmp_path, SERVERS).provenance["sha256"]
    for old, new in (("10 us", "11 us"), ("8 GiB", "9 GiB"), ("nvidia-t4", "nvidia-l4"), ("threads: 4", "threads: 2")):
        assert read(tmp_path, SERVERS.replace(old, new)).provenance["sha256"] != base


def test_local_cpu_has_a_worker_a_core():
    cluster = read_cluster("local-cpu")
    assert [device.address for device in cluster.devices] == [f"cpu:{core}" for core in local_cores()]
    assert all(device.type == local_core() for device in cluster.devices)


def test_a_users_entry_takes_precedence(tmp_path, monkeypatch):
    monkeypatch.setenv("MOIRAI_SIM_HOME", str(tmp_path))
    folder = tmp_path / "topologies" / "devices"
    folder.mkdir(parents=True)
    shipped = catalog.find("devices", "nvidia-t4").read_text()
    (folder / "nvidia-t4.yaml").write_text(shipped.replace("15 GiB", "16 GiB"))
    (folder / "mine.yaml").write_text(shipped.replace("nvidia-t4", "mine"))
    assert read_device_type("nvidia-t4").memory_bytes == 16 * 2**30
    assert "mine" in catalog.list_names("devices")
    assert "nvidia-l4" in catalog.list_names("devices")


def test_files_named_in_a_cluster_are_found_beside_it(tmp_path):
    (tmp_path / "own.yaml").write_text(catalog.find("devices", "nvidia-t4").read_text())
    model = tmp_path / "models" / "mine"
    model.mkdir(parents=True)
    (model / "card.json").write_text(json.dumps({}))
    cluster = read(tmp_path, "name: c\ndevices: [{name: x, device: own.yaml, cost_model: models/mine}]\n")
    assert cluster.devices[0].type.name == "nvidia-t4"
    assert cluster.devices[0].cost_model == str(model)


def test_route_classes_take_no_time_by_pairs_of_devices(tmp_path):
    cluster = read(tmp_path, SERVERS.replace("count: 3", "count: 300"))
    route_class, classes, examples = route_classes(cluster)
    assert route_class.shape == (900, 900)
    assert len(classes) == len(examples) == 5  # gpu-gpu and gpu-cpu within; gpu-gpu, gpu-cpu, cpu-cpu across
    for a, b in [(0, 1), (1, 2), (0, 899), (1, 500), (3, 600)]:
        way = route(cluster, cluster.devices[a].name, cluster.devices[b].name)
        assert classes[route_class[a, b]] == (way.latency_ns, way.bandwidth_bytes_per_s)


@st.composite
def clusters(draw):
    """Random connected graphs of devices and switches, with parallel paths and ties."""
    n = draw(st.integers(2, 7))
    switches = draw(st.integers(0, 3))
    nodes = [f"d{i}" for i in range(n)] + [f"s{i}" for i in range(switches)]
    order = draw(st.permutations(nodes))
    pairs = {tuple(sorted((order[draw(st.integers(0, i - 1))], order[i]))) for i in range(1, len(order))}
    pairs |= draw(st.sets(st.sampled_from(list(itertools.combinations(nodes, 2))), max_size=6))
    kind = DeviceType("t", "gpu", 1, 1.0, {"float32": 1.0})
    links = [
        Link(f"l{i}", pair, draw(st.sampled_from([1e9, 2e9, 3e9])), draw(st.sampled_from([0, 5, 10])))
        for i, pair in enumerate(sorted(pairs))
    ]
    devices = tuple(Device(name, kind) for name in nodes[:n])
    return Cluster("random", devices, tuple(links), tuple(nodes[n:]))


@settings(max_examples=150, deadline=None)
@given(clusters())
def test_route_classes_agree_with_routes(cluster):
    route_class, classes, examples = route_classes(cluster)
    assert (np.diag(route_class) == -1).all()
    seen = set()
    for i, j in itertools.permutations(range(len(cluster.devices)), 2):
        way = route(cluster, cluster.devices[i].name, cluster.devices[j].name)
        assert classes[route_class[i, j]] == (way.latency_ns, way.bandwidth_bytes_per_s)
        assert sum(cluster.link[name].latency_ns for name in way.links) == way.latency_ns
        seen.add(int(route_class[i, j]))
    assert seen == set(range(len(classes)))
    assert [route_class[pair] for pair in examples] == list(range(len(classes)))


@settings(max_examples=50, deadline=None)
@given(clusters(), st.lists(st.integers(0, 10**12), min_size=1, max_size=5))
def test_transfer_times_agree_with_routes(cluster, sizes):
    route_class, times, _ = transfer_table(cluster, np.array(sizes, dtype=np.int64))
    for i, j in itertools.permutations(range(len(cluster.devices)), 2):
        way = route(cluster, cluster.devices[i].name, cluster.devices[j].name)
        assert [way.transfer_ns(size) for size in sizes] == times[:, route_class[i, j]].tolist()


def test_unconnected_devices_have_no_route():
    kind = DeviceType("t", "gpu", 1, 1.0, {"float32": 1.0})
    cluster = Cluster("apart", (Device("a", kind), Device("b", kind)))
    with pytest.raises(InputError, match="no links join"):
        route(cluster, "a", "b")
    with pytest.raises(InputError, match="no links join"):
        route_classes(cluster)


def test_two_links_of_the_same_ends_are_refused(tmp_path):
    text = (
        "name: pair\ndevices: [{name: a, device: nvidia-t4}, {name: b, device: nvidia-t4}]\nlinks:\n"
        "  - {name: wide, ends: [a, b], bandwidth: 16 GB/s, latency: 9 us}\n"
        "  - {name: quick, ends: [b, a], bandwidth: 1 GB/s, latency: 1 us}\n"
    )
    with pytest.raises(InputError, match=r"both join 'a' and 'b'.*one link with the sum of their bandwidths"):
        read(tmp_path, text)


def test_a_cluster_of_one_device_needs_no_link(tmp_path):
    (tmp_path / "one.yaml").write_text("name: one\ndevices:\n  - {name: c0, device: local-core}\n")
    cluster = read_cluster(tmp_path / "one.yaml")
    route_class, classes, examples = route_classes(cluster)
    assert (route_class.tolist(), classes, examples) == ([[-1]], [], [])
    timeline = place(load_problem("zoo:ws-32?seed=1", cluster), "heft")
    assert {span.resource for span in timeline.spans} == {"c0"}


@pytest.mark.parametrize(
    "text",
    [
        "devices: [{name: a, device: nvidia-t4}, {name: b, device: nvidia-t4}]\nswitches: [unused]\n"
        "links: [{ends: [a, b], bandwidth: 1 GB/s}]\n",
        "devices: [{name: a, device: nvidia-t4}]\nswitches: [s, unused]\nlinks: [{ends: [a, s], bandwidth: 1 GB/s}]\n",
        "devices: [{name: a, device: nvidia-t4}]\nswitches: [s, t]\n",
    ],
)
def test_switches_that_join_nothing_are_no_harm(tmp_path, text):
    cluster = read(tmp_path, f"name: odd\n{text}")
    table, classes, _ = route_classes(cluster)
    assert len(classes) == len(cluster.devices) - 1
    assert (table.diagonal() == -1).all()


@pytest.mark.parametrize("seed", range(20))
def test_routes_between_anchors_are_those_of_the_whole_graph(seed):
    """Searched by another algorithm, over devices with one link too; ties by number of links, then by name."""
    random = np.random.default_rng(seed)
    names = [f"n{i}" for i in random.permutation(9)]
    kind = DeviceType("unit", "gpu", 1, 1.0, {"float32": 1.0})
    ends = {(names[int(random.integers(i))], names[i]) for i in range(1, 9)}  # a tree, and a few more
    ends |= {tuple(random.choice(names, 2, replace=False).tolist()) for _ in range(int(random.integers(5)))}
    joined = {frozenset(pair): pair for pair in ends}
    links = tuple(Link(f"l{i}", pair, 1e9, int(random.integers(3))) for i, pair in enumerate(sorted(joined.values())))
    cluster = Cluster("c", tuple(Device(name, kind) for name in names), links)
    for source, target in itertools.permutations(names, 2):
        found = route(cluster, source, target)
        assert (found.latency_ns, found.nodes) == _way(cluster, source, target)
    assert set(cluster.routes) <= set(cluster.core)
