"""Steps in which a bucket stays on its rank.

Under a loss scale one number a bucket travels all the same: a step that one rank has to skip is skipped by all, as after an
exchange, where all see the same Inf or NaN. Else the ranks' scales and steps would drift apart.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from commpress.comm.exchange.wire import Transfer, Wire
from commpress.comm.feedback import Memory


def stay() -> Iterator[Transfer]:
    """Leave the bucket as it is."""
    return iter(())


def alone(x: Tensor, memory: Memory) -> Iterator[Transfer]:
    """The mean over a single rank, which may remember what it withheld when there were more."""
    if memory.residual is not None:
        x.add_(memory.residual)
        memory.residual = None
    yield from ()


def skip_together(x: Tensor, wire: Wire) -> Iterator[Transfer]:
    """Leave `x` ([n], any float dtype) as it is, or fill it with NaN on all ranks if it holds NaN or Inf on any."""
    bad = torch.tensor([float(not bool(x.isfinite().all()))], dtype=torch.float32, device=x.device)
    yield wire.all_reduce(bad)
    if bad.item():
        x.fill_(torch.nan)  # all of it: DDP hands on no gradient of a parameter that no rank used
