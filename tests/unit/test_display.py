"""What a notebook shows."""

from moirai_sim.clusters.reader import read_cluster
from moirai_sim.graphs.load import load_graph
from moirai_sim.policies.base import Request
from moirai_sim.policies.run import place
from moirai_sim.sources import build_problem


def test_nouns_show_their_figures():
    graph, cluster = load_graph("zoo:ws-32?seed=1"), read_cluster("diviml-server")
    timeline = place(build_problem(graph, cluster), "heft", Request())
    assert f"{len(graph):,}" in graph._repr_html_()
    assert "1 x nvidia-t4" in cluster._repr_html_()
    page = timeline._repr_html_()
    assert page.count("<rect") == len(timeline.spans)
    assert all(f">{device}</text>" in page for device in set(timeline.placement.values()))
