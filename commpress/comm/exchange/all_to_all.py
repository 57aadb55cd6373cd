"""all_to_all: each rank has a part for every other rank. For sharded matrices, each of which one rank steps.

    rank 0  [a0 a1 a2] -> p01, p02        rank 0  [a0  b0' c0']
    rank 1  [b0 b1 b2] -> p10, p12        rank 1  [a1' b1  c1']
    rank 2  [c0 c1 c2] -> p20, p21        rank 2  [a2' b2' c2 ]

A rank sends the sum of nbytes(n) over its parts for others; its own part stays exact. The sender decodes what it has sent, so
both ends hold the same bits.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

from commpress.comm.codecs import Codec
from commpress.comm.encoder import Encoder
from commpress.comm.exchange.label import Label
from commpress.comm.exchange.wire import Transfer, Wire


def all_to_all(
    x: Tensor,
    sizes: Sequence[int],
    out: Tensor,
    arriving: Sequence[int],
    encoder: Encoder,
    buffer: Tensor,
    wire: Wire,
    label: Label,
) -> Iterator[Transfer]:
    """Send part r of `x` (`sizes[r]` values) to rank r; fill `out` with the parts from all ranks (`arriving[r]` from rank r).

    Both are float32. Afterwards `x` holds the values that its receivers have decoded. `buffer` is uint8
    [all_to_all_bytes(...)].
    """
    me, codec = wire.rank, encoder.codec
    going, coming = (_payloads(values, codec, me) for values in (sizes, arriving))
    outgoing, incoming = buffer.split([sum(going), sum(coming)])
    mine, theirs = x.split(list(sizes)), out.split(list(arriving))
    payloads, received = outgoing.split(going), incoming.split(coming)
    for r in wire.peers:
        if sizes[r]:
            encoder.encode(mine[r], slice(None), out=payloads[r])
    transfer = wire.all_to_all(outgoing, going, incoming, label, last=True, arriving=coming)
    for r in wire.peers:  # while they are on their way
        if sizes[r]:
            encoder.decode(payloads[r], sizes[r], out=mine[r])
    theirs[me].copy_(mine[me])
    yield transfer
    for r in wire.peers:
        if arriving[r]:
            encoder.decode(received[r], arriving[r], out=theirs[r])


def all_to_all_bytes(sizes: Sequence[int], arriving: Sequence[int], codec: Codec, rank: int) -> int:
    """Return the bytes of all payloads that a rank sends and receives."""
    return sum(_payloads(sizes, codec, rank)) + sum(_payloads(arriving, codec, rank))


def _payloads(values: Sequence[int], codec: Codec, rank: int) -> list[int]:
    return [codec.nbytes(n) if n and r != rank else 0 for r, n in enumerate(values)]
