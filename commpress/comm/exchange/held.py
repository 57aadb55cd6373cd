"""A collective without headers that does not end: another rank may be waiting for one that is not this.

    rank 0   all_reduce ....... HELD_SECONDS ... [header] -->  rank 1, which does something else and so waits for a header
                                says so in the store           finds another one than its own: both end, with both values

Nobody needs the header where all are only slow; then it is never received, and costs nothing more.
"""

import contextlib
import datetime
from collections.abc import Callable
from typing import Any

from commpress.comm.exchange.label import wait_for
from commpress.comm.failure import FailureBoard

HELD_SECONDS = 1.0
"""How long a rank waits before it tells the others what for."""


class Held:
    """What a rank says that waits for a collective. `send` sends its header, and returns what must live until it has ended."""

    def __init__(self, board: FailureBoard, text: str, send: Callable[[], object]) -> None:
        self._board, self._text, self._send = board, text, send

    def wait_for(self, work: Any) -> None:
        """Return when the collective has ended. Raises LostPeerError where the backend says that a rank is gone or silent."""
        with contextlib.suppress(RuntimeError):  # it has not ended, or failed: then it says so again
            work.wait(datetime.timedelta(seconds=HELD_SECONDS))
        if work.is_completed():
            wait_for(None, work)
            return
        self._board.say(self._text)
        sent: object = None
        with contextlib.suppress(RuntimeError):  # a rank has left: the collective fails, too
            sent = self._send()
        wait_for(None, work)
        self._board.unsay()
        del sent
