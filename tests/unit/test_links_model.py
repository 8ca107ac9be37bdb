"""Link models: exact on curves of a known form, monotone, and honest about what was held out."""

import numpy as np
import pandas as pd
import pytest

from moirai_sim.clusters.cluster import Cluster, Device, DeviceType, Link, Route
from moirai_sim.costs.links import Curve, Group, LinkModel, load_link_model, ring_share
from moirai_sim.costs.links_fit import fit_curve, fit_links
from moirai_sim.errors import InputError
from moirai_sim.profiling.links import _pairs

SIZES = np.array([1 << e for e in range(10, 27)], dtype=np.int64)
LATENCY_S, BANDWIDTH = 10e-6, 5e9


def seconds(size):
    return LATENCY_S + size / BANDWIDTH


def frame(collective="send", participants=2, sizes=SIZES, time=seconds):
    return pd.DataFrame(
        {
            "collective": collective,
            "participants": participants,
            "bytes": sizes,
            "median_s": time(sizes),
            "source": "test",
        }
    )


def test_latency_bandwidth_line_is_found_again():
    curve = fit_curve(SIZES, seconds(SIZES))
    assert curve.latency_s == pytest.approx(seconds(1024))
    assert curve.bandwidth_bytes_per_s == pytest.approx(BANDWIDTH, rel=1e-6)
    between = np.array([3000, 50_000, 5_000_000])
    assert curve.seconds(between) == pytest.approx(seconds(between), rel=0.05)
    beyond = np.array([1 << 30])
    assert curve.seconds(beyond) == pytest.approx(seconds(beyond), rel=1e-6)
    assert curve.seconds(np.array([1])) == pytest.approx(curve.latency_s)


def test_noise_never_makes_a_larger_transfer_cheaper():
    rng = np.random.default_rng(3)
    curve = fit_curve(np.repeat(SIZES, 3), seconds(np.repeat(SIZES, 3)) * rng.lognormal(0, 0.5, 3 * len(SIZES)))
    assert (np.diff(curve.seconds(np.arange(1, 1 << 27, 99_991))) >= 0).all()


def test_many_sizes_are_thinned():
    sizes = np.unique(np.logspace(3, 9, 400).astype(np.int64))
    curve = fit_curve(sizes, seconds(sizes))
    assert len(curve.bytes) <= 96
    assert curve.seconds(sizes) == pytest.approx(seconds(sizes), rel=0.02)


def test_hold_outs_are_reported_and_required():
    model = fit_links(frame(), "x")
    assert {row["split"] for row in model.card["splits"]} == {"random", "larger"}
    assert all(row["mean_ape"] < 0.2 for row in model.card["splits"])
    with pytest.raises(InputError, match="at least 5"):
        fit_links(frame(sizes=SIZES[:4]), "x")


def test_fewer_sizes_are_no_better():
    sizes = np.unique(np.logspace(3, 9, 120).astype(np.int64))
    bumpy = fit_links(frame(sizes=sizes, time=lambda s: seconds(s) * (1 + 0.3 * np.sin(3 * np.log(s)) ** 2)), "x")
    curve = bumpy.card["learning_curve"]
    assert len(curve) == 3
    assert curve[0]["mean_ape"] > curve[-1]["mean_ape"] > 0
    assert fit_links(frame(sizes=SIZES[:5]), "x").card["learning_curve"] == []


def test_errors_are_of_rows_that_the_fit_did_not_see():
    jump = fit_links(frame(time=lambda s: np.where(s == SIZES[-1], 1.0, seconds(s))), "x")
    larger = next(row for row in jump.card["splits"] if row["split"] == "larger")
    assert larger["mean_ape"] > 0.9


def test_file_round_trip_and_whole_nanoseconds(tmp_path):
    model = fit_links(frame(), "x")
    model.write(tmp_path)
    again = load_link_model(tmp_path)
    sizes = np.array([1, 1024, 12345, 1 << 28])
    assert (again.transfer_ns(sizes) == model.transfer_ns(sizes)).all()
    assert again.transfer_ns(12345) == again.transfer_ns(sizes)[2]
    assert isinstance(again.transfer_ns(12345), int)
    (tmp_path / "links.json").write_text('{"format": "other"}')
    with pytest.raises(InputError, match="links@1"):
        load_link_model(tmp_path)


def test_a_curve_that_noise_made_flat_still_charges_for_more_bytes():
    flat = Curve((1 << 10, 1 << 20, 1 << 21, 1 << 22), (1e-5, 1e-3, 1e-3, 1e-3))
    assert flat.seconds(np.array([1 << 30]))[0] == pytest.approx(256 * 1e-3, rel=0.01)


def test_all_reduce_scales_as_a_ring():
    model = LinkModel("x", {Group("all-reduce", 2): Curve((1 << 20, 1 << 30), (1e-6, 1e-1))}, {})
    big = np.array([1 << 32])
    two, four = (model.collective_s("all-reduce", p, big)[0] for p in (2, 4))
    assert four / two == pytest.approx(ring_share("all-reduce", 4) / ring_share("all-reduce", 2), rel=0.01)
    with pytest.raises(InputError, match="has no 'all-gather'"):
        model.collective_s("all-gather", 2, big)


def test_models_keep_devices_machines_and_stacks_apart(tmp_path):
    one = frame("all-reduce").assign(device="a", nodes=1, stack="x")
    far = frame("all-reduce", time=lambda s: 3 * seconds(s)).assign(device="a", nodes=2, stack="x")
    slow = frame("all-reduce", time=lambda s: 5 * seconds(s)).assign(device="b", nodes=1, stack="y")
    fit_links(pd.concat([one, far, slow]), "x").write(tmp_path)
    model = load_link_model(tmp_path)
    size = np.array([1 << 20])
    near = model.collective_s("all-reduce", 2, size, device="a")
    assert near == pytest.approx(seconds(size))
    assert model.collective_s("all-reduce", 2, size, device="a", nodes=2) == pytest.approx(3 * near)
    assert model.collective_s("all-reduce", 2, size, device="b") == pytest.approx(5 * near)
    with pytest.raises(InputError, match="all-reduce among 2 b"):
        model.collective_s("all-reduce", 2, size, device="c")


def test_a_number_of_participants_between_measured_ones_is_between():
    def ring(p):
        return lambda s: p * LATENCY_S + ring_share("all-reduce", p) * s / BANDWIDTH

    model = fit_links(pd.concat([frame("all-reduce", p, time=ring(p)) for p in (2, 4, 16)]), "x")
    guess = model.collective_s("all-reduce", 8, SIZES)
    assert guess == pytest.approx(ring(8)(SIZES), rel=0.1)
    left_out = [row for row in model.card["groups"] if row["split"] == "left-out participants"]
    assert len(left_out) == 3


def test_unlike_routes_are_priced_apart(tmp_path):
    """What a crossing takes beside its route is 10 us over the near links and 40 us over the far ones."""

    def crossing(latency_ns, rate, beside_s):
        rows = frame(time=lambda size: beside_s + latency_ns / 1e9 + size / rate)
        return rows.assign(latency_ns=latency_ns, bandwidth_bytes_per_s=rate)

    fit_links(pd.concat([crossing(500_000, 25e6, 1e-5), crossing(20_500_000, 12.5e6, 4e-5)]), "x").write(tmp_path)
    model = load_link_model(tmp_path)
    assert [row["group"] for row in model.card["groups"] if row["split"] == "larger"] == [
        "send among 2, over 0.5 ms and 25 MB/s", "send among 2, over 20.5 ms and 12.5 MB/s",
    ]  # fmt: skip

    def priced(latency_ns, rate):
        route = Route(("a", "b"), ("l",), latency_ns, rate)
        return model.transfer_ns(SIZES, route) - [route.transfer_ns(int(size)) for size in SIZES]

    assert priced(500_000, 25e6) == pytest.approx(10_000, abs=2)
    assert priced(20_500_000, 12.5e6) == pytest.approx(40_000, abs=2)
    assert priced(1_000_000, 20e6) == pytest.approx(10_000, abs=2), "another route is as the one most like it"
    assert isinstance(model.transfer_ns(4096, Route(("a", "b"), ("l",), 500_000, 25e6)), int)


def test_unlike_routes_of_an_emulated_cluster_are_each_profiled():
    kind = DeviceType("core", "cpu", 2**33, 1e10, {"float32": 1e11})
    devices = tuple(Device(f"m{i}", kind, address=f"netns:{i}") for i in range(4))

    def star(*latencies):
        links = tuple(Link(f"l{i}", (f"m{i}", "hub"), 1e9, ns) for i, ns in enumerate(latencies))
        return Cluster("star", devices, links, switches=("hub",))

    neighbours = [("m0", "m1"), ("m1", "m2"), ("m2", "m3")]
    assert _pairs(star(500, 500, 500, 500)) == neighbours
    assert _pairs(star(500, 500, 20_000, 500))[:2] == [("m0", "m1"), ("m1", "m2")]
    far = _pairs(star(500, 1000, 20_000, 90_000))
    assert len(far) == len(set(far)) == 4
    assert far[0] == ("m0", "m1")
    assert far[-1] == ("m2", "m3"), "the nearest and the farthest, and some between"
