"""Max-min fair rates against a plain solution for all flows, over random networks, arrivals and departures."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moirai_sim.simulation.fairness import change, new_flows

NONE = np.zeros(0, dtype=np.int64)


def all_at_once(capacity: list[float], flows: dict[int, tuple[list[int], float]]) -> dict[int, float]:
    """Raise all rates together; whoever meets its limit or a full link stays there. No code shared with the package."""
    rates: dict[int, float] = {}
    while len(rates) < len(flows):
        level = min(limit for f, (_, limit) in flows.items() if f not in rates)
        shares = {}
        for link, total in enumerate(capacity):
            growing = [f for f, (route, _) in flows.items() if link in route and f not in rates]
            if growing:
                taken = sum(rate for f, rate in rates.items() if link in flows[f][0])
                shares[link] = (total - taken) / len(growing)
        tight = min(shares.values(), default=level)
        if level <= tight:
            rates |= {f: limit for f, (_, limit) in flows.items() if f not in rates and limit <= level}
        else:
            full = [link for link, share in shares.items() if share <= tight * (1 + 1e-12)]
            stopped = [f for f, (r, _) in flows.items() if f not in rates and any(link in r for link in full)]
            rates |= dict.fromkeys(stopped, tight)
    return rates


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_rates_are_those_of_solving_for_all_flows(data: st.DataObject) -> None:
    n_links = data.draw(st.integers(1, 7))
    capacity = data.draw(st.lists(st.sampled_from([1.0, 2.0, 3.0, 5.0, 8.0]), min_size=n_links, max_size=n_links))
    s = new_flows(capacity, 12, 4)
    alive: dict[int, tuple[list[int], float]] = {}
    for now in range(data.draw(st.integers(1, 12))):
        ended = data.draw(st.lists(st.sampled_from(sorted(alive)), unique=True, max_size=2)) if alive else []
        for f in ended:
            del alive[f]
        begun = []
        for slot in [f for f in range(12) if f not in alive][: data.draw(st.integers(0, 3))]:
            if slot in ended:
                continue
            route = data.draw(st.lists(st.integers(0, n_links - 1), min_size=1, max_size=4, unique=True))
            limit = data.draw(st.sampled_from([0.5, 1.0, 2.5, 100.0]))
            s.route[slot] = -1
            s.route[slot, : len(route)] = route
            s.limit[slot], s.left[slot] = limit, 1e6
            alive[slot] = (route, limit)
            begun.append(slot)
        altered = []
        if data.draw(st.booleans()):
            link = data.draw(st.integers(0, n_links - 1))
            s.capacity[link] = capacity[link] = data.draw(st.sampled_from([0.5, 4.0]))
            altered.append(link)
        change(s, now, *(np.array(x, dtype=np.int64) if x else NONE for x in (ended, begun, altered)))
        for f, rate in all_at_once(capacity, alive).items():
            assert abs(s.rate[f] - rate) <= 1e-7 * rate, (f, s.rate[f], rate, alive, capacity)


def test_three_bottlenecks_of_the_textbook() -> None:
    """One long flow over links of 1, 2 and 3 units, each shared with a short one: 1/2, then 1/2, 3/2 and 5/2."""
    s = new_flows([1.0, 2.0, 3.0], 4, 3)
    for f, route in enumerate([[0, 1, 2], [0], [1], [2]]):
        s.route[f, : len(route)] = route
        s.limit[f], s.left[f] = 100.0, 1000.0
    change(s, 0, NONE, np.arange(4), NONE)
    assert s.rate.tolist() == [0.5, 0.5, 1.5, 2.5]
    change(s, 10, np.array([1]), NONE, NONE)
    assert s.rate[[0, 2, 3]].tolist() == [1.0, 1.0, 2.0]
