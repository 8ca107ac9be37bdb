"""Answers for operators that were measured on the very device, and the learned model for all others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from moirai_sim.clusters.cluster import DeviceType
from moirai_sim.costs.kernels import same_speed
from moirai_sim.costs.model import CostModel, Prediction
from moirai_sim.errors import InputError
from moirai_sim.files import write_whole
from moirai_sim.profiling.schema import operator_key

if TYPE_CHECKING:
    from moirai_sim.graphs.operator import Operator

FILE = "measured.json"
FORMAT = "moirai-sim/measured@1"
Shape = tuple[int, ...]
_Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Times = tuple[_Seconds, _Seconds, _Seconds]
"""Median, 10th and 90th percentile of one operator, seconds."""
_TO_90 = 1.6449 / 1.2816
"""From the reach of those percentiles, in log time, to that of the 5th and the 95th: as of a normal distribution."""


class _Content(BaseModel):
    format: Literal["moirai-sim/measured@1"]
    cpus: dict[str, str]
    devices: dict[str, dict[str, Times]]
    outputs: dict[str, set[Shape]] = {}
    """Older tables have none."""


def key_hash(key: str) -> str:
    """Return the short name under which an `operator_key` is filed."""
    return hashlib.sha256(key.encode()).hexdigest()[:20]


def write_table(
    folder: Path,
    devices: Mapping[str, Mapping[str, Times]],
    cpus: Mapping[str, str],
    outputs: Mapping[str, Set[Shape]],
) -> None:
    """Write the table of measured operators: device -> hash of the operator's key -> times.

    Parameters
    ----------
    folder
        Of the model.
    devices
        The table.
    cpus
        The CPU, as its maker spells it, of devices that are cores of some machine.
    outputs
        By device the shapes that its operators' first outputs have, so that most others need not be looked up; a device
        that is not named has no such list.
    """
    content = {
        "format": FORMAT,
        "cpus": dict(cpus),
        "outputs": {device: sorted(shapes) for device, shapes in sorted(outputs.items())},
        "devices": {
            device: {key: [float(f"{t:.4g}") for t in times] for key, times in sorted(table.items())}
            for device, table in sorted(devices.items())
        },
    }
    write_whole(folder / FILE, json.dumps(content, separators=(",", ":")) + "\n")


def read_table(folder: Path) -> tuple[dict[str, dict[str, Times]], dict[str, str], dict[str, Set[Shape]]]:
    """Return what `write_table` wrote: the table, the CPUs of its devices, and the shapes of their outputs.

    Raises
    ------
    InputError
        If it is broken.
    """
    path = folder / FILE
    try:
        content = _Content.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise InputError(
            f"{path}: {'.'.join(map(str, one['loc'])) or 'content'}: {one['msg']}; calibrate the model again"
            for one in error.errors()
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error}); calibrate the model again") from error
    return content.devices, content.cpus, dict(content.outputs)


class MeasuredModel:
    """A learned model behind a table of measurements. The table answers exact matches only.

    Parameters
    ----------
    learned
        Prices what was not measured.
    folder
        Holds the table.
    sheets
        Data sheets of the devices in the table, by name.

    Raises
    ------
    InputError
        If the table is broken.
    """

    def __init__(self, learned: CostModel, folder: Path, sheets: Mapping[str, DeviceType]) -> None:
        self.learned = learned
        self.name = learned.name
        self.devices, self.cpus, self._outputs = read_table(folder)
        self.sheets = sheets

    @property
    def card(self) -> Mapping[str, object]:
        """Return the card of the model."""
        return self.learned.card

    def predict(self, operators: Sequence[Operator], device: DeviceType) -> Prediction:
        """Return measured times where the same operator was measured on this device, else predicted ones."""
        device = self._same(device)
        table, sheet = self.devices.get(device.name), self.sheets.get(device.name)
        if not table or sheet is None or not same_speed(sheet, device):
            return self.learned.predict(operators, device)
        shapes = self._outputs.get(device.name)
        found = [
            table.get(key_hash(operator_key(operator)))
            if shapes is None or (operator.outputs[0].shape if operator.outputs else ()) in shapes
            else None
            for operator in operators
        ]
        known = np.array([times is not None for times in found], dtype=bool)
        rest = self.learned.predict([op for op, times in zip(operators, found, strict=True) if times is None], device)
        if not known.any():
            return rest
        columns = np.empty((3, len(operators)))
        median, *ends = np.array([times for times in found if times is not None], dtype=np.float64).T
        columns[:, known] = median, *(median * (end / median) ** _TO_90 for end in ends)
        columns[:, ~known] = rest.latency_s, rest.low_s, rest.high_s
        extrapolated = np.zeros(len(operators), dtype=bool)
        extrapolated[~known] = rest.extrapolated
        return Prediction(columns[0], columns[1], columns[2], extrapolated, rest.source, known)

    def _same(self, device: DeviceType) -> DeviceType:
        """Return the measured device that a core of this machine is, where its CPU was measured; else ``device``.

        Virtual machines give many CPUs one name, so the vector units and the level 2 cache must be the same too.
        """
        from moirai_sim.clusters.local import LOCAL_CORE, TORCH_SUFFIX

        suffix = device.name.removeprefix(LOCAL_CORE)
        if not device.name.startswith(LOCAL_CORE) or suffix not in ("", TORCH_SUFFIX):
            return device
        from moirai_sim.profiling.telemetry import cpu_model

        here = cpu_model()
        alike = [self.sheets[name] for name, cpu in self.cpus.items() if cpu == here and name in self.sheets]
        if alike:
            from moirai_sim.profiling.cpu import device_type_name, l2_cache_bytes

            cache = l2_cache_bytes()
            alike = [
                sheet
                for sheet in alike
                if sheet.l2_cache_bytes == cache and sheet.name == device_type_name(sheet.compute_units or 1) + suffix
            ]
        return min(alike, key=lambda sheet: (sheet.compute_units or 1, sheet.name), default=device)
