"""Local steps: a bucket stays on its rank.

With a loss scale one number a bucket is still sent: if one rank must skip a step, all skip it, as after an exchange, in which
all see the same Inf or NaN. Otherwise the ranks' scales and steps would drift apart.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from commpress.comm.codecs import Codec
from commpress.comm.encoder import Encoder
from commpress.comm.exchange.base import Exchange, Message
from commpress.comm.exchange.label import Label
from commpress.comm.exchange.wire import Transfer, Wire
from commpress.comm.meter import NOT_SENT


@dataclass(frozen=True)
class NoExchange(Exchange):
    """No exchange: the bucket does not change."""

    name: ClassVar[str] = NOT_SENT

    def run(self, x: Tensor, encoder: Encoder, wire: Wire, label: Label) -> Iterator[Transfer]:
        return iter(())

    def messages(self, n: int, itemsize: int, codec: Codec, world_size: int, rank: int) -> tuple[Message, ...]:
        return ()


def single_rank(x: Tensor, encoder: Encoder, out: Tensor | None = None, times: float = 1.0) -> Iterator[Transfer]:
    """Write `times` the mean over a single rank to `out` (None: to `x`), with a residual from a time with more ranks."""
    encoder.add_residual(x)
    if out is not None and out.data_ptr() != x.data_ptr():
        out.copy_(x)
    if times != 1:
        (x if out is None else out).mul_(times)
    yield from ()


def all_reduce_found_inf(x: Tensor, wire: Wire, label: Label) -> Iterator[Transfer]:
    """Leave `x` ([n], any float dtype) as it is, or fill it with NaN on all ranks if it holds NaN or Inf on any.

    The host does not ask the device which of the two it is.
    """
    bad = x.isfinite().all().logical_not().to(torch.float32).view(1)
    yield wire.all_reduce(bad, label)
    x.masked_fill_(bad != 0, torch.nan)  # the whole bucket: DDP passes on no gradient of a parameter that no rank used
