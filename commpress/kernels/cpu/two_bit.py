"""Loops of `int2`: sign and one of two sizes."""

from typing import Any

import numpy as np
from torch import Tensor

from commpress.kernels.compiled import loop, part
from commpress.kernels.cpu.arrays import floats, padded, steps, values
from commpress.kernels.cpu.blocks import (
    NAN,
    SIGN_BLOCK,
    SIGN_LANES,
    block_of,
    fold,
    pack_tail_signs,
    pad,
    part_of,
    put_block,
    remember,
    room_for,
    sign_bit,
    sum_magnitudes,
)

BLOCKS_SHA256 = "c51943699b3cf74d"
"""Of `blocks.py`, which is compiled into these loops: Numba's cache looks at the time stamp of this file alone."""
PLANE = SIGN_BLOCK // 8


@part
def _plane(n):
    """Bytes of one bit for each of n values."""
    return n // SIGN_BLOCK * (PLANE) + (n % SIGN_BLOCK + 7) // 8


@part
def _sizes(x, m, lanes):
    """The mean magnitude of a full block of which m values are real and the rest 0, and the means of those magnitudes up to
    it and above it. `lanes` holds three rows of SIGN_LANES: sums and counts, in the order of the format."""
    low, high, count = lanes[0], lanes[1], lanes[2]
    mean = sum_magnitudes(x, low) * (np.float32(1) / np.float32(m))
    low[:], high[:], count[:] = np.float32(0), np.float32(0), np.float32(0)
    for k in range(SIGN_BLOCK // SIGN_LANES):
        row = x[k * SIGN_LANES : (k + 1) * SIGN_LANES]
        for lane in range(SIGN_LANES):
            size = np.abs(row[lane])
            low[lane] += np.float32(0) if size > mean else size
            high[lane] += size if size > mean else np.float32(0)
            count[lane] += np.float32(1) if size > mean else np.float32(0)
    above = fold(count)
    below = np.float32(m) - above
    least = fold(low) * (np.float32(1) / below) if below > 0 else np.float32(0)
    most = fold(high) * (np.float32(1) / above) if above > 0 else np.float32(0)
    return mean, least, most


@part
def _write(x, residual, signs, sizes, mean, low, high):
    """Encode a full block, leave in `residual` what is lost."""
    for j in range(PLANE):
        sign, size = np.uint32(0), np.uint32(0)
        for p in range(8):
            value = x[p * PLANE + j]
            sign |= sign_bit(value, p)
            size |= sign_bit(mean - np.abs(value), p)  # below 0 where the value is large
        signs[j], sizes[j] = np.uint8(sign), np.uint8(size)
    if residual is not None:
        for j in range(SIGN_BLOCK):
            value = x[j]
            residual[j] = value - np.copysign(high if np.abs(value) > mean else low, value)


@loop
def _write_rare(x, residual, signs, sizes, a, t, lanes):
    """Encode a block of any length and any values, to the same bytes; return its two sizes."""
    m = x.size
    pad(x, a)
    mean, low, high = _sizes(a, m, lanes)
    finite = np.isfinite(mean)
    for j in range(m):
        t[j] = mean - np.abs(a[j]) if finite else np.float32(0)
    pack_tail_signs(a[:m], signs)
    pack_tail_signs(t[:m], sizes)
    if not finite:  # the block decodes to NaN; its residual stays as it was
        return NAN, NAN
    if residual is not None:
        for j in range(m):
            residual[j] = a[j] - np.copysign(high if t[j] < 0 else low, a[j])
    return low, high


@part
def _encode_block(x, residual, a, t, lanes, b, blocks, plane, pf, pu):
    """Encode the block `b`, whose values are `x`. All signs are `plane` bytes."""
    start, width = 8 * blocks + b * PLANE, (x.size + 7) // 8
    if x.size == SIGN_BLOCK:
        mean, low, high = _sizes(x, SIGN_BLOCK, lanes)
        if np.isfinite(mean):
            pf[2 * b], pf[2 * b + 1] = low, high
            signs, sizes = pu[start : start + PLANE], pu[start + plane : start + plane + PLANE]
            _write(x, residual, signs, sizes, mean, low, high)
            return
    signs, sizes = pu[start : start + width], pu[start + plane : start + plane + width]
    pf[2 * b], pf[2 * b + 1] = _write_rare(x, residual, signs, sizes, a, t, lanes)


@part
def _int2_read(pf, pu, W, row, b, blocks, plane, share, out):
    """The mean of the block `b` of W payloads, into `out` (the values of that block)."""
    m = out.size
    width = (m + 7) // 8
    for w in range(W):
        at = w * row + 8 * blocks + b * (PLANE)
        low, high = pf[w * (row // 4) + 2 * b] * share, pf[w * (row // 4) + 2 * b + 1] * share
        if m == SIGN_BLOCK:
            signs, sizes = pu[at : at + PLANE], pu[at + plane : at + plane + PLANE]
            for p in range(8):
                bit = np.uint8(1 << p)
                eighth = out[p * (PLANE) : (p + 1) * (PLANE)]
                if w:
                    for j in range(PLANE):
                        size = high if sizes[j] & bit else low
                        eighth[j] += -size if signs[j] & bit else size
                else:
                    for j in range(PLANE):
                        size = high if sizes[j] & bit else low
                        eighth[j] = -size if signs[j] & bit else size
        else:
            for i in range(m):
                size = high if pu[at + plane + i % width] >> (i // width) & 1 else low
                value = -size if pu[at + i % width] >> (i // width) & 1 else size
                out[i] = out[i] + value if w else value


@loop
def int2_encode(x, prologue, residual, pf, pu):
    """Signs and sizes of x + residual; the residual becomes what they miss."""
    blocks, plane = (x.size + SIGN_BLOCK - 1) // SIGN_BLOCK, _plane(x.size)
    scratch, a, t = (
        np.empty(SIGN_BLOCK, np.float32),
        np.empty(SIGN_BLOCK, np.float32),
        np.empty(SIGN_BLOCK, np.float32),
    )
    lanes = np.empty((3, SIGN_LANES), np.float32)
    for b in range(blocks):
        xb = block_of(x, prologue, residual, b * SIGN_BLOCK, SIGN_BLOCK, scratch)
        _encode_block(xb, part_of(residual, b * SIGN_BLOCK, SIGN_BLOCK), a, t, lanes, b, blocks, plane, pf, pu)


@loop
def int2_mean(pf, pu, W, row, out):
    """The mean of W payloads."""
    blocks, plane = (out.size + SIGN_BLOCK - 1) // SIGN_BLOCK, _plane(out.size)
    share = np.float32(1.0 / W)
    scratch = np.empty(SIGN_BLOCK, np.float32)
    for b in range(blocks):
        ob = room_for(out, b * SIGN_BLOCK, SIGN_BLOCK, scratch)
        _int2_read(pf, pu, W, row, b, blocks, plane, share, ob)
        put_block(out, b * SIGN_BLOCK, ob)


@loop
def int2_recode(pf, pu, W, row, residual, qf, qu, n):
    """Encode the mean of W payloads (plus residual): the middle of two_shot."""
    blocks, plane = (n + SIGN_BLOCK - 1) // SIGN_BLOCK, _plane(n)
    share = np.float32(1.0 / W)
    mean, a, t = np.empty(SIGN_BLOCK, np.float32), np.empty(SIGN_BLOCK, np.float32), np.empty(SIGN_BLOCK, np.float32)
    lanes = np.empty((3, SIGN_LANES), np.float32)
    for b in range(blocks):
        mb = mean[: min(SIGN_BLOCK, n - b * SIGN_BLOCK)]
        _int2_read(pf, pu, W, row, b, blocks, plane, share, mb)
        rb = part_of(residual, b * SIGN_BLOCK, SIGN_BLOCK)
        remember(mb, rb, mb.size)
        _encode_block(mb, rb, a, t, lanes, b, blocks, plane, qf, qu)


def encode(codec: Any, x: Tensor, residual: Tensor | None, prologue: Any, payload: Tensor) -> None:
    """`encode` of the table."""
    coded = padded(payload)
    int2_encode(values(x), steps(prologue), floats(residual), coded.view(np.float32), coded)


def mean(codec: Any, payloads: Tensor, count: int, out: Tensor) -> None:
    """`mean` of the table."""
    coded = payloads.numpy()
    int2_mean(coded.view(np.float32), coded, count, codec.nbytes(out.numel()), values(out))


def recode(codec: Any, payloads: Tensor, n: int, count: int, residual: Tensor | None, payload: Tensor) -> None:
    """`recode` of the table."""
    before, after = payloads.numpy(), padded(payload)
    coded = before.view(np.float32), before, count, codec.nbytes(n)
    int2_recode(*coded, floats(residual), after.view(np.float32), after, n)
