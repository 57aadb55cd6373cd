"""The store of the default process group, which another process may keep: a rank that asks it waits no longer than it says."""

import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
_stores: "weakref.WeakKeyDictionary[dist.ProcessGroup, Any]" = weakref.WeakKeyDictionary()
"""A connection of our own to the store of each default group, so that nobody else waits while we do."""


def with_timeout(seconds: float, action: Callable[[], T]) -> T:
    """Return what `action()` returns. Raises what it raises, TimeoutError if it takes longer; its thread is then left alone."""
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(action())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="commpress waits", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        try:
            raise errors[0]
        finally:
            errors.clear()  # an error that is held by its own frame would hold the caller's frames, and a transfer in them
    if not results:
        raise TimeoutError(f"no answer in {seconds:g} s")
    return results[0]


def own_store() -> Any:
    """The default group's store, by a connection of our own where it has connections. Call it by `with_timeout`: the host that
    keeps it may be silent."""
    group = dist.distributed_c10d._get_default_group()
    if group not in _stores:
        store: Any = dist.distributed_c10d._get_default_store()
        try:
            _stores[group] = store.clone()
        except (AttributeError, RuntimeError):  # a store in a file, or an older torch: there is but the one
            _stores[group] = store
    return _stores[group]
