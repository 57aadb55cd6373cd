"""all_gather: each rank's shard, on every rank. For sharded parameters.

    rank 0  a -> pa --> 1, 2        rank 0  [pa pb pc] -> [a' b' c']
    rank 1  b -> pb --> 0, 2        rank 1  [pa pb pc] -> [a' b' c']
    rank 2  c -> pc --> 0, 1        rank 2  [pa pb pc] -> [a' b' c']

Each rank sends (W - 1) * nbytes(m), as many bytes as in a ring. All ranks, a shard's owner included, decode the sent bytes, so
all compute with the same bits. The shard itself does not change.
"""

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor

from commpress.comm.encoder import Encoder
from commpress.comm.exchange.label import Label
from commpress.comm.exchange.wire import Transfer, Wire


def all_gather(
    shard: Tensor, out: Tensor, encoder: Encoder, buffer: Tensor, wire: Wire, label: Label
) -> Iterator[Transfer]:
    """Fill `out` ([W * m]) with the ranks' `shard` ([m], which may be this rank's part of `out`); any float dtype.

    `buffer` is uint8 [W * nbytes(m)].
    """
    me, W, m = wire.rank, wire.world_size, shard.numel()
    rows, parts = buffer.split(encoder.codec.nbytes(m)), out.split(m)
    encoder.encode(shard, slice(None), out=rows[me])
    transfer = wire.all_gather(rows, label, last=True, whole=buffer)
    encoder.decode(rows[me], m, out=parts[me])  # while it is on its way
    yield transfer
    for r in (*range(me), *range(me + 1, W)):
        encoder.decode(rows[r], m, out=parts[r])


def native_all_gather(shard: Tensor, out: Tensor, wire: Wire, label: Label) -> Iterator[Transfer]:
    """Run the group's own all-gather of any dtype. A ring sends W - 1 shards."""
    crossing = (wire.world_size - 1) * shard.nbytes

    def start(group: dist.ProcessGroup) -> Any:
        return dist.all_gather_single(out, shard, group=group, async_op=True)

    yield wire.collective(start, out.nbytes, label, crossing, crossing)
