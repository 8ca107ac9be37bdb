"""Repeated blocks over alike servers: each kind of block is solved once for each way to enter it, and no layer again.

A language model is a series of a few kinds of modules (between cut vertices, see `modules`), each repeated dozens of
times, and a cluster has many devices but few kinds of servers. So a block has only these ways to be run: by a team one
of whose devices ran its entry (it *stays*); by a team that takes over within the server, because that device is full
(it may still keep a part, as large as fits); by a team of another server. Each is solved exactly, by CP-SAT, for teams
of g devices of the server, g = 1, 2, 4, ... as long as a larger team makes the blocks faster. The devices of a server
can be swapped, so it does not matter on which of the team a block ends, and series decomposition adds the blocks up.

Memory says how many layers a server gets. Along the series a dynamic programme over (modules done, servers used of each
kind, kind of the last) chooses the servers one after another, the team size in each, whether devices are filled to the
brim, and where to leave. Within a server the emptiest devices take over from a full one. The answer is the best of this
family, which leaves out teams of devices of different kinds; the bound (`repeated_bound`) holds for every placement.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from moirai_sim.placement import Placement
from moirai_sim.policies.base import Request
from moirai_sim.policies.cp_model import CpModel
from moirai_sim.policies.groups import no_room
from moirai_sim.policies.modules import Module, assemble, cut_vertices, modules_of
from moirai_sim.policies.starts import improved_start, too_wide
from moirai_sim.policies.symmetry import Server, servers_of
from moirai_sim.problem import UNLIMITED, UNSUPPORTED
from moirai_sim.simulation.replay import replay
from moirai_sim.simulation.schedule import placement_from_schedule

if TYPE_CHECKING:
    from moirai_sim.problem import PlacementProblem

START, STAY, NEXT = -1, -2, -3
"""Ways to enter a block: at the start, on a device of the team, on another device of the server. From 0: the kind of
the server on which it enters."""
REPEATS = 1.5
"""Modules a kind, on average, from which a problem counts as repeated."""
EXACT_OPERATORS = 40
"""Blocks above this size are solved by search alone."""
GAIN = 0.998
"""A larger team must bring the sum of all blocks below this share of a smaller one's."""
STEPS = 24
"""A server is left where it is full, or after a multiple of this part of the series."""
LONGEST = 2
"""A block that is split over a full device and the next may take so many times as long as on the next alone."""
HEAVY = 5
"""So many of a block's heaviest operators decide how it may be split over a full device and the next."""
LIGHT = 0.02
"""A smaller share of a block is not worth keeping; the rest of it may weigh so much beside the heaviest operators."""
MOST_STATES = 20_000
"""Servers of so many kinds that the dynamic programme has more states than this are left to other methods."""


State: TypeAlias = "tuple[tuple[int, ...], int]"
"""How many servers of each kind are used, and the kind of the last."""


class Part(NamedTuple):
    """One way to run a kind of block."""

    ns: int
    placement: Placement
    """On local devices: the entry's own, where it is outside the team; then the team, its leader first."""
    weight: tuple[int, ...]
    """Bytes on each local device."""
    end: int
    """Local device of the exit: where the next block enters."""


class Step(NamedTuple):
    """One block of the answer."""

    part: Part
    devices: tuple[int, ...]
    """Position within the server of each local device; -1 for one outside of it."""
    at_ns: int
    """Time from the entry into the server to the end of the block."""


@dataclass(eq=False)
class Repeated:
    """The blocks of a problem by kind, its servers by kind, and what is solved so far."""

    problem: PlacementProblem
    modules: list[Module]
    kind: list[int]
    """[modules] kind of each module."""
    example: list[Module]
    """[kinds] one module of each kind."""
    servers: list[Server]
    request: Request
    parts: dict[tuple[int, int, int, int, int], Part | None] = field(default_factory=dict)
    """By kind of block, way to enter it, kind of server, team size, and bytes that the device of the entry keeps where
    it is outside the team; None where the team cannot run it."""
    squeezed: dict[tuple[int, int, tuple[int, ...]], Part | None] = field(default_factory=dict)
    """By kind of block, kind of server and memory left on its devices, that of the entry first."""
    solves: int = 0

    def __post_init__(self) -> None:
        """Group the servers by kind, in device order."""
        self.alike: list[list[Server]] = [[] for _ in {server.kind for server in self.servers}]
        for server in self.servers:
            self.alike[server.kind].append(server)
        self.deadline = time.perf_counter() + self.request.time_limit_s

    def place(self) -> Placement:
        """Return the best answer of the family; without devices where it holds none that fits."""
        plan = self._plan()
        if plan is None:
            return no_room("no layout of the blocks over the servers was found within memory")
        free = [list(servers) for servers in self.alike]
        parts, at = [], -1
        for server_kind, steps in plan:
            server = free[server_kind].pop(0)
            for step in steps:
                local = np.array([at if k < 0 else server.devices[k] for k in step.devices], dtype=np.int64)
                parts.append(replace(step.part.placement, device=local[step.part.placement.device]))
                at = int(local[step.part.end])
        return assemble(self.problem, self.modules, parts)

    def team_sizes(self, server_kind: int) -> list[int]:
        """Return the team sizes that are worth trying: doubled as long as that makes the blocks faster."""
        count = Counter(self.kind)
        sizes, last = [1], 0
        for exponent in range(len(self.alike[server_kind][0].devices).bit_length()):
            size = 2**exponent
            stay = [self.part(block, STAY, server_kind, size) for block in count if self.example[block].entry]
            if any(part is None for part in stay):  # a device of the kind cannot run some block
                return sizes
            total = sum(
                part.ns * count[block]
                for block, part in zip([block for block in count if self.example[block].entry], stay, strict=True)
                if part
            )
            if exponent and total >= GAIN * last:
                break
            last = total
            sizes.append(size)
        return sorted(set(sizes))

    def part(self, block: int, way: int, server_kind: int, size: int, kept: int = 0) -> Part | None:
        """Return the best known way to run a block; solved at its first use."""
        key = (block, way, server_kind, size, kept)
        if key not in self.parts:
            self.parts[key] = self._solve(*key)
        return self.parts[key]

    def _solve(self, block: int, way: int, server_kind: int, size: int, kept: int) -> Part | None:
        module = self.example[block]
        outside = way not in (START, STAY)
        problem = _between(module, self._devices(way, server_kind, size), outside=outside, kept=kept)
        if (problem.operator_ns.max(axis=1) < 0).any():
            return None
        n = problem.n_operators
        if kept:
            best = self.part(block, way, server_kind, size)
        elif size > 1:
            best = self.part(block, way, server_kind, size // 2)
        else:
            alone = np.full(n, int(outside))
            alone[0] = 0
            return self._part(module, problem, Placement(device=alone))
        left = max(0.1, (self.deadline - time.perf_counter()) / 8)
        request = Request(time_limit_s=left, seed=self.request.seed)
        if n > EXACT_OPERATORS:
            start = improved_start(problem, request)
            if start is not None and (best is None or start.value_ns < best.ns):
                best = self._part(module, problem, start.placement)
        elif best is not None and too_wide(problem):
            best = None if kept else best
        elif best is not None:
            self.solves += 1
            model = CpModel(problem, LONGEST * best.ns if kept else best.ns - 1)
            if kept:
                best = None
                model.hold_at_least(0, kept)
            answer = model.solve(left, seed=self.request.seed)
            if answer.placement is not None:
                best = self._part(module, problem, answer.placement)
        return best

    def _devices(self, way: int, server_kind: int, size: int) -> list[int]:
        """Return devices that stand for all: that of the entry where it is not in the team, then the team."""
        devices = self.alike[server_kind][0].devices
        if way in (START, STAY):
            return list(devices[:size])
        if way == NEXT:
            return list(devices[: min(size, len(devices) - 1) + 1])
        others = self.alike[way]
        return [others[1 if way == server_kind else 0].devices[0], *devices[:size]]

    @staticmethod
    def _part(module: Module, problem: PlacementProblem, placement: Placement) -> Part | None:
        if (problem.operator_ns[np.arange(problem.n_operators), placement.device] < 0).any():
            return None
        held = np.zeros(problem.n_devices, dtype=np.int64)
        np.add.at(held, placement.device, problem.weight_bytes)
        schedule = replay(problem, placement)
        ordered = placement_from_schedule(problem, placement, schedule)
        end = int(placement.device[-1]) if module.exit else 0
        return Part(schedule.makespan_ns, ordered, tuple(held.tolist()), end)

    # --- which servers, and how many blocks each ---------------------------------------------------------------------

    def _plan(self) -> list[tuple[int, list[Step]]] | None:
        """Return the servers by kind with the blocks that each runs, of the least total time."""
        n, kinds = len(self.modules), len(self.alike)
        stride = max(1, -(-n // STEPS))
        sizes = [self.team_sizes(kind) for kind in range(kinds)]
        best: list[dict[State, tuple[int, int, State | None, list[Step]]]] = [{} for _ in range(n + 1)]
        best[0][(0,) * kinds, START] = (0, 0, None, [])
        filled: dict[tuple[int, int, int, int, bool], list[Step]] = {}
        states = 0
        for p in range(n):
            for (used, last), (so_far, *_) in best[p].items():
                states += 1
                if states > MOST_STATES:
                    return None
                if time.perf_counter() > self.deadline:
                    break
                for kind in range(kinds):
                    if used[kind] == len(self.alike[kind]):
                        continue
                    now = (*used[:kind], used[kind] + 1, *used[kind + 1 :]), kind
                    for size, brim in itertools.product(sizes[kind], (False, True)):
                        key = (p, last, kind, size, brim)
                        if key not in filled:
                            filled[key] = self._fill(*key)
                        steps = filled[key]
                        ends = {len(steps), *range(stride - p % stride, len(steps), stride)} - {0}
                        for count in sorted(ends):
                            value = so_far + steps[count - 1].at_ns
                            known = best[p + count].get(now)
                            if known is None or value < known[0]:
                                best[p + count][now] = (value, p, (used, last), steps[:count])
        if not best[n]:
            return None
        state: State | None = min(best[n], key=lambda one: (best[n][one][0], one))
        at, plan = n, []
        while at and state is not None:
            _, p, before, steps = best[at][state]
            plan.append((state[1], steps))
            at, state = p, before
        return plan[::-1]

    def _fill(self, p: int, last: int, server_kind: int, size: int, brim: bool) -> list[Step]:
        """Return the blocks from p on that an empty server can run, entered from a server of kind ``last``."""
        devices = self.alike[server_kind][0].devices
        room = [int(self.problem.memory_bytes[k]) for k in devices]
        steps: list[Step] = []
        at, lead = 0, 0
        for c in range(p, len(self.modules)):
            if time.perf_counter() > self.deadline:
                break
            block = self.kind[c]
            ways = [(last if c == p else STAY, 0)]
            if c > p and len(devices) > 1:
                ways += [(NEXT, kept) for kept in ([*self._shares(block, room[lead])] if brim else [0])]
            for way, kept in ways:
                part = self.part(block, way, server_kind, size, kept)
                members = None if part is None else _team(part, way, room, lead)
                if part is not None and members is not None:
                    break
            else:
                members = (lead, *sorted((k for k in range(len(room)) if k != lead), key=lambda k: (-room[k], k)))
                part = self._squeeze(block, server_kind, tuple(room[k] for k in members)) if brim and c > p else None
            if part is None or members is None:
                break
            for k, weight in zip(members, part.weight, strict=True):
                if k >= 0:
                    room[k] -= weight
            at += part.ns
            lead = members[part.end]
            steps.append(Step(part, members, at))
        return steps

    def _squeeze(self, block: int, server_kind: int, room: tuple[int, ...]) -> Part | None:
        """Return how to run a block within what is left of the memory of a server whose first device has its entry."""
        key = (block, server_kind, room)
        if key not in self.squeezed:
            module, stay = self.example[block], self.part(block, STAY, server_kind, 1)
            left = min(1.0, (self.deadline - time.perf_counter()) / 8)
            part = None
            small = len(module.operators) <= EXACT_OPERATORS and sum(room) >= module.held_bytes
            if stay is not None and module.entry and small and left > 0:
                team = list(self.alike[server_kind][0].devices)
                problem = replace(_between(module, team, outside=False, kept=0), memory_bytes=np.array(room))
                if not too_wide(problem):
                    self.solves += 1
                    answer = CpModel(problem, LONGEST * stay.ns).solve(left, seed=self.request.seed)
                    part = None if answer.placement is None else self._part(module, problem, answer.placement)
            self.squeezed[key] = part
        return self.squeezed[key]

    def _shares(self, block: int, room: int) -> list[int]:
        """Return what a full device may keep of a block, bytes: sums of its heaviest operators; the most first."""
        module = self.example[block]
        weight = sorted(module.weight_bytes.tolist())[-HEAVY:]
        sums = {sum(some) for size in range(HEAVY + 1) for some in itertools.combinations(weight, size)}
        least = sum(weight) * LIGHT
        return [*sorted((held for held in sums if least <= held <= room), reverse=True), 0]


def _team(part: Part, way: int, room: list[int], lead: int) -> tuple[int, ...] | None:
    """Return a device of the server for each local device: the emptiest hold most; None where there is no room.

    The first local device is given: where the block before ended.
    """
    given = -1 if way >= 0 else lead
    if given >= 0 and part.weight[0] > room[given]:
        return None
    others = sorted((k for k in range(len(room)) if k != given), key=lambda k: (-room[k], k))
    roles = sorted(range(1, len(part.weight)), key=lambda role: (-part.weight[role], role))
    members = [given] * len(part.weight)
    for role, k in zip(roles, others, strict=False):
        if part.weight[role] > room[k]:
            return None
        members[role] = k
    return tuple(members)


def repeated(problem: PlacementProblem, request: Request) -> Repeated | None:
    """Return the blocks of a problem; None where it does not repeat itself, or is not made of blocks."""
    if problem.network == "fair" or problem.colocation is not None:
        return None
    cuts = cut_vertices(problem)
    if len(cuts) < 2:
        return None
    modules = modules_of(problem, cuts)
    number: dict[bytes, int] = {}
    kind = [number.setdefault(module.key() + module.weight_bytes.tobytes(), len(number)) for module in modules]
    if len(modules) < REPEATS * len(number):
        return None
    example = [modules[kind.index(block)] for block in range(len(number))]
    return Repeated(problem, modules, kind, example, servers_of(problem), request)


def _between(module: Module, devices: list[int], *, outside: bool, kept: int) -> PlacementProblem:
    """Return a block on some devices, its entry on the first, which holds about ``kept`` bytes where it is outside."""
    whole = module.problem
    duration = whole.operator_ns[:, devices].copy()
    columns = np.arange(len(devices))
    memory = np.full(len(devices), UNLIMITED, dtype=np.int64)
    if outside:
        memory[0] = kept + int(LIGHT * module.held_bytes) if kept else 0
        duration[-1 if kept else slice(1, None), 0] = UNSUPPORTED
    if module.entry:
        duration[0, columns != 0] = UNSUPPORTED
    return replace(
        whole,
        operator_ns=duration,
        weight_bytes=module.weight_bytes,
        devices=tuple(whole.devices[k] for k in devices),
        device_type=columns.astype(np.int64),
        memory_bytes=memory,
        route_class=whole.route_class[np.ix_(devices, devices)],
    )
