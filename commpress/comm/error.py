"""The error of a step's means against dense ones, and the residual, on a sample of each bucket that the ranks exchange exactly.

bucket   [x . . . x . . . x . . . x . . .]     every stride-th value, as it is, to all ranks: their mean is the dense one
mean     [y . . . y . . . y . . . y . . .]     the same values as they arrived: error = |y - dense| / |dense|
memory   [e . . . e . . . e . . . e . . .]     what feedback held before this step: residual = |e| / |x|, the worst rank's

The sample includes the sum of the squares of e, and whether all values of the bucket are finite: a bucket with NaN or Inf says
nothing about the codec. Where masks prune a model, the sample is one of the values that they keep: only these are sent.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from commpress.comm.codecs import Codec
from commpress.comm.exchange import Label, Transfer, Wire
from commpress.comm.feedback import Memory

SAMPLE = 2048
"""The largest number of values of a bucket in its sample."""


class ErrorWatch:
    """Error and residual of one step, for buckets that are sent by `codec`. All ranks hold the same bits and find the same."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self._sums: list[Tensor] = []
        self._squares: list[Tensor] = []

    def watch(
        self,
        exchange: Iterator[Transfer],
        x: Tensor,
        codec: Codec,
        memory: Memory,
        wire: Wire,
        label: Label,
        kept_index: Tensor | None = None,
    ) -> Iterator[Transfer]:
        """Run an exchange that leaves the mean in `x` ([n]), and note its error if `codec` is the watched one.

        `memory` is the bucket's. `kept_index` holds the places in `x` whose values are sent: int32 [k]; None if all are.

        Every bucket of the step must pass here, so that all their collectives start after a sample, in one order on every rank.
        """
        n = x.numel() if kept_index is None else kept_index.numel()
        stride = max(1, -(-n // SAMPLE))
        places = None if kept_index is None else kept_index[::stride]
        # a NaN shows in both the minimum and the maximum: one pass, and no copy of the bucket
        ends = torch.stack(x.aminmax()) if x.numel() else x
        beside = [memory.squares(stride, wire.world_size, x.device), ends.isfinite().all().to(torch.float32)]
        own = torch.cat([_sample(x, stride, places).to(torch.float32), torch.stack(beside)])
        rows = own.repeat(wire.world_size).view(wire.world_size, -1)
        whole = rows.view(-1).view(torch.uint8)
        transfer = wire.all_gather(whole.split(own.nbytes), label, last=False, whole=whole)
        transfer.sent = transfer.received = 0  # the report counts only the exchange
        yield transfer
        yield from exchange
        if codec != self.codec:
            return
        values, held, finite = rows.to(torch.float64).tensor_split([-2, -1], dim=1)
        dense = values.mean(0)
        far = _sample(x, stride, places) - dense
        # NaN or Inf spreads over its block, or lies between the samples: such a bucket says nothing about the codec
        says = finite.all()
        self._sums.append(torch.where(says, torch.stack([far.square().sum(), dense.square().sum()]), 0.0))
        self._squares.append(torch.where(says, torch.cat([held, values.square().sum(1, keepdim=True)], 1), 0.0))

    def error(self) -> float | None:
        """Return |mean - dense| / |dense| over all samples; None if no sample was of finite gradients other than 0."""
        if not self._sums:
            return None
        return _root(*torch.stack(self._sums).sum(0).tolist())

    def residual(self) -> float | None:
        """Return |residual| / |gradient|, both of all ranks together; None as `error`.

        A rank alone may have a gradient that is small for once.
        """
        return _root(*torch.stack(self._squares).sum((0, 1)).tolist()) if self._squares else None


def _sample(x: Tensor, stride: int, places: Tensor | None) -> Tensor:
    """Return the values of `x` at these places, or every stride-th."""
    return x[::stride] if places is None else x.index_select(0, places)


def _root(square: float, of: float) -> float | None:
    """Return the root of a share; None of nothing. Processors may differ in the last bits, so it is rounded."""
    return float(f"{math.sqrt(square / of):.3g}") if of else None
