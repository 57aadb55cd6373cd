"""What all tests share: one thread a process, failed asserts in the battery show their values, ranks of a module's own."""

import gc
import os
from collections import defaultdict
from collections.abc import Iterator

import pytest
from browser import CHROMIUM, Chromium

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: workers and ranks outnumber the cores already

pytest.register_assert_rewrite("battery")

gc.disable()  # while all modules are imported: there is nothing to collect, and it takes a second of each worker


def pytest_collection_finish() -> None:
    """Collect again, but look through nothing that is there by now."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module")
def ranks_of_our_own(request: pytest.FixtureRequest) -> Iterator[None]:
    """End what a library leaves in its processes with them. They import the module's LIBRARIES first."""
    from ranks import apart

    with apart(*libraries_of(request.module)):
        yield


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """A browser, without which the test is skipped."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def libraries_of(module: object) -> tuple[str, ...]:
    """Return the LIBRARIES that a test module's ranks import first; they take seconds."""
    return getattr(module, "LIBRARIES", ())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin each xdist worker's share with modules of the same LIBRARIES, so that one worker alone imports these.

    `--dist worksteal` cuts the tests into equal shares, in their order, and takes from the end of a share what another worker
    shall run.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    groups: dict[tuple[str, ...], list[pytest.Item]] = defaultdict(list)
    for item in items:
        groups[libraries_of(getattr(item, "module", None))].append(item)
    others = groups.pop((), [])
    shares: list[list[pytest.Item]] = [[] for _ in range(workers)]
    for _, group in sorted(groups.items(), key=lambda pair: (-len(pair[1]), pair[0])):
        min(shares, key=len).extend(group)
    ends = [len(items) * (i + 1) // workers for i in range(workers)]
    ordered: list[pytest.Item] = []
    for share, end in zip(shares, ends, strict=True):
        ordered += share
        room = max(0, end - len(ordered))
        ordered += others[:room]
        others = others[room:]
    items[:] = ordered + others
