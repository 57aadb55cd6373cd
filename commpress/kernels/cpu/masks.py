"""Loops that pack the values that masks keep, and unpack them."""

import numpy as np
import torch
from torch import Tensor

from commpress.kernels.compiled import loop


@loop
def pack(x, places, out):
    """out[i] <- x[places[i]], 0 where the place is negative; integers of any width, the bits of the values."""
    for i in range(places.size):
        p = places[i]
        out[i] = x[p] if p >= 0 else 0


@loop
def unpack(packed, places, out):
    """out <- 0, out[places[i]] <- packed[i] where the place is not negative."""
    out[:] = 0
    for i in range(places.size):
        p = places[i]
        if p >= 0:
            out[p] = packed[i]


BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack_kept(x: Tensor, places: Tensor, out: Tensor) -> None:
    """`pack` of the table."""
    pack(_bits(x), places.numpy(), _bits(out))


def unpack_kept(packed: Tensor, places: Tensor, out: Tensor) -> None:
    """`unpack` of the table."""
    unpack(_bits(packed), places.numpy(), _bits(out))


def _bits(x: Tensor) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    return x.detach().view(BITS[x.element_size()]).numpy()
