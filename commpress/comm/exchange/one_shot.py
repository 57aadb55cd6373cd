"""one_shot: every rank sends its whole payload to every other. For sparse payloads and few ranks.

    rank 0  p0 --> 1, 2        rank 0  mean(p0, p1, p2)
    rank 1  p1 --> 0, 2        rank 1  mean(p0, p1, p2)
    rank 2  p2 --> 0, 1        rank 2  mean(p0, p1, p2)

Each rank sends (W - 1) * nbytes(n). All sum the same bytes in the order of the ranks, so all hold the same bits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from commpress.comm.codecs import Codec
from commpress.comm.encoder import Encoder
from commpress.comm.exchange.base import Exchange, Message
from commpress.comm.exchange.label import Label
from commpress.comm.exchange.wire import Transfer, Wire


@dataclass(frozen=True)
class OneShot(Exchange):
    """Sends whole payloads to all ranks, in one round."""

    name: ClassVar[str] = "one_shot"

    def run(self, x: Tensor, encoder: Encoder, wire: Wire, label: Label) -> Iterator[Transfer]:
        me, W, size = wire.rank, wire.world_size, encoder.codec.nbytes(x.numel())
        gathered = encoder.buffer("gathered", W * size, x.device)
        rows = gathered.split(size)
        encoder.encode(x, slice(None), out=rows[me])
        yield wire.all_gather(rows, label, last=True, whole=gathered)
        encoder.mean(gathered, x.numel(), W, out=x)

    def messages(self, n: int, itemsize: int, codec: Codec, world_size: int, rank: int) -> tuple[Message, ...]:
        size = (world_size - 1) * codec.nbytes(n)
        return (Message(size, size),)

    def payloads(self, codec: Codec, world_size: int) -> int:
        return world_size
