"""Steps in which a bucket stays on its rank.

Under a loss scale one number travels all the same: a step that one rank has to skip is skipped by all, as after an exchange,
where all see the same Inf or NaN. Else the ranks' scales and steps would drift apart.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from commpress.comm.exchange.wire import Transfer, Wire


def stay() -> Iterator[Transfer]:
    """Leave the bucket as it is."""
    return iter(())


def skip_together(
    x: Tensor, bad: list[bool], last: bool, wire: Wire, exchange: Iterator[Transfer]
) -> Iterator[Transfer]:
    """Exchange `x` ([n], any float dtype), but with a NaN in it if it is the step's last bucket and any rank's step is bad.

    `bad` gathers whether this rank's buckets of the step hold NaN or Inf.
    """
    bad.append(not bool(x.isfinite().all()))
    if last:
        ranks = torch.tensor([float(any(bad))], device=x.device)
        yield wire.all_reduce(ranks, last=False)
        if ranks.item():
            x[0] = torch.nan
    yield from exchange
