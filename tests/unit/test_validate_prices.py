"""What is profiled for a study, and where."""

from __future__ import annotations

import os

import pandas as pd
import pytest

import moirai_sim.costs.calibrate
import moirai_sim.profiling.links
import moirai_sim.profiling.operators
import moirai_sim.profiling.schema
from moirai_sim.clusters.cluster import Cluster, Device, DeviceType, Link
from moirai_sim.studies.study import ValidateStudy
from moirai_sim.studies.validate_prices import calibrated

CORE = DeviceType("core", "cpu", 2**33, 1e10, {"float32": 1e11})
GPU = DeviceType("card", "gpu", 2**33, 1e12, {"float32": 1e13})


def test_operators_are_profiled_once_for_each_backend_and_number_of_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    devices = (
        Device("one", CORE, address="cpu:2-5"),
        Device("two", CORE, address="cpu:2-5", threads=2),
        Device("same", CORE, address="cpu:0-1", threads=2),
        Device("torch", CORE, address="cpu:7", backend="torch"),
        Device("card", GPU, address="cuda:1", backend="torch"),
    )
    links = tuple(Link(f"l{d.name}", ("one", d.name), 1e10, 1000) for d in devices[1:])
    profiled = []

    def profile(_models, device, *, backend, budget_s):
        profiled.append((device, backend, budget_s))
        frame = pd.DataFrame()
        frame.attrs["metadata"] = {}
        return frame

    monkeypatch.setattr(moirai_sim.profiling.operators, "profile_operators", profile)
    monkeypatch.setattr(moirai_sim.profiling.links, "profile_links", lambda _: profile([], "", backend="", budget_s=0))
    monkeypatch.setattr(moirai_sim.profiling.schema, "write_profile", lambda *_, **__: None)
    fitted = []
    monkeypatch.setattr(moirai_sim.costs.calibrate, "calibrate", lambda profiles, *_, **__: fitted.extend(profiles))
    study = ValidateStudy(kind="validate", name="s", models=["m.onnx"], clusters=["c"], calibrate="8 s")
    calibrated(Cluster("c", devices, links), [str(zoo_file(tmp_path))], study, tmp_path)
    assert profiled[1:] == [
        ("cpu:2-2", "onnxruntime", pytest.approx(2)), ("cpu:2-3", "onnxruntime", pytest.approx(2)),
        ("cpu:7-7", "torch", pytest.approx(2)), ("cuda:1", "torch", pytest.approx(2)),
    ]  # fmt: skip
    assert len(set(fitted)) == 5


def zoo_file(folder):
    from onnx import TensorProto, helper, save

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"], "n")], "g", ends[:1], ends[1:])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), folder / "m.onnx")
    return folder / "m.onnx"
