"""Loops of `sign`."""

from typing import Any

import numpy as np
from torch import Tensor

from commpress.kernels.compiled import loop, part
from commpress.kernels.cpu.arrays import floats, padded, steps
from commpress.kernels.cpu.blocks import NAN, SIGN_BLOCK, SIGN_LANES, block_of, fold, load, pack_signs

BLOCKS_SHA256 = "c51943699b3cf74d"
"""Of `blocks.py`, which is compiled into these loops: Numba's cache looks at the time stamp of this file alone."""


@part
def _sign_write(a, acc, m, b, blocks, residual, pf, pu):
    """Encode the block `b` in `a` (SIGN_BLOCK values, zeros behind the m real ones), leave in `residual` what was lost."""
    for lane in range(SIGN_LANES):
        acc[lane] = np.abs(a[lane])
    for k in range(1, SIGN_BLOCK // SIGN_LANES):
        row = a[k * SIGN_LANES : (k + 1) * SIGN_LANES]
        for lane in range(SIGN_LANES):
            acc[lane] += np.abs(row[lane])
    scale = fold(acc) * (np.float32(1) / np.float32(m))
    if np.isfinite(scale):
        pf[b] = scale
        if residual.size == SIGN_BLOCK:
            for j in range(SIGN_BLOCK):
                residual[j] = a[j] - np.copysign(scale, a[j])
        else:
            for j in range(residual.size):
                residual[j] = a[j] - np.copysign(scale, a[j])
    else:  # the block decodes to NaN; its residual stays as it was
        pf[b] = NAN
    start = 4 * blocks + b * (SIGN_BLOCK // 8)
    pack_signs(a.view(np.int32), m, pu[start : start + SIGN_BLOCK // 8])


@part
def _sign_read(pf, pu, W, row, b, blocks, share, out):
    """The mean of the block `b` of W payloads, into `out` (the values of that block)."""
    m = out.size
    width = (m + 7) // 8
    for w in range(W):
        at = w * row + 4 * blocks + b * (SIGN_BLOCK // 8)
        scale = pf[w * (row // 4) + b] * share
        if m == SIGN_BLOCK:
            codes = pu[at : at + SIGN_BLOCK // 8]
            for p in range(8):
                bit = np.uint8(1 << p)
                plane = out[p * (SIGN_BLOCK // 8) : (p + 1) * (SIGN_BLOCK // 8)]
                if w:
                    for j in range(SIGN_BLOCK // 8):
                        plane[j] += -scale if codes[j] & bit else scale
                else:
                    for j in range(SIGN_BLOCK // 8):
                        plane[j] = -scale if codes[j] & bit else scale
        else:
            for i in range(m):
                value = -scale if pu[at + i % width] >> (i // width) & 1 else scale
                out[i] = out[i] + value if w else value


@loop
def sign_encode(x, prologue, residual, pf, pu):
    """Signs and magnitudes of x + residual; the residual becomes what they miss."""
    n = x.size
    blocks = (n + SIGN_BLOCK - 1) // SIGN_BLOCK
    a = np.empty(SIGN_BLOCK, np.float32)
    acc = np.empty(SIGN_LANES, np.float32)
    scratch = np.empty(SIGN_BLOCK, np.float32)
    for b in range(blocks):
        o = b * SIGN_BLOCK
        xb, rb = block_of(x, prologue, o, SIGN_BLOCK, scratch), residual[o : o + SIGN_BLOCK]
        load(xb, rb, a, SIGN_BLOCK)
        _sign_write(a, acc, xb.size, b, blocks, rb, pf, pu)


@loop
def sign_mean(pf, pu, W, row, out):
    """The mean of W payloads."""
    blocks = (out.size + SIGN_BLOCK - 1) // SIGN_BLOCK
    share = np.float32(1.0 / W)
    for b in range(blocks):
        _sign_read(pf, pu, W, row, b, blocks, share, out[b * SIGN_BLOCK : (b + 1) * SIGN_BLOCK])


@loop
def sign_recode(pf, pu, W, row, residual, qf, qu, n):
    """Encode the mean of W payloads (plus residual): the middle of two_shot."""
    blocks = (n + SIGN_BLOCK - 1) // SIGN_BLOCK
    share = np.float32(1.0 / W)
    mean = np.empty(SIGN_BLOCK, np.float32)
    a = np.empty(SIGN_BLOCK, np.float32)
    acc = np.empty(SIGN_LANES, np.float32)
    for b in range(blocks):
        o = b * SIGN_BLOCK
        m = min(SIGN_BLOCK, n - o)
        rb = residual[o : o + SIGN_BLOCK]
        _sign_read(pf, pu, W, row, b, blocks, share, mean[:m])
        load(mean[:m], rb, a, SIGN_BLOCK)
        _sign_write(a, acc, m, b, blocks, rb, qf, qu)


def encode(codec: Any, x: Tensor, residual: Tensor | None, prologue: Any, payload: Tensor) -> None:
    """`encode` of the table."""
    coded = padded(payload)
    sign_encode(x.numpy(), steps(prologue), floats(residual), coded.view(np.float32), coded)


def mean(codec: Any, payloads: Tensor, count: int, out: Tensor) -> None:
    """`mean` of the table."""
    coded = payloads.numpy()
    sign_mean(coded.view(np.float32), coded, count, codec.nbytes(out.numel()), out.numpy())


def recode(codec: Any, payloads: Tensor, n: int, count: int, residual: Tensor | None, payload: Tensor) -> None:
    """`recode` of the table."""
    before, after = payloads.numpy(), padded(payload)
    coded = before.view(np.float32), before, count, codec.nbytes(n)
    sign_recode(*coded, floats(residual), after.view(np.float32), after, n)
