"""Loops over pruned values. torch's own ways to zero by a mask take five times as long."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from commpress.kernels.compiled import loop

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
BLOCK = 4096
"""How many values are counted in 32 bits."""


@loop
def _keep(bits: "np.ndarray[Any, Any]", kept: "np.ndarray[Any, Any]") -> None:
    for i in range(bits.size):
        value = bits[i]  # read whether it is kept or not: else AVX2, which has no masks for 16 bits, goes one by one
        bits[i] = value if kept[i] else 0


@loop
def _count(bits: "np.ndarray[Any, Any]", kept: "np.ndarray[Any, Any]", but_sign: Any) -> Any:
    found = np.int64(0)
    for o in range(0, bits.size, BLOCK):
        block, beside = bits[o : o + BLOCK], kept[o : o + BLOCK]
        of_block = np.int32(0)  # 64 bits for each value would be taken apart byte by byte on ARM
        for i in range(block.size):
            of_block = np.int32(of_block + np.int32((block[i] & but_sign != 0) & (beside[i] == 0)))
        found += of_block
    return found


def keep(x: Tensor, kept: Tensor) -> None:
    """`keep` of the table."""
    _keep(_bits(x), kept.view(-1).view(torch.int8).numpy())


def count_pruned(x: Tensor, kept: Tensor) -> int:
    """`count_pruned` of the table."""
    bits = _bits(x)
    but_sign = np.iinfo(bits.dtype).max
    return int(_count(bits, kept.view(-1).view(torch.int8).numpy(), bits.dtype.type(but_sign)))


def _bits(x: Tensor) -> "np.ndarray[Any, Any]":
    return x.view(-1).view(BITS[x.element_size()]).numpy()
