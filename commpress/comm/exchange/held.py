"""A collective without headers that does not end, perhaps because another rank waits for a different one.

    rank 0   all_reduce ....... HELD_SECONDS ... [header] -->  rank 1, which does something else and so waits for a header,
                                says so in the store           finds another one than its own: both end, with both values

If all ranks are only slow, no rank needs the header: it is never received, and the backend keeps about a kilobyte of it on both
sides. So each unneeded header doubles the time before the next, and a wire has at most a dozen of them.
"""

import contextlib
import datetime
from collections.abc import Callable
from typing import Any

from commpress.comm.exchange.label import wait_for
from commpress.comm.failure import FailureBoard

HELD_SECONDS = 1.0
"""Seconds that a rank waits before it tells the others what it waits for."""


class Waits:
    """The waits of a rank for the collectives of one wire."""

    def __init__(self, board: FailureBoard) -> None:
        self._board = board
        self._silences = 1
        """A header is sent after this many times HELD_SECONDS."""

    def wait_for(self, work: Any, text: str, send: Callable[[], object]) -> None:
        """Wait until a collective has ended; `text` describes it. `send` sends its header, and returns what must stay alive.

        Raises LostPeerError if the backend says that a rank is gone or silent.
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
    """Whether a work ends within `seconds`, with or without an error."""
    if seconds > 0:  # the backend takes 0 for forever
        try:
            work.wait(datetime.timedelta(seconds=seconds))
            return True  # is_completed() is not reliable: the work of a reduce-scatter never says so
        except RuntimeError:  # it has not ended, or has failed; a failed work raises again later
            pass
    return bool(work.is_completed())
