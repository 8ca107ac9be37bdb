"""The exact dynamic programme of Tarnawski et al. for pipelines: the largest load of contiguous pieces."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np

from moirai_sim.compiled import kernel
from moirai_sim.placement import Placement
from moirai_sim.policies.groups import groups_of, no_room
from moirai_sim.simulation.list_scheduling import NEVER

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moirai_sim.policies.base import Request
    from moirai_sim.problem import PlacementProblem

    Ints = NDArray[np.int64]

PUBLISHED_FORMAT = "dnn-partitioning"
"""``provenance["format"]`` of problems whose loads follow the published rules."""
MAX_ENTRIES = 50_000_000
"""Most entries (ideals times combinations of devices) of the table; it takes 12 bytes an entry."""
MAX_IDEALS = 200_000
_LAYER_ENTRIES = 2_000_000_000
"""Most entries, of two bytes, of a table of nodes by nodes or by the ideals of one size."""
LOOKS_S = 0.05
"""Seconds between two looks at the clock, roughly."""
STEP = 1.1
"""Growth of the threshold on loads from one attempt to the next."""


class PipelineDp:
    """Cut the graph into one contiguous piece a device so that the largest load is least, by dynamic programming.

    Tarnawski, Phanishayee, Devanur, Mahajan, Nina Paravecino, "Efficient Algorithms for Device Placement of DNN Graph
    Operators", NeurIPS 2020, section 5: over all ideals (sets with all their predecessors) I and numbers of devices
    used, best(I) = min over ideals J inside I of max(best(J) with one device less, load(I - J)). It minimises the
    period of a pipeline whatever the objective of the request.

    On the published instances a load is theirs: time on the device, and for an accelerator also the transfers, each
    tensor once out of the accelerator that makes it and once into each that reads it; CPUs read for free.

    Extensions: devices come in any number of kinds (type and memory); on other problems a load is the largest of
    computing, sending and receiving, because transfers overlap computation, with the mean time of a tensor over all
    pairs of devices; co-located operators, and all on paths between them, are one. Loads above a threshold are not
    looked at; the threshold grows until an answer lies below it, so that the answer stays exact.

    Where the ideals are too many, or take too long, the policy answers ``limit``. `provenance` holds their number and
    the largest load.
    """

    name: ClassVar[str] = "pipeline-dp"

    def place(self, problem: PlacementProblem, request: Request) -> Placement:
        """Return the pieces; each device runs greedily by upward rank."""
        kinds = _kinds(problem)
        graph = _condense(problem, kinds)
        combinations = np.array([len(kind.devices) + 1 for kind in kinds])
        deadline = time.perf_counter() + request.time_limit_s
        most = min(MAX_IDEALS, int(MAX_ENTRIES // combinations.astype(float).prod()))
        lattice = _lattice(graph, most, deadline)
        if lattice is None:
            return no_room("the graph has too many ideals for the dynamic programme, or for the time limit")
        stride = np.concatenate([[1], np.cumprod(combinations)[:-1]]).astype(np.int64)
        fastest = np.where(graph.time < 0, NEVER, graph.time).min(axis=1, initial=NEVER)
        whole = int(np.maximum(graph.time, 0).max(axis=1, initial=0).sum()) + 2 * int(graph.cost.sum())
        threshold = max(1, int(fastest.max(initial=0)), int(fastest.sum()) // problem.n_devices)
        while True:
            n_ideals, n_states = len(lattice[0]) - 1, int(combinations.prod())
            best = np.full((n_ideals, n_states), NEVER)
            before = np.full((n_ideals, n_states), -1, dtype=np.int32)
            on_kind = np.full((n_ideals, n_states), -1, dtype=np.int8)
            best[0, :] = 0
            begin, ideals = 1, 16
            while begin < n_ideals:
                now = time.perf_counter()
                if now > deadline:
                    return no_room("the dynamic programme did not end within the time limit")
                end = min(n_ideals, begin + ideals)
                _solve(
                    *lattice, graph.time, graph.weight, *graph.inputs, *graph.outputs, graph.cost, graph.readers,
                    np.array([kind.memory for kind in kinds]), np.array([kind.pays for kind in kinds]),
                    kinds[0].overlap, combinations, stride, threshold, begin, end, best, before, on_kind,
                )  # fmt: skip
                begin = end
                ideals = ideals * 2 if time.perf_counter() - now < LOOKS_S else max(1, ideals // 2)
            last = int(np.argmin(best[-1]))
            if best[-1, last] <= threshold or threshold >= whole:
                break
            threshold = min(whole, int(threshold * STEP) + 1)
        if best[-1, last] == NEVER:
            return no_room("no contiguous pieces fit the memory of the devices")
        piece, homes = _read_back(lattice, before, on_kind, stride, last, kinds)
        of = np.where(graph.of >= 0, piece[graph.of], len(homes))
        for free in range(int(graph.of.min()), 0):  # free sources join their first consumer, the last freed first
            mine = graph.of == free
            edges = problem.edges[mine[problem.edges[:, 0]] & ~mine[problem.edges[:, 1]]]
            of[mine] = of[edges[:, 1]].min(initial=len(homes) - 1)
        facts: dict[str, object] = {"ideals": len(best), "largest_load_ns": int(best[-1, last])}
        return Placement(device=homes[of], provenance=facts)


class _Kind(NamedTuple):
    """Devices that are alike."""

    devices: Ints
    type: int
    memory: int
    pays: bool
    """Whether transfers out of and into these devices are part of their load."""
    overlap: bool
    """Whether computing, sending and receiving go on at the same time, or add up."""


class _Graph(NamedTuple):
    """The problem as v nodes, each of what must stay together, and the w tensors between them."""

    of: Ints
    """[n] node of an operator; below 0, one number each, for sources that cost nothing wherever they are."""
    edges: Ints
    """[x, 2] node pairs, unique."""
    time: Ints
    """[v, kinds] ns; -1 where a kind cannot run the node."""
    weight: Ints
    inputs: tuple[Ints, Ints]
    """CSR: tensors that a node reads from other nodes."""
    outputs: tuple[Ints, Ints]
    """CSR: tensors of a node that other nodes read."""
    cost: Ints
    """[w] ns for each crossing, out or in."""
    readers: Ints
    """[w] number of nodes that read the tensor."""


def _kinds(problem: PlacementProblem) -> list[_Kind]:
    published = problem.provenance.get("format") == PUBLISHED_FORMAT
    alike = np.stack([problem.device_type, problem.memory_bytes], axis=1)
    return [
        _Kind(
            devices=np.flatnonzero((alike == pair).all(axis=1)),
            type=int(pair[0]),
            memory=int(pair[1]),
            pays=not published or int(pair[0]) == 0,  # type 0 is the accelerator
            overlap=not published,
        )
        for pair in np.unique(alike, axis=0)
    ]


def _condense(problem: PlacementProblem, kinds: list[_Kind]) -> _Graph:
    """Merge co-location groups and the cycles this makes: a contiguous piece holds them and all between them."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    groups = groups_of(problem)
    ends = groups.of[problem.edges].reshape(-1, 2)
    size = len(groups.weight)
    arcs = coo_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(size, size))
    count, component = connected_components(arcs.tocsr(), directed=True, connection="strong")
    time = np.zeros((count, len(kinds)), dtype=np.int64)
    for column, kind in enumerate(kinds):
        np.add.at(time[:, column], component, groups.work[:, kind.type])
        time[component[~groups.can_run[:, kind.type]], column] = -1
    weight = np.zeros(count, dtype=np.int64)
    np.add.at(weight, component, groups.weight)
    crossing = _crossing_cost(problem)
    of = _without_idle(problem, component[groups.of].astype(np.int64), time, weight, crossing)
    kept, label = np.unique(of[of >= 0], return_inverse=True)
    of[of >= 0] = label.reshape(-1)
    count, time = len(kept), time[kept]
    weight = np.zeros(count, dtype=np.int64)
    np.add.at(weight, of[of >= 0], problem.weight_bytes[of >= 0])
    edges, reads = _between(problem, of)
    tensors, first, tensor = np.unique(reads[:, 0], return_index=True, return_inverse=True)
    return _Graph(
        of=of,
        edges=edges,
        time=time,
        weight=weight,
        inputs=_grouped(reads[:, 2], tensor.reshape(-1), count),
        outputs=_grouped(reads[first, 1], np.arange(len(tensors)), count),
        cost=crossing[tensors],
        readers=np.bincount(tensor.reshape(-1), minlength=len(tensors)).astype(np.int64),
    )


def _crossing_cost(problem: PlacementProblem) -> Ints:
    """Return what each tensor costs when it leaves a device, and again where it enters one, [q] ns."""
    if problem.provenance.get("format") == PUBLISHED_FORMAT:
        return np.asarray(problem.transfer_ns[:, 1])  # between an accelerator and a CPU: one crossing
    pairs = problem.route_class[~np.eye(problem.n_devices, dtype=bool)]
    if not len(pairs):
        return np.zeros(len(problem.transfer_ns), dtype=np.int64)
    share = np.bincount(pairs, minlength=problem.transfer_ns.shape[1]) / len(pairs)
    return np.rint(problem.transfer_ns @ share).astype(np.int64)


def _between(problem: PlacementProblem, of: Ints) -> tuple[Ints, Ints]:
    """Return the unique pairs of nodes that edges join, [x, 2], and the unique (tensor, producer, consumer), [r, 3]."""
    ends = of[problem.edges].reshape(-1, 2)
    crosses = (ends[:, 0] != ends[:, 1]) & (ends >= 0).all(axis=1)
    carries = crosses & (problem.edge_tensor >= 0)
    reads = np.concatenate([problem.edge_tensor[carries, None], ends[carries]], axis=1)
    return np.unique(ends[crosses], axis=0), np.unique(reads, axis=0)


def _without_idle(problem: PlacementProblem, of: Ints, time: Ints, weight: Ints, crossing: Ints) -> Ints:
    """Merge nodes that cost nothing into a neighbour where an optimum can have them; each would double the ideals.

    Without work, and without weight or where any device holds the whole model: a node with one producer and outputs
    that cross for free goes with the producer; a source with one consumer goes with it; a source with outputs that
    cross for free goes (a number below 0) with whichever consumer comes first.
    """
    of = of.copy()
    roomy = int(problem.weight_bytes.sum()) <= int(problem.memory_bytes.min())
    idle = (time == 0).all(axis=1) & ((weight == 0) | roomy)
    while True:
        edges, reads = _between(problem, of)
        producers, consumers = (np.bincount(edges[:, side], minlength=len(idle)) for side in (1, 0))
        dear = np.zeros(len(idle), dtype=bool)
        dear[reads[crossing[reads[:, 0]] > 0, 1]] = True
        joins = np.arange(len(idle))
        with_producer = (idle & (producers == 1) & ~dear)[edges[:, 1]]
        with_consumer = (idle & (producers == 0) & (consumers == 1))[edges[:, 0]]
        if with_producer.any():
            joins[edges[with_producer, 1]] = edges[with_producer, 0]
        elif with_consumer.any():
            joins[edges[with_consumer, 0]] = edges[with_consumer, 1]
        else:
            free = idle & (producers == 0) & (consumers > 0) & ~dear
            if not free.any():
                return of
            number = min(int(of.min()), 0) - np.cumsum(free)
            of = np.where((of >= 0) & free[of], number[of], of)
            continue
        while (joins[joins] != joins).any():
            joins = joins[joins]
        of = np.where(of >= 0, joins[of], of)


def _grouped(keys: Ints, values: Ints, size: int) -> tuple[Ints, Ints]:
    """Return CSR (indptr [size + 1], values by key)."""
    indptr = np.zeros(size + 1, dtype=np.int64)
    np.cumsum(np.bincount(keys, minlength=size), out=indptr[1:])
    return indptr, values[np.argsort(keys, kind="stable")].astype(np.int64)


def _lattice(graph: _Graph, most: int, deadline: float) -> tuple[Ints, Ints, Ints] | None:
    """Return the ideals by size, as CSR: for each, the nodes that can be taken away last and the ideals that remain.

    Ideals are recognised by two independent random keys a node, 128 bits in all. None if there are more than ``most``,
    or at the deadline.
    """
    v = len(graph.weight)
    if v >= most or v * v > _LAYER_ENTRIES:  # each node makes one ideal more, at least
        return None
    consumer = np.zeros((v, v), dtype=np.int16)
    consumer[graph.edges[:, 0], graph.edges[:, 1]] = 1
    keys = np.random.default_rng(0).integers(0, 2**63, size=(v, 2), dtype=np.int64)
    missing = consumer.sum(axis=0, dtype=np.int16)[None, :]  # producers outside the ideal; -1 for what is inside
    key = np.zeros((1, 2), dtype=np.int64)
    nodes, remains, degree, total = [], [], [np.zeros(1, dtype=np.int64)], 1
    for _ in range(v):
        ideal, node = np.nonzero(missing == 0)
        grown, first, child = np.unique(key[ideal] ^ keys[node], axis=0, return_index=True, return_inverse=True)
        if total + len(grown) > most or len(grown) * v > _LAYER_ENTRIES or time.perf_counter() > deadline:
            return None
        child = child.reshape(-1)
        by_child = np.argsort(child, kind="stable")
        nodes.append(node[by_child])
        remains.append(ideal[by_child] + total - len(key))
        degree.append(np.bincount(child, minlength=len(grown)))
        missing = missing[ideal[first]] - consumer[node[first]]
        missing[np.arange(len(first)), node[first]] = -1
        key = grown
        total += len(grown)
    indptr = np.zeros(total + 1, dtype=np.int64)
    np.cumsum(np.concatenate(degree), out=indptr[1:])
    empty = [np.zeros(0, dtype=np.int64)]
    return indptr, np.concatenate(nodes + empty), np.concatenate(remains + empty)


@kernel
def _solve(
    indptr: Ints,
    node: Ints,
    remains: Ints,
    time: Ints,
    weight: Ints,
    in_ptr: Ints,
    in_tensor: Ints,
    out_ptr: Ints,
    out_tensor: Ints,
    cost: Ints,
    readers: Ints,
    memory: Ints,
    pays: NDArray[np.bool_],
    overlap: bool,
    combinations: Ints,
    stride: Ints,
    threshold: int,
    begin: int,
    end: int,
    best: Ints,
    before: NDArray[np.int32],
    on_kind: NDArray[np.int8],
) -> None:
    """Fill in for some ideals, by combination of devices, the least largest load, the ideal and kind it comes from.

    From each ideal, a depth-first walk takes away one node after the other: what is taken away is a contiguous piece,
    whose time, weight and transfers change by a few terms a step.
    """
    n_ideals, n_kinds = len(indptr) - 1, len(memory)
    n_states = 1
    for kind in range(n_kinds):
        n_states *= combinations[kind]
    seen = np.full(n_ideals, -1)
    inside = np.zeros(len(cost), np.int64)  # readers of a tensor inside the piece
    compute, blocked = np.zeros(n_kinds, np.int64), np.zeros(n_kinds, np.int64)
    depth_limit = time.shape[0] + 1
    at, arc, taken = np.empty(depth_limit, np.int64), np.empty(depth_limit, np.int64), np.empty(depth_limit, np.int64)
    sent_by, received_by = np.empty(depth_limit, np.int64), np.empty(depth_limit, np.int64)
    for ideal in range(begin, end):
        depth, held = 0, 0
        at[0], arc[0], sent_by[0], received_by[0] = ideal, indptr[ideal], 0, 0
        while depth >= 0:
            position = arc[depth]
            if position < indptr[at[depth] + 1]:
                arc[depth] += 1
                rest, v = remains[position], node[position]
                if seen[rest] == ideal:
                    continue
                seen[rest] = ideal
                sent, received = sent_by[depth], received_by[depth]
                for p in range(in_ptr[v], in_ptr[v + 1]):
                    if inside[in_tensor[p]] == 0:
                        received += cost[in_tensor[p]]
                    inside[in_tensor[p]] += 1
                for p in range(out_ptr[v], out_ptr[v + 1]):
                    if inside[out_tensor[p]] > 0:
                        received -= cost[out_tensor[p]]
                    if inside[out_tensor[p]] < readers[out_tensor[p]]:
                        sent += cost[out_tensor[p]]
                held += weight[v]
                possible = False
                for kind in range(n_kinds):
                    if time[v, kind] < 0:
                        blocked[kind] += 1
                    else:
                        compute[kind] += time[v, kind]
                    if blocked[kind] > 0 or compute[kind] > threshold or held > memory[kind]:
                        continue
                    possible = True
                    load = compute[kind]
                    if pays[kind] and overlap:
                        load = max(load, sent, received)
                    elif pays[kind]:
                        load += sent + received
                    if load > threshold:
                        continue
                    for state in range(n_states):
                        if (state // stride[kind]) % combinations[kind] == 0:
                            continue
                        largest = max(load, best[rest, state - stride[kind]])
                        if largest < best[ideal, state]:
                            best[ideal, state] = largest
                            before[ideal, state] = rest
                            on_kind[ideal, state] = kind
                depth += 1
                at[depth], taken[depth], sent_by[depth], received_by[depth] = rest, v, sent, received
                arc[depth] = indptr[rest] if possible else indptr[rest + 1]
            else:
                if depth > 0:
                    v = taken[depth]
                    held -= weight[v]
                    for p in range(in_ptr[v], in_ptr[v + 1]):
                        inside[in_tensor[p]] -= 1
                    for kind in range(n_kinds):
                        if time[v, kind] < 0:
                            blocked[kind] -= 1
                        else:
                            compute[kind] -= time[v, kind]
                depth -= 1


def _read_back(
    lattice: tuple[Ints, Ints, Ints],
    before: NDArray[np.int32],
    on_kind: NDArray[np.int8],
    stride: Ints,
    state: int,
    kinds: list[_Kind],
) -> tuple[Ints, Ints]:
    """Return the piece of each node, in pipeline order, and the device of each piece."""
    indptr, node, _ = lattice
    piece = np.zeros(int(node.max(initial=-1)) + 1, dtype=np.int64)
    homes: list[int] = []
    used = [0] * len(kinds)
    ideal = len(indptr) - 2
    while ideal > 0:
        rest, kind = int(before[ideal, state]), int(on_kind[ideal, state])
        piece[sorted(_members(lattice, ideal) - _members(lattice, rest))] = len(homes)
        homes.append(int(kinds[kind].devices[used[kind]]))
        used[kind] += 1
        state -= int(stride[kind])
        ideal = rest
    return len(homes) - 1 - piece, np.array(homes[::-1], dtype=np.int64)


def _members(lattice: tuple[Ints, Ints, Ints], ideal: int) -> set[int]:
    """Return the nodes of an ideal: take any last node away until nothing is left."""
    indptr, node, remains = lattice
    members = set()
    while ideal > 0:
        members.add(int(node[indptr[ideal]]))
        ideal = int(remains[indptr[ideal]])
    return members
