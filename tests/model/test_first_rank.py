"""What the first rank does while the others wait, however long: how they hear of its end, its error and its loss."""

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Died, outcome, run

from commpress.model.first_rank import done_by_first_rank

CPU = torch.device("cpu")
PATIENCE = 1.5
"""Seconds of the group's timeout."""


def in_long_work() -> list[Any]:
    """It takes longer than the group waits; then it fails, and works again."""

    def work() -> str:
        time.sleep(PATIENCE + 1)
        return "done"

    said = [done_by_first_rank(work, None, CPU), outcome(lambda: done_by_first_rank(lambda: 1 // 0, None, CPU))]
    return [*said, done_by_first_rank(lambda: {"rank": dist.get_rank()}, None, CPU)]


def test_the_others_wait_for_the_first_rank_longer_than_their_group_does() -> None:
    first, second = run(2, in_long_work, group_timeout=PATIENCE)
    said = "ZeroDivisionError: integer division or modulo by zero"
    assert first == ["done", said, {"rank": 0}]
    assert second == ["done", f"FirstRankError: {said}", {"rank": 0}]


def of_no_json() -> str:
    return outcome(lambda: done_by_first_rank(lambda: {"model": object()}, None, CPU))


def test_a_result_that_json_cannot_hold_is_an_error_on_all_ranks() -> None:
    first, second = run(2, of_no_json)
    assert first == "TypeError: Object of type object is not JSON serializable"
    assert second == f"FirstRankError: {first}"


def with_a_first_rank_that_dies() -> str:
    os.environ["COMMPRESS_HOST"] = f"host {dist.get_rank()}"
    return outcome(lambda: done_by_first_rank(lambda: os._exit(9), None, CPU))


def test_a_first_rank_that_dies_is_named_by_the_others() -> None:
    gone, *said = run(3, with_a_first_rank_that_dies, fresh=True, tcp=True, timeout=15)
    assert gone == Died(9)
    for each in said:
        assert each.startswith("LostFirstRankError: lost rank 0 (host 0), or the store, while it waited for it: ")


def of_the_second_half() -> list[Any]:
    """Two groups at a time, with first ranks of their own."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    own = halves[dist.get_rank() // 2]
    return [done_by_first_rank(dist.get_rank, own, CPU) for _ in range(1 + dist.get_rank() // 2)]


def test_groups_side_by_side_hear_their_own_first_ranks() -> None:
    assert run(4, of_the_second_half) == [[0], [0], [2, 2], [2, 2]]


def test_one_process_alone_just_does_it() -> None:
    assert done_by_first_rank(lambda: 3, None, CPU) == 3
    with pytest.raises(ZeroDivisionError):
        done_by_first_rank(lambda: 1 // 0, None, CPU)
