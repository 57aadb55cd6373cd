"""A collective without headers that does not end: another rank may be waiting for a different one.

    rank 0   all_reduce ....... HELD_SECONDS ... [header] -->  rank 1, which does something else and so waits for a header
                                says so in the store           finds another one than its own: both end, with both values

No rank needs the header if all are only slow: then it is never received, and the backend keeps about a kilobyte of it on both
sides. So each unneeded one doubles the time before the next one, and a wire has no more than a dozen of them.
"""

import contextlib
import datetime
from collections.abc import Callable
from typing import Any

from commpress.comm.exchange.label import wait_for
from commpress.comm.failure import FailureBoard

HELD_SECONDS = 1.0
"""How long a rank waits before it tells the others what for."""


class Waits:
    """How a rank waits for the collectives of one wire."""

    def __init__(self, board: FailureBoard) -> None:
        self._board = board
        self._silences = 1
        """After so many times HELD_SECONDS a header goes."""

    def wait_for(self, work: Any, text: str, send: Callable[[], object]) -> None:
        """Return when the collective has ended, in words `text`. `send` sends its header, and returns what must live as long.

        Raises LostPeerError where the backend says that a rank is gone or silent.
        """
        if _ends_within(work, HELD_SECONDS):
            wait_for(None, work)
            return
        self._board.say(text)
        sent: object = None
        if told := not _ends_within(work, (self._silences - 1) * HELD_SECONDS):
            with contextlib.suppress(RuntimeError):  # a rank has left: the collective fails, too
                sent = send()
        wait_for(None, work)
        self._board.unsay()
        self._silences *= 1 + told
        del sent


def _ends_within(work: Any, seconds: float) -> bool:
    """Whether it has ended by then, well or not."""
    if seconds > 0:  # for the backend 0 is forever
        try:
            work.wait(datetime.timedelta(seconds=seconds))
            return True  # not all works say by themselves that they are completed: that of a reduce-scatter never does
        except RuntimeError:  # it has not ended, or failed: then it says so again
            pass
    return bool(work.is_completed())
