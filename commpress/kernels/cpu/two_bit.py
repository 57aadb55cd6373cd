"""Loops of `int2`: sign and one of two sizes."""

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
)
from commpress.kernels.cpu.instructions import SIGN_BLOCK, pack_magnitudes, settle_streams, sum_magnitudes, widest
from commpress.kernels.cpu.slices import in_slices

SHARED_SHA256 = "5d1d88ea2ebdd3a9"
"""The hash of `blocks.py` and `instructions.py`, which are compiled in: Numba's cache checks only this file's time stamp."""
PLANE = SIGN_BLOCK // 8


@part
def _plane(n):
    """Return the bytes of one bit for each of n values."""
    return n // SIGN_BLOCK * (PLANE) + (n % SIGN_BLOCK + 7) // 8


@part
def _mean_size(x, m):
    """Return the mean magnitude of a full block of m values, filled up with zeros."""
    return np.float32(sum_magnitudes(x) * (np.float32(1) / np.float32(m)))


@part
def _pack(x, m, mean, signs, sizes):
    """Write the bits of such a block; return the means of its magnitudes up to `mean` and above it."""
    low, high, above = pack_magnitudes(x, mean, signs, sizes)
    below = np.float32(m) - above
    least = low * (np.float32(1) / below) if below > 0 else np.float32(0)
    most = high * (np.float32(1) / above) if above > 0 else np.float32(0)
    return least, most


@part
def _keep_loss(x, residual, mean, low, high):
    """Write the error of a full block to `residual`."""
    for j in range(SIGN_BLOCK):
        value = x[j]
        residual[j] = value - np.copysign(high if np.abs(value) > mean else low, value)


@loop
def _write_rare(x, residual, signs, sizes, a, t):
    """Encode a block of any length and any values, to the same bytes; return its two sizes."""
    m, bits = x.size, t.view(np.uint8)
    pad(x, a)
    mean = _mean_size(a, m)
    low, high = _pack(a, m, mean, bits[:PLANE], bits[PLANE : 2 * PLANE])  # bits that nobody reads: they lie otherwise
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
def _encode_block(x, residual, a, t, b, blocks, plane, pf, pu):
    """Encode the full block `b`, whose values are `x`. All signs are `plane` bytes."""
    start = 8 * blocks + b * PLANE
    signs, sizes = pu[start : start + PLANE], pu[start + plane : start + plane + PLANE]
    mean = _mean_size(x, SIGN_BLOCK)
    if np.isfinite(mean):
        low, high = _pack(x, SIGN_BLOCK, mean, signs, sizes)
        pf[2 * b], pf[2 * b + 1] = low, high
        if residual is not None:
            _keep_loss(x, residual, mean, low, high)
    else:
        pf[2 * b], pf[2 * b + 1] = _write_rare(x, residual, signs, sizes, a, t)


@part
def _encode_tail(x, residual, a, t, b, blocks, plane, pf, pu):
    """Encode the last block `b`, if it is shorter."""
    start, width = 8 * blocks + b * PLANE, (x.size + 7) // 8
    if x.size:
        signs, sizes = pu[start : start + width], pu[start + plane : start + plane + width]
        pf[2 * b], pf[2 * b + 1] = _write_rare(x, residual, signs, sizes, a, t)


@part
def _read(pf, pu, W, row, b, blocks, plane, share, out):
    """Write the mean of the full block `b` of W payloads to `out`."""
    for w in range(W):
        at = w * row + 8 * blocks + b * PLANE
        low, high = pf[w * (row // 4) + 2 * b] * share, pf[w * (row // 4) + 2 * b + 1] * share
        signs, sizes = pu[at : at + PLANE], pu[at + plane : at + plane + PLANE]
        for p in range(8):
            bit = np.uint8(1 << p)
            eighth = out[p * PLANE : (p + 1) * PLANE]
            if w:
                for j in range(PLANE):
                    size = high if sizes[j] & bit else low
                    eighth[j] += -size if signs[j] & bit else size
            else:
                for j in range(PLANE):
                    size = high if sizes[j] & bit else low
                    eighth[j] = -size if signs[j] & bit else size


@part
def _read_tail(pf, pu, W, row, b, blocks, plane, share, out):
    """Write the mean of the last block of W payloads to `out`, if it is shorter."""
    width = (out.size + 7) // 8
    for w in range(W if out.size else 0):
        at = w * row + 8 * blocks + b * PLANE
        low, high = pf[w * (row // 4) + 2 * b] * share, pf[w * (row // 4) + 2 * b + 1] * share
        for i in range(out.size):
            size = high if pu[at + plane + i % width] >> (i // width) & 1 else low
            value = -size if pu[at + i % width] >> (i // width) & 1 else size
            out[i] = out[i] + value if w else value


@loop
def int2_encode(x, prologue, residual, pf, pu, begin, end):
    """Encode x + residual as signs and sizes; the residual becomes their error."""
    widest()
    full, blocks, plane = x.size // SIGN_BLOCK, (x.size + SIGN_BLOCK - 1) // SIGN_BLOCK, _plane(x.size)
    scratch, a, t = scratch_beside(x, SIGN_BLOCK), np.empty(SIGN_BLOCK, np.float32), np.empty(SIGN_BLOCK, np.float32)
    for b in range(begin, min(end, full)):
        xb = block_of(x, prologue, residual, b * SIGN_BLOCK, SIGN_BLOCK, scratch)
        _encode_block(xb, part_of(residual, b * SIGN_BLOCK, SIGN_BLOCK), a, t, b, blocks, plane, pf, pu)
    if end > full:
        at, rest = full * SIGN_BLOCK, x.size - full * SIGN_BLOCK
        xb = block_of(x, prologue, residual, at, rest, scratch)
        _encode_tail(xb, part_of(residual, at, rest), a, t, full, blocks, plane, pf, pu)


@loop
def int2_mean(pf, pu, W, row, out, begin, end):
    """Write the mean of W payloads to `out`."""
    widest()
    full, blocks, plane = out.size // SIGN_BLOCK, (out.size + SIGN_BLOCK - 1) // SIGN_BLOCK, _plane(out.size)
    share = np.float32(1.0 / W)
    scratch = scratch_beside(out, SIGN_BLOCK)
    for b in range(begin, min(end, full)):
        _read(pf, pu, W, row, b, blocks, plane, share, scratch)
        put_block(out, b * SIGN_BLOCK, scratch, SIGN_BLOCK)
    if end > full:
        ob = scratch[: out.size - full * SIGN_BLOCK]
        _read_tail(pf, pu, W, row, full, blocks, plane, share, ob)
        put_block(out, full * SIGN_BLOCK, ob, ob.size)
    settle_streams()


@loop
def int2_recode(pf, pu, W, row, residual, qf, qu, n, begin, end):
    """Encode the mean of W payloads (plus residual): the middle of two_shot."""
    widest()
    full, blocks, plane = n // SIGN_BLOCK, (n + SIGN_BLOCK - 1) // SIGN_BLOCK, _plane(n)
    share = np.float32(1.0 / W)
    mean, a, t = scratch_beside(pu, SIGN_BLOCK), np.empty(SIGN_BLOCK, np.float32), np.empty(SIGN_BLOCK, np.float32)
    for b in range(begin, min(end, full)):
        rb = part_of(residual, b * SIGN_BLOCK, SIGN_BLOCK)
        _read(pf, pu, W, row, b, blocks, plane, share, mean)
        remember(mean, rb, SIGN_BLOCK)
        _encode_block(mean, rb, a, t, b, blocks, plane, qf, qu)
    if end > full:
        at, rest = full * SIGN_BLOCK, n - full * SIGN_BLOCK
        mb, rb = mean[:rest], part_of(residual, at, rest)
        _read_tail(pf, pu, W, row, full, blocks, plane, share, mb)
        remember(mb, rb, rest)
        _encode_tail(mb, rb, a, t, full, blocks, plane, qf, qu)


def encode(codec: Any, x: Tensor, residual: Tensor | None, prologue: Any, payload: Tensor) -> None:
    """`encode` of the table."""
    coded = padded(payload)
    arguments = values(x), steps(prologue), floats(residual), coded.view(np.float32), coded
    in_slices(int2_encode, x.numel(), SIGN_BLOCK, *arguments)


def mean(codec: Any, payloads: Tensor, count: int, out: Tensor) -> None:
    """`mean` of the table."""
    coded, n = payloads.numpy(), out.numel()
    in_slices(int2_mean, n, SIGN_BLOCK, coded.view(np.float32), coded, count, codec.nbytes(n), values(out))


def recode(codec: Any, payloads: Tensor, n: int, count: int, residual: Tensor | None, payload: Tensor) -> None:
    """`recode` of the table."""
    before, after = payloads.numpy(), padded(payload)
    coded = before.view(np.float32), before, count, codec.nbytes(n)
    in_slices(int2_recode, n, SIGN_BLOCK, *coded, floats(residual), after.view(np.float32), after, n)
