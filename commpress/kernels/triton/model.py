"""Kernels over pruned values. Values are handled as bits, whatever their dtype."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from commpress.kernels.triton.blocks import read, write
from commpress.kernels.triton.launch import bits, walk

SIZE = 2048


@triton.jit
def _keep(arguments, at, inside):
    x, kept = arguments
    value, stays = tl.load(x + at, inside), tl.load(kept + at, inside)
    write(x + at, tl.where(stays != 0, value, 0), inside)


@triton.jit
def _count(arguments, at, inside):
    """Add to `found` how many values that a mask does not keep are not 0; -0 is 0."""
    x, kept, found = arguments
    value, stays = read(x + at, inside, x.dtype.element_ty), read(kept + at, inside, tl.int8)
    magnitude = value & (2 ** (x.dtype.element_ty.primitive_bitwidth - 1) - 1)
    count = tl.sum(((magnitude != 0) & (stays == 0)).to(tl.int32))
    if count > 0:
        tl.atomic_add(found, count.to(tl.int64))


def keep(x: Tensor, kept: Tensor) -> None:
    """`keep` of the table."""
    walk(_keep, x.numel(), bits(x), kept.view(-1).view(torch.int8), size=SIZE)


def count_pruned(x: Tensor, kept: Tensor) -> Tensor:
    """`count_pruned` of the table: returns int64 [] on the device, without waiting for it."""
    found = torch.zeros((), dtype=torch.int64, device=x.device)
    walk(_count, x.numel(), bits(x), kept.view(-1).view(torch.int8), found, size=SIZE)
    return found
