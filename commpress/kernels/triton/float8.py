"""Kernels of `fp8`, both formats: a program has ROWS blocks. The layout is in `comm/codecs/float8.py`.

A normal value is rounded in its own bits: half of the last place that stays is added, less one where that place is even, and
the bias of the exponent changes. One below the smallest normal value is a number of steps: the low bits of itself plus
1.5 * 2**23 steps. So no GPU needs instructions for 8-bit floats.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from commpress.kernels.triton.blocks import (
    block_scale,
    keep_lost,
    magnitude_bits,
    read,
    remembered,
    row_start,
    total,
    write,
)
from commpress.kernels.triton.launch import counting, launch, padded, steps, words

BLOCK: tl.constexpr = tl.constexpr(256)
FLUSH: tl.constexpr = tl.constexpr(2.0**-80)
ROWS = 4
RECODE_ROWS = 2
"""More rows of W payloads would not fit into a thread's registers."""
FORMATS = {
    "e4m3": {"SHIFT": 20, "BIAS": 120, "LARGEST": 448.0, "STEP": 2.0**-9},
    "e5m2": {"SHIFT": 21, "BIAS": 112, "LARGEST": 57344.0, "STEP": 2.0**-16},
}
"""Bits of float32's mantissa that go, by how much its exponent's bias is larger, the largest value, the smallest step."""


@triton.jit
def _code(y, SHIFT: tl.constexpr, BIAS: tl.constexpr, STEP: tl.constexpr):
    """The bytes of y, whose magnitudes are at most the largest value or round to it."""
    half: tl.constexpr = 2 ** (SHIFT - 1) - 1
    first: tl.constexpr = 2 ** (23 - SHIFT)  # the code of the smallest normal value
    magic: tl.constexpr = 1.5 * 2**23 * STEP
    magnitude = magnitude_bits(y)
    normal = ((magnitude + half + ((magnitude >> SHIFT) & 1)) >> SHIFT) - BIAS * first
    small = (magnitude.to(tl.float32, bitcast=True) + magic).to(tl.int32, bitcast=True) & 0xFF
    return tl.where(normal < first, small, normal) | ((y.to(tl.int32, bitcast=True) >> 24) & 128)


@triton.jit
def _value(code, SHIFT: tl.constexpr, BIAS: tl.constexpr, STEP: tl.constexpr):
    """The values of bytes in a block of scale 1."""
    magnitude = code & 127
    normal = (magnitude << SHIFT) + (BIAS << 23)
    small = (magnitude.to(tl.float32) * STEP).to(tl.int32, bitcast=True)
    bits = tl.where(magnitude >> (23 - SHIFT) > 0, normal, small)
    return (bits | ((code & 128) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def _mean_of(
    pf, pu, W, row, b, at, share, inside, b_inside, SHIFT: tl.constexpr, BIAS: tl.constexpr, STEP: tl.constexpr
):
    """The mean of W payloads at blocks `b`, whose codes lie at `at`."""
    mean = (
        _value(read(tl.multiple_of(pu + at, [1, 4]), inside, tl.int32), SHIFT, BIAS, STEP)
        * read(pf + b, b_inside)
        * share
    )
    for w in range(1, W):
        start = row_start(w, row)
        value = _value(read(tl.multiple_of(pu + 4 * start + at, [1, 4]), inside, tl.int32), SHIFT, BIAS, STEP)
        mean += value * read(pf + start + b, b_inside) * share
    return mean


@triton.jit
def _put(
    value, residual, qf, qu, b, at, codes, inside, b_inside,
    SHIFT: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Encode blocks `b`, [ROWS, 256]; write the error to `residual`."""
    scale, inverse = block_scale(tl.max(magnitude_bits(value), axis=1, keep_dims=True), LARGEST, FLUSH)
    code = tl.where(inverse == 0, 0, _code(value * inverse, SHIFT, BIAS, STEP))
    write(qf + b, scale, b_inside)
    write(tl.multiple_of(qu + codes, [1, 4]), code.to(tl.uint8), inside)
    if residual is not None:
        keep_lost(residual, at, value - _value(code, SHIFT, BIAS, STEP) * scale, inside)


@triton.jit
def _rows(
    x, prologue, pf, pu, W, row, share, residual, qf, qu, out, n, blocks, b,
    WHOLE: tl.constexpr, SHIFT: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    at = b * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside, b_inside = None if WHOLE else at < n, None if WHOLE else b < blocks
    codes = 4 * blocks + at
    if x is not None:
        value = total(x, prologue, residual, at, inside)
    else:
        mean = _mean_of(pf, pu, W, row, b, codes, share, inside, b_inside, SHIFT, BIAS, STEP)
        value = remembered(mean, residual, at, inside)
    if out is not None:
        write(out + at, value, inside)
    else:
        _put(value, residual, qf, qu, b, at, codes, inside, b_inside, SHIFT, BIAS, LARGEST, STEP)


@counting
def _code_blocks(
    x, prologue, pf, pu, W, row, share, residual, qf, qu, out, n, blocks,
    ROWS: tl.constexpr, SHIFT: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Encode x, or without it the mean of W payloads (pf, pu), into (qf, qu), or write the mean to `out`."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    b = first + tl.arange(0, ROWS)[:, None]
    if (first + ROWS) * BLOCK <= n:
        _rows(x, prologue, pf, pu, W, row, share, residual, qf, qu, out, n, blocks, b, True, SHIFT, BIAS, LARGEST, STEP)
    else:
        _rows(
            x, prologue, pf, pu, W, row, share, residual, qf, qu, out, n, blocks, b, False, SHIFT, BIAS, LARGEST, STEP
        )


def encode(codec: Any, x: Tensor, residual: Tensor | None, prologue: Any, payload: Tensor) -> None:
    """`encode` of the table."""
    after = padded(payload)
    source = x, steps(prologue), None, None, 0, 0, 0.0
    _launch(codec, x.numel(), ROWS, *source, residual, words(after), after, None)


def mean(codec: Any, payloads: Tensor, count: int, out: Tensor) -> None:
    """`mean` of the table."""
    source = None, None, words(payloads), payloads, count, codec.nbytes(out.numel()) // 4, 1.0 / count
    _launch(codec, out.numel(), ROWS, *source, None, None, None, out)


def recode(codec: Any, payloads: Tensor, n: int, count: int, residual: Tensor | None, payload: Tensor) -> None:
    """`recode` of the table."""
    after = padded(payload)
    source = None, None, words(payloads), payloads, count, codec.nbytes(n) // 4, 1.0 / count
    _launch(codec, n, RECODE_ROWS, *source, residual, words(after), after, None)


def _launch(codec: Any, n: int, rows: int, *arguments: Any) -> None:
    blocks = triton.cdiv(n, BLOCK)
    launch(_code_blocks, triton.cdiv(blocks, rows), *arguments, n, blocks, ROWS=rows, **FORMATS[codec.format])
