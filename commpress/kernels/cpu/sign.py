"""Loops of `sign`."""

from typing import Any

import numpy as np
from torch import Tensor

from commpress.kernels.compiled import loop, part
from commpress.kernels.cpu.arrays import floats, padded, steps, values
from commpress.kernels.cpu.blocks import (
    NAN,
    block_of,
    pack_tail_signs,
    pad,
    part_of,
    put_block,
    remember,
    scratch_beside,
    sign_bit,
)
from commpress.kernels.cpu.instructions import SIGN_BLOCK, settle_streams, sum_magnitudes, widest
from commpress.kernels.cpu.slices import in_slices

SHARED_SHA256 = "5d1d88ea2ebdd3a9"
"""The hash of `blocks.py` and `instructions.py`, which are compiled in: Numba's cache checks only this file's time stamp."""
PLANE = SIGN_BLOCK // 8


@part
def _write(x, residual, codes, scale):
    """Encode the signs of a full block, write the error to `residual`."""
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
def _write_rare(x, residual, codes, a):
    """Encode a block of any length and any values, to the same bytes; return its scale."""
    pad(x, a)
    scale = sum_magnitudes(a) * (np.float32(1) / np.float32(x.size))
    pack_tail_signs(a[: x.size], codes)
    if not np.isfinite(scale):  # the block decodes to NaN; its residual stays as it was
        return NAN
    if residual is not None:
        for j in range(x.size):
            residual[j] = a[j] - np.copysign(scale, a[j])
    return scale


@part
def _encode_block(x, residual, a, b, blocks, pf, pu):
    """Encode the full block `b`, whose values are `x`."""
    codes = pu[4 * blocks + b * PLANE : 4 * blocks + (b + 1) * PLANE]
    scale = sum_magnitudes(x) * np.float32(1 / SIGN_BLOCK)
    if np.isfinite(scale):
        pf[b] = scale
        _write(x, residual, codes, scale)
    else:
        pf[b] = _write_rare(x, residual, codes, a)


@part
def _encode_tail(x, residual, a, b, blocks, pf, pu):
    """Encode the last block `b`, if it is shorter."""
    start = 4 * blocks + b * PLANE
    if x.size:
        pf[b] = _write_rare(x, residual, pu[start : start + (x.size + 7) // 8], a)


@part
def _read(pf, pu, W, row, b, blocks, share, out):
    """Write the mean of the full block `b` of W payloads to `out`."""
    for w in range(W):
        at = w * row + 4 * blocks + b * PLANE
        scale, codes = pf[w * (row // 4) + b] * share, pu[at : at + PLANE]
        for p in range(8):
            bit = np.uint8(1 << p)
            plane = out[p * PLANE : (p + 1) * PLANE]
            if w:
                for j in range(PLANE):
                    plane[j] += -scale if codes[j] & bit else scale
            else:
                for j in range(PLANE):
                    plane[j] = -scale if codes[j] & bit else scale


@part
def _read_tail(pf, pu, W, row, b, blocks, share, out):
    """Write the mean of the last block of W payloads to `out`, if it is shorter."""
    width = (out.size + 7) // 8
    for w in range(W if out.size else 0):
        at = w * row + 4 * blocks + b * PLANE
        scale = pf[w * (row // 4) + b] * share
        for i in range(out.size):
            value = -scale if pu[at + i % width] >> (i // width) & 1 else scale
            out[i] = out[i] + value if w else value


@loop
def sign_encode(x, prologue, residual, pf, pu, begin, end):
    """Encode x + residual as signs and magnitudes; the residual becomes their error."""
    widest()
    full, blocks = x.size // SIGN_BLOCK, (x.size + SIGN_BLOCK - 1) // SIGN_BLOCK
    scratch, a = scratch_beside(x, SIGN_BLOCK), np.empty(SIGN_BLOCK, np.float32)
    for b in range(begin, min(end, full)):
        xb = block_of(x, prologue, residual, b * SIGN_BLOCK, SIGN_BLOCK, scratch)
        _encode_block(xb, part_of(residual, b * SIGN_BLOCK, SIGN_BLOCK), a, b, blocks, pf, pu)
    if end > full:
        at, rest = full * SIGN_BLOCK, x.size - full * SIGN_BLOCK
        xb = block_of(x, prologue, residual, at, rest, scratch)
        _encode_tail(xb, part_of(residual, at, rest), a, full, blocks, pf, pu)


@loop
def sign_mean(pf, pu, W, row, out, begin, end):
    """Write the mean of W payloads to `out`."""
    widest()
    full, blocks = out.size // SIGN_BLOCK, (out.size + SIGN_BLOCK - 1) // SIGN_BLOCK
    share = np.float32(1.0 / W)
    scratch = scratch_beside(out, SIGN_BLOCK)
    for b in range(begin, min(end, full)):
        _read(pf, pu, W, row, b, blocks, share, scratch)
        put_block(out, b * SIGN_BLOCK, scratch, SIGN_BLOCK)
    if end > full:
        ob = scratch[: out.size - full * SIGN_BLOCK]
        _read_tail(pf, pu, W, row, full, blocks, share, ob)
        put_block(out, full * SIGN_BLOCK, ob, ob.size)
    settle_streams()


@loop
def sign_recode(pf, pu, W, row, residual, qf, qu, n, begin, end):
    """Encode the mean of W payloads (plus residual): the middle of two_shot."""
    widest()
    full, blocks = n // SIGN_BLOCK, (n + SIGN_BLOCK - 1) // SIGN_BLOCK
    share = np.float32(1.0 / W)
    mean, a = scratch_beside(pu, SIGN_BLOCK), np.empty(SIGN_BLOCK, np.float32)
    for b in range(begin, min(end, full)):
        rb = part_of(residual, b * SIGN_BLOCK, SIGN_BLOCK)
        _read(pf, pu, W, row, b, blocks, share, mean)
        remember(mean, rb, SIGN_BLOCK)
        _encode_block(mean, rb, a, b, blocks, qf, qu)
    if end > full:
        at, rest = full * SIGN_BLOCK, n - full * SIGN_BLOCK
        mb, rb = mean[:rest], part_of(residual, at, rest)
        _read_tail(pf, pu, W, row, full, blocks, share, mb)
        remember(mb, rb, rest)
        _encode_tail(mb, rb, a, full, blocks, qf, qu)


def encode(codec: Any, x: Tensor, residual: Tensor | None, prologue: Any, payload: Tensor) -> None:
    """`encode` of the table."""
    coded = padded(payload)
    arguments = values(x), steps(prologue), floats(residual), coded.view(np.float32), coded
    in_slices(sign_encode, x.numel(), SIGN_BLOCK, *arguments)


def mean(codec: Any, payloads: Tensor, count: int, out: Tensor) -> None:
    """`mean` of the table."""
    coded, n = payloads.numpy(), out.numel()
    in_slices(sign_mean, n, SIGN_BLOCK, coded.view(np.float32), coded, count, codec.nbytes(n), values(out))


def recode(codec: Any, payloads: Tensor, n: int, count: int, residual: Tensor | None, payload: Tensor) -> None:
    """`recode` of the table."""
    before, after = payloads.numpy(), padded(payload)
    coded = before.view(np.float32), before, count, codec.nbytes(n)
    in_slices(sign_recode, n, SIGN_BLOCK, *coded, floats(residual), after.view(np.float32), after, n)
