"""Whose fault an error is: the peer's that is gone, or this rank's own."""

import gc
import os
import time
import weakref

import pytest
import torch
import torch.distributed as dist
from ranks import Died, run

from commpress.comm.failure import FailureBoard
from commpress.store import with_timeout


def said(dies: bool) -> list[str]:
    """What rank 0 says when rank 1 has died, or says nothing for too long; then, about errors of its own."""
    board = FailureBoard("a group", dist.get_rank(), ["here", "there"])
    x = torch.ones(4)
    dist.all_reduce(x)
    if dist.get_rank() == 1:
        if dies:
            os._exit(7)
        time.sleep(2)  # longer than the group's timeout
        return []
    explained = []
    to_myself = (lambda: dist.isend(x, 0).wait(),) if dies else ()  # after a timeout Gloo says that of all it is asked
    for action in (lambda: dist.irecv(x, 1).wait(), *to_myself):
        try:
            action()
        except RuntimeError as error:
            explained.append(str(board.explain(error)))
    return [*explained, str(board.explain(RuntimeError("topk has no loop for the gloo backend")))]


def test_a_peer_is_lost_where_gloo_says_so_and_nowhere_else() -> None:
    for dies, how in ((True, ("closed by peer", "Read error")), (False, ("Timed out",))):
        (lost, *own), there = run(2, said, dies, fresh=True, group_timeout=1)
        assert there == (Died(7) if dies else [])
        what = "is gone" if dies else "did not answer within the group's timeout"
        assert lost.startswith(
            f"commpress: another rank {what}: the gradient exchange failed on rank 0, which lost it: "
        )
        assert any(text in lost for text in how)
        assert len(own) == 1 + dies
        assert all("failed on rank 0: RuntimeError: " in text and "which lost it" not in text for text in own)
        assert own[-1].endswith("topk has no loop for the gloo backend")


class Held:
    """Stands for a transfer in flight: as long as it is held, its connections are open."""


def test_an_error_of_an_action_is_not_held_by_the_frames_that_it_went_through() -> None:
    def caller() -> "weakref.ref[Held]":
        held = Held()
        with pytest.raises(ZeroDivisionError):
            with_timeout(60, lambda: 1 // 0)
        return weakref.ref(held)

    gc.disable()
    try:
        assert caller()() is None
    finally:
        gc.enable()
