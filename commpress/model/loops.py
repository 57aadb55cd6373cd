"""The loops that run in a step, in Numba: torch's own ways to zero by a mask take five times as long."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from commpress.kernels.compiled import loop

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def keep_(x: Tensor, kept: Tensor) -> None:
    """x <- 0 where `kept` (bool, of its shape) is False, in place; NaN there, too."""
    x = x.detach()
    if x.device.type == "cpu" and x.is_contiguous() and kept.is_contiguous() and x.element_size() in BITS:
        _keep(x.view(-1).view(BITS[x.element_size()]).numpy(), kept.view(-1).view(torch.int8).numpy())
    else:
        x.masked_fill_(~kept, 0)


def count_pruned(x: Tensor, kept: Tensor) -> int:
    """How many values are not 0 where `kept` (bool, of its shape) is False."""
    x = x.detach()
    fits = x.device.type == "cpu" and x.is_contiguous() and kept.is_contiguous() and x.element_size() in BITS
    if fits and x.is_floating_point():
        bits = x.view(-1).view(BITS[x.element_size()]).numpy()
        return int(_count(bits, kept.view(-1).view(torch.int8).numpy(), 2 ** (8 * x.element_size() - 1) - 1))
    return int(((x != 0) & ~kept).sum())


@loop
def _keep(bits: "np.ndarray[Any, Any]", kept: "np.ndarray[Any, Any]") -> None:
    for i in range(bits.size):
        bits[i] = bits[i] if kept[i] else 0


@loop
def _count(bits: "np.ndarray[Any, Any]", kept: "np.ndarray[Any, Any]", but_sign: int) -> int:
    found = 0
    for i in range(bits.size):
        found += (bits[i] & but_sign != 0) & (kept[i] == 0)
    return found
