"""`auto` in an engine of ZeRO 1 to 3: where its steps begin, and how long training waits for what DeepSpeed sends by itself.

An optimizer step, behind as many backwards as are accumulated, makes the next step due; the forward that follows begins it.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from commpress.comm.sharded_auto import ShardedAuto, begins_steps


def follow_steps(engine: Any, auto: ShardedAuto) -> None:
    """Have the forwards behind an engine's optimizer steps begin those of `auto`."""

    def step(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        done = original(*args, **kwargs)
        auto.due = True
        return done

    engine.optimizer.step = partial(step, engine.optimizer.step)
    engine.module.register_forward_pre_hook(begins_steps(auto), prepend=True)  # ZeRO 3's own gather parameters


class TimedHandle:
    """Stands in for a handle of DeepSpeed's, and notes how long training waits for it.

    A new `wait` on the handle itself would be a cycle of references, which keeps its buffer until the next collection.
    """

    def __init__(self, handle: Any, auto: ShardedAuto) -> None:
        self._handle, self._auto = handle, auto

    def wait(self, **kwargs: Any) -> None:
        """Wait as the handle does."""
        timed(self._auto, "parameters", self._handle.wait)(**kwargs)


def timed(auto: ShardedAuto | None, role: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of DeepSpeed's that sends gradients or parameters, and how long training waits in it is noted."""
    if auto is None:
        return original

    def waiting(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            auto.note_waiting(role, time.perf_counter() - start)

    return waiting
