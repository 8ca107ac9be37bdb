"""What a validation study measures of a model: the placements of policies, each once, and why others gave none."""

from __future__ import annotations

import os

import numpy as np
import pytest

from moirai_sim import placement
from moirai_sim.clusters.cluster import Cluster, Device, DeviceType, Link
from moirai_sim.placement import Placement
from moirai_sim.problem import PlacementProblem
from moirai_sim.studies.in_place import Priced, priced_as_it_is
from moirai_sim.studies.study import ValidateStudy
from moirai_sim.studies.validate import _candidates


@pytest.fixture
def priced() -> Priced:
    """A fork and join that fits no single device."""
    kind = DeviceType("core", "cpu", 20, 1e10, {"float32": 1e11})
    core = min(os.sched_getaffinity(0))
    devices = tuple(Device(name, kind, address=f"cpu:{core}") for name in ("c0", "c1"))
    cluster = Cluster("two", devices, (Link("l", ("c0", "c1"), 1e9, 5),))
    problem = PlacementProblem(
        name="fork", operators=tuple("abcd"), operator_ns=np.array([[10], [30], [30], [10]]),
        weight_bytes=np.array([4, 8, 8, 4]), devices=("c0", "c1"), device_type=np.array([0, 0]),
        memory_bytes=np.array([20, 20]), edges=np.array([[0, 1], [0, 2], [1, 3], [2, 3]]),
        edge_tensor=np.array([0, 0, 1, 2]), tensor_bytes=np.array([8, 8, 8]),
        route_class=np.array([[-1, 0], [0, -1]]), transfer_ns=np.array([[3], [3], [3]]), cluster=cluster,
    )  # fmt: skip
    return priced_as_it_is(problem, cluster)


def study(*policies: str) -> ValidateStudy:
    return ValidateStudy(kind="validate", models=["fork"], policies=list(policies), random_placements=0)


def test_policies_without_an_answer_are_kept_with_their_status_and_reason(priced: Priced):
    found, refused = _candidates(priced, study("single", "heft", "no-such-policy"))
    assert [candidate.name for candidate in found] == ["heft"]
    assert {policy: outcome["status"] for policy, outcome in refused.items()} == {
        "single": "limit",
        "no-such-policy": "error",
    }
    assert refused["single"]["reason"]
    assert "unknown policy" in refused["no-such-policy"]["error"]


def test_a_placement_without_an_order_is_another_than_those_with_one(priced: Priced, monkeypatch: pytest.MonkeyPatch):
    inner, free = placement.placement_from_timeline, []

    def last_is_free(problem: PlacementProblem, timeline: object) -> Placement:
        found = inner(problem, timeline)
        free.append(len(free) == 1)
        return Placement(found.device) if free[-1] else found

    monkeypatch.setattr(placement, "placement_from_timeline", last_is_free)
    found, _ = _candidates(priced, study("heft", "heft"))
    assert [one.placement.order is None for one in found] == [False, True]
