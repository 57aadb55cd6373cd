"""Kernels of `int8` and `int4`: a program has ROWS blocks. The layout and the noise are in `comm/codecs/integer.py`."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from commpress.kernels.triton.blocks import (
    block_scale,
    keep_lost,
    magnitude_bits,
    only,
    read,
    remembered,
    row_start,
    total,
    write,
)
from commpress.kernels.triton.launch import WARPS, counting, launch, padded, steps, words

BLOCK: tl.constexpr = tl.constexpr(256)
HALF: tl.constexpr = tl.constexpr(128)
FLUSH: tl.constexpr = tl.constexpr(2.0**-100)
ROWS = 4


@triton.jit
def _noise(value, scale, place):
    """Return the noise that values at these places of their blocks get before they are rounded: the definition's hash."""
    key = scale.to(tl.uint32, bitcast=True) * 0x9E3779B9
    h = value.to(tl.uint32, bitcast=True) ^ (key + place.to(tl.uint32) * 0x85EBCA6B)
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    signed = (h ^ (h >> 16)).to(tl.int32, bitcast=True)
    return ((signed >> 8) | 1).to(tl.float32) * 2.0**-24


@triton.jit
def _code(value, place, scale, inverse, BITS: tl.constexpr, STOCHASTIC: tl.constexpr):
    """The codes of values at these places of their blocks, and the integers that they stand for; 0 where `inverse` is 0,
    whatever the value is."""
    magic: tl.constexpr = 1.5 * 2**23 + 2 ** (BITS - 1)
    level = tl.where(inverse == 0, 0.0, value * inverse)
    if STOCHASTIC:
        levels: tl.constexpr = 2.0 ** (BITS - 1) - 1
        level = tl.minimum(tl.maximum(level + _noise(value, scale, place), -levels), levels)
    t = level + magic  # rounds half to even; the code is in the low bits
    return t.to(tl.int32, bitcast=True) & (2**BITS - 1), t - magic


@triton.jit
def _halves(b, n, WHOLE: tl.constexpr):
    """Where the values of blocks `b` lie whose codes share bytes, [ROWS, 128] each, and which are there."""
    j = tl.arange(0, HALF)[None, :]
    low = b * BLOCK + j
    if WHOLE:
        return low, low + HALF, None, None
    else:
        size = tl.minimum(tl.maximum(n - b * BLOCK, 0), BLOCK)
        half = (size + 1) // 2
        return low, low + half, j < half, j < size - half


@triton.jit
def _put_bytes(value, residual, pf, pu, b, blocks, at, inside, STOCHASTIC: tl.constexpr):
    """Encode blocks of int8, [ROWS, 256]."""
    scale, inverse = block_scale(tl.max(magnitude_bits(value), axis=1, keep_dims=True), 127.0, FLUSH)
    code, level = _code(value, at - b * BLOCK, scale, inverse, 8, STOCHASTIC)
    write(pf + b, scale, None if inside is None else b < blocks)
    write(tl.multiple_of(pu + 4 * blocks + at, [1, 4]), code.to(tl.uint8), inside)
    if residual is not None:
        keep_lost(residual, at, value - level * scale, inside)


@triton.jit
def _put_halves(low, high, residual, pf, pu, b, blocks, at, upper, inside, upper_inside, STOCHASTIC: tl.constexpr):
    """Encode blocks of int4, of which these are the halves, [ROWS, 128] each."""
    top = tl.max(tl.maximum(magnitude_bits(low), magnitude_bits(high)), axis=1, keep_dims=True)
    scale, inverse = block_scale(top, 7.0, FLUSH)
    code, level = _code(low, at - b * BLOCK, scale, inverse, 4, STOCHASTIC)
    upper_code, upper_level = _code(high, upper - b * BLOCK, scale, inverse, 4, STOCHASTIC)
    write(pf + b, scale, None if inside is None else b < blocks)
    place = tl.multiple_of(pu + 4 * blocks + b * HALF + tl.arange(0, HALF)[None, :], [1, 4])
    write(place, (code | upper_code << 4).to(tl.uint8), inside)
    if residual is not None:
        keep_lost(residual, at, low - level * scale, inside)
        keep_lost(residual, upper, high - upper_level * scale, upper_inside)


@triton.jit
def _mean_bytes(pf, pu, W, row, b, blocks, at, share, inside, b_inside):
    """The mean of W payloads of int8 at blocks `b`, [ROWS, 256]."""
    scale, code = read(pf + b, b_inside), read(tl.multiple_of(pu + 4 * blocks + at, [1, 4]), inside)
    mean = (code - 128.0) * scale * share
    for w in range(1, W):
        start = row_start(w, row)
        scale, code = (
            read(pf + start + b, b_inside),
            read(tl.multiple_of(pu + 4 * start + 4 * blocks + at, [1, 4]), inside),
        )
        mean += (code - 128.0) * scale * share
    return only(mean, inside)


@triton.jit
def _mean_halves(pf, pu, W, row, b, blocks, share, inside, upper_inside, b_inside):
    """The mean of W payloads of int4 at blocks `b`: its halves, [ROWS, 128] each."""
    at = 4 * blocks + b * HALF + tl.arange(0, HALF)[None, :]
    low, high = _two(pf, pu, b, at, share, inside, b_inside)
    for w in range(1, W):
        start = row_start(w, row)
        more_low, more_high = _two(pf + start, pu + 4 * start, b, at, share, inside, b_inside)
        low += more_low
        high += more_high
    return only(low, inside), only(high, upper_inside)


@triton.jit
def _two(pf, pu, b, at, share, inside, b_inside):
    """The share of one payload of int4 in a mean."""
    scale, codes = read(pf + b, b_inside), read(tl.multiple_of(pu + at, [1, 4]), inside, tl.int32)
    low, high = ((codes & 15) - 8).to(tl.float32), ((codes >> 4) - 8).to(tl.float32)
    return low * scale * share, high * scale * share


@triton.jit
def _byte_rows(
    x,
    prologue,
    pf,
    pu,
    W,
    row,
    share,
    residual,
    qf,
    qu,
    out,
    n,
    blocks,
    b,
    WHOLE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    at = b * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside, b_inside = None if WHOLE else at < n, None if WHOLE else b < blocks
    if x is not None:
        value = total(x, prologue, residual, at, inside)
    else:
        mean = _mean_bytes(pf, pu, W, row, b, blocks, at, share, inside, b_inside)
        value = remembered(mean, residual, at, inside)
    if out is not None:
        write(out + at, value, inside)
    else:
        _put_bytes(value, residual, qf, qu, b, blocks, at, inside, STOCHASTIC)


@triton.jit
def _half_rows(
    x,
    prologue,
    pf,
    pu,
    W,
    row,
    share,
    residual,
    qf,
    qu,
    out,
    n,
    blocks,
    b,
    WHOLE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    at, upper, inside, upper_inside = _halves(b, n, WHOLE)
    b_inside = None if WHOLE else b < blocks
    if x is not None:
        low = total(x, prologue, residual, at, inside)
        high = total(x, prologue, residual, upper, upper_inside)
    else:
        low, high = _mean_halves(pf, pu, W, row, b, blocks, share, inside, upper_inside, b_inside)
        low, high = remembered(low, residual, at, inside), remembered(high, residual, upper, upper_inside)
    if out is not None:
        write(out + at, low, inside)
        write(out + upper, high, upper_inside)
    else:
        _put_halves(low, high, residual, qf, qu, b, blocks, at, upper, inside, upper_inside, STOCHASTIC)


@triton.jit
def _rows(
    x,
    prologue,
    pf,
    pu,
    W,
    row,
    share,
    residual,
    qf,
    qu,
    out,
    n,
    blocks,
    b,
    WHOLE: tl.constexpr,
    BITS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    if BITS == 8:
        _byte_rows(x, prologue, pf, pu, W, row, share, residual, qf, qu, out, n, blocks, b, WHOLE, STOCHASTIC)
    else:
        _half_rows(x, prologue, pf, pu, W, row, share, residual, qf, qu, out, n, blocks, b, WHOLE, STOCHASTIC)


@counting
def _code_blocks(
    x,
    prologue,
    pf,
    pu,
    W,
    row,
    share,
    residual,
    qf,
    qu,
    out,
    n,
    blocks,
    BITS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Encode x, or without it the mean of W payloads (pf, pu), into (qf, qu), or write the mean to `out`."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    b = first + tl.arange(0, ROWS)[:, None]
    if (first + ROWS) * BLOCK <= n:
        _rows(x, prologue, pf, pu, W, row, share, residual, qf, qu, out, n, blocks, b, True, BITS, STOCHASTIC)
    else:
        _rows(x, prologue, pf, pu, W, row, share, residual, qf, qu, out, n, blocks, b, False, BITS, STOCHASTIC)


def encode(codec: Any, x: Tensor, residual: Tensor | None, prologue: Any, payload: Tensor) -> None:
    """`encode` of the table."""
    after = padded(payload)
    source = x, steps(prologue), None, None, 0, 0, 0.0
    _launch(codec, x.numel(), x.element_size(), *source, residual, words(after), after, None)


def mean(codec: Any, payloads: Tensor, count: int, out: Tensor) -> None:
    """`mean` of the table."""
    source = None, None, words(payloads), payloads, count, codec.nbytes(out.numel()) // 4, 1.0 / count
    _launch(codec, out.numel(), out.element_size(), *source, None, None, None, out)


def recode(codec: Any, payloads: Tensor, n: int, count: int, residual: Tensor | None, payload: Tensor) -> None:
    """`recode` of the table."""
    after = padded(payload)
    source = None, None, words(payloads), payloads, count, codec.nbytes(n) // 4, 1.0 / count
    _launch(codec, n, 4, *source, residual, words(after), after, None)


def _launch(codec: Any, n: int, wide: int, *arguments: Any) -> None:
    """Start the kernel; values of a gradient or a mean have `wide` bytes. Of int4 a program has the halves of 1024 values."""
    blocks = triton.cdiv(n, BLOCK)
    constants = {
        "BITS": codec.bits,
        "STOCHASTIC": codec.stochastic,
        "ROWS": ROWS,
        "num_warps": 4 if codec.bits == 8 else WARPS[wide],
    }
    launch(_code_blocks, triton.cdiv(blocks, ROWS), *arguments, n, blocks, **constants)
