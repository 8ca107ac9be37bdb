"""What is timed on a GPU, on one that is not here: streams with clocks of their own stand in for it."""

import json
import math
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from moirai_sim.errors import InputError
from moirai_sim.profiling import telemetry

pytest.importorskip("torch", reason="PyTorch is not installed; pip install 'moirai-sim[torch]'")

import torch

from moirai_sim.graphs.work import make_operator
from moirai_sim.profiling.backends import torch as backend


class Gpu:
    """A host that enqueues, and streams of a device that follow in order; clocks in seconds."""

    def __init__(self):
        self.host, self.ends, self.current = 0.0, {}, None
        self.cuda = SimpleNamespace(
            Event=lambda **_: Event(self), Stream=lambda: Stream(self), stream=self.stream,
            _sleep=lambda cycles: self.launch(2e-6, cycles / 1.5e9), get_device_capability=lambda _: self.level,
        )  # fmt: skip

    def launch(self, host_s, device_s):
        self.host += host_s
        self.ends[self.current] = max(self.now(), self.host) + device_s

    def now(self):
        return max(self.ends.get(self.current, 0.0), self.host)

    def wait(self):
        self.host = max(self.host, *self.ends.values(), 0.0)

    @contextmanager
    def stream(self, used):
        before, self.current = self.current, used
        yield
        self.current = before


class Stream:
    def __init__(self, gpu):
        self.gpu = gpu

    def wait_event(self, event):
        self.gpu.ends[self] = max(self.gpu.ends.get(self, 0.0), event.at)


class Event:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.at = self.gpu.now()

    def query(self):
        return self.at <= self.gpu.host

    def synchronize(self):
        self.gpu.host = max(self.gpu.host, self.at)

    def elapsed_time(self, other):
        return (other.at - self.at) * 1e3


@pytest.fixture
def gpu(monkeypatch):
    made = Gpu()
    monkeypatch.setattr(backend, "time", SimpleNamespace(perf_counter=lambda: made.host))
    return made


def device_on(gpu, level=(9, 0)):
    device = backend.TorchDevice("cpu:0")
    device.kind, device.synchronize, device.torch, gpu.level = "cuda", gpu.wait, gpu, level
    return device


@pytest.mark.parametrize("device_s", [1e-6, 2e-5, 1e-3])
def test_a_kernel_shorter_than_its_launch_does_not_wait_for_the_host(gpu, device_s):
    samples, launch_s = device_on(gpu)._time(lambda: gpu.launch(1e-5, device_s), 0.1)
    assert samples == pytest.approx(device_s)
    assert launch_s == pytest.approx(1e-5)
    assert len(samples) >= 5


def test_a_call_that_waits_for_the_device_is_timed_whole(gpu):
    def copy():
        gpu.wait()
        gpu.launch(1e-6, 1e-3)
        gpu.wait()

    assert device_on(gpu).time(copy, 0.1) == pytest.approx(1e-3, rel=0.01)


class EnergyCounter:
    """300 W, told in steps of 0.1 s."""

    def __init__(self, gpu):
        self.gpu = gpu

    def energy_j(self):
        return 300 * 0.1 * math.floor(self.gpu.host / 0.1)


def test_energy_of_one_call_is_power_times_its_time(gpu):
    device = device_on(gpu)
    assert math.isnan(device.energy(lambda: None, 1e-3))
    device.board = EnergyCounter(gpu)
    assert device.energy(lambda: gpu.launch(1e-6, 1e-3), 1e-3) == pytest.approx(0.3, rel=0.06)
    device.board = SimpleNamespace(energy_j=lambda: 5.0)
    assert math.isnan(device.energy(lambda: gpu.launch(1e-6, 1e-3), 1e-3))


@pytest.mark.parametrize(
    ("level", "wanted"),
    [((7, 5), {"float32"}), ((8, 6), {"float32", "tf32", "bfloat16", "int8"}),
     ((9, 0), {"float32", "tf32", "bfloat16", "int8", "float8"})],
)  # fmt: skip
def test_only_data_types_that_a_gpu_multiplies_have_a_rate(gpu, level, wanted):
    device = device_on(gpu, level)

    def timed(product, _):
        if product.dtype == "float16":
            raise backend.Unsupported("one failure does not end the others")
        return np.array([1e-3])

    device.time_operator = timed
    assert set(device._product_rates()) == wanted
    device.time_operator = lambda *_: (_ for _ in ()).throw(backend.Unsupported("none"))
    with pytest.raises(InputError, match="8192 x 8192"):
        device._product_rates()


def test_a_range_of_cores_is_as_many_threads():
    before = torch.get_num_threads()
    try:
        device = backend.TorchDevice("cpu:2-3")
        assert (device.threads, torch.get_num_threads()) == (2, 2)
    finally:
        torch.set_num_threads(before)
    for name in ("cpu:3-2", "cpu:x", "cuda:0-1"):
        with pytest.raises(InputError, match="cpu:FIRST-LAST"):
            backend.TorchDevice(name)


def test_energy_is_read_of_every_so_manieth_operator(monkeypatch):
    device, asked = backend.TorchDevice("cpu:0"), []
    relu = make_operator("relu", "Relu", [(4, 4)], [(4, 4)])

    def measured(_operator, _budget_s, *, energy):
        asked.append(energy)
        return backend.Measured(np.ones(5), math.nan, 2.0 if energy else math.nan)

    monkeypatch.setattr(device, "measure_operator", measured)
    frame, _ = backend.profile_graph_operators(device, [relu] * 5, 1.0, energy_every=2)
    assert asked == [True, False, True, False, True]
    assert frame["energy_j"].notna().tolist() == asked


class Nvml:
    """Two boards whose order is not that of CUDA."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    UUIDS = (b"GPU-aa", b"GPU-bb")

    class NVMLError(Exception):
        pass

    def __init__(self, boards=2):
        self.boards, self.reads = boards, 0

    def nvmlInit(self):
        pass

    def nvmlDeviceGetCount(self):
        return self.boards

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid not in self.UUIDS:
            raise self.NVMLError
        return self.UUIDS.index(uuid)

    def nvmlSystemGetDriverVersion(self):
        return b"570.1"

    def nvmlDeviceGetName(self, handle):
        return f"board {handle}"

    def nvmlDeviceGetClockInfo(self, _handle, _which):
        self.reads += 1
        return 1000 + self.reads

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, _handle):
        return 1 << (self.reads // 2 % 2)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return 1000 * (handle + 1)


@pytest.mark.parametrize("uuid", ["bb", "GPU-bb"])
def test_a_board_is_known_by_its_uuid(monkeypatch, uuid):
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    state = telemetry.board(uuid).state()
    assert (state["model"], state["driver"], state["energy_j"], state["power_w"]) == ("board 1", "570.1", 2.0, None)
    assert [one["index"] for one in telemetry.gpu_snapshot()] == [0, 1]


def test_a_board_that_is_not_known_is_not_guessed(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    assert telemetry.board("cc") is telemetry.board("") is telemetry.board(None) is None
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(boards=1))
    assert telemetry.board("cc").state()["model"] == telemetry.board(None).state()["model"] == "board 0"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert telemetry.board("aa") is None
    assert telemetry.gpu_snapshot() == []


def test_a_board_is_watched_while_a_block_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    with telemetry.Watch(telemetry.board("aa"), every_s=0.001) as watch:
        while len(watch._samples) < 5:
            time.sleep(0.001)
    found = watch.summary()
    assert found["samples"] >= 5
    low, middle, high = found["sm_clock_mhz"]
    assert low < middle < high
    assert found["throttle_reasons"] == 3
    assert found["power_w"] is None
    with telemetry.Watch(None) as nothing:
        pass
    assert nothing.summary() == {}


@pytest.fixture
def sweep(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "experiments" / "profiles"))
    import sweep

    return sweep


def sheet(dtypes):
    return SimpleNamespace(memory_bytes=1 << 60, peak_flops=dict.fromkeys(dtypes, 1e12))


def test_every_data_type_meets_small_and_large_sides_alike(sweep):
    chosen = sweep.design(2000, 0, SimpleNamespace(kind="cuda", torch=torch), sheet(sweep.CUDA_DTYPES))
    products = [op for op in chosen if op.name == "matmul" and op.dtype in sweep.CUDA_DTYPES]
    cells = Counter((op.dtype, op.inputs[0].shape[0] < 128, op.inputs[1].shape[1] < 128) for op in products)
    assert len(cells) == 4 * len(sweep.CUDA_DTYPES)
    assert min(cells.values()) > 0.3 * max(cells.values())


def test_only_data_types_that_the_device_has_are_drawn(sweep):
    chosen = sweep.design(200, 0, SimpleNamespace(kind="cuda", torch=torch), sheet(("float32", "float16")))
    assert {op.dtype for op in chosen} == {"float32", "float16", "int8"}


def test_prefill_is_drawn_with_and_without_a_causal_mask_and_decoding_without(sweep):
    chosen = sweep.design(2000, 0, SimpleNamespace(kind="cuda", torch=torch), sheet(sweep.CUDA_DTYPES))
    drawn = Counter(
        (op.inputs[0].shape[2] > 1, op.attributes.get("is_causal", 0)) for op in chosen if op.op_type == "Attention"
    )
    assert set(drawn) == {(True, 0), (True, 1), (False, 0)}
    assert abs(drawn[True, 0] - drawn[True, 1]) < 0.3 * drawn[False, 0]


def test_rows_that_are_there_are_not_measured_again(sweep, tmp_path):
    path, seen = tmp_path / "rows.json", []

    def measure(rows, number, error=None):
        def figures():
            seen.append(number)
            if error:
                raise error
            return {"value": number}

        rows.measure({"number": number, "shape": [number]}, figures)

    def nothing():
        pass

    rows = sweep.sections.Rows(path, 60, nothing)
    measure(rows, 1)
    measure(rows, 2, RuntimeError("out of memory"))
    with pytest.raises(KeyboardInterrupt):
        measure(rows, 3, KeyboardInterrupt())
    rows = sweep.sections.Rows(path, -1, nothing)
    measure(rows, 1)
    measure(rows, 4)
    rows = sweep.sections.Rows(path, 60, nothing)
    for number in (1, 2, 3, 4):
        measure(rows, number)
    assert seen == [1, 2, 3, 4]
    assert [row.get("value", row.get("error")) for row in json.loads(path.read_text())] == [
        1, "RuntimeError: out of memory", "ended the process", 4
    ]  # fmt: skip

    def broken():
        raise RuntimeError("the device takes no more work")

    rows = sweep.sections.Rows(path, 60, broken)
    with pytest.raises(RuntimeError, match="no more work"):
        measure(rows, 5, RuntimeError("illegal address"))


def test_whole_models_are_compiled_last_and_keep_their_data_type(sweep, monkeypatch):
    labels, backends = [], SimpleNamespace(cuda=SimpleNamespace(matmul=SimpleNamespace()), cudnn=SimpleNamespace())
    device = SimpleNamespace(kind="cuda", torch=SimpleNamespace(backends=backends))
    monkeypatch.setattr(sweep.sections, "networks", lambda *_, **__: {"a": ([], ()), "b": ([], ())})
    sweep.sections.whole_models(device, SimpleNamespace(measure=lambda label, *_, **__: labels.append(label)), 1.0)
    modes = [label["mode"] for label in labels]
    assert modes == sorted(modes, key=["eager", "eager-cuda-graph", "compiled", "compiled-cuda-graph"].index)
    assert {(label["model"], label["batch"]) for label in labels[:6]} == {(m, b) for m in "ab" for b in (1, 8, 32)}
    assert backends.cuda.matmul.allow_tf32 is backends.cudnn.allow_tf32 is False


@pytest.mark.parametrize("copy_s", [5e-6, 0.05])
def test_a_copy_is_timed_while_kernels_run(gpu, sweep, monkeypatch, copy_s):
    monkeypatch.setattr(sweep.sections, "time", backend.time)
    gpu.empty_like, gpu.mm = (lambda _: None), (lambda left, _, out: gpu.launch(5e-6, left[0] ** 3 / 1e14))
    device = device_on(gpu)
    device.tensor = lambda shape, _: shape
    busy, running = sweep.sections._Busy(device), []

    def copy(seconds):
        gpu.launch(1e-5, seconds)
        running.append(max(gpu.ends.values()) > gpu.ends[gpu.current])
        gpu.host = gpu.ends[gpu.current]  # as a copy of pageable memory does

    assert busy.times(lambda: copy(copy_s)) == pytest.approx([copy_s] * 7, rel=0.01, abs=1e-5)
    assert all(running[-7:])
    with pytest.raises(RuntimeError, match="outlasts"):
        busy.times(lambda: copy(10.0))


def test_operators_of_a_network_are_those_that_pytorch_calls(sweep):
    found = sweep.networks(torch, small=True)
    stages, shape = found["resnet"]
    called = sweep.called(torch, stages, torch.randn(2, *shape))
    assert Counter(operator.op_type for operator in called) == {
        "Conv": 9, "BatchNormalization": 9, "Relu": 7, "Add": 2, "MaxPool": 1, "GlobalAveragePool": 1, "Gemm": 1
    }  # fmt: skip
    assert called[0].attributes["strides"] == [2, 2]
    stages, shape = found["gpt2"]
    masks = [op.attributes for op in sweep.called(torch, stages, torch.randn(2, *shape)) if op.op_type == "Attention"]
    assert masks == [{"is_causal": 1}] * 2


def test_sums_of_operators_stand_beside_the_whole(sweep):
    sums = {"bert?batch=8": {"operators_s": 0.9}, "gpt2?batch=8": {"operators_s": 2.0}}
    rows = [{"model": "bert", "batch": 8, "mode": "eager", "median_s": 1.0},
            {"model": "bert", "batch": 8, "mode": "compiled", "error": "no time left"},
            {"model": "resnet", "batch": 8, "mode": "eager", "median_s": 1.0}]  # fmt: skip
    sweep._compare({"real": {"sums": sums}, "whole-models": {"rows": rows}})
    assert sums["bert?batch=8"] == {"operators_s": 0.9, "eager_s": 1.0, "eager_ratio": 0.9}
    assert sums["gpt2?batch=8"] == {"operators_s": 2.0}
    sweep._compare({"real": {"error": "did not end"}, "whole-models": {"error": "did not end"}})
