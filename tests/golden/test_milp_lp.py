"""Each family of constraints of the MILP, as reviewed by eye, for one tiny problem a network."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moirai_sim.policies.milp_lp import lp_text
from moirai_sim.policies.milp_model import MilpModel
from moirai_sim.problem import PlacementProblem

GOLDEN = Path(__file__).parent / "milp"


def _problem() -> PlacementProblem:
    """Two producers a, b of one consumer c; a also feeds d on a tensor shared with c; two devices."""
    return PlacementProblem(
        name="golden",
        operators=("a", "b", "c", "d"),
        operator_ns=np.array([[4, 6], [5, 3], [2, 2], [7, -1]]),
        weight_bytes=np.array([3, 1, 2, 4]),
        devices=("p", "q"),
        device_type=np.arange(2),
        memory_bytes=np.array([8, 6]),
        edges=np.array([[0, 2], [0, 3], [1, 2]]),
        edge_tensor=np.array([0, 0, 1]),
        tensor_bytes=np.array([-1, -1]),
        route_class=np.array([[-1, 0], [1, -1]]),
        transfer_ns=np.array([[3, 2], [1, 4]]),
        colocation=np.array([-1, 0, 0, -1]),
    )


CASES = {
    "one-port": [
        "operator_completion", "transfer_completion", "assignment", "precedence", "sent_after", "received_before",
        "memory", "colocation", "route", "leaves_its_producer", "reaches_a_consumer", "makespan", "load", "same_device",
        "operator_order", "same_send", "same_receive", "transfer_order",
    ],
    "half-duplex": ["same_port"],
    "throughput": ["port_load"],
    "equal devices": ["interchangeable"],
}  # fmt: skip


def _model(case: str) -> MilpModel:
    if case == "throughput":
        return MilpModel(_problem(), 30, "throughput")
    if case == "equal devices":
        same = replace(
            _problem(),
            operator_ns=np.array([[4], [5], [2], [7]]),
            device_type=np.zeros(2, dtype=np.int64),
            memory_bytes=np.array([8, 8]),
            transfer_ns=np.array([[3, 3], [1, 1]]),
        )
        return MilpModel(same, 30, "throughput")
    return MilpModel(replace(_problem(), network=case), 30)


@pytest.mark.parametrize(("case", "family"), [(n, f) for n, families in CASES.items() for f in families])
def test_family_is_as_reviewed(case: str, family: str) -> None:
    text = lp_text(_model(case), [family])
    path = GOLDEN / f"{family}.lp"
    if os.environ.get("MOIRAI_SIM_UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


def test_every_family_has_a_golden_file() -> None:
    families = {family for case in CASES for family in _model(case).families}
    assert families == {path.stem for path in GOLDEN.glob("*.lp")} == {f for fs in CASES.values() for f in fs}


def test_without_contention_nothing_is_said_of_ports() -> None:
    families = MilpModel(_problem().with_network("none"), 30).families
    assert not families.keys() & {"same_send", "same_receive", "same_port", "transfer_order"}
