"""A prologue in a pass of its own; kernels that encode do it in theirs."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from commpress.kernels.triton.blocks import with_prologue, write
from commpress.kernels.triton.launch import launch, steps

SIZE = 1024


@triton.jit(do_not_specialize=["n"])
def _apply(x, prologue, n, SIZE: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * SIZE
    at = first + tl.arange(0, SIZE)
    if first + SIZE <= n:
        write(x + at, with_prologue(x, prologue, at, None), None)
    else:
        write(x + at, with_prologue(x, prologue, at, at < n), at < n)


def apply(x: Tensor, prologue: Any) -> None:
    """`prologue` of the table."""
    n = x.numel()
    launch(_apply, triton.cdiv(n, SIZE), x, steps(prologue), n, SIZE=SIZE)
