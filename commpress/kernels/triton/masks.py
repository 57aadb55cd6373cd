"""Kernels that pack the values that masks keep, and unpack them. Values are handled as bits, whatever their dtype."""

import triton
import triton.language as tl
from torch import Tensor

from commpress.kernels.triton.blocks import read, write
from commpress.kernels.triton.launch import bits, walk

SIZE = 2048


@triton.jit
def _there(place, inside):
    """Which values have a place: none that fills up a chunk does."""
    if inside is None:
        return place >= 0
    else:
        return inside & (place >= 0)


@triton.jit
def _pack(arguments, at, inside):
    x, places, out = arguments
    place = read(places + at, inside, tl.int32)
    write(out + at, tl.load(x + place, _there(place, inside), other=0), inside)


@triton.jit
def _unpack(arguments, at, inside):
    packed, places, out = arguments
    place = read(places + at, inside, tl.int32)
    tl.store(out + place, tl.load(packed + at, inside), _there(place, inside))


def pack(x: Tensor, places: Tensor, out: Tensor) -> None:
    """`pack` of the table."""
    walk(_pack, places.numel(), bits(x), places, bits(out), size=SIZE)


def unpack(packed: Tensor, places: Tensor, out: Tensor) -> None:
    """`unpack` of the table: zeros, and then the values at their places."""
    out.zero_()
    walk(_unpack, places.numel(), bits(packed), places, bits(out), size=SIZE)
