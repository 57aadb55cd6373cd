"""A check that all replicas hold the same bits: every N steps the ranks compare hashes of the means and of parameters.

    step          0 1 2 . . . N . . . 2N           16 bytes a rank are compared, after the last bucket
    means         hash of every bucket's mean      after the exchange
    parameters    hash of every parameter          at forward
    payloads      a checksum in each header        shows damage on the way to one owner, which would reach all ranks

If they differ, the ranks exchange one hash per parameter, and the error names the rank and the parameter.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from commpress.comm.exchange.label import Label
from commpress.comm.exchange.wire import Transfer, Wire
from commpress.comm.failure import DriftError
from commpress.kernels.cpu.fingerprint import fingerprint

FIRST_STEPS = 3
"""The first steps, which are always compared: most errors exist from the start."""
EVERY = 1000


def require_interval(verify: object) -> None:
    """Raise ValueError unless `verify` is a number of steps, or 0 for never."""
    if not isinstance(verify, int) or verify < 0:
        raise ValueError(f"verify {verify!r}: expected a number of steps, such as {EVERY}, or 0 for never")


def is_due(verify: int, step: int) -> bool:
    """Return whether a step (from 0) is compared."""
    return verify > 0 and (step < FIRST_STEPS or step % verify == 0)


class Comparison:
    """The hashes of one step. `parameters` are those of forward, by name."""

    def __init__(self, step: int, parameters: Sequence[tuple[str, Tensor]]) -> None:
        self._step = step
        self._names = [f"parameter {name!r}" for name, _ in parameters]
        self._hashes = [fingerprint(p) for _, p in parameters]

    def watch(self, exchange: Iterator[Transfer], bucket: Tensor, name: str) -> Iterator[Transfer]:
        """Note the hash of a bucket after its exchange."""
        yield from exchange
        self._names.append(name)
        self._hashes.append(fingerprint(bucket))

    def finish(self, exchange: Iterator[Transfer], wire: Wire, label: Label) -> Iterator[Transfer]:
        """Compare, after the exchange of a step's last bucket. Raises DriftError on all ranks if anything differs."""
        for transfer in exchange:
            transfer.last, transfer.decodes = False, transfer.last
            yield transfer
        yield Transfer([], 0, 0, last=False)  # after it all earlier buckets have landed
        yield from self._compared(wire, label, [_together(self._hashes)], last=False)
        if len(set(self._found)) == 1:
            return
        yield from self._compared(wire, label.second(), self._hashes, last=True)
        raise DriftError(self._difference(wire))

    def _compared(self, wire: Wire, label: Label, hashes: list[int], last: bool) -> Iterator[Transfer]:
        """Exchange hashes: every rank's are in `_found` afterwards."""
        own = torch.tensor([h - (1 << 63) for h in hashes], dtype=torch.int64, device=wire.device).view(torch.uint8)
        whole = own.repeat(wire.world_size)
        rows = whole.split(own.numel())
        transfer = wire.all_gather(rows, label, last, whole)
        transfer.sent = transfer.received = 0  # the report counts only the exchange
        yield transfer
        self._found = [tuple(row.view(torch.int64).tolist()) for row in rows]

    def _difference(self, wire: Wire) -> str:
        """Return a sentence on the first difference. It names the ranks that differ from the majority, or else from rank 0."""
        ranks = list(zip(*self._found, strict=True))
        differ = [place for place, of_ranks in enumerate(ranks) if len(set(of_ranks)) > 1]
        of_ranks = ranks[differ[0]]
        ((usual, times), *others) = Counter(of_ranks).most_common(2)
        if others and others[0][1] == times:
            usual = of_ranks[0]
        odd = [rank for rank, value in enumerate(of_ranks) if value != usual]
        who = ", ".join(wire.board.name(rank) for rank in odd)
        values = f"hash {of_ranks[odd[0]] + (1 << 63):016x}, rank {of_ranks.index(usual)} {usual + (1 << 63):016x}"
        more = f", and {len(differ) - 1} others of {len(ranks)} compared" if len(differ) > 1 else ""
        return (
            f"{who} has other values of {self._names[differ[0]]}{more} in step {self._step} ({values}): the replicas have "
            "drifted apart. Start again from a checkpoint, or from one rank's parameters by "
            "commpress.broadcast_parameters(model); attach(..., verify=0) does not compare"
        )


def _together(hashes: Sequence[int]) -> int:
    """Return one hash of many hashes."""
    return fingerprint(torch.tensor([h - (1 << 63) for h in hashes], dtype=torch.int64, device="cpu"))
