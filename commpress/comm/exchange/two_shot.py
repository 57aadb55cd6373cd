"""two_shot: a reduce-scatter and an all-gather of payloads. The volume does not grow with the number of ranks.

             encode in W chunks      own chunk of all: mean, encode      all chunks: decode
    rank 0   [a0 b0 c0]  \\           [a0 a1 a2] -> A   \\                [A B C]
    rank 1   [a1 b1 c1]   > swap     [b0 b1 b2] -> B    > swap          [A B C]
    rank 2   [a2 b2 c2]  /           [c0 c1 c2] -> C   /                [A B C]

Each rank sends (W - 1) / W * nbytes(n) twice. Both encodings have their own feedback. Every rank, the owner too, decodes
the bytes that were sent, so all hold the same bits.
"""

from collections.abc import Iterator

from torch import Tensor

from commpress.comm.codecs import Codec
from commpress.comm.coding import recode
from commpress.comm.exchange.label import Label
from commpress.comm.exchange.wire import Transfer, Wire
from commpress.comm.feedback import Memory


def chunk_bounds(n: int, world_size: int, granularity: int) -> list[int]:
    """W + 1 cuts of n values at multiples of the codec's granularity, the chunks as equal as that allows."""
    blocks = -(-n // granularity)
    return [min(n, blocks * r // world_size * granularity) for r in range(world_size)] + [n]


def two_shot(x: Tensor, codec: Codec, memory: Memory, wire: Wire, label: Label) -> Iterator[Transfer]:
    """Replace `x` ([n], any float dtype) by its mean over the ranks."""
    me, W = wire.rank, wire.world_size
    cuts = chunk_bounds(x.numel(), W, codec.granularity)
    lengths = [cuts[r + 1] - cuts[r] for r in range(W)]
    sizes = [codec.nbytes(length) for length in lengths]

    outgoing = memory.buffer("outgoing", sum(sizes), x.device).split(sizes)
    for r in range(W):
        memory.encode(codec, x, slice(cuts[r], cuts[r + 1]), out=outgoing[r])
    gathered = memory.buffer("gathered", W * sizes[me], x.device)
    rows = gathered.split(sizes[me]) if sizes[me] else (gathered,) * W
    rows[me].copy_(outgoing[me])
    yield wire.swap(outgoing, rows, label, last=False)

    means = memory.buffer("means", sum(sizes), x.device).split(sizes)
    recode(codec, gathered, lengths[me], W, memory.second, out=means[me])
    yield wire.swap([means[me]] * W, means, label.second(), last=True)

    for r in range(W):
        codec.decode(means[r], lengths[r], out=x[cuts[r] : cuts[r + 1]])
