"""Starts Numba's compiler in the process that ranks are forked from, which takes half a second; it compiles nothing of ours."""

import numba


@numba.njit  # type: ignore[misc]
def nothing() -> None:
    """Give the compiler something to compile."""


nothing()
