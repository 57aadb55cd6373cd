"""two_shot: a reduce-scatter and an all-gather of payloads. The volume does not grow with the number of ranks.

             encode in W chunks      own chunk of all: mean, encode      all chunks: decode
    rank 0   [a0 b0 c0]  \\           [a0 a1 a2] -> A   \\                [A B C]
    rank 1   [a1 b1 c1]   > to all   [b0 b1 b2] -> B    > to all        [A B C]
    rank 2   [a2 b2 c2]  /           [c0 c1 c2] -> C   /                [A B C]

Each rank sends (W - 1) / W * nbytes(n) twice. Both encodings have their own feedback. Every rank, the owner included, decodes
the bytes that were sent, so all hold the same bits. Between two ranks `one_shot` sends as many bytes in one round, and encodes
once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from commpress.comm.codecs import Codec
from commpress.comm.encoder import Encoder
from commpress.comm.exchange.base import Exchange, Message
from commpress.comm.exchange.label import Label
from commpress.comm.exchange.one_shot import OneShot
from commpress.comm.exchange.wire import Transfer, Wire


def chunk_bounds(n: int, world_size: int, granularity: int) -> list[int]:
    """Return W + 1 cuts of n values, at multiples of the codec's granularity; the chunks are as equal as that allows."""
    blocks = -(-n // granularity)
    return [min(n, blocks * r // world_size * granularity) for r in range(world_size)] + [n]


@dataclass(frozen=True)
class TwoShot(Exchange):
    """Sends payloads of chunks to their owners, and payloads of the means to all ranks."""

    name: ClassVar[str] = "two_shot"

    def run(self, x: Tensor, encoder: Encoder, wire: Wire, label: Label) -> Iterator[Transfer]:
        me, W = wire.rank, wire.world_size
        cuts = chunk_bounds(x.numel(), W, encoder.codec.granularity)
        lengths = [cuts[r + 1] - cuts[r] for r in range(W)]
        sizes = [encoder.codec.nbytes(length) for length in lengths]

        outgoing = encoder.buffer("outgoing", sum(sizes), x.device)
        payloads = outgoing.split(sizes)
        for r in range(W):
            encoder.encode(x, slice(cuts[r], cuts[r + 1]), out=payloads[r])
        gathered = encoder.buffer("gathered", W * sizes[me], x.device)
        gathered[me * sizes[me] : (me + 1) * sizes[me]].copy_(payloads[me])
        yield wire.all_to_all(outgoing, sizes, gathered, label, last=False)

        longest = max(sizes)
        whole = encoder.buffer("means", W * longest, x.device)
        means = [whole[r * longest : r * longest + sizes[r]] for r in range(W)]
        encoder.recode(gathered, lengths[me], W, out=means[me])
        yield wire.all_gather(means, label.second(), last=True, whole=whole)

        for r in range(W):
            encoder.decode(means[r], lengths[r], out=x[cuts[r] : cuts[r + 1]])

    def messages(self, n: int, itemsize: int, codec: Codec, world_size: int, rank: int) -> tuple[Message, ...]:
        cuts = chunk_bounds(n, world_size, codec.granularity)
        sizes = [codec.nbytes(cuts[r + 1] - cuts[r]) for r in range(world_size)]
        to_owners, own = sum(sizes) - sizes[rank], (world_size - 1) * sizes[rank]
        return Message(to_owners, own), Message(own, to_owners)

    def chunk(self, n: int, codec: Codec, rank: int, world_size: int) -> tuple[int, int] | None:
        cuts = chunk_bounds(n, world_size, codec.granularity)
        return cuts[rank], cuts[rank + 1]

    def among(self, world_size: int) -> Exchange:
        return OneShot() if world_size == 2 else self
