"""Kernels of `sign`. The layout is in `comm/codecs/sign.py`."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

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
def _mean_of(pf, pu, W, row, blocks, share, b, i, size, WHOLE: tl.constexpr):
    """The mean of W payloads at values `i` of blocks `b`."""
    b_inside = None if WHOLE else size > 0
    mean = _signed(pf, pu + 4 * blocks, b, i, size, b_inside, WHOLE) * share
    for w in range(1, W):
        start = row_start(w, row)
        mean += _signed(pf + start, pu + 4 * start + 4 * blocks, b, i, size, b_inside, WHOLE) * share
    return mean


@triton.jit
def _signed(pf, plane, b, i, size, b_inside, WHOLE: tl.constexpr):
    scale = read(pf + b, b_inside)
    return tl.where(bit(plane, b, i, size, WHOLE, 4) != 0, -scale, scale)


@triton.jit
def _value(x, prologue, pf, pu, W, row, blocks, share, residual, b, i, size, WHOLE: tl.constexpr):
    """Values `i` of blocks `b` as they are coded: of x, or without it of the mean of W payloads."""
    at, inside = b * BLOCK + i, None if WHOLE else i < size
    if x is not None:
        return total(x, prologue, residual, at, inside)
    else:
        mean = _mean_of(pf, pu, W, row, blocks, share, b, i, size, WHOLE)
        return remembered(mean, residual, at, inside)


@triton.jit
def _encode_rows(
    x, prologue, pf, pu, W, row, share, residual, qf, qu, n, blocks, b, WHOLE: tl.constexpr, ROWS: tl.constexpr
):
    size = sizes(b, n)
    acc = tl.zeros([ROWS, LANES], tl.float32)
    for k in range(STEPS):
        value = _value(x, prologue, pf, pu, W, row, blocks, share, residual, b, lanes(k), size, WHOLE)
        inside = None if WHOLE else lanes(k) < size
        acc += only(tl.abs(value), inside)
    one, number = tl.full([ROWS, 1], 1.0, tl.float32), tl.maximum(size, 1).to(tl.float32)
    mean = folded(acc, ROWS) * tl.div_rn(one, number)
    scale = tl.where(is_finite(mean), mean, nan_like(mean))
    b_inside = None if WHOLE else b < blocks
    write(qf + b, scale, b_inside)

    j = tl.arange(0, WIDTH)[None, :]
    byte = tl.zeros([ROWS, WIDTH], tl.int32)
    for p in range(8):
        i = spread(b, j, p, size, WHOLE)
        value = _value(x, prologue, pf, pu, W, row, blocks, share, residual, b, i, size, WHOLE)
        negative = (value.to(tl.int32, bitcast=True) >> 31) & 1
        i_inside = None if WHOLE else i < size
        byte |= only(negative, i_inside).to(tl.int32) << p
    j_inside = None if WHOLE else j < (size + 7) // 8
    write(tl.multiple_of(qu + 4 * blocks + b * WIDTH + j, [1, 4]), byte.to(tl.uint8), j_inside)

    if residual is not None:
        tl.debug_barrier()  # all of the program have read what remained before any of it is written over
        for k in range(STEPS):
            value = _value(x, prologue, pf, pu, W, row, blocks, share, residual, b, lanes(k), size, WHOLE)
            decoded = tl.where(value.to(tl.int32, bitcast=True) < 0, -scale, scale)
            inside = None if WHOLE else lanes(k) < size
            keep_lost(residual, b * BLOCK + lanes(k), value - decoded, inside)


@counting
def _encode(x, prologue, pf, pu, W, row, share, residual, qf, qu, n, blocks, ROWS: tl.constexpr):
    """Encode x, or without it the mean of W payloads (pf, pu), into (qf, qu)."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    b = first + tl.arange(0, ROWS)[:, None]
    if (first + ROWS) * BLOCK <= n:
        _encode_rows(x, prologue, pf, pu, W, row, share, residual, qf, qu, n, blocks, b, True, ROWS)
    else:
        _encode_rows(x, prologue, pf, pu, W, row, share, residual, qf, qu, n, blocks, b, False, ROWS)


@triton.jit
def _part(pf, plane, share, b, p, j, size, WHOLE: tl.constexpr):
    """The share of one payload in the mean of whole blocks, [ROWS, 8, 128]."""
    scale = read(pf + b, None if WHOLE else size > 0)
    return tl.where(bits_of_blocks(plane, b, p, j, size, WHOLE, 4) != 0, -scale, scale) * share


@triton.jit
def _mean_rows(pf, pu, W, row, share, out, n, blocks, b, WHOLE: tl.constexpr):
    size = sizes(b, n)
    p, j = tl.arange(0, 8)[None, :, None], tl.arange(0, WIDTH)[None, None, :]
    mean = _part(pf, pu + 4 * blocks, share, b, p, j, size, WHOLE)
    for w in range(1, W):
        start = row_start(w, row)
        mean += _part(pf + start, pu + 4 * start + 4 * blocks, share, b, p, j, size, WHOLE)
    i = spread(b, j, p, size, WHOLE)
    write(out + b * BLOCK + i, mean, None if WHOLE else (j < (size + 7) // 8) & (i < size))


@counting
def _mean(pf, pu, W, row, share, out, n, blocks, ROWS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * ROWS
    b = first + tl.arange(0, ROWS)[:, None, None]
    if (first + ROWS) * BLOCK <= n:
        _mean_rows(pf, pu, W, row, share, out, n, blocks, b, True)
    else:
        _mean_rows(pf, pu, W, row, share, out, n, blocks, b, False)


def encode(codec: Any, x: Tensor, residual: Tensor | None, prologue: Any, payload: Tensor) -> None:
    """`encode` of the table."""
    n, after = x.numel(), padded(payload)
    blocks = triton.cdiv(n, BLOCK)
    source = x, steps(prologue), None, None, 0, 0, 0.0
    options = {"ROWS": ROWS, "num_warps": WARPS[x.element_size()]}
    launch(_encode, triton.cdiv(blocks, ROWS), *source, residual, words(after), after, n, blocks, **options)


def mean(codec: Any, payloads: Tensor, count: int, out: Tensor) -> None:
    """`mean` of the table."""
    n = out.numel()
    blocks = triton.cdiv(n, BLOCK)
    source = words(payloads), payloads, count, codec.nbytes(n) // 4, 1.0 / count
    launch(_mean, blocks, *source, out, n, blocks, ROWS=1, num_warps=1)  # a thread has 4 bytes of bits, all 32 values


def recode(codec: Any, payloads: Tensor, n: int, count: int, residual: Tensor | None, payload: Tensor) -> None:
    """`recode` of the table."""
    blocks, after = triton.cdiv(n, BLOCK), padded(payload)
    source = None, None, words(payloads), payloads, count, codec.nbytes(n) // 4, 1.0 / count
    options = {"ROWS": RECODE_ROWS, "num_warps": RECODE_WARPS}
    launch(_encode, triton.cdiv(blocks, RECODE_ROWS), *source, residual, words(after), after, n, blocks, **options)
