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

SOURCES = ("measured", "predicted", "extrapolated", "data sheet")
"""What a time may rest on: a measurement of that operator on that device, a model that saw its like, a model that did
not, or the limits of a data sheet."""


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

    Its interval then is what nine of ten repeats of the measurement took, by their 10th and 90th percentiles."""

    def sources(self) -> NDArray[np.uint8]:
        """Return [n] what each number rests on, as positions in `SOURCES`."""
        import numpy as np

        found = np.full(len(self.latency_s), SOURCES.index(self.source), dtype=np.uint8)
        if self.source == "predicted":
            found[self.extrapolated] = SOURCES.index("extrapolated")
        if self.measured is not None:
            found[self.measured] = SOURCES.index("measured")
        return found


@runtime_checkable
class CostModel(Protocol):
    """Prices operators. Implementations: the roofline, and the learned models of the catalog."""

    name: str

    @property
    def card(self) -> Mapping[str, object]:
        """Data, licence, hardware, versions, held-out errors, and what the model must not be used for."""

    def predict(self, operators: Sequence[Operator], device: DeviceType) -> Prediction:
        """Return the times of ``operators`` on ``device``; the device need not be one the model saw."""
