"""What becomes of an error: the exchange ends on every rank, and every rank says whose fault it was and why.

The rank that fails leaves its reason in the store and closes the group's connections; the others find their connections
closed, look into the store and report the same reason. If nothing stands there, the peer itself is gone.
"""

import re
import time

import torch.distributed as dist

PATIENCE = 0.5
"""Seconds to wait for the reason of a peer that closed its connections."""

LOST_PEER = re.compile(
    r"gloo/transport/.*(Connection closed by peer|Read error|writev |Socket (unexpectedly )?closed|[Tt]imed out|timeout)"
    r"|Application timeout caused pair closure",
    re.DOTALL,
)
"""What Gloo says when a peer's connection is closed, broken or silent; its other errors are this rank's own."""


class ExchangeError(RuntimeError):
    """An exchange failed here or on another rank; the gradients of this step are not to be used."""


class FailureBoard:
    """Where the ranks of one process group leave the reason of the first failure."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._rank = dist.get_rank(group)
        self._key = f"commpress/failure/{group.group_name}"
        self._store = dist.distributed_c10d._get_default_store()

    def explain(self, error: BaseException) -> ExchangeError:
        """Post what happened here, or find what was posted, and return the error that this rank's user shall see."""
        own = f"rank {self._rank}: {type(error).__name__}: {error}"
        lost_peer = isinstance(error, RuntimeError) and LOST_PEER.search(str(error)) is not None
        try:
            if lost_peer:
                reason = self._posted() or f"rank {self._rank}, which lost another rank: {error}"
            else:
                reason = own
                self._store.set(self._key, own)
        except RuntimeError as gone:  # the store went down with the rank that kept it
            reason = f"{own} (and the store that would say more is gone: {gone})"
        return ExchangeError(f"commpress: the gradient exchange failed on {reason}")

    def _posted(self) -> str:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if self._store.check([self._key]):
                return f"{self._store.get(self._key).decode()} (reported by rank {self._rank})"
            time.sleep(PATIENCE / 10)
        return ""
