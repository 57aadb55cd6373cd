"""Passes over pruned weights in each step: in plain torch, or by the kernels of the table, which take a fifth of the time."""

from torch import Tensor

from commpress.kernels.table import Kernel, lookup

BIT_SIZES = (2, 4, 8)
"""Bytes of the values that kernels handle as bits."""


def keep_(x: Tensor, kept: Tensor) -> None:
    """x <- 0 where `kept` (bool, of its shape) is False, in place; NaN there, too."""
    x = x.detach()
    if kernel := _kernel("keep", x, kept):
        kernel(x, kept)
    else:
        x.masked_fill_(~kept, 0)


def count_pruned(x: Tensor, kept: Tensor) -> int:
    """How many values are not 0 where `kept` (bool, of its shape) is False."""
    x = x.detach()
    if x.is_floating_point() and (kernel := _kernel("count_pruned", x, kept)):
        return int(kernel(x, kept))
    return int(((x != 0) & ~kept).sum())


def _kernel(op: str, x: Tensor, kept: Tensor) -> Kernel | None:
    fits = x.is_contiguous() and kept.is_contiguous() and x.element_size() in BIT_SIZES
    return lookup(op, None, x.device.type) if fits else None
