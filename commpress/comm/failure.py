"""Errors of an exchange: it ends on every rank, and every rank names the rank that failed and the reason.

The rank that fails writes its reason into the store and closes the group's connections. The others find their connections
closed, read the store and report the same reason. If the store has no reason, the peer itself is lost.

The store is in another process, which may not answer: a rank waits for it at most `PATIENCE` seconds.
"""

import contextlib
import json
import re
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from commpress.store import own_store, with_timeout

PATIENCE = 0.75
"""Seconds to wait for the store, and for a peer's entry in it."""
GRACE = 1.0
"""Seconds that a call may take beyond its own timeout."""

LOST_PEER = re.compile(
    r"gloo/transport/.*(Connection closed by peer|Read error|writev |Socket (unexpectedly )?closed)", re.DOTALL
)
"""Words of Gloo when a peer's connection is closed or broken; its other errors are this rank's own."""
SILENT_PEER = re.compile(
    r"gloo/transport/.*([Tt]imed out|timeout)|Application timeout caused pair closure|[Ww]ait timeout", re.DOTALL
)
"""Words of Gloo when a peer, or the store, has not answered within the timeout."""


class ExchangeError(RuntimeError):
    """An exchange that failed here or on another rank. Do not use the gradients of this step."""


class DisagreementError(ExchangeError, ValueError):
    """An exchange in which ranks did different things: one sent a message that another did not expect."""


class LostPeerError(RuntimeError):
    """A rank of the group (`peer`; None if unknown) is lost or does not answer. The text is the backend's."""

    def __init__(self, peer: int | None, text: str) -> None:
        super().__init__(text)
        self.peer = peer


class OtherMessageError(RuntimeError):
    """A rank of the group (`peer`) sent another message than `mine`, or one of another length."""

    def __init__(self, peer: int, mine: str) -> None:
        super().__init__(mine)
        self.peer, self.mine = peer, mine


class DamagedMessageError(RuntimeError):
    """A message arrived damaged."""


class DriftError(RuntimeError):
    """The replicas hold different bits, or settings. All ranks find out together, so each raises it itself."""


def is_lost(error: BaseException) -> bool:
    """Whether the backend says that a peer is gone or silent."""
    text = str(error)
    return isinstance(error, RuntimeError) and bool(LOST_PEER.search(text) or SILENT_PEER.search(text))


class FailureBoard:
    """The place where the ranks of one process group write the reason of the first failure. `hosts` are their hosts' names."""

    def __init__(self, name: str, rank: int, hosts: Sequence[str]) -> None:
        self._rank, self.hosts = rank, tuple(hosts)
        self._key = f"commpress/failure/{name}"
        self._waits = False
        """Whether this rank has posted what it waits for."""

    def say(self, text: str) -> None:
        """Post what this rank has been waiting for, for the other ranks."""
        self._waits = True
        with contextlib.suppress(RuntimeError, TimeoutError):  # then it is not posted
            with_timeout(PATIENCE, lambda: own_store().set(f"{self._key}/{self._rank}", text))

    def unsay(self) -> None:
        """Remove this rank's post: it no longer waits."""
        self._waits = False
        with contextlib.suppress(RuntimeError, TimeoutError):
            with_timeout(PATIENCE, lambda: own_store().delete_key(f"{self._key}/{self._rank}"))

    def silent(self) -> int | None:
        """Return the first rank that has posted nothing, if this rank has posted what it waits for.

        None if there is no such rank, or if several hosts have one. Raises TimeoutError or RuntimeError if the store does not
        answer.
        """
        if not self._waits:
            return None
        keys = {rank: f"{self._key}/{rank}" for rank in range(len(self.hosts)) if rank != self._rank}
        found = with_timeout(PATIENCE, lambda: [rank for rank, key in keys.items() if not own_store().check([key])])
        return found[0] if len({self.hosts[rank] for rank in found}) == 1 else None

    def name(self, rank: int) -> str:
        """Return a rank and its host in words, as in "rank 3 (node1)"."""
        return f"rank {rank} ({self.hosts[rank]})"

    def explain(self, error: BaseException) -> ExchangeError:
        """Post the reason of a failure, or find the one that was posted, and return the error to raise on this rank.

        Takes at most as long as the waits for the store, a few times `PATIENCE`.
        """
        if not isinstance(error, LostPeerError) and is_lost(error):
            error = LostPeerError(None, str(error))
        kind = DisagreementError if isinstance(error, OtherMessageError | DriftError) else ExchangeError
        try:
            told = partial(self._both if isinstance(error, OtherMessageError) else self._own, error)
            if isinstance(error, LostPeerError) and self._waits and not SILENT_PEER.search(str(error)):
                told = partial(self._own_if_nobody_else, error)
            text = with_timeout(2 * PATIENCE, told)
            posted = with_timeout(PATIENCE, lambda: self._post(kind, text or self._own(error)))
        except (RuntimeError, TimeoutError) as gone:  # the rank that keeps the store is gone or silent
            text = self._own(error)
            return kind(f"commpress: {text} (and the store, which may say more, does not answer: {gone})")
        if (isinstance(error, LostPeerError) or not text) and posted is not None:
            kind = DisagreementError if posted["kind"] == DisagreementError.__name__ else ExchangeError
            return kind(f"commpress: {posted['text']} (reported by rank {self._rank})")
        return kind(f"commpress: {text or self._own(error)}")

    def answers(self) -> bool:
        """Whether the store answers in time."""
        try:
            with_timeout(PATIENCE, lambda: own_store().check([self._key]))
        except (RuntimeError, TimeoutError):
            return False
        return True

    def has_reason(self) -> bool:
        """Whether a reason was posted, and the store answers in time."""
        try:
            return bool(with_timeout(PATIENCE, lambda: own_store().check([self._key])))
        except (RuntimeError, TimeoutError):
            return False

    def _own(self, error: BaseException) -> str:
        """Return this rank's own account of an error."""
        if isinstance(error, OtherMessageError):
            return f"{self.name(self._rank)} has {error.mine}, {self.name(error.peer)} has something else"
        if isinstance(error, DriftError):
            return str(error)
        if not isinstance(error, LostPeerError):
            return f"the gradient exchange failed on rank {self._rank}: {type(error).__name__}: {error}"
        silent = SILENT_PEER.search(str(error)) is not None
        what = "did not answer within the group's timeout" if silent else "is gone"
        who = "another rank" if error.peer is None else self.name(error.peer)
        return f"{who} {what}: the gradient exchange failed on rank {self._rank}, which lost it: {error}"

    def _own_if_nobody_else(self, error: BaseException) -> str:
        """Return this rank's own account of an error, after the rank that it lost has had time to post a reason.

        Ranks that wait for a silent rank time out together, and close their connections a moment before they post.
        """
        deadline = time.monotonic() + PATIENCE
        while not own_store().check([self._key]) and time.monotonic() < deadline:
            time.sleep(PATIENCE / 20)
        return self._own(error)

    def _post(self, kind: type[ExchangeError], text: str) -> dict[str, str] | None:
        """Post a reason and return None; if one was posted before, return that instead."""
        store = own_store()
        if store.check([self._key]):
            found: dict[str, str] = json.loads(store.get(self._key))
            return found
        store.set(self._key, json.dumps({"kind": kind.__name__, "text": text}))
        return None

    def _both(self, error: Any) -> str:
        """Return a sentence with the two different messages of this rank and its peer; "" if the peer does not post its own."""
        store = own_store()
        store.set(f"{self._key}/{self._rank}", error.mine)
        theirs, deadline = f"{self._key}/{error.peer}", time.monotonic() + PATIENCE
        while not store.check([theirs]):
            if time.monotonic() > deadline or store.check([self._key]):
                return ""
            time.sleep(PATIENCE / 20)
        both = sorted([(self._rank, error.mine), (error.peer, store.get(theirs).decode())])
        (one, mine), (other, its) = both
        return f"{self.name(one)} has {mine}, {self.name(other)} has {its}: all ranks must do the same"
