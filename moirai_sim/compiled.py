"""How this package compiles its inner loops with numba."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numba

if TYPE_CHECKING:
    from collections.abc import Callable

    F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """Compile ``function`` at its first call, and keep the machine code on disk where a folder can be written.

    The code is kept beside the module, or in the user's cache folder where the package is installed read-only; without
    either it is compiled anew in each process.
    """
    try:
        compiled: F = numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # numba found no folder to keep the code in
        compiled = numba.njit(nogil=True)(function)
    return compiled
