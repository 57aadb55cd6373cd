"""broadcast: one rank's values on all ranks, as changes since the last time.

    rank 1 (source)  x - base -> p --> 0, 2     base <- base + p'
    rank 0, 2                                   base <- base + p', x <- base

`base`, the version that was sent last, is the same on all ranks. The error of a codec stays in x - base and is sent the next
time, so no other memory is needed. One byte a tensor says whether it has no negative value; then `base` gets none either, so a
variance just above 0 stays valid. A value that is never finite (the -inf of an attention mask) does no harm. If a value becomes
Inf or NaN later, or finite again, that is not sent: while x - base is not finite, the values of its block do not change on the
other ranks. The payload and these bytes go through a binomial tree: they are sent W - 1 times in all.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from commpress.comm.encoder import Encoder
from commpress.comm.exchange.label import Label
from commpress.comm.exchange.wire import Transfer, Wire


def broadcast(
    x: Tensor,
    sizes: Sequence[int],
    base: Tensor,
    encoder: Encoder,
    payload: Tensor,
    wire: Wire,
    source: int,
    label: Label,
) -> Iterator[Transfer]:
    """Update `base` (float32 [n]) by the changes of the source's `x` (float32 [n]), and copy it to `x` on the other ranks.

    `sizes` are those of the tensors in `x`, `payload` is uint8 [nbytes(n) + tensors]. The source keeps its own `x`.
    """
    coded, positive = payload.split([encoder.codec.nbytes(x.numel()), len(sizes)])
    if wire.rank == source:
        encoder.encode(torch.where(x == base, 0.0, x - base), slice(None), out=coded)  # inf - inf is no change
        positive.copy_(torch.stack([(part >= 0).all() for part in x.split(list(sizes))]))
    yield wire.broadcast(payload, source, label)
    step = torch.empty_like(base)
    encoder.decode(coded, x.numel(), out=step)
    base.add_(torch.where(step.isfinite(), step, 0.0))  # NaN would stay in base for good
    free = torch.full((len(sizes),), -torch.inf, dtype=base.dtype, device=base.device)
    least = free.masked_fill(positive != 0, 0.0)  # on the device: the host does not wait for the answers
    for part, bound in zip(base.split(list(sizes)), least, strict=True):
        part.clamp_(min=bound)
    if wire.rank != source:
        x.copy_(base)


def exact_broadcast(x: Tensor, wire: Wire, source: int, label: Label) -> Iterator[Transfer]:
    """Give `x` (any dtype) the source's value on all ranks, bit for bit."""
    yield wire.broadcast(x, source, label)
