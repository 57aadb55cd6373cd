"""What all tests share: failed asserts in the battery show their values, and ranks of a module's own."""

from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("battery")


@pytest.fixture(scope="module")
def ranks_of_our_own(request: pytest.FixtureRequest) -> Iterator[None]:
    """End what a library leaves in its processes with them. The process they are forked from imports the module's LIBRARIES."""
    from ranks import apart

    with apart(*getattr(request.module, "LIBRARIES", ())):
        yield
