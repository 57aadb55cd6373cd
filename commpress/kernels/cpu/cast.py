"""Loops of `bf16` and `fp16`."""

from typing import Any

import numpy as np
from torch import Tensor

from commpress.kernels.compiled import loop, part
from commpress.kernels.cpu.arrays import floats, padded, steps, values
from commpress.kernels.cpu.blocks import AHEAD, LARGEST, block_of, fetch, part_of, put, put_block, real, scratch_beside
from commpress.kernels.cpu.instructions import settle_streams, widest
from commpress.kernels.cpu.slices import in_slices

SHARED_SHA256 = "5d1d88ea2ebdd3a9"
"""The hash of `blocks.py` and `instructions.py`, which are compiled in: Numba's cache checks only this file's time stamp."""
CAST_BLOCK = 256


@part
def _encode_block(x, residual, halves, size):
    for j in range(size):
        value = x[j] if residual is None else np.float32(x[j] + residual[j])
        put(halves, j, value)
        if residual is not None:
            lost = value - real(halves[j])
            residual[j] = lost if np.abs(lost) <= LARGEST else residual[j]  # not NaN, not Inf


@part
def _add(hb, share, size, first, out):
    """Add the values of a payload, times `share`, to `out`; `first`: write them instead."""
    for j in range(size):
        value = real(hb[j]) * share
        out[j] = value if first else np.float32(out[j] + value)


@part
def _add_four(a, b, c, d, share, size, first, out):
    """Add the values of four payloads in one pass: their sum stays in registers."""
    for j in range(size):
        total = real(a[j]) * share
        total = total if first else np.float32(out[j] + total)
        out[j] = total + real(b[j]) * share + real(c[j]) * share + real(d[j]) * share


@part
def _read(halves, W, row, o, share, size, out):
    """Write the mean of `size` values from `o` on of W payloads to `out`."""
    for w in range(0, W // 4 * 4, 4):
        p, q, r, s = w * row + o, (w + 1) * row + o, (w + 2) * row + o, (w + 3) * row + o
        a, b, c, d = halves[p : p + size], halves[q : q + size], halves[r : r + size], halves[s : s + size]
        if w == 0:
            _add_four(a, b, c, d, share, size, True, out)
        else:
            _add_four(a, b, c, d, share, size, False, out)
    for w in range(W // 4 * 4, W):
        hb = halves[w * row + o : w * row + o + size]
        if w == 0:
            _add(hb, share, size, True, out)
        else:
            _add(hb, share, size, False, out)


@loop
def cast_encode(x, prologue, residual, halves, begin, end):
    """Encode x + residual as 16-bit floats; the residual becomes their error."""
    widest()
    full = x.size // CAST_BLOCK
    scratch = scratch_beside(x, CAST_BLOCK)
    for b in range(begin, min(end, full)):
        o = b * CAST_BLOCK
        fetch(residual, o + AHEAD, CAST_BLOCK)
        xb, rb = block_of(x, prologue, None, o, CAST_BLOCK, scratch), part_of(residual, o, CAST_BLOCK)
        _encode_block(xb, rb, halves[o : o + CAST_BLOCK], CAST_BLOCK)
    if end > full:
        o, rest = full * CAST_BLOCK, x.size - full * CAST_BLOCK
        xb, rb = block_of(x, prologue, None, o, rest, scratch), part_of(residual, o, rest)
        _encode_block(xb, rb, halves[o : o + rest], rest)


@loop
def cast_mean(halves, W, row, out, begin, end):
    """Write the mean of W payloads, of `row` 16-bit floats each, to `out`."""
    widest()
    full = out.size // CAST_BLOCK
    share = np.float32(1.0 / W)
    scratch = scratch_beside(out, CAST_BLOCK)
    for b in range(begin, min(end, full)):  # a block's sum stays in the L1 cache
        _read(halves, W, row, b * CAST_BLOCK, share, CAST_BLOCK, scratch)
        put_block(out, b * CAST_BLOCK, scratch, CAST_BLOCK)
    if end > full:
        ob = scratch[: out.size - full * CAST_BLOCK]
        _read(halves, W, row, full * CAST_BLOCK, share, ob.size, ob)
        put_block(out, full * CAST_BLOCK, ob, ob.size)
    settle_streams()


@loop
def cast_recode(halves, W, row, residual, coded, n, begin, end):
    """Encode the mean of W payloads (plus residual): the middle of two_shot; the mean itself is never stored."""
    widest()
    full = n // CAST_BLOCK
    share = np.float32(1.0 / W)
    mean = scratch_beside(halves, CAST_BLOCK)
    for b in range(begin, min(end, full)):
        o = b * CAST_BLOCK
        fetch(residual, o + AHEAD, CAST_BLOCK)
        _read(halves, W, row, o, share, CAST_BLOCK, mean)
        _encode_block(mean, part_of(residual, o, CAST_BLOCK), coded[o : o + CAST_BLOCK], CAST_BLOCK)
    if end > full:
        o, rest = full * CAST_BLOCK, n - full * CAST_BLOCK
        mb = mean[:rest]
        _read(halves, W, row, o, share, rest, mb)
        _encode_block(mb, part_of(residual, o, rest), coded[o : o + rest], rest)


HALVES = {"bf16": np.uint16, "fp16": np.int16}
"""By which type of integers the loops tell them apart."""


def encode(codec: Any, x: Tensor, residual: Tensor | None, prologue: Any, payload: Tensor) -> None:
    """`encode` of the table."""
    halves = padded(payload).view(HALVES[codec.word])
    in_slices(cast_encode, x.numel(), CAST_BLOCK, values(x), steps(prologue), floats(residual), halves)


def mean(codec: Any, payloads: Tensor, count: int, out: Tensor) -> None:
    """`mean` of the table."""
    halves = payloads.numpy().view(HALVES[codec.word])
    n = out.numel()
    in_slices(cast_mean, n, CAST_BLOCK, halves, count, codec.nbytes(n) // 2, values(out))


def recode(codec: Any, payloads: Tensor, n: int, count: int, residual: Tensor | None, payload: Tensor) -> None:
    """`recode` of the table."""
    before, after = (x.view(HALVES[codec.word]) for x in (payloads.numpy(), padded(payload)))
    in_slices(cast_recode, n, CAST_BLOCK, before, count, codec.nbytes(n) // 2, floats(residual), after, n)
