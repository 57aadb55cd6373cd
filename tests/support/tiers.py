"""What `make test` leaves to `make test-slow`: tests with the mark `slow`, and members of a test with many parameters."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """Return a test's parameters, one value each, as a member that only `make test-slow` runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


def slowly(values: Iterable[Any], quick: Container[Any]) -> list[Any]:
    """Return the members of a test, slow but for those in `quick`. A tuple holds the values of several parameters."""
    return [value if value in quick else slow(*value) if isinstance(value, tuple) else slow(value) for value in values]
