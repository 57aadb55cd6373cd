"""all_gather: every rank sends its whole payload to every other. For sparse payloads and few ranks.

    rank 0  p0 --> 1, 2        rank 0  mean(p0, p1, p2)
    rank 1  p1 --> 0, 2        rank 1  mean(p0, p1, p2)
    rank 2  p2 --> 0, 1        rank 2  mean(p0, p1, p2)

Each rank sends (W - 1) * nbytes(n). All sum the same bytes in the order of the ranks, so all hold the same bits.
"""

from collections.abc import Iterator

from torch import Tensor

from commpress.comm.codecs import Codec
from commpress.comm.exchange.label import Label
from commpress.comm.exchange.wire import Transfer, Wire
from commpress.comm.feedback import Memory


def all_gather(x: Tensor, codec: Codec, memory: Memory, wire: Wire, label: Label) -> Iterator[Transfer]:
    """Replace `x` ([n], any float dtype) by its mean over the ranks."""
    me, W, size = wire.rank, wire.world_size, codec.nbytes(x.numel())
    gathered = memory.buffer("gathered", W * size, x.device)
    rows = gathered.split(size)
    memory.encode(codec, x, slice(None), out=rows[me])
    yield wire.swap([rows[me]] * W, rows, label, last=True)
    codec.mean(gathered, x.numel(), W, out=x)
