"""Loops of `sign`."""

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
def _write(x, residual, codes, scale):
    """Encode the signs of a full block, leave in `residual` what is lost."""
    for j in range(PLANE):
        byte = np.uint32(0)
        for p in range(8):
            byte |= sign_bit(x[p * PLANE + j], p)
        codes[j] = np.uint8(byte)
    if residual is not None:
        for j in range(SIGN_BLOCK):
            value = x[j]
            residual[j] = value - np.copysign(scale, value)


@loop
def _write_rare(x, residual, codes, a, lanes):
    """Encode a block of any length and any values, to the same bytes; return its scale."""
    pad(x, a)
    scale = sum_magnitudes(a, lanes) * (np.float32(1) / np.float32(x.size))
    pack_tail_signs(a[: x.size], codes)
    if not np.isfinite(scale):  # the block decodes to NaN; its residual stays as it was
        return NAN
    if residual is not None:
        for j in range(x.size):
            residual[j] = a[j] - np.copysign(scale, a[j])
    return scale


@part
def _encode_block(x, residual, a, lanes, b, blocks, pf, pu):
    """Encode the block `b`, whose values are `x`."""
    start = 4 * blocks + b * PLANE
    if x.size == SIGN_BLOCK:
        codes = pu[start : start + PLANE]
        scale = sum_magnitudes(x, lanes) * np.float32(1 / SIGN_BLOCK)
        if np.isfinite(scale):
            pf[b] = scale
            _write(x, residual, codes, scale)
            return
    pf[b] = _write_rare(x, residual, pu[start : start + (x.size + 7) // 8], a, lanes)


@part
def _sign_read(pf, pu, W, row, b, blocks, share, out):
    """The mean of the block `b` of W payloads, into `out` (the values of that block)."""
    m = out.size
    width = (m + 7) // 8
    for w in range(W):
        at = w * row + 4 * blocks + b * (PLANE)
        scale = pf[w * (row // 4) + b] * share
        if m == SIGN_BLOCK:
            codes = pu[at : at + PLANE]
            for p in range(8):
                bit = np.uint8(1 << p)
                plane = out[p * (PLANE) : (p + 1) * (PLANE)]
                if w:
                    for j in range(PLANE):
                        plane[j] += -scale if codes[j] & bit else scale
                else:
                    for j in range(PLANE):
                        plane[j] = -scale if codes[j] & bit else scale
        else:
            for i in range(m):
                value = -scale if pu[at + i % width] >> (i // width) & 1 else scale
                out[i] = out[i] + value if w else value


@loop
def sign_encode(x, prologue, residual, pf, pu):
    """Signs and magnitudes of x + residual; the residual becomes what they miss."""
    blocks = (x.size + SIGN_BLOCK - 1) // SIGN_BLOCK
    scratch, a, lanes = (
        np.empty(SIGN_BLOCK, np.float32),
        np.empty(SIGN_BLOCK, np.float32),
        np.empty(SIGN_LANES, np.float32),
    )
    for b in range(blocks):
        xb = block_of(x, prologue, residual, b * SIGN_BLOCK, SIGN_BLOCK, scratch)
        _encode_block(xb, part_of(residual, b * SIGN_BLOCK, SIGN_BLOCK), a, lanes, b, blocks, pf, pu)


@loop
def sign_mean(pf, pu, W, row, out):
    """The mean of W payloads."""
    blocks = (out.size + SIGN_BLOCK - 1) // SIGN_BLOCK
    share = np.float32(1.0 / W)
    scratch = np.empty(SIGN_BLOCK, np.float32)
    for b in range(blocks):
        ob = room_for(out, b * SIGN_BLOCK, SIGN_BLOCK, scratch)
        _sign_read(pf, pu, W, row, b, blocks, share, ob)
        put_block(out, b * SIGN_BLOCK, ob)


@loop
def sign_recode(pf, pu, W, row, residual, qf, qu, n):
    """Encode the mean of W payloads (plus residual): the middle of two_shot."""
    blocks = (n + SIGN_BLOCK - 1) // SIGN_BLOCK
    share = np.float32(1.0 / W)
    mean, a, lanes = (
        np.empty(SIGN_BLOCK, np.float32),
        np.empty(SIGN_BLOCK, np.float32),
        np.empty(SIGN_LANES, np.float32),
    )
    for b in range(blocks):
        mb = mean[: min(SIGN_BLOCK, n - b * SIGN_BLOCK)]
        _sign_read(pf, pu, W, row, b, blocks, share, mb)
        rb = part_of(residual, b * SIGN_BLOCK, SIGN_BLOCK)
        remember(mb, rb, mb.size)
        _encode_block(mb, rb, a, lanes, b, blocks, qf, qu)


def encode(codec: Any, x: Tensor, residual: Tensor | None, prologue: Any, payload: Tensor) -> None:
    """`encode` of the table."""
    coded = padded(payload)
    sign_encode(values(x), steps(prologue), floats(residual), coded.view(np.float32), coded)


def mean(codec: Any, payloads: Tensor, count: int, out: Tensor) -> None:
    """`mean` of the table."""
    coded = payloads.numpy()
    sign_mean(coded.view(np.float32), coded, count, codec.nbytes(out.numel()), values(out))


def recode(codec: Any, payloads: Tensor, n: int, count: int, residual: Tensor | None, payload: Tensor) -> None:
    """`recode` of the table."""
    before, after = payloads.numpy(), padded(payload)
    coded = before.view(np.float32), before, count, codec.nbytes(n)
    sign_recode(*coded, floats(residual), after.view(np.float32), after, n)
