"""Loops of `int8` and `int4`."""

from typing import Any

import numpy as np
from torch import Tensor

from commpress.kernels.compiled import loop, part
from commpress.kernels.cpu.arrays import floats, padded, steps
from commpress.kernels.cpu.blocks import INFINITY_BITS, LARGEST, NAN, block_of, load

BLOCKS_SHA256 = "c51943699b3cf74d"
"""Of `blocks.py`, which is compiled into these loops: Numba's cache looks at the time stamp of this file alone."""
INT_BLOCK = 256
FLUSH = np.float32(2.0**-100)
ROUND = np.float32(1.5 * 2**23)


@part
def _int_round(a, top, t, levels, magic, residual):
    """Leave the codes of the block `a` in the low bits of `t` and what they miss in `residual`; return the scale.

    `a` and `t` hold INT_BLOCK values, `residual` as many, or those of the last block, or none; `top` are the bits of the
    largest magnitude."""
    if top >= INFINITY_BITS:  # the block decodes to NaN; its residual stays as it was
        for j in range(INT_BLOCK):
            t[j] = magic
        return NAN
    peak = np.int32(top).view(np.float32)
    scale, inverse = np.float32(0), np.float32(0)
    if peak >= FLUSH:
        scale, inverse = peak / levels, levels / peak
    for j in range(INT_BLOCK):
        t[j] = a[j] * inverse + magic
    if residual.size == INT_BLOCK and peak < LARGEST / np.float32(2):
        for j in range(INT_BLOCK):
            residual[j] = a[j] - (t[j] - magic) * scale
    else:
        for j in range(residual.size):
            lost = a[j] - (t[j] - magic) * scale
            if np.isfinite(lost):  # the largest code times the scale may round to Inf
                residual[j] = lost
    return scale


@part
def _int_write(a, top, t, m, b, blocks, bits, residual, pf, pu):
    """Encode the block `b` in `a` (INT_BLOCK values, zeros behind the m real ones), leave in `residual` what was lost."""
    levels = np.float32(127) if bits == 8 else np.float32(7)
    magic = ROUND + np.float32(128) if bits == 8 else ROUND + np.float32(8)
    pf[b] = _int_round(a, top, t, levels, magic, residual)
    ti = t.view(np.int32)
    if bits == 8:
        start = 4 * blocks + b * INT_BLOCK
        if m == INT_BLOCK:
            codes = pu[start : start + INT_BLOCK]
            for j in range(INT_BLOCK):
                codes[j] = np.uint8(ti[j] & np.int32(255))
        else:
            for j in range(m):
                pu[start + j] = np.uint8(ti[j] & np.int32(255))
    else:
        start = 4 * blocks + b * (INT_BLOCK // 2)
        if m == INT_BLOCK:
            codes = pu[start : start + INT_BLOCK // 2]
            for j in range(INT_BLOCK // 2):
                low, high = ti[j] & np.int32(15), ti[j + INT_BLOCK // 2] & np.int32(15)
                codes[j] = np.uint8(np.int32(low) | np.int32(np.int32(high) << np.int32(4)))
        else:
            half = (m + 1) // 2
            for j in range(half):
                pu[start + j] = np.uint8((ti[j] & 15) | ((ti[j + half] & 15) << 4))


@part
def _int_add(scale, share, codes, bits, out):
    """Add the values of a full block, times `share`, to `out`. One loop a half, or LLVM gives up."""
    if bits == 8:
        for j in range(INT_BLOCK):
            out[j] += np.float32(np.int32(np.int32(codes[j]) - np.int32(128))) * scale * share
    else:
        upper = out[INT_BLOCK // 2 :]
        for j in range(INT_BLOCK // 2):
            out[j] += np.float32(np.int32(np.int32(codes[j] & np.uint8(15)) - np.int32(8))) * scale * share
        for j in range(INT_BLOCK // 2):
            upper[j] += np.float32(np.int32(np.int32(codes[j] >> np.uint8(4)) - np.int32(8))) * scale * share


@part
def _int_set(scale, share, codes, bits, out):
    """Put the values of a full block, times `share`, into `out`."""
    if bits == 8:
        for j in range(INT_BLOCK):
            out[j] = np.float32(np.int32(np.int32(codes[j]) - np.int32(128))) * scale * share
    else:
        upper = out[INT_BLOCK // 2 :]
        for j in range(INT_BLOCK // 2):
            out[j] = np.float32(np.int32(np.int32(codes[j] & np.uint8(15)) - np.int32(8))) * scale * share
        for j in range(INT_BLOCK // 2):
            upper[j] = np.float32(np.int32(np.int32(codes[j] >> np.uint8(4)) - np.int32(8))) * scale * share


@loop
def _int_tail(scale, share, codes, bits, add, out):
    """Either of the two for the last block, which is shorter."""
    m = out.size
    half = (m + 1) // 2
    for j in range(m):
        if bits == 8:
            code = np.int32(codes[j]) - np.int32(128)
        else:
            code = np.int32(codes[j] & 15 if j < half else codes[j - half] >> 4) - np.int32(8)
        value = np.float32(code) * scale * share
        out[j] = out[j] + value if add else value


@part
def _int_read(pf, pu, W, row, b, blocks, bits, share, out):
    """The mean of the block `b` of W payloads, into `out` (the values of that block)."""
    size = INT_BLOCK * bits // 8
    for w in range(W):
        at = w * row + 4 * blocks + b * size
        scale, codes = pf[w * (row // 4) + b], pu[at : at + size]
        if out.size < INT_BLOCK:
            _int_tail(scale, share, codes, bits, w > 0, out)
        elif w > 0:
            _int_add(scale, share, codes, bits, out)
        else:
            _int_set(scale, share, codes, bits, out)


@loop
def int_encode(x, prologue, residual, pf, pu, bits):
    """Codes and scales of x + residual; the residual becomes what they miss."""
    n = x.size
    blocks = (n + INT_BLOCK - 1) // INT_BLOCK
    a = np.empty(INT_BLOCK, np.float32)
    t = np.empty(INT_BLOCK, np.float32)
    scratch = np.empty(INT_BLOCK, np.float32)
    for b in range(blocks):
        o = b * INT_BLOCK
        xb, rb = (
            block_of(x, prologue, o, INT_BLOCK, scratch),
            residual[o : o + INT_BLOCK],
        )  # rb is empty without feedback
        top = load(xb, rb, a, INT_BLOCK)
        _int_write(a, top, t, xb.size, b, blocks, bits, rb, pf, pu)


@loop
def int_mean(pf, pu, W, row, bits, out):
    """The mean of W payloads."""
    blocks = (out.size + INT_BLOCK - 1) // INT_BLOCK
    share = np.float32(1.0 / W)
    for b in range(blocks):
        _int_read(pf, pu, W, row, b, blocks, bits, share, out[b * INT_BLOCK : (b + 1) * INT_BLOCK])


@loop
def int_recode(pf, pu, W, row, bits, residual, qf, qu, n):
    """Encode the mean of W payloads (plus residual): the middle of two_shot; the mean itself is never stored."""
    blocks = (n + INT_BLOCK - 1) // INT_BLOCK
    share = np.float32(1.0 / W)
    mean = np.empty(INT_BLOCK, np.float32)
    a = np.empty(INT_BLOCK, np.float32)
    t = np.empty(INT_BLOCK, np.float32)
    for b in range(blocks):
        o = b * INT_BLOCK
        m = min(INT_BLOCK, n - o)
        rb = residual[o : o + INT_BLOCK]
        _int_read(pf, pu, W, row, b, blocks, bits, share, mean[:m])
        top = load(mean[:m], rb, a, INT_BLOCK)
        _int_write(a, top, t, m, b, blocks, bits, rb, qf, qu)


def encode(codec: Any, x: Tensor, residual: Tensor | None, prologue: Any, payload: Tensor) -> None:
    """`encode` of the table."""
    coded = padded(payload)
    int_encode(x.numpy(), steps(prologue), floats(residual), coded.view(np.float32), coded, codec.bits)


def mean(codec: Any, payloads: Tensor, count: int, out: Tensor) -> None:
    """`mean` of the table."""
    coded = payloads.numpy()
    int_mean(coded.view(np.float32), coded, count, codec.nbytes(out.numel()), codec.bits, out.numpy())


def recode(codec: Any, payloads: Tensor, n: int, count: int, residual: Tensor | None, payload: Tensor) -> None:
    """`recode` of the table."""
    before, after = payloads.numpy(), padded(payload)
    coded = before.view(np.float32), before, count, codec.nbytes(n)
    int_recode(*coded, codec.bits, floats(residual), after.view(np.float32), after, n)
