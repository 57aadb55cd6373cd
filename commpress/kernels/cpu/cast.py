"""Loops of `bf16` and `fp16`."""

from typing import Any

import numpy as np
from torch import Tensor

from commpress.kernels.compiled import loop, part
from commpress.kernels.cpu.arrays import floats, padded
from commpress.kernels.cpu.blocks import LARGEST
from commpress.kernels.cpu.prologue import apply

BLOCKS_SHA256 = "c51943699b3cf74d"
"""Of `blocks.py`, which is compiled into these loops: Numba's cache looks at the time stamp of this file alone."""


@part
def _to_bfloat16(value):
    """The bits of the bfloat16 nearest to a float32, half to even (as uint32, in whose vectors the loops compute)."""
    bits = np.float32(value).view(np.uint32)
    odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
    half = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
    return half if value == value else np.uint32(0x7FC0)


@part
def _from_bfloat16(half):
    """The float32 of a bfloat16's bits."""
    return np.uint32(half << np.uint32(16)).view(np.float32)


@part
def _to_float16(value):
    """The bits of the float16 nearest to a float32, half to even: below 2**-14, where float16 is denormal, the addition
    of 0.5 rounds, since one unit of its last place is then float16's smallest denormal, 2**-24."""
    bits = np.float32(value).view(np.uint32)
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    odd = np.uint32((magnitude >> np.uint32(13)) & np.uint32(1))
    rebased = np.uint32(magnitude - np.uint32(112 << 23) + np.uint32(0xFFF) + odd)
    normal = min(np.uint32(rebased >> np.uint32(13)), np.uint32(0x7C00))
    tiny = np.uint32(np.float32(np.abs(value) + np.float32(0.5)).view(np.uint32) - np.uint32(0x3F000000))
    half = tiny if magnitude < np.uint32(0x38800000) else normal
    sign = np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000))
    return np.uint32(half | sign) if value == value else np.uint32(0x7E00)


@part
def _from_float16(half):
    """The float32 of a float16's bits: a denormal is its integer times 2**-24; Inf and NaN need the exponent 255."""
    magnitude = np.uint32(half & np.uint32(0x7FFF))
    shifted = np.uint32(np.uint32(magnitude << np.uint32(13)) + np.uint32(112 << 23))
    special = np.uint32(shifted + np.uint32(112 << 23))
    tiny = np.float32(np.float32(np.int32(magnitude)) * np.float32(2.0**-24)).view(np.uint32)
    bits = special if magnitude >= np.uint32(0x7C00) else (tiny if magnitude < np.uint32(0x400) else shifted)
    sign = np.uint32(np.uint32(half & np.uint32(0x8000)) << np.uint32(16))
    return np.uint32(bits | sign).view(np.float32)


@part
def _cast_encode(x, residual, halves, to_half, from_half):
    if residual.size:
        for i in range(x.size):
            total = x[i] + residual[i]
            half = to_half(total)
            halves[i] = np.uint16(half)
            lost = total - from_half(half)
            residual[i] = lost if np.abs(lost) <= LARGEST else residual[i]  # not NaN, not Inf
    else:
        for i in range(x.size):
            halves[i] = np.uint16(to_half(x[i]))


@part
def _cast_mean(halves, W, row, out, from_half):
    n = out.size
    share = np.float32(1.0 / W)
    for o in range(0, n, 1024):  # a block at a time: its sum stays in the L1 cache
        ob = out[o : min(o + 1024, n)]
        for w in range(W):
            hb = halves[w * row + o : w * row + o + ob.size]
            if w:
                for j in range(ob.size):
                    ob[j] += from_half(np.uint32(hb[j])) * share
            else:
                for j in range(ob.size):
                    ob[j] = from_half(np.uint32(hb[j])) * share


@loop
def bfloat16_encode(x, residual, halves):
    """The bfloat16 of `x + residual`; the residual becomes what they miss."""
    _cast_encode(x, residual, halves, _to_bfloat16, _from_bfloat16)


@loop
def float16_encode(x, residual, halves):
    """The float16 of `x + residual`; the residual becomes what they miss."""
    _cast_encode(x, residual, halves, _to_float16, _from_float16)


@loop
def bfloat16_mean(halves, W, row, out):
    """The mean of W payloads of `row` 16-bit words each."""
    _cast_mean(halves, W, row, out, _from_bfloat16)


@loop
def float16_mean(halves, W, row, out):
    """The mean of W payloads of `row` 16-bit words each."""
    _cast_mean(halves, W, row, out, _from_float16)


LOOPS = {"bf16": (bfloat16_encode, bfloat16_mean), "fp16": (float16_encode, float16_mean)}


def encode(codec: Any, x: Tensor, residual: Tensor | None, prologue: Any, payload: Tensor) -> None:
    """`encode` of the table."""
    if prologue is not None:
        apply(x, prologue)
    LOOPS[codec.word][0](x.numpy(), floats(residual), padded(payload).view(np.uint16))


def mean(codec: Any, payloads: Tensor, count: int, out: Tensor) -> None:
    """`mean` of the table."""
    LOOPS[codec.word][1](payloads.numpy().view(np.uint16), count, codec.nbytes(out.numel()) // 2, out.numpy())
