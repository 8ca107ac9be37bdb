"""GPUs as NVML tells of them, here a stand-in for it: a board that is lost spoils nothing."""

import sys
from types import SimpleNamespace

import pytest

from moirai_sim.profiling import telemetry


class NVMLError(Exception):
    """What every function of NVML raises."""


def _refuses(*_):
    raise NVMLError


def _handle(index):
    return index if index == 0 else _refuses()


@pytest.fixture
def nvml(monkeypatch):
    module = SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlShutdown=_refuses,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=_handle,
        nvmlDeviceGetName=lambda _: b"Some Board",
        nvmlDeviceGetPowerUsage=lambda _: 70_000,
        nvmlDeviceGetTemperature=_refuses,
        nvmlSystemGetDriverVersion=_refuses,
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def test_a_board_that_does_not_answer_is_listed_beside_the_others(nvml):
    good, lost = telemetry.gpu_snapshot()
    assert (good["model"], good["power_w"], good["temperature_c"], good["driver"]) == ("Some Board", 70, None, None)
    assert {key for key, value in lost.items() if value is not None} == {"index"}


def test_without_a_count_there_is_no_board(nvml):
    nvml.nvmlDeviceGetCount = _refuses
    assert telemetry.gpu_snapshot() == []


def test_doctor_names_the_boards(cli, nvml):
    assert "Some Board, GPU 1 (does not answer)" in cli("doctor").out
