"""Streams of requests: throughput of replicas and pipelines over the fastest device alone."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.row import Row
from moirai_sim.clusters.reader import read_cluster
from moirai_sim.placement import placement_from_timeline
from moirai_sim.policies.base import Request
from moirai_sim.policies.cycles import best_cycle, whole_models
from moirai_sim.policies.loads import best_single_device, period_ns
from moirai_sim.policies.run import place
from moirai_sim.simulation.workloads import serve
from moirai_sim.sources import load_problem

REPLICAS = 3
SECONDS = 20.0
STREAM = 300
"""Requests of the simulated stream; eight a placement are in flight."""


def _stream(name: str, model: str) -> Callable[[], Row]:
    def run() -> Row:
        problem = load_problem(model, read_cluster("diviml-server"), network="one-port")
        alone = best_single_device(problem)
        copies = best_cycle(problem, whole_models(problem), REPLICAS)
        if alone is None or copies is None:
            raise RuntimeError("the model fits no device")
        request = Request(objective="throughput", time_limit_s=SECONDS, replicas=REPLICAS)
        timeline = place(problem, "diviml", request)
        served = serve(problem, placement_from_timeline(problem, timeline), in_flight=8 * REPLICAS, requests=STREAM)
        gain = alone[1] / timeline.objective_ns
        by_copies = alone[1] / period_ns(problem, copies.devices)
        reached = served.throughput_per_s * alone[1] / 1e9
        note = (
            f"proven bound {alone[1] / timeline.lower_bound_ns:.3g}; copies of the model {by_copies:.3g}; "
            f"{len(timeline.cycle)} placements; a simulated stream reaches {reached:.3g}"
        )
        return Row(name, gain, "times one device", f">= {by_copies:.3g} (copies)", gain >= by_copies, note)

    return run


BENCHMARKS: dict[str, Callable[[], Row]] = {
    "stream-ws-32": _stream("stream-ws-32", "zoo:ws-32?seed=1"),
    "stream-inception": _stream("stream-inception", "zoo:inception-v3"),
}
