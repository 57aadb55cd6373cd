"""Kernels over what masks prune. Values are handled as bits, whatever their dtype."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from commpress.kernels.triton.blocks import read, write
from commpress.kernels.triton.launch import bits, launch

SIZE = 2048


@triton.jit
def _keep_part(x, kept, at, inside):
    value, stays = tl.load(x + at, inside), tl.load(kept + at, inside)
    write(x + at, tl.where(stays != 0, value, 0), inside)


@triton.jit(do_not_specialize=["n"])
def _keep(x, kept, n, SIZE: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * SIZE
    at = first + tl.arange(0, SIZE)
    if first + SIZE <= n:
        _keep_part(x, kept, at, None)
    else:
        _keep_part(x, kept, at, at < n)


@triton.jit
def _count_part(x, kept, found, at, inside):
    """Add to `found` how many values that a mask does not keep are not 0; -0 is 0."""
    value, stays = read(x + at, inside, x.dtype.element_ty), read(kept + at, inside, tl.int8)
    magnitude = value & (2 ** (x.dtype.element_ty.primitive_bitwidth - 1) - 1)
    count = tl.sum(((magnitude != 0) & (stays == 0)).to(tl.int32))
    if count > 0:
        tl.atomic_add(found, count.to(tl.int64))


@triton.jit(do_not_specialize=["n"])
def _count(x, kept, found, n, SIZE: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * SIZE
    at = first + tl.arange(0, SIZE)
    if first + SIZE <= n:
        _count_part(x, kept, found, at, None)
    else:
        _count_part(x, kept, found, at, at < n)


def keep(x: Tensor, kept: Tensor) -> None:
    """`keep` of the table."""
    n = x.numel()
    launch(_keep, triton.cdiv(n, SIZE), bits(x), kept.view(-1).view(torch.int8), n, SIZE=SIZE)


def count_pruned(x: Tensor, kept: Tensor) -> Tensor:
    """`count_pruned` of the table: int64 [], which nobody waits for here."""
    n, found = x.numel(), torch.zeros((), dtype=torch.int64, device=x.device)
    launch(_count, triton.cdiv(n, SIZE), bits(x), kept.view(-1).view(torch.int8), found, n, SIZE=SIZE)
    return found
