"""Execution: what the executor costs a model that is wholly on one device, against a plain session."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.row import Row

ROUNDS = 15
PLAIN_RUNS = 4


def executor_overhead() -> Row:
    """Return how much longer the executor takes than a plain session: the worst of the light models.

    Bursts of both alternate in one worker process, so that a slow spell meets both.
    """
    from moirai_sim.clusters.reader import read_cluster
    from moirai_sim.execution.measure import load_order, load_subject, time_plain, typical_ns
    from moirai_sim.execution.workers import Workers
    from moirai_sim.graphs.light import light_models
    from moirai_sim.graphs.load import load_graph

    found = {}
    with Workers(read_cluster("local-cpu")) as workers:
        device = workers.names[0]
        for name, path in light_models().items():
            graph = load_graph(str(path))
            subject, operators = load_subject(path, graph), list(graph.operators)
            loaded = load_order(workers, subject, dict.fromkeys(operators, device), operators)
            loaded.run()
            subject.load_plain(workers, device)
            plain, ours = [], []
            for _ in range(ROUNDS):
                plain.append(time_plain(workers, [device], PLAIN_RUNS)[device])
                ours.append([run.timed for run in loaded.run_hot()])
            loaded.close()
            found[name.removeprefix("light_")] = typical_ns(ours) / typical_ns(plain) - 1
    worst = max(found.values())
    note = ", ".join(f"{name} {share:+.1%}" for name, share in found.items())
    return Row("executor_overhead", worst * 100, "% of a plain run", "<= 3", worst <= 0.03, note)


BENCHMARKS: dict[str, Callable[[], Row]] = {"executor_overhead": executor_overhead}
