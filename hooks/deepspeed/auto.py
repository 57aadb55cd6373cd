"""`auto` in an engine of ZeRO 1 to 3: where its steps begin, and how long training waits for DeepSpeed's own collectives.

An optimizer step, after all accumulated backwards, makes the next step of `auto` due; the forward that follows begins it.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from commpress.comm.sharded_auto import ShardedAuto, begins_steps, ends_forwards


def follow_steps(engine: Any, auto: ShardedAuto) -> None:
    """Have the first forward after each of the engine's optimizer steps begin a step of `auto`."""

    def step(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        done = original(*args, **kwargs)
        auto.due = True
        return done

    engine.optimizer.step = partial(step, engine.optimizer.step)
    engine.module.register_forward_pre_hook(begins_steps(auto), prepend=True)  # before ZeRO 3's hooks, which gather
    engine.module.register_forward_hook(ends_forwards(auto))


class TimedHandle:
    """A wrapper around a handle of DeepSpeed's that notes how long training waits for it.

    A new `wait` on the handle itself would be a reference cycle, which keeps its buffer until the next garbage collection.
    """

    def __init__(self, handle: Any, auto: ShardedAuto) -> None:
        self._handle, self._auto = handle, auto

    def wait(self, **kwargs: Any) -> None:
        """Wait as the handle does."""
        timed(self._auto, "parameters", self._handle.wait)(**kwargs)


def timed(auto: ShardedAuto | None, role: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function of DeepSpeed's that sends gradients or parameters (`role`): the seconds in it are noted for `auto`."""
    if auto is None:
        return original

    def waiting(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            auto.note_waiting(role, time.perf_counter() - start)

    return waiting
