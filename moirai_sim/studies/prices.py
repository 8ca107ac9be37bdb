"""Bill of materials of a cluster, and its price by the prices that a study gives."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from moirai_sim.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from moirai_sim.clusters.cluster import Cluster

Parts = dict[str, tuple[int, float | None]]
"""Device type, or name of a link without numbers -> (how many, EUR of all); None where no file prices one of them.
JSON makes lists of the pairs."""

_NUMBER = re.compile(r"\d+(?=$|\.|--)")


def parts(cluster: Cluster) -> Parts:
    """Return the devices and links of a cluster by kind. A link that no file prices costs nothing by itself."""
    found: Parts = {}
    priced = [(device.type.name, device.type.price_eur) for device in cluster.devices]
    priced += [(_NUMBER.sub("", link.name), link.price_eur or 0.0) for link in cluster.links]
    for name, price in priced:
        count, total = found.get(name, (0, 0.0))
        found[name] = (count + 1, None if total is None or price is None else total + price)
    return found


def price_eur(found: Parts, prices: Mapping[str, float]) -> float | None:
    """Return the price of all parts, EUR, those of the study before those of the files; None where one is unknown."""
    total = 0.0
    for name, (count, own) in found.items():
        price = prices[name] * count if name in prices else own
        if price is None:
            return None
        total += price
    return total


def check_prices(prices: Mapping[str, float], clusters: Iterable[Parts]) -> None:
    """Refuse prices of what no variant has.

    Raises
    ------
    InputError
        If a price names neither a device type nor a link of any of the clusters.
    """
    known = sorted({name for found in clusters for name in found})
    problems = [
        f"prices: no device type or link '{name}'; {did_you_mean(name, known)}" for name in prices if name not in known
    ]
    if problems:
        raise InputError(problems)
