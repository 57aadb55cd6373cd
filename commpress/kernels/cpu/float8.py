"""Loops of `fp8`, both formats.

A normal value is rounded in its own bits: half of the last place that stays is added, less one where that place is even,
and the bias of the exponent changes. One below the smallest normal value is a number of steps: the low bits of itself plus
1.5 * 2**23 steps.
"""

from typing import Any

import numpy as np
from torch import Tensor

from commpress.kernels.compiled import loop, part
from commpress.kernels.cpu.arrays import floats, padded, steps, values
from commpress.kernels.cpu.blocks import (
    INFINITY_BITS,
    LARGEST,
    MAGNITUDE,
    NAN,
    block_of,
    from_float16,
    part_of,
    put_block,
    remember,
    scratch_beside,
    top_of,
)
from commpress.kernels.cpu.instructions import CONVERTS_HALVES, settle_streams, widest
from commpress.kernels.cpu.slices import in_slices

SHARED_SHA256 = "5d1d88ea2ebdd3a9"
"""The hash of `blocks.py` and `instructions.py`, which are compiled in: Numba's cache checks only this file's time stamp."""
FLOAT8_BLOCK = 256
FLUSH = np.float32(2.0**-80)
E4M3 = (np.int32(20), np.int32(120), np.float32(448), np.float32(2.0**-9))
E5M2 = (np.int32(21), np.int32(112), np.float32(57344), np.float32(2.0**-16))
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
def _value(byte, form):
    """Return the value of a byte in a block of scale 1: float16 has the exponent's width of e5m2, and the denormals of both."""
    if CONVERTS_HALVES:
        shift = np.int32(form[0] - np.int32(13))
        kept = np.int32(np.int32(127 << shift) | np.int32(0x8000))
        spread = np.int32(np.int32(np.int8(byte)) << shift)  # the sign in all bits above the magnitude's
        unit = np.float32(2.0 ** (form[1] - 112))
        return np.float32(from_float16(np.uint32(spread & kept)) * unit)
    return _value_by_bits(byte, form)


@part
def _value_by_bits(byte, form):
    """Return the same where the processor has no float16."""
    shift, bias, _, step = form
    code = np.int32(byte)
    magnitude = np.int32(code & np.int32(127))
    normal = np.int32(np.int32(magnitude << shift) + np.int32(bias << np.int32(23)))
    small = np.float32(np.float32(magnitude) * step).view(np.int32)
    bits = normal if magnitude >> np.int32(23 - shift) > 0 else small
    return np.int32(bits | np.int32(np.int32(code & np.int32(128)) << np.int32(24))).view(np.float32)


@part
def _constants(form):
    """Return what `_code` needs of a format beside the shift: half, change, first, magic, zero."""
    shift, bias, _, step = form
    magic = np.float32(1.5 * 2**23) * step
    half = np.int32((np.int32(1) << np.int32(shift - 1)) - 1)
    first = np.int32(np.int32(1) << np.int32(23 - shift))  # the code of the smallest normal value
    return half, np.int32(bias << np.int32(23 - shift)), first, magic, np.float32(magic).view(np.int32)


@part
def _write(x, residual, codes, peak, form):
    """Encode a full block of ordinary values; write the error to `residual`, return the scale."""
    shift, _, largest, _ = form
    half, change, first, magic, zero = _constants(form)
    scale, inverse = np.float32(peak / largest), np.float32(largest / peak)
    for j in range(FLOAT8_BLOCK):
        value = x[j]
        code = _code(value * inverse, shift, half, change, first, magic, zero)
        codes[j] = code
        if residual is not None:
            residual[j] = value - _value(code, form) * scale
    return scale


@loop
def _write_rare(x, residual, codes, top, form):
    """Encode a block of any length and any values, to the same bytes; return its scale."""
    shift, _, largest, _ = form
    half, change, first, magic, zero = _constants(form)
    peak = np.int32(top).view(np.float32)
    codes[:] = np.uint8(0)
    if top >= INFINITY_BITS:  # the block decodes to NaN; its residual stays as it was
        return NAN
    small = peak < FLUSH
    scale, inverse = np.float32(0), np.float32(0)
    if not small:
        scale, inverse = np.float32(peak / largest), np.float32(largest / peak)
    for j in range(x.size):
        value = x[j]
        if not small:
            codes[j] = _code(value * inverse, shift, half, change, first, magic, zero)
        if residual is not None:
            lost = value - _value(codes[j], form) * scale
            if np.isfinite(lost):  # the largest value times the scale may round to Inf
                residual[j] = lost
    return scale


@part
def _encode_block(x, residual, b, blocks, form, pf, pu):
    """Encode the full block `b`, whose values are `x`."""
    start = 4 * blocks + b * FLOAT8_BLOCK
    codes = pu[start : start + FLOAT8_BLOCK]
    top = top_of(x, FLOAT8_BLOCK)
    peak = np.int32(top).view(np.float32)
    if FLUSH <= peak < LARGEST / np.float32(2):
        pf[b] = _write(x, residual, codes, peak, form)
    else:
        pf[b] = _write_rare(x, residual, codes, top, form)


@part
def _encode_tail(x, residual, b, blocks, form, pf, pu):
    """Encode the last block `b`, if it is shorter."""
    start = 4 * blocks + b * FLOAT8_BLOCK
    if x.size:
        pf[b] = _write_rare(x, residual, pu[start : start + x.size], top_of(x, x.size), form)


@part
def _add(scale, codes, form, share, size, first, out):
    """Add the values of a payload, times `share`, to `out`; `first`: write them instead."""
    for j in range(size):
        value = _value(codes[j], form) * scale * share
        out[j] = value if first else np.float32(out[j] + value)


@part
def _add_four(scales, a, b, c, d, form, share, size, first, out):
    """Add the values of four payloads in one pass: their sum stays in registers."""
    k, m, n, p = scales
    for j in range(size):
        total = _value(a[j], form) * k * share
        total = total if first else np.float32(out[j] + total)
        total += _value(b[j], form) * m * share
        total += _value(c[j], form) * n * share
        out[j] = total + _value(d[j], form) * p * share


@part
def _read(pf, pu, W, row, b, blocks, form, share, size, out):
    """Write the mean of the block `b` of W payloads, of `size` values, to `out`."""
    grouped = W // 4 * 4 if size else 0
    at, words = 4 * blocks + b * FLOAT8_BLOCK, row // 4
    for w in range(0, grouped, 4):
        i, j, k, m = w * row + at, (w + 1) * row + at, (w + 2) * row + at, (w + 3) * row + at
        codes = pu[i : i + size], pu[j : j + size], pu[k : k + size], pu[m : m + size]
        t = w * words + b
        scales = pf[t], pf[t + words], pf[t + 2 * words], pf[t + 3 * words]
        if w == 0:
            _add_four(scales, *codes, form, share, size, True, out)
        else:
            _add_four(scales, *codes, form, share, size, False, out)
    for w in range(grouped, W if size else 0):
        scale, codes_of_one = pf[w * words + b], pu[w * row + at : w * row + at + size]
        if w == 0:
            _add(scale, codes_of_one, form, share, size, True, out)
        else:
            _add(scale, codes_of_one, form, share, size, False, out)


@part
def _encode(x, prologue, residual, pf, pu, begin, end, form):
    full, blocks = x.size // FLOAT8_BLOCK, (x.size + FLOAT8_BLOCK - 1) // FLOAT8_BLOCK
    scratch = scratch_beside(x, FLOAT8_BLOCK)
    for b in range(begin, min(end, full)):
        xb = block_of(x, prologue, residual, b * FLOAT8_BLOCK, FLOAT8_BLOCK, scratch)
        _encode_block(xb, part_of(residual, b * FLOAT8_BLOCK, FLOAT8_BLOCK), b, blocks, form, pf, pu)
    if end > full:
        at, rest = full * FLOAT8_BLOCK, x.size - full * FLOAT8_BLOCK
        xb = block_of(x, prologue, residual, at, rest, scratch)
        _encode_tail(xb, part_of(residual, at, rest), full, blocks, form, pf, pu)


@part
def _mean(pf, pu, W, row, out, begin, end, form):
    full, blocks = out.size // FLOAT8_BLOCK, (out.size + FLOAT8_BLOCK - 1) // FLOAT8_BLOCK
    share = np.float32(1.0 / W)
    scratch = scratch_beside(out, FLOAT8_BLOCK)
    for b in range(begin, min(end, full)):
        _read(pf, pu, W, row, b, blocks, form, share, FLOAT8_BLOCK, scratch)
        put_block(out, b * FLOAT8_BLOCK, scratch, FLOAT8_BLOCK)
    if end > full:
        ob = scratch[: out.size - full * FLOAT8_BLOCK]
        _read(pf, pu, W, row, full, blocks, form, share, ob.size, ob)
        put_block(out, full * FLOAT8_BLOCK, ob, ob.size)
    settle_streams()


@part
def _recode(pf, pu, W, row, residual, qf, qu, n, begin, end, form):
    full, blocks = n // FLOAT8_BLOCK, (n + FLOAT8_BLOCK - 1) // FLOAT8_BLOCK
    share = np.float32(1.0 / W)
    mean = scratch_beside(pu, FLOAT8_BLOCK)
    for b in range(begin, min(end, full)):
        rb = part_of(residual, b * FLOAT8_BLOCK, FLOAT8_BLOCK)
        _read(pf, pu, W, row, b, blocks, form, share, FLOAT8_BLOCK, mean)
        remember(mean, rb, FLOAT8_BLOCK)
        _encode_block(mean, rb, b, blocks, form, qf, qu)
    if end > full:
        at, rest = full * FLOAT8_BLOCK, n - full * FLOAT8_BLOCK
        mb, rb = mean[:rest], part_of(residual, at, rest)
        _read(pf, pu, W, row, full, blocks, form, share, rest, mb)
        remember(mb, rb, rest)
        _encode_tail(mb, rb, full, blocks, form, qf, qu)


@loop
def e4m3_encode(x, prologue, residual, pf, pu, begin, end):
    """Encode x + residual as scales and codes; the residual becomes their error."""
    widest()
    _encode(x, prologue, residual, pf, pu, begin, end, E4M3)


@loop
def e5m2_encode(x, prologue, residual, pf, pu, begin, end):
    """Encode x + residual as scales and codes; the residual becomes their error."""
    widest()
    _encode(x, prologue, residual, pf, pu, begin, end, E5M2)


@loop
def e4m3_mean(pf, pu, W, row, out, begin, end):
    """Write the mean of W payloads to `out`."""
    widest()
    _mean(pf, pu, W, row, out, begin, end, E4M3)


@loop
def e5m2_mean(pf, pu, W, row, out, begin, end):
    """Write the mean of W payloads to `out`."""
    widest()
    _mean(pf, pu, W, row, out, begin, end, E5M2)


@loop
def e4m3_recode(pf, pu, W, row, residual, qf, qu, n, begin, end):
    """Encode the mean of W payloads (plus residual): the middle of two_shot; the mean itself is never stored."""
    widest()
    _recode(pf, pu, W, row, residual, qf, qu, n, begin, end, E4M3)


@loop
def e5m2_recode(pf, pu, W, row, residual, qf, qu, n, begin, end):
    """Encode the mean of W payloads (plus residual): the middle of two_shot; the mean itself is never stored."""
    widest()
    _recode(pf, pu, W, row, residual, qf, qu, n, begin, end, E5M2)


LOOPS = {"e4m3": (e4m3_encode, e4m3_mean, e4m3_recode), "e5m2": (e5m2_encode, e5m2_mean, e5m2_recode)}


def encode(codec: Any, x: Tensor, residual: Tensor | None, prologue: Any, payload: Tensor) -> None:
    """`encode` of the table."""
    coded = padded(payload)
    arguments = values(x), steps(prologue), floats(residual), coded.view(np.float32), coded
    in_slices(LOOPS[codec.format][0], x.numel(), FLOAT8_BLOCK, *arguments)


def mean(codec: Any, payloads: Tensor, count: int, out: Tensor) -> None:
    """`mean` of the table."""
    coded, n = payloads.numpy(), out.numel()
    in_slices(
        LOOPS[codec.format][1], n, FLOAT8_BLOCK, coded.view(np.float32), coded, count, codec.nbytes(n), values(out)
    )


def recode(codec: Any, payloads: Tensor, n: int, count: int, residual: Tensor | None, payload: Tensor) -> None:
    """`recode` of the table."""
    before, after = payloads.numpy(), padded(payload)
    coded = before.view(np.float32), before, count, codec.nbytes(n)
    in_slices(LOOPS[codec.format][2], n, FLOAT8_BLOCK, *coded, floats(residual), after.view(np.float32), after, n)
