"""CostModel: what an operator costs on a device, with an interval and a flag where the answer is a guess."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from moirai_sim.clusters.cluster import DeviceType
    from moirai_sim.graphs.operator import Operator


@dataclass(frozen=True)
class Prediction:
    """Predicted times of n operators on one device."""

    latency_s: NDArray[np.float64]
    """[n] median estimate, seconds."""
    low_s: NDArray[np.float64]
    """[n] lower end of the 90 % interval, seconds."""
    high_s: NDArray[np.float64]
    """[n] upper end of the 90 % interval, seconds."""
    extrapolated: NDArray[np.bool_]
    """[n] the operator or the device lies outside what the model saw."""
    source: str = "predicted"
    """"measured", "predicted", "data sheet": the kind of evidence behind the numbers."""
    measured: NDArray[np.bool_] | None = None
    """[n] the number is a measurement of that very operator on that very device; None where none is.

    Its interval then is what repeats of the measurement spanned, from the 10th to the 90th percentile."""

    def seconds_by_source(self) -> dict[str, float]:
        """Return the total of the finite times by the kind of evidence behind them."""
        import numpy as np

        seconds = np.where(np.isfinite(self.latency_s), self.latency_s, 0.0)
        if self.measured is None:
            return {self.source: float(seconds.sum())}
        rest = float(seconds[~self.measured].sum())
        return {"measured": float(seconds[self.measured].sum())} | ({self.source: rest} if rest else {})


@runtime_checkable
class CostModel(Protocol):
    """Prices operators. Implementations: the roofline, and the learned models of the catalog."""

    name: str

    @property
    def card(self) -> Mapping[str, object]:
        """Data, licence, hardware, versions, held-out errors, and what the model must not be used for."""

    def predict(self, operators: Sequence[Operator], device: DeviceType) -> Prediction:
        """Return the times of ``operators`` on ``device``; the device need not be one the model saw."""
