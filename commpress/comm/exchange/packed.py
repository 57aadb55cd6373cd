"""packed: an exchange of only those values of a bucket that masks keep. For any codec; no indices are sent.

    rank 0   [a0 . . b0] -> [a0 b0]  \\
    rank 1   [a1 . . b1] -> [a1 b1]   > exchange -> [A B] -> [A 0 0 B]        the mean; 0 where nothing is kept
    rank 2   [a2 . . b2] -> [a2 b2]  /

Each rank sends only the exchange's bytes for the kept values.
"""

from collections.abc import Iterator

from torch import Tensor

from commpress.comm.exchange.wire import Transfer
from commpress.comm.masks_index import pack, unpack


def packed(
    x: Tensor,
    places: Tensor,
    kept: Tensor,
    exchange: Iterator[Transfer],
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Iterator[Transfer]:
    """Fill `kept` ([k]) from `x` ([n]) at `places` ([k]), run `exchange`, which works on `kept`, and write the result to `x`.

    `out` is (result, places, kept) if the result goes to other memory.
    """
    pack(x, places, kept)
    yield from exchange
    result, back, values = (x, places, kept) if out is None else out
    unpack(values, back, result)
