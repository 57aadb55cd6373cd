"""Loops of `fp8`, both formats.

A normal value is rounded in its own bits: half of the last place that stays is added, less one where that place is even,
and the bias of the exponent changes. One below the smallest normal value is a number of steps: the low bits of itself plus
1.5 * 2**23 steps.
"""

from typing import Any

import numpy as np
from torch import Tensor

from commpress.kernels.compiled import loop, part
from commpress.kernels.cpu.arrays import floats, padded, steps
from commpress.kernels.cpu.blocks import INFINITY_BITS, LARGEST, MAGNITUDE, NAN, block_of, load

BLOCKS_SHA256 = "c51943699b3cf74d"
"""Of `blocks.py`, which is compiled into these loops: Numba's cache looks at the time stamp of this file alone."""
FLOAT8_BLOCK = 256
FLUSH = np.float32(2.0**-80)
FORMATS = {
    "e4m3": (np.int32(20), np.int32(120), np.float32(448), np.float32(2.0**-9)),
    "e5m2": (np.int32(21), np.int32(112), np.float32(57344), np.float32(2.0**-16)),
}
"""Bits of float32's mantissa that go, by how much its exponent's bias is larger, the largest value, the smallest step."""


@part
def _code(y, shift, half, change, first, magic, zero):
    """The byte of y, whose magnitude is at most the largest value or rounds to it."""
    bits = np.int32(np.float32(y).view(np.int32))
    magnitude = np.int32(bits & MAGNITUDE)
    odd = np.int32(np.int32(magnitude >> shift) & np.int32(1))
    normal = np.int32(np.int32(np.int32(np.int32(magnitude + half) + odd) >> shift) - change)
    small = np.int32(np.int32(np.float32(magnitude.view(np.float32) + magic).view(np.int32)) - zero)
    sign = np.int32(np.int32(bits >> np.int32(24)) & np.int32(128))
    return np.uint8(np.int32((small if normal < first else normal) | sign))


@part
def _encode_block(a, top, m, b, blocks, form, residual, pf, pu):
    """Encode the block `b` in `a` (FLOAT8_BLOCK values, zeros behind the m real ones), leave in `residual` what was lost.

    `top` are the bits of the largest magnitude, `residual` holds m values or none.
    """
    shift, bias, largest, step = form
    codes = pu[4 * blocks + b * FLOAT8_BLOCK : 4 * blocks + b * FLOAT8_BLOCK + m]
    peak = np.int32(top).view(np.float32)
    if top >= INFINITY_BITS:  # the block decodes to NaN; its residual stays as it was
        pf[b] = NAN
        codes[:] = np.uint8(0)
        return
    if peak < FLUSH:
        pf[b] = np.float32(0)
        codes[:] = np.uint8(0)
        residual[:] = a[: residual.size]
        return
    scale, inverse = peak / largest, largest / peak
    pf[b] = scale
    magic = np.float32(1.5 * 2**23) * step
    zero = np.float32(magic).view(np.int32)
    half = np.int32((np.int32(1) << np.int32(shift - 1)) - 1)
    change = np.int32(bias << np.int32(23 - shift))
    first = np.int32(np.int32(1) << np.int32(23 - shift))  # the code of the smallest normal value
    if m == FLOAT8_BLOCK:
        for j in range(FLOAT8_BLOCK):
            codes[j] = _code(a[j] * inverse, shift, half, change, first, magic, zero)
    else:
        for j in range(m):
            codes[j] = _code(a[j] * inverse, shift, half, change, first, magic, zero)
    if residual.size == 0:
        return
    exact = peak < LARGEST / np.float32(2)
    for j in range(residual.size):
        lost = a[j] - _value(codes[j], form) * scale
        if exact or np.isfinite(lost):  # the largest value times the scale may round to Inf
            residual[j] = lost


@part
def _value(byte, form):
    """What a byte stands for, times 1."""
    shift, bias, _, step = form
    code = np.int32(byte)
    magnitude = np.int32(code & np.int32(127))
    normal = np.int32(np.int32(magnitude << shift) + np.int32(bias << np.int32(23))).view(np.float32)
    value = normal if magnitude >> np.int32(23 - shift) > 0 else np.float32(magnitude) * step
    return -value if code > np.int32(127) else value


@part
def _read(pf, pu, W, row, b, blocks, form, share, out):
    """The mean of the block `b` of W payloads, into `out` (the values of that block)."""
    for w in range(W):
        at = w * row + 4 * blocks + b * FLOAT8_BLOCK
        scale, codes = pf[w * (row // 4) + b], pu[at : at + out.size]
        if w == 0:
            for j in range(out.size):
                out[j] = _value(codes[j], form) * scale * share
        else:
            for j in range(out.size):
                out[j] += _value(codes[j], form) * scale * share


@loop
def float8_encode(x, prologue, residual, pf, pu, form):
    """Codes and scales of x + residual; the residual becomes what they miss."""
    blocks = (x.size + FLOAT8_BLOCK - 1) // FLOAT8_BLOCK
    a, scratch = np.empty(FLOAT8_BLOCK, np.float32), np.empty(FLOAT8_BLOCK, np.float32)
    for b in range(blocks):
        o = b * FLOAT8_BLOCK
        xb, rb = block_of(x, prologue, o, FLOAT8_BLOCK, scratch), residual[o : o + FLOAT8_BLOCK]
        top = load(xb, rb, a, FLOAT8_BLOCK)
        _encode_block(a, top, xb.size, b, blocks, form, rb, pf, pu)


@loop
def float8_mean(pf, pu, W, row, form, out):
    """The mean of W payloads."""
    blocks = (out.size + FLOAT8_BLOCK - 1) // FLOAT8_BLOCK
    share = np.float32(1.0 / W)
    for b in range(blocks):
        _read(pf, pu, W, row, b, blocks, form, share, out[b * FLOAT8_BLOCK : (b + 1) * FLOAT8_BLOCK])


@loop
def float8_recode(pf, pu, W, row, form, residual, qf, qu, n):
    """Encode the mean of W payloads (plus residual): the middle of two_shot; the mean itself is never stored."""
    blocks = (n + FLOAT8_BLOCK - 1) // FLOAT8_BLOCK
    share = np.float32(1.0 / W)
    mean, a = np.empty(FLOAT8_BLOCK, np.float32), np.empty(FLOAT8_BLOCK, np.float32)
    for b in range(blocks):
        o = b * FLOAT8_BLOCK
        m = min(FLOAT8_BLOCK, n - o)
        rb = residual[o : o + FLOAT8_BLOCK]
        _read(pf, pu, W, row, b, blocks, form, share, mean[:m])
        top = load(mean[:m], rb, a, FLOAT8_BLOCK)
        _encode_block(a, top, m, b, blocks, form, rb, qf, qu)


def encode(codec: Any, x: Tensor, residual: Tensor | None, prologue: Any, payload: Tensor) -> None:
    """`encode` of the table."""
    coded, form = padded(payload), FORMATS[codec.format]
    float8_encode(x.numpy(), steps(prologue), floats(residual), coded.view(np.float32), coded, form)


def mean(codec: Any, payloads: Tensor, count: int, out: Tensor) -> None:
    """`mean` of the table."""
    coded, row = payloads.numpy(), codec.nbytes(out.numel())
    float8_mean(coded.view(np.float32), coded, count, row, FORMATS[codec.format], out.numpy())


def recode(codec: Any, payloads: Tensor, n: int, count: int, residual: Tensor | None, payload: Tensor) -> None:
    """`recode` of the table."""
    before, after, form = payloads.numpy(), padded(payload), FORMATS[codec.format]
    coded = before.view(np.float32), before, count, codec.nbytes(n), form
    float8_recode(*coded, floats(residual), after.view(np.float32), after, n)
