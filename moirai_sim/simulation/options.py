"""SimulationOptions: how devices differ from the plain ones that run one operator at a time and launch in no time."""

from __future__ import annotations

from dataclasses import dataclass

from moirai_sim.errors import InputError


@dataclass(frozen=True)
class SimulationOptions:
    """Device models of a simulation. The defaults are the meaning of a placement in ``docs/design.md``."""

    streams: int = 1
    """Operators that a device runs at once, each at full speed: parts that do not slow each other down."""
    launch_ns: int = 0
    """Time of the host to launch an operator, ns."""
    asynchronous_launch: bool = True
    """The host of a device launches its operators one after the other, in order of priority, from the arrival of the
    request on, and does not wait for them to run; else a device stands still while its next operator is launched."""
    copy_engines: int | None = None
    """Transfers in which a device takes part at once. 0: it has no copy engine, so that it cannot compute meanwhile.
    None: as many as the network allows."""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises
        ------
        InputError
            With every option that is out of range.
        """
        problems = []
        if self.streams < 1:
            problems.append(f"streams: read {self.streams}; a device runs at least 1 operator at a time")
        if self.launch_ns < 0:
            problems.append(f"launch_ns: read {self.launch_ns}; a launch takes at least 0 ns")
        if self.copy_engines is not None and self.copy_engines < 0:
            problems.append(f"copy_engines: read {self.copy_engines}; give 0 or more, or none at all for no limit")
        if problems:
            raise InputError(problems)


DEFAULT = SimulationOptions()
