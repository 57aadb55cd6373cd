"""The error of a step's means against dense ones, on a sample of each bucket that the ranks exchange exactly.

bucket   [x . . . x . . . x . . . x . . .]     every stride-th value, as it is, to all ranks: their mean is the dense one
mean     [y . . . y . . . y . . . y . . .]     the same values as they arrived: error = |y - dense| / |dense|

The sample includes whether all values of the bucket are finite: a bucket with NaN or Inf says nothing about the codec.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from commpress.comm.codecs import Codec
from commpress.comm.exchange import Label, Transfer, Wire

SAMPLE = 2048
"""The largest number of values of a bucket in its sample."""


class ErrorWatch:
    """The error of one step, for buckets that are sent by `codec`. All ranks hold the same bits and find the same error."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self._sums: list[Tensor] = []

    def watch(
        self, exchange: Iterator[Transfer], x: Tensor, codec: Codec, wire: Wire, label: Label
    ) -> Iterator[Transfer]:
        """Run an exchange that leaves the mean in `x` ([n]), and note its error if `codec` is the watched one.

        Every bucket of the step must pass here, so that all their collectives start after a sample, in one order on every rank.
        """
        stride = max(1, -(-x.numel() // SAMPLE))
        # a NaN shows in both the minimum and the maximum: one pass, and no copy of the bucket
        ends = torch.stack(x.aminmax()) if x.numel() else x
        own = torch.cat([x[::stride].to(torch.float32), ends.isfinite().all().to(torch.float32).view(1)])
        rows = own.repeat(wire.world_size).view(wire.world_size, -1)
        whole = rows.view(-1).view(torch.uint8)
        transfer = wire.all_gather(whole.split(own.nbytes), label, last=False, whole=whole)
        transfer.sent = transfer.received = 0  # the report counts only the exchange
        yield transfer
        yield from exchange
        if codec != self.codec:
            return
        dense, finite = rows.mean(0, dtype=torch.float64).tensor_split([-1])
        far = x[::stride] - dense
        sums = torch.stack([far.square().sum(), dense.square().sum()])
        # NaN or Inf spreads over its block, or lies between the samples: such a bucket says nothing about the codec
        self._sums.append(torch.where(finite == 1, sums, 0.0))

    def error(self) -> float | None:
        """Return |mean - dense| / |dense| over all samples; None if no sample was of finite gradients other than 0."""
        if not self._sums:
            return None
        far, norm = torch.stack(self._sums).sum(0).tolist()
        return float(f"{math.sqrt(far / norm):.3g}") if norm else None  # processors may differ in the last bits
