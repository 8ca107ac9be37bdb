"""What the operators of a model take where they run, and what one more part costs.

On one device the model runs whole, in a plain session, and cut at every kernel, in parts as the executor makes them.
Every kernel is then timed with the inputs, the layout and the caches that it has in the model. What a part costs (one
more call of the backend, other memory, what is cold then) shows beside a run in larger parts. The small parts run after
a rest, too: what their beginning takes longer then is what a device pays that has waited for others.

Kernels run once more with the next one always on another device. How much longer they take there than on one device is
what it costs to read what another core has written, and how long they wait for it, beyond what lies between two parts
on one device, is what it takes to hand a tensor over. Only kernels are timed so: how long the model takes, and so how
parts on several devices play together, is left for the simulator to predict.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import chain, cycle, pairwise
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from moirai_sim.execution.carrying import Carrying, CarryingTimer, carrying
from moirai_sim.execution.measure import PATIENCE_S, covered_operators, load_order, time_plain, typical_ns

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from moirai_sim.execution.measure import Crew, Loaded, Run, Subject, Timed
    from moirai_sim.execution.split import Executed, Part

ROUNDS = 5
"""So many tell a model's times well enough where nothing else is measured beside them."""
_PLAIN_RUNS, _PLAIN_NS = 6, 300_000_000
"""Runs of a plain session in a round: fewer where they take longer, but at least two."""
_REST_NS = 10_000_000
"""After this long, caches are as cold as they get: see `moirai_sim.simulation.corrections.COOLING_NS`."""
_ALIKE = 0.1
"""By how much the model may take longer or shorter in rounds that are alike, run so that every tensor crosses."""
_HEAD_NS = 2_000_000
"""So much of a run, from its beginning, shows what is cold; all of a long one would hide it behind its noise."""


@dataclass(frozen=True)
class Crossing:
    """What a tensor of the model costs a device that another one has written."""

    exchange_ns: int
    """By how much more lies between two parts of a device that hands tensors over and takes them; at least 0."""
    hand_over_ns: int
    """From the end of the kernel that writes it to the start of the one that waits for it, beyond what lies between two
    such parts; at least 0."""
    read_ns_per_byte: float
    """By how much longer the kernel takes that reads it; at least 0."""


@dataclass(frozen=True)
class Cuts:
    """Times of one model on one device."""

    operator_ns: Mapping[str, int]
    """The user's operators that have a kernel; they add up to ``whole_ns``."""
    whole_ns: int
    """The model in a plain session."""
    part_ns: int
    """Of one more part, at least 0."""
    split_share: float
    """By how much longer operators take on a device that runs many parts, as a share; at least 0."""
    split_parts: int
    """So many parts; with fewer, operators take longer by a part of it, with one not at all."""
    cold_ns: int
    """Of a start after a long rest, at least 0."""
    crossing: Crossing | None
    """What it costs that a tensor comes from another device; None where that was not timed."""


class InPlace:
    """Times a model whole and cut at every kernel, in turn, so that a slow spell of the machine meets both.

    Rounds can be taken between runs of placements: then a slow spell meets these too.

    Parameters
    ----------
    workers
        Running workers.
    subject
        The model.
    kind
        Of each of the workers' devices, the one whose times serve for it: devices of a kind are equal.
    patience_s
        How long to look for undisturbed runs of each, which alone count then; 0 takes the machine as it comes.
    network
        Whether a network lies between the devices: then not tensors that cross are timed, but what it costs a core to
        send and receive them.
    """

    def __init__(
        self,
        workers: Crew,
        subject: Subject,
        kind: Mapping[str, str],
        *,
        patience_s: float = PATIENCE_S,
        network: bool = False,
    ) -> None:
        self.workers, self.subject, self.kind, self.patience_s = workers, subject, kind, patience_s
        devices = list(dict.fromkeys(kind.values()))
        operators = list(subject.graph.operators)
        self._loaded = {
            name: load_order(workers, subject, dict.fromkeys(operators, name), operators, most_kernels=1)
            for name in devices
        }
        self._crossing: dict[tuple[str, str], Loaded] = {}
        for name in () if network else devices:
            other = next((other for other in workers.apart if other != name), None)
            if other is not None and name in workers.apart:
                loaded = self._alternating(name, other)
                if len(loaded.participants) == 2:
                    self._crossing[name, other] = loaded
                else:  # the kernels of one operator have nothing to cross
                    loaded.close()
        self._carrying = CarryingTimer(workers, *workers.apart[:2]) if network and len(workers.apart) > 1 else None
        self._coarse: dict[str, Loaded] = {}
        for name, loaded in self._loaded.items():
            size = max(2, math.isqrt(len(loaded.parts)))
            device = dict.fromkeys(operators, name)
            self._coarse[name] = load_order(workers, subject, device, operators, most_kernels=size)
        for loaded in self._all():
            loaded.run()
        self.forget()

    def forget(self) -> None:
        """Begin anew: the machine may have changed its speed."""
        self._rounds: list[_Found] = []
        self._alternating_ns: list[float] = []  # of each round: the model with every tensor crossing, all pairs
        self._carried: list[dict[str, list[Timed]]] = []  # of each round
        self._head: dict[str, int] = {}  # last part of the beginning

    @property
    def count(self) -> int:
        """Rounds so far."""
        return len(self._rounds)

    def round(self) -> None:
        """Time everything once."""
        names = self.workers.names
        longest = max((self._typical("whole", name) for name in names), default=1.0) if self._rounds else 1.0
        runs = int(max(2, min(_PLAIN_RUNS, _PLAIN_NS / longest)))
        found: _Found = defaultdict(list)
        for name in names:
            self.subject.load_plain(self.workers, name)  # anew: where a session's memory lies makes a percent or two
            times = time_plain(self.workers, [name], runs, patience_s=self.patience_s)[name]
            found["whole", name].append(times)
        apart = self.workers.apart
        for name, times in time_plain(self.workers, apart, runs, patience_s=self.patience_s).items():
            found["together", name].append(times)
        for device, loaded in self._loaded.items():
            burst = loaded.run_hot(patience_s=self.patience_s)
            rested = loaded.run_hot(patience_s=self.patience_s, rest_ns=_REST_NS)
            ends = [end - burst[0].origin for *_, end in burst[0].records[device].runs]
            head = self._head.setdefault(device, min(bisect_left(ends, _HEAD_NS), len(ends) - 1))
            for figure, runs_of in (("hot", burst), ("cold", rested)):  # the beginning, run after run and after a rest
                found[figure, device].append(
                    [(run.records[device].runs[head][-1] - run.origin, run.disturbed) for run in runs_of]
                )
            found["small parts", device].append([run.timed for run in burst])
            kernels: dict[int, list[Timed]] = defaultdict(list)
            for run in burst:
                for _, part, _, start, end in run.records[device].runs:
                    kernels[part].append((end - start, run.disturbed))
            for part, times in kernels.items():
                found["kernel", device, part].append(times)
            found["between", device].append([(_mean_gap(run.records[device].runs), run.disturbed) for run in burst])
        for device, loaded in self._coarse.items():
            found["large parts", device].append([run.timed for run in loaded.run_hot(patience_s=self.patience_s)])
        alternating = 0.0
        for pair, loaded in self._crossing.items():
            burst = loaded.run_hot(patience_s=self.patience_s)
            alternating += typical_ns([[run.timed for run in burst]], quiet=self.patience_s > 0)
            self._time_crossing(found, pair, loaded, burst)
        if self._carrying is not None:
            self._carried.append(self._carrying.time(self.patience_s))
        self._rounds.append(found)
        self._alternating_ns.append(alternating)

    def _time_crossing(self, found: _Found, pair: tuple[str, str], loaded: Loaded, burst: Sequence[Run]) -> None:
        """Book what kernels took whose neighbours are on another device, and what it took to wait for these."""
        of = {name: [part for part in loaded.parts if part.device == name] for name in pair}
        for name in pair:
            took: dict[_Kernel, list[Timed]] = defaultdict(list)
            exchanging: list[Timed] = []  # between parts of a device that takes and sends, the mean of a run
            handed: list[Timed] = []  # over to a device that waits, the mean of a run
            for run in burst:
                written = {
                    tensor: end
                    for other in pair
                    for part, (*_, end) in zip(of[other], run.records[other].runs, strict=True)
                    for tensor in part.outputs
                }
                free, gaps, waits = run.origin, [], []
                for part, (*_, start, end) in zip(of[name], run.records[name].runs, strict=True):
                    took[_kernel(loaded.executed, part)].append((end - start, run.disturbed))
                    last = max((written[tensor] for tensor in part.awaits), default=free)
                    if last > free:  # the device stood still for it
                        waits.append(start - last)
                    else:
                        gaps.append(start - free)
                    free = end
                for means, spans in ((exchanging, gaps), (handed, waits)):
                    if spans:
                        means.append((round(float(np.mean(spans))), run.disturbed))
            kind = self.kind[name]
            for kernel, times in took.items():
                found["across", kind, kernel].append(times)
            if exchanging and handed:
                found["exchanging", kind].append(exchanging)
                found["handed", kind].append(handed)

    def alike(self) -> list[bool]:
        """Return which rounds ran while tensors crossed as fast as in most of them.

        The host of a virtual machine may move a core to another cache: then the same crossings take several times as
        long, for minutes, and nothing else tells.
        """
        took = self._alternating_ns
        like = [[abs(other - one) <= _ALIKE * one for other in took] for one in took]
        return max(zip(like, took, strict=True), key=lambda known: (sum(known[0]), -known[1]), default=([], 0))[0]

    def contention(self) -> float:
        """Return how much longer the model takes for each other device that runs it too, on cores of its own."""
        apart = self.workers.apart
        longer = [self._typical("together", name) / self._typical("whole", name) for name in apart]
        return 1 + max(0.0, median(longer) - 1) / max(len(longer) - 1, 1)

    def carrying(self) -> Carrying | None:
        """Return what it costs a core to send and to receive; None where no network lies between two of them."""
        return carrying(self._carried, quiet=self.patience_s > 0) if self._carried else None

    def cuts(self, device: str) -> Cuts:
        """Return the times on one device, in the rounds that were `alike`."""
        loaded, graph = self._loaded[device], self.subject.graph
        kernel_ns = [self._typical("kernel", device, part) for part in range(len(loaded.parts))]
        whole = self._typical("whole", device)
        alone = _without_calls(kernel_ns, whole)
        covered = covered_operators(loaded.executed, graph, loaded.parts, loaded.placement)
        operator_ns: dict[str, float] = defaultdict(float)
        for part, ns in zip(loaded.parts, alone, strict=True):
            owner = loaded.executed.owner[part.kernels[0]]
            main = max((owner, *covered[part]), key=lambda name: graph[name].flops)
            operator_ns[main] += ns  # another placement may cut the kernel, and the light members leave its work behind
        part_ns, split_share = self._parts(device, whole)
        cold = self._typical("cold", device) - self._typical("hot", device)
        found = {name: max(1, round(ns)) for name, ns in operator_ns.items()}
        crossing = self._crossed(device, kernel_ns)
        few = len(self._coarse[device].parts)
        return Cuts(found, round(whole), round(part_ns), split_share, few, max(0, round(cold)), crossing)

    def _parts(self, device: str, whole: float) -> tuple[float, float]:
        """Return what one more part costs, ns, and by what share all operators take longer beside that.

        Few large parts cost more, each, than many small ones: from the few on a straight line leads to the many.
        """
        more = [self._typical(size, device) - whole for size in ("small parts", "large parts")]
        cuts = [len(loaded[device].parts) - 1 for loaded in (self._loaded, self._coarse)]
        if cuts[1] < 1 or cuts[0] == cuts[1]:
            return max(0.0, more[0] / max(cuts[0], 1)), 0.0
        slope = min(max(0.0, (more[0] - more[1]) / (cuts[0] - cuts[1])), max(0.0, more[0] / cuts[0]))
        return slope, max(0.0, more[1] - slope * cuts[1]) / whole

    def _crossed(self, device: str, kernel_ns: Sequence[float]) -> Crossing | None:
        if not any(("handed", device) in found for found in self._rounds):
            return None
        exchanging = self._typical("exchanging", device)
        exchange = max(0.0, exchanging - self._typical("between", device))
        hand_over = max(0.0, self._typical("handed", device) - exchanging)
        executed = self._loaded[device].executed
        alone = {_kernel(executed, part): ns for part, ns in zip(self._loaded[device].parts, kernel_ns, strict=True)}
        size: dict[_Kernel, int] = {}
        for loaded in self._crossing.values():
            for part in loaded.parts:
                if self.kind[part.device] == device:
                    size[_kernel(loaded.executed, part)] = sum(loaded.executed.tensors[n].bytes for n in part.awaits)
        across = {key[-1] for found in self._rounds for key in found if key[:2] == ("across", device)}
        known = [kernel for kernel in size if kernel in alone and kernel in across]
        longer = sum(self._typical("across", device, kernel) - alone[kernel] for kernel in known)
        read = longer / max(sum(size[kernel] for kernel in known), 1)
        return Crossing(round(exchange), round(hand_over), max(0.0, read))

    def _alternating(self, one: str, other: str) -> Loaded:
        """Load the model cut at every kernel, the next one always on the other device."""
        graph, whole = self.subject.graph, self._loaded[one]
        covered = covered_operators(whole.executed, graph, whole.parts, whole.placement)
        device: dict[str, str] = {}
        turns = cycle((one, other))
        for part in whole.parts:
            owner = whole.executed.owner[part.kernels[0]]
            here = device.get(owner) or next(turns)  # what belongs to one operator stays together
            device |= dict.fromkeys((owner, *covered[part]), here)
        return load_order(self.workers, self.subject, device, list(graph.operators), most_kernels=1)

    def _typical(self, *key: Hashable) -> float:
        """Return what was found under a key, in the rounds that were alike if it was found in one of them."""
        like = [found.get(key, []) for found, alike in zip(self._rounds, self.alike(), strict=True) if alike]
        rounds = list(chain.from_iterable(like)) or [times for found in self._rounds for times in found.get(key, [])]
        return typical_ns(rounds, quiet=self.patience_s > 0)

    def close(self) -> None:
        """Let the workers forget the parts."""
        for loaded in self._all():
            if self.workers.processes:
                loaded.close()
        if self._carrying is not None and self.workers.processes:
            self._carrying.close()

    def _all(self) -> list[Loaded]:
        return [*self._loaded.values(), *self._coarse.values(), *self._crossing.values()]


_Found = defaultdict[tuple[Hashable, ...], list[list["Timed"]]]
"""Runs of one round, by what was timed and on which device."""
_Kernel = tuple[str, tuple[str, ...], tuple[str, ...]]
"""What a kernel is, however a model is placed: type, and tensors read and written."""


def _kernel(executed: Executed, part: Part) -> _Kernel:
    node = executed.nodes[part.kernels[0]]
    return node.op_type, tuple(name.partition("@")[0] for name in node.input), tuple(node.output)


def _mean_gap(runs: Sequence[tuple[int, int, int, int, int]]) -> int:
    """Return the mean time from the end of a part to the start of the next one, ns."""
    gaps = [after[3] - before[4] for before, after in pairwise(runs)]
    return round(float(np.mean(gaps))) if gaps else 0


def _without_calls(kernel_ns: list[float], whole: float) -> list[float]:
    """Return the times of kernels without the calls around them, equal for all, so that they add up to the whole."""
    low, high = 0.0, max(kernel_ns)
    for _ in range(60):
        call = (low + high) / 2
        if sum(max(ns - call, 0.0) for ns in kernel_ns) > whole:
            low = call
        else:
            high = call
    alone = [max(ns - high, 0.0) for ns in kernel_ns]
    scale = whole / sum(alone) if sum(alone) else 0.0
    return [ns * scale for ns in alone]
