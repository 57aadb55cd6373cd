"""Loops of `int2`: sign and one of two sizes."""

from typing import Any

import numpy as np
from torch import Tensor

from commpress.kernels.compiled import loop, part
from commpress.kernels.cpu.arrays import floats, padded, steps
from commpress.kernels.cpu.blocks import NAN, SIGN_BLOCK, SIGN_LANES, block_of, fold, load, pack_signs

BLOCKS_SHA256 = "c51943699b3cf74d"
"""Of `blocks.py`, which is compiled into these loops: Numba's cache looks at the time stamp of this file alone."""


@part
def _plane(n):
    """Bytes of one bit for each of n values."""
    return n // SIGN_BLOCK * (SIGN_BLOCK // 8) + (n % SIGN_BLOCK + 7) // 8


@part
def _int2_sizes(a, lanes, m):
    """The mean magnitude of the block `a` (zeros behind the m real values), and the means of those up to it and above it.

    `lanes` holds three rows of SIGN_LANES: sums and counts, in the order of the format."""
    low, high, count = lanes[0], lanes[1], lanes[2]
    low[:] = np.float32(0)
    for k in range(SIGN_BLOCK // SIGN_LANES):
        row = a[k * SIGN_LANES : (k + 1) * SIGN_LANES]
        for lane in range(SIGN_LANES):
            low[lane] += np.abs(row[lane])
    mean = fold(low) * (np.float32(1) / np.float32(m))
    low[:], high[:], count[:] = np.float32(0), np.float32(0), np.float32(0)
    for k in range(SIGN_BLOCK // SIGN_LANES):
        row = a[k * SIGN_LANES : (k + 1) * SIGN_LANES]
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
def _int2_write(a, t, lanes, m, b, blocks, plane, residual, pf, pu):
    """Encode the block `b` in `a` (SIGN_BLOCK values, zeros behind the m real ones), leave in `residual` what was lost.

    All signs are `plane` bytes."""
    mean, low, high = _int2_sizes(a, lanes, m)
    if np.isfinite(mean):
        for j in range(SIGN_BLOCK):
            t[j] = mean - np.abs(a[j])  # below 0 where the value is large
        if residual.size == SIGN_BLOCK:
            for j in range(SIGN_BLOCK):
                residual[j] = a[j] - np.copysign(high if t[j] < 0 else low, a[j])
        else:
            for j in range(residual.size):
                residual[j] = a[j] - np.copysign(high if t[j] < 0 else low, a[j])
    else:  # the block decodes to NaN; its residual stays as it was
        low, high = NAN, NAN
        t[:] = np.float32(0)
    pf[2 * b], pf[2 * b + 1] = low, high
    start, width = 8 * blocks + b * (SIGN_BLOCK // 8), (m + 7) // 8
    pack_signs(a.view(np.int32), m, pu[start : start + width])
    pack_signs(t.view(np.int32), m, pu[start + plane : start + plane + width])


@part
def _int2_read(pf, pu, W, row, b, blocks, plane, share, out):
    """The mean of the block `b` of W payloads, into `out` (the values of that block)."""
    m = out.size
    width = (m + 7) // 8
    for w in range(W):
        at = w * row + 8 * blocks + b * (SIGN_BLOCK // 8)
        low, high = pf[w * (row // 4) + 2 * b] * share, pf[w * (row // 4) + 2 * b + 1] * share
        if m == SIGN_BLOCK:
            signs, sizes = pu[at : at + SIGN_BLOCK // 8], pu[at + plane : at + plane + SIGN_BLOCK // 8]
            for p in range(8):
                bit = np.uint8(1 << p)
                eighth = out[p * (SIGN_BLOCK // 8) : (p + 1) * (SIGN_BLOCK // 8)]
                if w:
                    for j in range(SIGN_BLOCK // 8):
                        size = high if sizes[j] & bit else low
                        eighth[j] += -size if signs[j] & bit else size
                else:
                    for j in range(SIGN_BLOCK // 8):
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
    a, t = np.empty(SIGN_BLOCK, np.float32), np.empty(SIGN_BLOCK, np.float32)
    lanes = np.empty((3, SIGN_LANES), np.float32)
    scratch = np.empty(SIGN_BLOCK, np.float32)
    for b in range(blocks):
        o = b * SIGN_BLOCK
        xb, rb = block_of(x, prologue, o, SIGN_BLOCK, scratch), residual[o : o + SIGN_BLOCK]
        load(xb, rb, a, SIGN_BLOCK)
        _int2_write(a, t, lanes, xb.size, b, blocks, plane, rb, pf, pu)


@loop
def int2_mean(pf, pu, W, row, out):
    """The mean of W payloads."""
    blocks, plane = (out.size + SIGN_BLOCK - 1) // SIGN_BLOCK, _plane(out.size)
    share = np.float32(1.0 / W)
    for b in range(blocks):
        _int2_read(pf, pu, W, row, b, blocks, plane, share, out[b * SIGN_BLOCK : (b + 1) * SIGN_BLOCK])


@loop
def int2_recode(pf, pu, W, row, residual, qf, qu, n):
    """Encode the mean of W payloads (plus residual): the middle of two_shot."""
    blocks, plane = (n + SIGN_BLOCK - 1) // SIGN_BLOCK, _plane(n)
    share = np.float32(1.0 / W)
    mean, a, t = np.empty(SIGN_BLOCK, np.float32), np.empty(SIGN_BLOCK, np.float32), np.empty(SIGN_BLOCK, np.float32)
    lanes = np.empty((3, SIGN_LANES), np.float32)
    for b in range(blocks):
        o = b * SIGN_BLOCK
        m = min(SIGN_BLOCK, n - o)
        rb = residual[o : o + SIGN_BLOCK]
        _int2_read(pf, pu, W, row, b, blocks, plane, share, mean[:m])
        load(mean[:m], rb, a, SIGN_BLOCK)
        _int2_write(a, t, lanes, m, b, blocks, plane, rb, qf, qu)


def encode(codec: Any, x: Tensor, residual: Tensor | None, prologue: Any, payload: Tensor) -> None:
    """`encode` of the table."""
    coded = padded(payload)
    int2_encode(x.numpy(), steps(prologue), floats(residual), coded.view(np.float32), coded)


def mean(codec: Any, payloads: Tensor, count: int, out: Tensor) -> None:
    """`mean` of the table."""
    coded = payloads.numpy()
    int2_mean(coded.view(np.float32), coded, count, codec.nbytes(out.numel()), out.numpy())


def recode(codec: Any, payloads: Tensor, n: int, count: int, residual: Tensor | None, payload: Tensor) -> None:
    """`recode` of the table."""
    before, after = payloads.numpy(), padded(payload)
    coded = before.view(np.float32), before, count, codec.nbytes(n)
    int2_recode(*coded, floats(residual), after.view(np.float32), after, n)
