"""Questions to all ranks without a wait: they are queued with the buckets, and the answers are read later.

    step k      [question][bucket 0][bucket 1] ...     backward goes on at once, whatever the other ranks do meanwhile
    step k + 1  the answers are read: they came before the buckets of step k

In the middle of a backward a rank must not wait for the others: one of them may be in a collective of the user's own, and wait
there for this rank's next step.
"""

import json
import zlib
from collections.abc import Iterator

import torch

from commpress.comm.agreement import Settings
from commpress.comm.exchange import Label, Transfer, Wire
from commpress.comm.work import Work, not_counted

ROOM = 1 << 13
"""Bytes of a rank's answer, the same on all ranks, so that one message carries it. It is padded with spaces."""
KEY = "hash"


class Question:
    """One question: this rank's `settings` (JSON values), and the answers of all ranks after `exchange`."""

    def __init__(self, settings: Settings, wire: Wire, room: int = ROOM) -> None:
        own = json.dumps(settings).encode().ljust(room)
        if len(own) > room:
            raise ValueError(
                f"{len(own)} bytes to tell the other ranks ({own[:60].decode()}...): expected at most {room}"
            )
        self._wire = wire
        self._whole = torch.empty(wire.world_size * room, dtype=torch.uint8, device=wire.device)
        self._rows = self._whole.split(room)
        self._rows[wire.rank].copy_(torch.frombuffer(bytearray(own), dtype=torch.uint8))
        self.work = Work(self._whole, not_counted)
        """The work that the runner of the exchange finishes."""

    @classmethod
    def of_hash(cls, settings: Settings, wire: Wire) -> "Question":
        """Return a short question: whether all ranks have the same `settings`."""
        return cls({KEY: zlib.crc32(json.dumps(settings).encode())}, wire, room=32)

    def exchange(self, label: Label) -> Iterator[Transfer]:
        """Run the exchange that sends each rank's answer to all."""
        transfer = self._wire.all_gather(self._rows, label, last=True, whole=self._whole)
        transfer.sent = transfer.received = 0  # the report counts only model traffic
        yield transfer

    def answers(self) -> list[Settings]:
        """Return every rank's settings, in the order of the ranks. Waits for them, and raises the error of the exchange."""
        self.work.wait()
        return self.arrived()

    def arrived(self) -> list[Settings]:
        """Return every rank's settings without waiting; call it only after the exchange is over."""
        return [json.loads(row.cpu().numpy().tobytes()) for row in self._rows]

    def is_unanimous(self) -> bool:
        """Return whether all ranks gave the same settings; call it only after the exchange is over."""
        first, *others = self.arrived()
        return all(other == first for other in others)
