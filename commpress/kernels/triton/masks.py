"""Kernels over what masks keep: packing it, and spreading it out again. Values are handled as bits, whatever their dtype."""

import triton
import triton.language as tl
from torch import Tensor

from commpress.kernels.triton.blocks import read, write
from commpress.kernels.triton.launch import bits, launch

SIZE = 2048


@triton.jit
def _there(place, inside):
    """Which values have a place: none that fills up a chunk does."""
    if inside is None:
        return place >= 0
    else:
        return inside & (place >= 0)


@triton.jit
def _pack_part(x, places, out, at, inside):
    place = read(places + at, inside, tl.int32)
    write(out + at, tl.load(x + place, _there(place, inside), other=0), inside)


@triton.jit(do_not_specialize=["k"])
def _pack(x, places, out, k, SIZE: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * SIZE
    at = first + tl.arange(0, SIZE)
    if first + SIZE <= k:
        _pack_part(x, places, out, at, None)
    else:
        _pack_part(x, places, out, at, at < k)


@triton.jit
def _unpack_part(packed, places, out, at, inside):
    place = read(places + at, inside, tl.int32)
    tl.store(out + place, tl.load(packed + at, inside), _there(place, inside))


@triton.jit(do_not_specialize=["k"])
def _unpack(packed, places, out, k, SIZE: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * SIZE
    at = first + tl.arange(0, SIZE)
    if first + SIZE <= k:
        _unpack_part(packed, places, out, at, None)
    else:
        _unpack_part(packed, places, out, at, at < k)


def pack(x: Tensor, places: Tensor, out: Tensor) -> None:
    """`pack` of the table."""
    k = places.numel()
    launch(_pack, triton.cdiv(k, SIZE), bits(x), places, bits(out), k, SIZE=SIZE)


def unpack(packed: Tensor, places: Tensor, out: Tensor) -> None:
    """`unpack` of the table: zeros, and then the values at their places."""
    k = places.numel()
    out.zero_()
    launch(_unpack, triton.cdiv(k, SIZE), bits(packed), places, bits(out), k, SIZE=SIZE)
