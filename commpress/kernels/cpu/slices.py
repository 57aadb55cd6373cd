"""Slices of a bucket on several cores, if backward leaves some idle.

Loops release the GIL, and each block of a codec is coded by itself, so any number of slices gives the same bytes.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import torch

LEAST = 2**17
"""The fewest values of a slice: a loop takes 60 us for them, and handing a slice to a thread takes 20 to 50 us."""


def in_slices(loop: Callable[..., Any], n: int, block: int, *arguments: Any) -> None:
    """Call `loop(*arguments, begin, end)` for all blocks of n values, in as many slices as there are idle cores.

    A slice is a range of whole blocks; the one with the last block holds the tail, too. Returns when all are done.
    """
    blocks = -(-n // block)
    count = max(1, min(idle_cores(), n // LEAST)) if n >= 2 * LEAST else 1
    first, *rest = pairwise(blocks * i // count for i in range(count + 1))
    others = [_started(loop, *arguments, *cut) for cut in rest]
    try:
        loop(*arguments, *first)
        for other, cut in zip(others, rest, strict=True):
            if other.cancel():  # no thread was free
                loop(*arguments, *cut)
    finally:  # also after an error no other thread may go on writing to the bucket
        errors = [None if other.cancel() else other.exception() for other in others]
    for error in filter(None, errors):
        raise error


def idle_cores() -> int:
    """Return this rank's share of the cores that the process may use, minus the threads of backward; at least 1."""
    share = cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, share - torch.get_num_threads())


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _started(loop: Callable[..., Any], *arguments: Any) -> "Future[None]":
    """Start the call in another thread and return its future; if the interpreter is about to end, it never begins."""
    try:
        return _pool().submit(loop, *arguments)
    except RuntimeError:
        return Future()


@cache
def _pool() -> ThreadPoolExecutor:
    """Return the thread pool of this process, whose threads are joined when the process ends."""
    return ThreadPoolExecutor(max(1, cores() - 1), thread_name_prefix="commpress slice")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads are not forked
