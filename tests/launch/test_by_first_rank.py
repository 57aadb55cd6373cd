"""What rank 0 does while the others wait: they hear of its end, of its loss, and of a stop."""

import os
import signal
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from ranks import Died, outcome, run

from commpress.launch import runtime

CPU = torch.device("cpu")
SOON = 15
"""Seconds in which all ranks have ended, on a busy machine."""


def waited(action: Callable[[], object]) -> str:
    """What a rank has of it in a program, or the error that it ends with."""
    os.environ["COMMPRESS_HOST"] = f"host {dist.get_rank()}"
    found: list[object] = []

    def program() -> None:
        with runtime.in_one_voice(), runtime.stop_signals():
            if dist.get_rank() and action is stopped_on_rank_1:
                signal.raise_signal(signal.SIGTERM)
            found.append(runtime.by_first_rank(action, CPU))

    return outcome(program) or str(found[0])


def number() -> int:
    return 3


def dead() -> None:
    os._exit(9)


def stopped() -> None:
    signal.raise_signal(signal.SIGTERM)
    time.sleep(60)


def stopped_on_rank_1() -> None:
    time.sleep(runtime.PATIENCE + 1)


def test_it_reaches_ranks_that_have_asked_less_often() -> None:
    assert run(1, waited, number) == ["3"]
    assert run(2, waited, number, timeout=SOON) == ["3", "3"]
    assert run(2, waited, number, timeout=SOON, tcp=True) == ["3", "3"]


def test_ranks_that_wait_for_a_dead_one_end_and_name_it() -> None:
    gone, said = run(2, waited, dead, fresh=True, tcp=True, timeout=SOON)
    assert gone == Died(9)
    assert said.startswith("LoneError: rank 1 (host 1): lost rank 0 (host 0), or the store, while it waited for it: ")


def test_a_stop_ends_what_rank_0_does_and_those_that_wait() -> None:
    assert run(2, waited, stopped, timeout=SOON) == [f"TrainingError: {runtime.STOPPED}"] * 2


def test_a_stop_on_a_rank_that_waits_ends_all() -> None:
    first, said = run(2, waited, stopped_on_rank_1, fresh=True, timeout=SOON)
    assert said == f"LoneError: rank 1 (host 1): {runtime.STOPPED}"
    assert first.startswith("LoneError: rank 0 (host 0): ends, too: rank 1 (host 1): asked to stop")
