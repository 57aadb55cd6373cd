"""The common parts of all kernel launches."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

READABLE = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of gradients that the kernels read, and of means that they write."""

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtypes by their number of bytes."""
WARPS = {4: 4, 2: 2}
"""By bytes of a value how many warps a program of 512 values at a time has: a thread reads or writes 16 bytes at once."""
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
"""Compiler options, unless a launch gives others. Products and sums are rounded separately."""


COUNTS = (
    *("n", "k", "W", "row", "head_row", "blocks", "plane", "tiles", "bits", "low_bits", "low_words", "high_at"),
    *("block", "rest", "rest_strata", "draw"),
    *("rows", "columns", "rank", "together", "groups", "height", "checks", "length", "p_size", "q_size", "p_tiles"),
)
PAYLOADS = ("pf", "pu", "qf", "qu", "head", "heads", "words", "ends", "p", "q", "sums", "batch")
counting: Any = triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=PAYLOADS)
"""Makes a kernel that is compiled once for all of these numbers, and not again where one is 1 or a multiple of 16; and once for
all payloads and factors, wherever they lie: behind others they are at multiples of 4 bytes."""


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Start `programs` programs on the current stream of the tensors' device."""
    each = (y for x in arguments for y in (x if isinstance(x, tuple) else (x,)))
    place = next(x for x in each if isinstance(x, Tensor))
    with torch.cuda.device_of(place):
        kernel[(programs,)](*arguments, **(OPTIONS | constants))


@counting
def _walk(arguments, n, PART: tl.constexpr, SIZE: tl.constexpr):
    """Run PART on SIZE values."""
    first = tl.program_id(0).to(tl.int64) * SIZE
    at = first + tl.arange(0, SIZE)
    if first + SIZE <= n:
        PART(arguments, at, None)
    else:
        PART(arguments, at, at < n)


def walk(part: Any, n: int, *arguments: Any, size: int) -> None:
    """Start a program for each `size` of n values, which calls `part(arguments, at, inside)`, a function for kernels.

    It handles the values `at`: all of them where `inside` is None, else those where it is True.
    """
    launch(_walk, triton.cdiv(n, size), arguments, n, PART=part, SIZE=size)


def steps(prologue: Any) -> tuple[Any, ...] | None:
    """Return the tensors and numbers of a `Prologue`; None for None."""
    if prologue is None:
        return None
    return prologue.inverse, prologue.average, float(prologue.limit), float(prologue.fresh), float(prologue.kept)


def bits(x: Tensor) -> Tensor:
    """A contiguous tensor as integers [n] as wide as its values."""
    return x.detach().view(-1).view(BITS[x.element_size()])


def words(payload: Tensor) -> Tensor:
    """A payload as float32."""
    return payload.view(torch.float32)


def padded(payload: Tensor) -> Tensor:
    """Return a payload to write to. Its last word is set to 0, which zeroes its padding."""
    payload[-4:].zero_()
    return payload
