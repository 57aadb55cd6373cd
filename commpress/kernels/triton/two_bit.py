"""Kernels of `int2`. The layout is in `comm/codecs/two_bit.py`."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from commpress.comm.codecs.sign import plane_bytes
from commpress.kernels.triton.blocks import (
    is_finite,
    keep_lost,
    nan_like,
    only,
    read,
    remembered,
    row_start,
    total,
    write,
)
from commpress.kernels.triton.launch import WARPS, counting, launch, padded, steps, words
from commpress.kernels.triton.planes import (
    BLOCK,
    LANES,
    STEPS,
    WIDTH,
    bit,
    bits_of_blocks,
    folded,
    lanes,
    sizes,
    spread,
)

ROWS = 8
RECODE_ROWS = 4
"""More rows of W payloads would not fit into a thread's registers."""
RECODE_WARPS = 2


@triton.jit
def _value_of(pf, b, size, negative, large, WHOLE: tl.constexpr):
    """The values of blocks `b` that two bits each stand for."""
    inside = None if WHOLE else size > 0
    value = tl.where(large != 0, read(pf + 2 * b + 1, inside), read(pf + 2 * b, inside))
    return tl.where(negative != 0, -value, value)


@triton.jit
def _one(pf, pu, blocks, plane, b, i, size, WHOLE: tl.constexpr, WORDS: tl.constexpr):
    """The values `i` of blocks `b` that one payload decodes to; `plane` is the length of a plane of bits."""
    signs = pu + 8 * blocks
    negative, large = bit(signs, b, i, size, WHOLE, 4), bit(signs + plane, b, i, size, WHOLE, WORDS)
    return _value_of(pf, b, size, negative, large, WHOLE)


@triton.jit
def _mean_of(pf, pu, W, row, blocks, plane, share, b, i, size, WHOLE: tl.constexpr, WORDS: tl.constexpr):
    """The mean of W payloads at values `i` of blocks `b`."""
    mean = _one(pf, pu, blocks, plane, b, i, size, WHOLE, WORDS) * share
    for w in range(1, W):
        start = row_start(w, row)
        mean += _one(pf + start, pu + 4 * start, blocks, plane, b, i, size, WHOLE, WORDS) * share
    return mean


@triton.jit
def _value(
    x, prologue, pf, pu, W, row, blocks, plane, share, residual, b, i, size, WHOLE: tl.constexpr, WORDS: tl.constexpr
):
    """Values `i` of blocks `b` as they are coded: of x, or without it of the mean of W payloads."""
    at, inside = b * BLOCK + i, None if WHOLE else i < size
    if x is not None:
        return total(x, prologue, residual, at, inside)
    else:
        mean = _mean_of(pf, pu, W, row, blocks, plane, share, b, i, size, WHOLE, WORDS)
        return remembered(mean, residual, at, inside)


@triton.jit
def _level(total, number):
    """The mean of `number` magnitudes, 0 of none."""
    one = tl.full(number.shape, 1.0, tl.float32)
    mean = total * tl.div_rn(one, tl.where(number > 0, number, 1.0))
    return tl.where(number > 0, mean, 0.0)


@triton.jit
def _levels(
    x,
    prologue,
    pf,
    pu,
    W,
    row,
    blocks,
    plane,
    share,
    residual,
    b,
    size,
    WHOLE: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The mean magnitude of blocks `b` (Inf if it is not finite), and the means of those below and above it."""
    acc = tl.zeros([ROWS, LANES], tl.float32)
    for k in range(STEPS):
        inside = None if WHOLE else lanes(k) < size
        acc += only(
            tl.abs(
                _value(x, prologue, pf, pu, W, row, blocks, plane, share, residual, b, lanes(k), size, WHOLE, WORDS)
            ),
            inside,
        )
    number = size.to(tl.float32)
    mean = folded(acc, ROWS) * tl.div_rn(tl.full([ROWS, 1], 1.0, tl.float32), tl.maximum(number, 1.0))
    good = is_finite(mean)
    mean = tl.where(good, mean, float("inf"))
    below, above = tl.zeros([ROWS, LANES], tl.float32), tl.zeros([ROWS, LANES], tl.float32)
    count = tl.zeros([ROWS, LANES], tl.float32)
    for k in range(STEPS):
        inside = None if WHOLE else lanes(k) < size
        magnitude = only(
            tl.abs(
                _value(x, prologue, pf, pu, W, row, blocks, plane, share, residual, b, lanes(k), size, WHOLE, WORDS)
            ),
            inside,
        )
        large = magnitude > mean
        below += tl.where(large, 0.0, magnitude)
        above += tl.where(large, magnitude, 0.0)
        count += tl.where(large, 1.0, 0.0)
    many = folded(count, ROWS)
    low, high = _level(folded(below, ROWS), number - many), _level(folded(above, ROWS), many)
    return mean, tl.where(good, low, nan_like(low)), tl.where(good, high, nan_like(high))


@triton.jit
def _encode_rows(
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
    n,
    blocks,
    plane,
    b,
    WHOLE: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
):
    size = sizes(b, n)
    mean, low, high = _levels(x, prologue, pf, pu, W, row, blocks, plane, share, residual, b, size, WHOLE, WORDS, ROWS)
    write(qf + 2 * b, low, None if WHOLE else b < blocks)
    write(qf + 2 * b + 1, high, None if WHOLE else b < blocks)

    j = tl.arange(0, WIDTH)[None, :]
    signs, large = tl.zeros([ROWS, WIDTH], tl.int32), tl.zeros([ROWS, WIDTH], tl.int32)
    for p in range(8):
        i = spread(b, j, p, size, WHOLE)
        value = _value(x, prologue, pf, pu, W, row, blocks, plane, share, residual, b, i, size, WHOLE, WORDS)
        inside = None if WHOLE else i < size
        signs |= only((value.to(tl.int32, bitcast=True) >> 31) & 1, inside).to(tl.int32) << p
        large |= only((tl.abs(value) > mean).to(tl.int32), inside).to(tl.int32) << p
    inside = None if WHOLE else j < (size + 7) // 8
    place = qu + 8 * blocks + b * WIDTH + j
    write(tl.multiple_of(place, [1, 4]), signs.to(tl.uint8), inside)
    if plane % 4 == 0:
        write(tl.multiple_of(place + plane, [1, 4]), large.to(tl.uint8), inside)
    else:
        write(place + plane, large.to(tl.uint8), inside)

    if residual is not None:
        tl.debug_barrier()  # all of the program have read what remained before any of it is written over
        for k in range(STEPS):
            value = _value(x, prologue, pf, pu, W, row, blocks, plane, share, residual, b, lanes(k), size, WHOLE, WORDS)
            level = tl.where(tl.abs(value) > mean, high, low)
            decoded = tl.where(value.to(tl.int32, bitcast=True) < 0, -level, level)
            keep_lost(residual, b * BLOCK + lanes(k), value - decoded, None if WHOLE else lanes(k) < size)


@counting
def _encode(x, prologue, pf, pu, W, row, share, residual, qf, qu, n, blocks, plane, ROWS: tl.constexpr):
    """Encode x, or without it the mean of W payloads (pf, pu), into (qf, qu)."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    b = first + tl.arange(0, ROWS)[:, None]
    if (first + ROWS) * BLOCK > n:
        _encode_rows(x, prologue, pf, pu, W, row, share, residual, qf, qu, n, blocks, plane, b, False, 1, ROWS)
    elif x is not None:
        _encode_rows(x, prologue, pf, pu, W, row, share, residual, qf, qu, n, blocks, plane, b, True, 1, ROWS)
    elif plane % 4 == 0:  # then all bits are read 4 bytes at once
        _encode_rows(x, prologue, pf, pu, W, row, share, residual, qf, qu, n, blocks, plane, b, True, 4, ROWS)
    else:
        _encode_rows(x, prologue, pf, pu, W, row, share, residual, qf, qu, n, blocks, plane, b, True, 1, ROWS)


@triton.jit
def _blocks(pf, signs, plane, b, p, j, size, WHOLE: tl.constexpr, WORDS: tl.constexpr):
    """The whole blocks that one payload decodes to, [ROWS, 8, 128]."""
    negative = bits_of_blocks(signs, b, p, j, size, WHOLE, 4)
    large = bits_of_blocks(signs + plane, b, p, j, size, WHOLE, WORDS)
    return _value_of(pf, b, size, negative, large, WHOLE)


@triton.jit
def _mean_rows(pf, pu, W, row, share, out, n, blocks, plane, b, WHOLE: tl.constexpr, WORDS: tl.constexpr):
    size = sizes(b, n)
    p, j = tl.arange(0, 8)[None, :, None], tl.arange(0, WIDTH)[None, None, :]
    mean = _blocks(pf, pu + 8 * blocks, plane, b, p, j, size, WHOLE, WORDS) * share
    for w in range(1, W):
        start = row_start(w, row)
        mean += _blocks(pf + start, pu + 4 * start + 8 * blocks, plane, b, p, j, size, WHOLE, WORDS) * share
    i = spread(b, j, p, size, WHOLE)
    write(out + b * BLOCK + i, mean, None if WHOLE else (j < (size + 7) // 8) & (i < size))


@counting
def _mean(pf, pu, W, row, share, out, n, blocks, plane, ROWS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * ROWS
    b = first + tl.arange(0, ROWS)[:, None, None]
    if (first + ROWS) * BLOCK > n:
        _mean_rows(pf, pu, W, row, share, out, n, blocks, plane, b, False, 1)
    elif plane % 4 == 0:  # then all bits are read 4 bytes at once
        _mean_rows(pf, pu, W, row, share, out, n, blocks, plane, b, True, 4)
    else:
        _mean_rows(pf, pu, W, row, share, out, n, blocks, plane, b, True, 1)


def encode(codec: Any, x: Tensor, residual: Tensor | None, prologue: Any, payload: Tensor) -> None:
    """`encode` of the table."""
    after = padded(payload)
    source = x, steps(prologue), None, None, 0, 0, 0.0
    _launch(_encode, x.numel(), ROWS, WARPS[x.element_size()], *source, residual, words(after), after)


def mean(codec: Any, payloads: Tensor, count: int, out: Tensor) -> None:
    """`mean` of the table."""
    row = codec.nbytes(out.numel()) // 4
    source = words(payloads), payloads, count, row, 1.0 / count
    _launch(_mean, out.numel(), 1, 1, *source, out)  # a thread has 4 bytes of each plane, all 32 values


def recode(codec: Any, payloads: Tensor, n: int, count: int, residual: Tensor | None, payload: Tensor) -> None:
    """`recode` of the table."""
    after = padded(payload)
    source = None, None, words(payloads), payloads, count, codec.nbytes(n) // 4, 1.0 / count
    _launch(_encode, n, RECODE_ROWS, RECODE_WARPS, *source, residual, words(after), after)


def _launch(kernel: Any, n: int, rows: int, warps: int, *arguments: Any) -> None:
    blocks = triton.cdiv(n, BLOCK)
    launch(kernel, triton.cdiv(blocks, rows), *arguments, n, blocks, plane_bytes(n), ROWS=rows, num_warps=warps)
