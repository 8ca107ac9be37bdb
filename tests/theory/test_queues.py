"""Streams of requests against queueing theory, with confidence intervals over seeds; and every knob's direction."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from moirai_sim.errors import InputError
from moirai_sim.placement import Placement
from moirai_sim.simulation.engine import simulate
from moirai_sim.simulation.llm import StepTimes, generate
from moirai_sim.simulation.options import DEFAULT, Fault, SimulationOptions, spread_of
from moirai_sim.simulation.workloads import at_once, estimate, periodic, poisson, read_arrivals, serve, serve_seeds

SERVICE_NS = 1_000_000
ONE = Placement(np.zeros(1, dtype=np.int64))
EXPONENTIAL = SimulationOptions(spread=1.0, distribution="exponential")


def mean_latency(problem, placement, load, options=DEFAULT, seeds=8, requests=6_000):
    services = serve_seeds(
        problem, placement, rate_per_s=load * 1e9 / SERVICE_NS, requests=requests, seeds=range(seeds), options=options
    )
    found = estimate(services, "mean_ns")
    assert found.half_width < 0.15 * found.mean  # an interval that holds anything would prove nothing
    return found


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_m_d_1(build, load) -> None:
    """Pollaczek-Khinchine with constant service: T = s + rho s / (2 (1 - rho))."""
    expected = SERVICE_NS * (1 + load / (2 * (1 - load)))
    assert mean_latency(build([SERVICE_NS]), ONE, load).covers(expected)


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_m_m_1(build, load) -> None:
    """T = s / (1 - rho)."""
    assert mean_latency(build([SERVICE_NS]), ONE, load, EXPONENTIAL).covers(SERVICE_NS / (1 - load))


@pytest.mark.parametrize("servers", [2, 4])
def test_m_m_c(build, servers) -> None:
    """Erlang's C formula, on one device of c streams."""
    load = 0.7
    a = servers * load
    wait = a**servers / math.factorial(servers) / (1 - load)
    wait /= sum(a**i / math.factorial(i) for i in range(servers)) + wait
    expected = SERVICE_NS * (1 + wait / (servers * (1 - load)))
    options = SimulationOptions(streams=servers, spread=1.0, distribution="exponential")
    assert mean_latency(build([SERVICE_NS]), ONE, a, options).covers(expected)


def test_a_closed_network_of_equal_exponential_stations(build) -> None:
    """N customers in a cycle of M equal exponential stations: throughput N / (N + M - 1) / s (Gordon and Newell)."""
    stations, clients = 3, 4
    edges = [(i, i + 1, 0) for i in range(stations - 1)]
    problem = build([SERVICE_NS] * stations, edges, stations, "none")
    placement = Placement(np.arange(stations))
    runs = [
        serve(problem, placement, in_flight=clients, requests=6_000, options=SimulationOptions(
            spread=1.0, distribution="exponential", seed=seed))
        for seed in range(8)
    ]  # fmt: skip
    found = estimate(runs, "throughput_per_s")
    assert found.half_width < 0.03 * found.mean
    assert found.covers(clients / (clients + stations - 1) * 1e9 / SERVICE_NS)


def test_littles_law_and_utilisation(build) -> None:
    """Queue = rate x wait, and a device is busy for the load it is offered; in one long run."""
    rate = 0.6 * 1e9 / SERVICE_NS
    service = serve(build([SERVICE_NS]), ONE, arrivals=poisson(rate, 20_000, 3), warm_up=0)
    lasted = service.done_ns.max() - service.arrival_ns[0]
    assert service.device_busy["d0"] == pytest.approx(20_000 * SERVICE_NS / lasted)
    wait = service.latency_ns.mean() - SERVICE_NS
    assert service.device_queue["d0"] == pytest.approx(20_000 / lasted * wait)


def test_lognormal_times_keep_their_mean_and_spread(build) -> None:
    sigma = spread_of(0.8, 1.25)
    service = serve(build([SERVICE_NS]), ONE, in_flight=1, requests=20_000, options=SimulationOptions(spread=sigma))
    logs = np.log(service.latency_ns / SERVICE_NS)
    assert service.mean_ns == pytest.approx(SERVICE_NS, rel=4 * sigma / 18_000**0.5)
    assert logs.std() == pytest.approx(sigma, rel=0.03)
    assert np.mean((logs > np.log(0.8)) & (logs < np.log(1.25))) == pytest.approx(0.9, abs=0.02)


def test_devices_draw_from_streams_of_their_own(build) -> None:
    """Another device in the system leaves the draws of the first as they were."""
    options = SimulationOptions(spread=0.3, seed=9)
    alone = simulate(build([SERVICE_NS]), ONE, options=options)
    both = simulate(build([SERVICE_NS, SERVICE_NS], devices=2), Placement(np.array([0, 1])), options=options)
    first = {s.name: s.end_ns for s in both.spans}
    assert first["o0"] == alone.makespan_ns
    assert first["o1"] != alone.makespan_ns


@pytest.mark.parametrize("router", ["round-robin", "least-busy"])
def test_replicas_multiply_the_throughput(build, router) -> None:
    problem = build([SERVICE_NS], devices=3)
    replicas = [Placement(np.array([k])) for k in range(3)]
    service = serve(problem, replicas, arrivals=at_once(3_000), router=router, warm_up=0)
    assert service.done_ns.max() == 1_000 * SERVICE_NS
    assert all(busy == pytest.approx(1) for busy in service.device_busy.values())


def test_the_better_router_waits_less(build) -> None:
    problem = build([SERVICE_NS], devices=4)
    replicas = [Placement(np.array([k])) for k in range(4)]
    arrivals = poisson(0.8 * 4 * 1e9 / SERVICE_NS, 5_000, 1)
    means = {
        router: serve(problem, replicas, arrivals=arrivals, router=router, options=EXPONENTIAL).mean_ns
        for router in ("round-robin", "least-busy")
    }
    assert means["least-busy"] < means["round-robin"]


def test_arrival_files(tmp_path) -> None:
    path = tmp_path / "arrivals.txt"
    path.write_text("# seconds\n0\n0.5\n\n1.25\n")
    assert read_arrivals(path).tolist() == [0, 500_000_000, 1_250_000_000]
    path.write_text("1\n0.5\nsoon\n")
    with pytest.raises(InputError) as error:
        read_arrivals(path)
    assert len(error.value.problems) == 2
    assert periodic(4.0, 3).tolist() == [0, 250_000_000, 500_000_000]


@pytest.mark.parametrize("seed", [0, 5])
def test_the_same_seed_gives_the_same_stream(build, seed) -> None:
    runs = [serve(build([SERVICE_NS]), ONE, arrivals=poisson(500, 200, seed), options=SimulationOptions(
        spread=0.2, seed=seed)) for _ in range(2)]  # fmt: skip
    assert np.array_equal(runs[0].done_ns, runs[1].done_ns)


def linear_times(prefill: int, decode: int) -> StepTimes:
    grid = np.array([1, 64])
    lengths = np.array([1, 1_000])
    return StepTimes(grid, lengths, prefill * lengths * np.ones((2, 1), dtype=np.int64),
                     np.full((2, 2), decode, dtype=np.int64))  # fmt: skip


def test_generation_of_one_request_is_prefill_and_steps() -> None:
    found = generate(linear_times(10, 7), [5], [100], [9], max_batch=4, cache_bytes=10**6, token_bytes=10)
    assert found.time_to_first_token_ns.tolist() == [1_000]
    assert found.done_ns.tolist() == [5 + 1_000 + 8 * 7]
    assert found.time_between_tokens_ns.tolist() == [7]
    assert found.peak_cache_bytes == 1_090
    assert found.tokens_per_s == pytest.approx(9e9 / 1_056)


def test_batches_share_decoding_steps_and_stall_for_a_prefill() -> None:
    found = generate(linear_times(10, 7), [0, 1_001], [100, 100], [20, 20], max_batch=4, cache_bytes=10**6,
                     token_bytes=10)  # fmt: skip
    assert found.largest_gap_ns[0] == 1_007  # the second prefill, then the step that gives the next token
    assert found.largest_gap_ns[1] == 7
    assert found.steps == 2 + 20  # one step alone before the second joins, then both go on side by side


def test_a_decoding_step_attends_to_what_lies_in_the_cache() -> None:
    """The prompt alone at the first one: the token before it was given by the prefill, and comes with this step."""
    grid, lengths = np.array([1, 2]), np.array([100, 102])
    times = StepTimes(grid, lengths, np.zeros((2, 2), dtype=np.int64), np.array([[7, 9], [7, 9]]))
    found = generate(times, [0], [100], [4], max_batch=1, cache_bytes=10**6, token_bytes=1)
    assert found.done_ns.tolist() == [7 + 8 + 9]


def test_the_cache_limits_the_batch() -> None:
    arguments = {"arrivals": [0] * 6, "prompts": [100] * 6, "answers": [50] * 6, "max_batch": 6, "token_bytes": 10}
    wide = generate(linear_times(1, 100), cache_bytes=9_000, **arguments)
    narrow = generate(linear_times(1, 100), cache_bytes=3_000, **arguments)
    assert (wide.peak_cache_bytes, narrow.peak_cache_bytes) == (9_000, 3_000)
    assert narrow.tokens_per_s < 0.4 * wide.tokens_per_s
    with pytest.raises(InputError, match="more than the cache"):
        generate(linear_times(1, 100), cache_bytes=1_000, **arguments)


KNOBS = {
    "streams": (SimulationOptions(streams=2), "less"),
    "launch": (SimulationOptions(launch_ns=500), "more"),
    "waiting launch": (SimulationOptions(launch_ns=500, asynchronous_launch=False), "more"),
    "copy engine": (SimulationOptions(copy_engines=1), "more"),
    "no copy engine": (SimulationOptions(copy_engines=0), "more"),
    "spread": (SimulationOptions(spread=0.5), "other"),
    "slow device": (SimulationOptions(faults=(Fault("d0", 0, 0.5),)), "more"),
    "fast device": (SimulationOptions(faults=(Fault("d0", 0, 2.0),)), "less"),
}


@pytest.mark.parametrize("knob", KNOBS)
def test_every_knob_moves_the_result_in_its_direction(build, knob) -> None:
    """Two equal branches on one device, each sent to another one; both tensors arrive where both are awaited."""
    problem = build([1_000, 1_000, 1_000, 1_000], [(0, 2, 600), (1, 3, 600)], 3, "none")
    placement = Placement(np.array([0, 0, 1, 2]))
    if "copy" in knob:  # the second output must be ready while the first still leaves
        problem = build([100, 100, 1_000, 1_000], [(0, 2, 600), (1, 3, 600)], 3, "none")
    options, direction = KNOBS[knob]
    before = simulate(problem, placement).makespan_ns
    after = simulate(problem, placement, options=options).makespan_ns
    assert {"less": after < before, "more": after > before, "other": after != before}[direction], (before, after)


@pytest.mark.parametrize(
    "options",
    [
        {"streams": 0},
        {"launch_ns": -1},
        {"copy_engines": -1},
        {"spread": -0.1},
        {"seed": -1},
        {"faults": (Fault("d0", -1),)},
    ],
)
def test_options_out_of_range_are_refused(options) -> None:
    with pytest.raises(InputError):
        SimulationOptions(**options)


@pytest.mark.parametrize("options", [{"launch_ns": 2**60}, {"faults": (Fault("d0", 0, 1e-12),)}])
def test_what_no_clock_could_hold_is_refused(options) -> None:
    with pytest.raises(InputError):
        SimulationOptions(**options)
    with pytest.raises(InputError, match="larger rate"):
        poisson(1e-11, 2)


def test_arrivals_that_begin_late_count_from_the_first(build) -> None:
    """Seconds since 1970, say."""
    late = 1_700_000_000 * 10**9
    service = serve(build([SERVICE_NS]), ONE, arrivals=late + SERVICE_NS * np.arange(5), warm_up=0)
    assert service.throughput_per_s == pytest.approx(1e9 / SERVICE_NS)
    assert service.device_busy["d0"] == pytest.approx(1)


def test_nobody_sends_to_a_device_that_has_failed(build) -> None:
    """Of two replicas that share a sender, the second one's transfers have the link to themselves once d1 is gone."""
    problem = build([1, 1], [(0, 1, 1_000)], 3, "fair")
    replicas = [Placement(np.array([0, 1])), Placement(np.array([0, 2]))]
    options = SimulationOptions(faults=(Fault("d1", 500),))
    service = serve(problem, replicas, arrivals=np.array([0, 0, 3_000, 3_000]), warm_up=0, options=options)
    assert service.done_ns[3] - service.arrival_ns[3] <= 1_003, "the transfer to d1 takes no share of the link"


def test_unknown_resources_are_refused(build) -> None:
    for options in (SimulationOptions(faults=(Fault("d9", 0),)), SimulationOptions(spread={"nobody": 0.1})):
        with pytest.raises(InputError, match=r"d9|nobody"):
            simulate(build([1]), ONE, options=options)


@pytest.mark.parametrize("answered", [0, 5, 10])
def test_fewer_answers_than_the_warm_up_takes_are_no_throughput(build, answered) -> None:
    """Of 100 requests, 10 of them to warm up, the device answers ``answered`` ones and is gone."""
    gone = SimulationOptions(faults=(Fault("d0", answered * SERVICE_NS + 1),))
    service = serve(build([SERVICE_NS]), ONE, arrivals=at_once(100), options=gone)
    assert (service.warm_up, int((service.done_ns >= 0).sum())) == (10, answered)
    assert all(math.isnan(figure) for figure in service.figures().values())
    document = json.loads(json.dumps(service.to_json()))
    assert document["unanswered"] == 100 - answered
    assert math.isnan(document["figures"]["throughput_per_s"])


def test_shares_are_of_the_time_after_warm_up(build) -> None:
    """The first device has done its part of all requests before the slow second one answers half of them."""
    problem = build([SERVICE_NS, 10 * SERVICE_NS], [(0, 1, 1)], 2)
    service = serve(problem, Placement(np.array([0, 1])), arrivals=at_once(100), warm_up=0.5)
    assert service.device_busy["d0"] == 0
    assert service.device_busy["d1"] == pytest.approx(1, abs=0.03)
