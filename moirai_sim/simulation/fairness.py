"""Max-min fair rates of flows over shared links, kept up to date as flows come and go.

An allocation is max-min fair if and only if every flow runs at its own limit or crosses a *bottleneck*: a full link on
which no flow is faster (Bertsekas and Gallager, Data Networks, 2nd ed., section 6.5.2). That condition is local. So a
change is answered by solving again only for the flows it unsettles: those changed, then those whose condition fails
beside them, and so on until it holds everywhere. The allocation is unique, so this gives the one that solving for all
flows would give.
"""
# Compiled functions have no types to write down: numba finds them.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moirai_sim.compiled import kernel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

NEVER = np.iinfo(np.int64).max
_FOREVER = 2.0**55
"""Nothing that goes on takes longer, ns: a year, of which many fit into 64 bits."""
_SLACK = 1e-9
"""Relative error of a rate that counts as none; work left of less than this many ns counts as done."""


class Flows(NamedTuple):
    """State of f flow slots over l links, with routes of at most h links. Rates are bytes per ns."""

    capacity: NDArray[np.float64]
    """[l] of each link."""
    used: NDArray[np.float64]
    """[l] sum of the rates on the link."""
    fastest: NDArray[np.float64]
    """[l] largest rate on the link."""
    first: NDArray[np.int64]
    """[l] first member of the link's list of (flow * h + hop), -1 for none."""
    after: NDArray[np.int64]
    """[f * h] next member of the same list."""
    before: NDArray[np.int64]
    """[f * h] previous member."""
    route: NDArray[np.int64]
    """[f, h] links that the flow crosses, then -1."""
    limit: NDArray[np.float64]
    """[f] rate of the flow alone."""
    rate: NDArray[np.float64]
    """[f]."""
    bottleneck: NDArray[np.int64]
    """[f] a bottleneck that the flow crosses; -1 where it runs at its own limit."""
    left: NDArray[np.float64]
    """[f] ns that the flow would still need at its limit, at the moment ``since``."""
    since: NDArray[np.int64]
    """[f] ns."""
    finish: NDArray[np.int64]
    """[f] when the flow ends if nothing changes, ns; NEVER for a free slot or a flow that stands still."""
    unsettled: NDArray[np.int64]
    """[f] scratch: the flows to solve for."""
    chosen: NDArray[np.bool_]
    """[f] scratch: is in ``unsettled``."""
    new_rate: NDArray[np.float64]
    """[f] scratch: what ``rate`` will be; equal to it between changes."""
    links: NDArray[np.int64]
    """[l] scratch: links that the unsettled flows cross."""
    seen: NDArray[np.bool_]
    """[l] scratch: is in ``links``."""
    room: NDArray[np.float64]
    """[l] scratch: what the settled flows leave."""
    open: NDArray[np.int64]
    """[l] scratch: flows on the link without a rate yet."""
    heap: NDArray[np.int64]
    """[l] scratch."""
    share: NDArray[np.float64]
    """[l] scratch: the heap's keys."""


def new_flows(capacity: Sequence[float], slots: int, hops: int) -> Flows:
    """Return the state of ``slots`` free slots over links of the given capacities, bytes per ns."""
    n = len(capacity)

    def numbers(*shape: int, fill: int = 0) -> NDArray[np.int64]:
        return np.full(shape, fill, dtype=np.int64)

    return Flows(
        capacity=np.array(capacity, dtype=np.float64),
        used=np.zeros(n),
        fastest=np.zeros(n),
        first=numbers(n, fill=-1),
        after=numbers(slots * hops, fill=-1),
        before=numbers(slots * hops, fill=-1),
        route=numbers(slots, hops, fill=-1),
        limit=np.zeros(slots),
        rate=np.zeros(slots),
        bottleneck=numbers(slots, fill=-1),
        left=np.zeros(slots),
        since=numbers(slots),
        finish=numbers(slots, fill=NEVER),
        unsettled=numbers(slots),
        chosen=np.zeros(slots, dtype=np.bool_),
        new_rate=np.zeros(slots),
        links=numbers(n),
        seen=np.zeros(n, dtype=np.bool_),
        room=np.zeros(n),
        open=numbers(n),
        heap=numbers(n),
        share=np.zeros(n),
    )


def grown(s: Flows) -> Flows:
    """Return the same state with twice the slots."""
    slots, hops = s.route.shape
    larger = new_flows(s.capacity.tolist(), 2 * slots, hops)
    for old, new in zip(s, larger, strict=True):
        new[: len(old)] = old
    return larger


@kernel
def change(s, now, ended, begun, altered):
    """Take flows out, put flows in, and give every flow its fair rate.

    Parameters
    ----------
    s
        `Flows`; of the slots in ``begun`` the caller has set ``route``, ``limit`` and ``left``.
    now
        ns.
    ended, begun
        Slots.
    altered
        Links whose ``capacity`` the caller has set anew.

    Returns
    -------
    When the next flow ends, ns; NEVER if none does.
    """
    count, n_links = _move(s, now, ended, begun, altered)
    while True:
        n_links = _fill(s.route, s.capacity, s.used, s.limit, s.bottleneck, s.new_rate, s.unsettled, s.links, s.seen,
                        s.room, s.open, s.heap, s.share, s.first, s.after, s.chosen, count, n_links)  # fmt: skip
        more = _unsettle(s.route, s.capacity, s.used, s.fastest, s.first, s.after, s.bottleneck, s.new_rate,
                         s.unsettled, s.chosen, s.links, count, n_links)  # fmt: skip
        if more == count:
            break
        count = more
    for position in range(n_links):
        s.seen[s.links[position]] = False
    for position in range(count):
        f = s.unsettled[position]
        s.chosen[f] = False
        rate = s.new_rate[f]
        if rate == s.rate[f] and s.finish[f] != NEVER:
            continue
        s.left[f] -= (now - s.since[f]) * (s.rate[f] / s.limit[f])
        s.since[f] = now
        s.rate[f] = rate
        if s.left[f] <= _SLACK:
            s.finish[f] = now
        elif rate <= 0.0:
            s.finish[f] = NEVER
        else:
            s.finish[f] = now + np.int64(min(np.ceil(s.left[f] * (s.limit[f] / rate) - _SLACK), _FOREVER))
    return s.finish.min()


@kernel
def _move(s, now, ended, begun, altered):
    """Take flows out and put flows in; return how many flows are unsettled and how many links are seen."""
    hops = s.route.shape[1]
    count, n_links = 0, 0
    for f in ended:
        for h in range(hops):
            link = s.route[f, h]
            if link < 0:
                break
            _leave(s.first, s.after, s.before, f * hops + h, link)
            if not s.seen[link]:
                s.seen[link] = True
                s.links[n_links] = link
                n_links += 1
        s.finish[f] = NEVER
        s.rate[f] = s.new_rate[f] = 0.0
    for f in begun:
        for h in range(hops):
            link = s.route[f, h]
            if link < 0:
                break
            _join(s.first, s.after, s.before, f * hops + h, link)
        s.rate[f] = s.new_rate[f] = 0.0
        s.since[f] = now
        s.chosen[f] = True
        s.unsettled[count] = f
        count += 1
    for link in altered:
        member = s.first[link]
        while member >= 0:
            f = member // hops
            member = s.after[member]
            if not s.chosen[f]:
                s.chosen[f] = True
                s.unsettled[count] = f
                count += 1
    return count, n_links


@kernel
def _fill(route, capacity, used, limit, bottleneck, new_rate, unsettled, links, seen, room, unfixed, heap, share,
          first, after, chosen, count, n_links):  # fmt: skip
    """Raise the rates of the unsettled flows together until each meets its limit or a full link (water-filling).

    Returns how many links are seen, those of the unsettled flows among them.
    """
    hops = route.shape[1]
    old = n_links
    for position in range(old):
        link = links[position]
        room[link], unfixed[link] = _left_over(first, after, chosen, new_rate, capacity, hops, link), 0
    for position in range(count):
        f = unsettled[position]
        for h in range(hops):
            link = route[f, h]
            if link < 0:
                break
            if not seen[link]:
                seen[link] = True
                links[n_links] = link
                n_links += 1
                room[link], unfixed[link] = _left_over(first, after, chosen, new_rate, capacity, hops, link), 0
            unfixed[link] += 1
    for position in range(count):
        new_rate[unsettled[position]] = -1.0  # none yet
    size = 0
    for position in range(n_links):
        link = links[position]
        if unfixed[link] > 0:
            share[link] = room[link] / unfixed[link]
            heap[size] = link
            size += 1
    for hole in range(size // 2 - 1, -1, -1):
        _sink(heap, share, hole, size)
    fixed = 0
    while fixed < count:
        full = heap[0]
        if unfixed[full] == 0:
            size -= 1
            heap[0] = heap[size]
            _sink(heap, share, 0, size)
            continue
        rate = room[full] / unfixed[full]
        if rate > share[full]:  # shares only grow, so a stale one sinks
            share[full] = rate
            _sink(heap, share, 0, size)
            continue
        rate = share[full]
        # No link's share is below this one's, so a flow that cannot use it meets its limit first.
        held = _fix(route, first, after, chosen, limit, bottleneck, new_rate, room, unfixed, full, rate, True)
        fixed += held
        if held == 0:
            fixed += _fix(route, first, after, chosen, limit, bottleneck, new_rate, room, unfixed, full, rate, False)
    return n_links


@kernel
def _fix(route, first, after, chosen, limit, bottleneck, new_rate, room, unfixed, link, share,
         limited):  # fmt: skip
    """Fix the rates of the flows on a link that can use no more than ``share``, or of all; return how many."""
    hops = route.shape[1]
    fixed = 0
    member = first[link]
    while member >= 0:
        f = member // hops
        member = after[member]
        if not chosen[f] or new_rate[f] >= 0.0 or (limited and limit[f] > share):
            continue
        rate = limit[f] if limited else share
        new_rate[f], bottleneck[f] = rate, -1 if limited else link
        fixed += 1
        for h in range(hops):
            other = route[f, h]
            if other < 0:
                break
            room[other] = max(0.0, room[other] - rate)
            unfixed[other] -= 1
    return fixed


@kernel
def _left_over(first, after, chosen, new_rate, capacity, hops, link):
    """Return what the settled flows leave of a link."""
    taken = 0.0
    member = first[link]
    while member >= 0:
        f = member // hops
        if not chosen[f]:
            taken += new_rate[f]
        member = after[member]
    return max(0.0, capacity[link] - taken)


@kernel
def _unsettle(route, capacity, used, fastest, first, after, bottleneck, new_rate, unsettled, chosen, links, count,
              n_links):  # fmt: skip
    """Measure the seen links and add every flow whose rate is no longer fair; return how many are unsettled then."""
    hops = route.shape[1]
    for position in range(n_links):
        link = links[position]
        total, most = 0.0, 0.0
        member = first[link]
        while member >= 0:
            rate = new_rate[member // hops]
            total += rate
            most = max(most, rate)
            member = after[member]
        used[link], fastest[link] = total, most
    more = count
    for position in range(count):  # faster flows on a link that limits an unsettled one must yield
        f = unsettled[position]
        link, most = bottleneck[f], new_rate[f] * (1.0 + _SLACK)
        if link >= 0 and fastest[link] > most:
            member = first[link]
            while member >= 0:
                g = member // hops
                if not chosen[g] and new_rate[g] > most:
                    chosen[g] = True
                    unsettled[more] = g
                    more += 1
                member = after[member]
    for position in range(n_links):  # a settled flow that lost its bottleneck may grow, or must shrink
        link = links[position]
        full = used[link] * (1.0 + _SLACK) >= capacity[link]
        most = fastest[link]
        member = first[link]
        while member >= 0:
            g = member // hops
            member = after[member]
            if chosen[g] or bottleneck[g] != link or (full and new_rate[g] * (1.0 + _SLACK) >= most):
                continue
            for h in range(hops):  # another link may hold it at the same rate
                other = route[g, h]
                if other < 0:
                    break
                if new_rate[g] * (1.0 + _SLACK) >= fastest[other] and used[other] * (1.0 + _SLACK) >= capacity[other]:
                    bottleneck[g] = other
                    break
            if bottleneck[g] == link:
                chosen[g] = True
                unsettled[more] = g
                more += 1
    return more


@kernel
def _join(first, after, before, member, link):
    head = first[link]
    after[member], before[member] = head, -1
    if head >= 0:
        before[head] = member
    first[link] = member


@kernel
def _leave(first, after, before, member, link):
    previous, following = before[member], after[member]
    if previous >= 0:
        after[previous] = following
    else:
        first[link] = following
    if following >= 0:
        before[following] = previous


@kernel
def _sink(heap, share, hole, size):
    """Restore the heap (smallest share on top) below ``hole``."""
    link = heap[hole]
    while 2 * hole + 1 < size:
        child = 2 * hole + 1
        if child + 1 < size and share[heap[child + 1]] < share[heap[child]]:
            child += 1
        if share[heap[child]] >= share[link]:
            break
        heap[hole] = heap[child]
        hole = child
    heap[hole] = link
