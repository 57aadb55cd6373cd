"""What all tests share: failed asserts in the battery show their values, and ranks of a module's own."""

from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("battery")


@pytest.fixture(scope="module")
def ranks_of_our_own() -> Iterator[None]:
    """What a library leaves in its processes ends with them."""
    from ranks import close

    yield
    close()
