"""How long calls take that take turns with copies of a tensor, on a processor or a GPU. For `codecs`, `passes`, `gpu_check`.

On a GPU events on the stream say when a call began and ended. Some copies go ahead of the first call of a kind: while they
run the host enqueues what follows, so that the GPU never waits for a launch. A call comes behind a copy each time, which has
driven the call's data out of the cache.
"""

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

K = TypeVar("K", bound=Hashable)
Calls = Mapping[K, Callable[[], object]]
Times = dict[K, list[float]]
LEAD = 64
"""Copies that go ahead. Of 134 MB each they take 4 ms on the fastest GPU; a launch takes its host some 50 us."""


def in_turns(calls: Calls[K], x: Tensor, repeat: int) -> tuple[list[float], Times[K]]:
    """Make each call `repeat` times, behind a copy of `x` each time. Return the seconds of all copies, and by key of the calls.

    Before that each call is made once, which is not timed.
    """
    target = torch.empty_like(x)
    for call in calls.values():
        call()

    def copy() -> object:
        return target.copy_(x)

    return (_by_events if x.device.type == "cuda" else _by_clock)(calls, copy, repeat)


def _by_clock(calls: Calls[K], copy: Callable[[], object], repeat: int) -> tuple[list[float], Times[K]]:
    copies: list[float] = []
    times: Times[K] = {key: [] for key in calls}

    def seconds(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    for _ in range(repeat):
        for key, call in calls.items():
            copies.append(seconds(copy))
            times[key].append(seconds(call))
    return copies, times


def _by_events(calls: Calls[K], copy: Callable[[], object], repeat: int) -> tuple[list[float], Times[K]]:
    copies: list[float] = []
    times: Times[K] = {key: [] for key in calls}

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    for key, call in calls.items():
        marks = []
        torch.cuda.synchronize()
        for _ in range(LEAD):
            copy()
        for _ in range(repeat):
            begun, _, copied, _, done = mark(), copy(), mark(), call(), mark()
            marks.append((begun, copied, done))
        torch.cuda.synchronize()
        copies += [begun.elapsed_time(copied) / 1e3 for begun, copied, _ in marks]
        times[key] += [copied.elapsed_time(done) / 1e3 for _, copied, done in marks]
    return copies, times
