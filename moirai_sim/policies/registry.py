"""Policies by name, found by entry point: built-ins and those of third parties alike."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from moirai_sim.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from moirai_sim.policies.base import Policy

GROUP = "moirai_sim.policies"
"""Entry point group; a distribution adds a policy by naming its class there."""


@cache
def _registered() -> dict[str, EntryPoint]:
    """Entry points by name, sorted; a third party's policy never replaces a built-in of the same name."""
    found = sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, not _built_in(entry), entry.value))
    return {entry.name: entry for entry in reversed(found)}


def _built_in(entry: EntryPoint) -> bool:
    return entry.value.startswith("moirai_sim.")


def policy_names() -> list[str]:
    """Return the names of all installed policies, sorted."""
    return sorted(_registered())


def check_policy(name: str) -> None:
    """Refuse a name that no policy has.

    Raises
    ------
    InputError
        If no installed distribution registers the name.
    """
    if name not in _registered():
        raise InputError(f"unknown policy '{name}'; {did_you_mean(name, policy_names())}")


def load_policy(name: str) -> Policy:
    """Return a policy by its name.

    Raises
    ------
    InputError
        If no installed distribution registers the name, or the class behind it cannot be imported.
    """
    check_policy(name)
    try:
        policy: Policy = _registered()[name].load()()
    except ImportError as error:
        raise InputError(f"policy '{name}' cannot be loaded ({error}); install what it needs") from error
    except (AttributeError, TypeError) as error:  # an entry point that names no class, or one that wants arguments
        raise InputError(f"policy '{name}' cannot be loaded ({error}); repair its entry point") from error
    return policy
