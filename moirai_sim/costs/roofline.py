"""The uncalibrated cost model: a data sheet and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moirai_sim.costs.features import roofline_s
from moirai_sim.costs.model import Prediction

if TYPE_CHECKING:
    from moirai_sim.clusters.cluster import DeviceType
    from moirai_sim.graphs.operator import Operator

LAUNCH_S: Mapping[str, float] = {"cpu": 2e-6, "gpu": 5e-6, "npu": 1e-5, "fpga": 1e-5}
"""Time to start a kernel, by kind of device: the order of magnitude that vendors' launch latencies have."""
SLOWEST = 6.0
"""Upper end of the interval: kernels that reach less than a sixth of the roofline are rare but for tiny ones."""


class Roofline:
    """``max(flops / peak, bytes / bandwidth) + launch`` (Williams, Waterman, Patterson, CACM 2009).

    A lower bound on what hardware can do rather than an estimate, so the interval is wide, every price is flagged as
    extrapolated, and the source is "data sheet". Operators that move no byte and compute nothing cost 0.
    """

    name = "roofline"

    @property
    def card(self) -> Mapping[str, object]:
        """Return what the model rests on."""
        return {
            "name": self.name,
            "source": "data sheet",
            "data": "none: the figures of the device file",
            "must not be used for": "absolute times that matter; it was never compared with a measurement here",
        }

    def predict(self, operators: Sequence[Operator], device: DeviceType) -> Prediction:
        """Return the times of ``operators`` on ``device``."""
        flops = np.array([op.flops for op in operators], dtype=np.float64)
        size = np.array([op.read_bytes + op.write_bytes for op in operators], dtype=np.float64)
        dtypes = np.array([op.dtype for op in operators], dtype=str)
        seconds = np.zeros(len(operators))
        for dtype in np.unique(dtypes):
            rows = dtypes == dtype
            seconds[rows] = roofline_s(flops[rows], size[rows], device, str(dtype)) + LAUNCH_S[device.kind]
        seconds[(flops == 0) & (size == 0)] = 0.0
        return Prediction(seconds, seconds.copy(), seconds * SLOWEST, np.ones(len(operators), dtype=bool), "data sheet")
