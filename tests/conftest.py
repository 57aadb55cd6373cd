"""What all tests share: one thread a process, failed asserts in the battery show their values, ranks of a module's own."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: workers and ranks outnumber the cores already

pytest.register_assert_rewrite("battery")


@pytest.fixture(scope="module")
def ranks_of_our_own(request: pytest.FixtureRequest) -> Iterator[None]:
    """End what a library leaves in its processes with them. They import the module's LIBRARIES first."""
    from ranks import apart

    with apart(*getattr(request.module, "LIBRARIES", ())):
        yield
