"""A prologue in a pass of its own. Kernels that encode apply it in their own pass."""

from typing import Any

import triton
from torch import Tensor

from commpress.kernels.triton.blocks import with_prologue, write
from commpress.kernels.triton.launch import steps, walk

SIZE = 1024


@triton.jit
def _apply(arguments, at, inside):
    x, prologue = arguments
    write(x + at, with_prologue(x, prologue, at, inside), inside)


def apply(x: Tensor, prologue: Any) -> None:
    """`prologue` of the table."""
    walk(_apply, x.numel(), x, steps(prologue), size=SIZE)
