"""Loops of `int8` and `int4`."""

from typing import Any

import numpy as np
from torch import Tensor

from commpress.kernels.compiled import loop, part
from commpress.kernels.cpu.arrays import floats, padded, steps, values
from commpress.kernels.cpu.blocks import (
    INFINITY_BITS,
    LARGEST,
    NAN,
    block_of,
    part_of,
    put_block,
    remember,
    scratch_beside,
    top_of,
)
from commpress.kernels.cpu.instructions import settle_streams, widest
from commpress.kernels.cpu.slices import in_slices

SHARED_SHA256 = "5d1d88ea2ebdd3a9"
"""The hash of `blocks.py` and `instructions.py`, which are compiled in: Numba's cache checks only this file's time stamp."""
INT_BLOCK = 256
HALF = INT_BLOCK // 2
FLUSH = np.float32(2.0**-100)
ROUND = np.float32(1.5 * 2**23)
ORDINARY = (LARGEST / np.float32(2)).view(np.int32)
"""Bits of the magnitude from which on the largest code times the scale may round to Inf."""
SCALE_HASH, PLACE_HASH = np.uint32(0x9E3779B9), np.uint32(0x85EBCA6B)
FIRST_HASH, LAST_HASH = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)


@part
def _scales(top, bits):
    """Return the scale of a block, what its values are multiplied by, and what they are added to for rounding."""
    levels = np.float32(127) if bits == 8 else np.float32(7)
    magic = ROUND + np.float32(128) if bits == 8 else ROUND + np.float32(8)
    peak = np.int32(top).view(np.float32)
    if top >= INFINITY_BITS:
        return NAN, np.float32(0), magic
    if peak < FLUSH:
        return np.float32(0), np.float32(0), magic
    return np.float32(peak / levels), np.float32(levels / peak), magic


@part
def _key(scale):
    """Return what the noise of a block of this scale begins with."""
    return np.uint32(np.float32(scale).view(np.uint32) * SCALE_HASH)


@part
def _noise(value, key, place):
    """Return what is added to the value at this place of its block before it is rounded: the hash of the definition."""
    h = np.uint32(np.float32(value).view(np.uint32) ^ np.uint32(key + np.uint32(np.uint32(place) * PLACE_HASH)))
    h = np.uint32(np.uint32(h ^ np.uint32(h >> np.uint32(16))) * FIRST_HASH)
    h = np.uint32(np.uint32(h ^ np.uint32(h >> np.uint32(15))) * LAST_HASH)
    signed = np.int32(np.uint32(h ^ np.uint32(h >> np.uint32(16))))
    return np.float32(np.float32(np.int32(np.int32(signed >> np.int32(8)) | np.int32(1))) * np.float32(2.0**-24))


@part
def _code(value, place, inverse, magic, key, bits, stochastic):
    """Return the code of the value at this place of its block, and the integer it stands for."""
    level = np.float32(value * inverse)
    if stochastic:
        levels = np.float32(127) if bits == 8 else np.float32(7)
        level = min(max(np.float32(level + _noise(value, key, place)), -levels), levels)
    t = np.float32(level + magic)
    return np.int32(t.view(np.int32) & np.int32(255 if bits == 8 else 15)), np.float32(t - magic)


@part
def _write(x, residual, codes, top, bits, stochastic):
    """Encode a full block of ordinary values; write the error to `residual`, return the scale."""
    scale, inverse, magic = _scales(top, bits)
    key = _key(scale)
    if bits == 8:
        for j in range(INT_BLOCK):
            value = x[j]
            code, level = _code(value, j, inverse, magic, key, bits, stochastic)
            codes[j] = np.uint8(code)
            if residual is not None:
                residual[j] = value - level * scale
    else:
        for j in range(HALF):
            low, high = x[j], x[j + HALF]
            code, level = _code(low, j, inverse, magic, key, bits, stochastic)
            upper_code, upper_level = _code(high, j + HALF, inverse, magic, key, bits, stochastic)
            codes[j] = np.uint8(np.int32(code | np.int32(upper_code << np.int32(4))))
            if residual is not None:
                residual[j] = low - level * scale
                residual[j + HALF] = high - upper_level * scale
    return scale


@loop
def _write_rare(x, residual, codes, top, bits, stochastic):
    """Encode a block of any length and any values, to the same bytes."""
    scale, inverse, magic = _scales(top, bits)
    key = _key(scale)
    half = (x.size + 1) // 2
    codes[:] = np.uint8(0 if bits == 8 else 8 << 4)  # if there is no upper value, its code is that of 0
    for j in range(x.size):
        value = x[j]
        usable = np.float32(0) if top >= INFINITY_BITS else value
        code, level = _code(usable, j, inverse, magic, key, bits, stochastic)
        if bits == 8:
            codes[j] = np.uint8(code)
        elif j < half:
            codes[j] = np.uint8(np.int32(codes[j] & 240) | code)
        else:
            codes[j - half] = np.uint8(np.int32(codes[j - half] & 15) | np.int32(code << np.int32(4)))
        if residual is not None:
            lost = value - level * scale
            if np.isfinite(lost):  # else it stays what it was
                residual[j] = lost
    return scale


@part
def _encode_block(x, residual, b, blocks, bits, stochastic, pf, pu):
    """Encode the full block `b`, whose values are `x`."""
    start = 4 * blocks + b * (INT_BLOCK * bits // 8)
    codes = pu[start : start + INT_BLOCK * bits // 8]
    top = top_of(x, INT_BLOCK)
    if top < ORDINARY:
        pf[b] = _write(x, residual, codes, top, bits, stochastic)
    else:
        pf[b] = _write_rare(x, residual, codes, top, bits, stochastic)


@part
def _encode_tail(x, residual, b, blocks, bits, stochastic, pf, pu):
    """Encode the last block `b`, if it is shorter."""
    start = 4 * blocks + b * (INT_BLOCK * bits // 8)
    if x.size:
        codes = pu[start : start + (x.size * bits + 7) // 8]
        pf[b] = _write_rare(x, residual, codes, top_of(x, x.size), bits, stochastic)


@part
def _encode(x, prologue, residual, pf, pu, begin, end, bits, stochastic):
    full, blocks = x.size // INT_BLOCK, (x.size + INT_BLOCK - 1) // INT_BLOCK
    scratch = scratch_beside(x, INT_BLOCK)
    for b in range(begin, min(end, full)):
        xb = block_of(x, prologue, residual, b * INT_BLOCK, INT_BLOCK, scratch)
        _encode_block(xb, part_of(residual, b * INT_BLOCK, INT_BLOCK), b, blocks, bits, stochastic, pf, pu)
    if end > full:
        rest = x.size - full * INT_BLOCK
        xb = block_of(x, prologue, residual, full * INT_BLOCK, rest, scratch)
        _encode_tail(xb, part_of(residual, full * INT_BLOCK, rest), full, blocks, bits, stochastic, pf, pu)


@part
def _value(code, bits, scale, share):
    offset = np.int32(128) if bits == 8 else np.int32(8)
    return np.float32(np.int32(np.int32(code) - offset)) * scale * share


@part
def _add(scale, codes, share, bits, first, out):
    """Add the values of a full block, times `share`, to `out`, or put them there. One loop a half, or LLVM gives up."""
    if bits == 8:
        for j in range(INT_BLOCK):
            value = _value(codes[j], bits, scale, share)
            out[j] = value if first else out[j] + value
    else:
        upper = out[HALF:]
        for j in range(HALF):
            value = _value(codes[j] & np.uint8(15), bits, scale, share)
            out[j] = value if first else out[j] + value
        for j in range(HALF):
            value = _value(codes[j] >> np.uint8(4), bits, scale, share)
            upper[j] = value if first else upper[j] + value


@loop
def _add_tail(scale, codes, share, bits, first, out):
    """Add the values of the last, shorter block, times `share`, to `out`; `first`: write them instead."""
    half = (out.size + 1) // 2
    for j in range(out.size):
        code = np.int32(codes[j] if bits == 8 else (codes[j] & 15 if j < half else codes[j - half] >> 4))
        value = _value(code, bits, scale, share)
        out[j] = value if first else out[j] + value


@part
def _read(pf, pu, W, row, b, blocks, bits, share, out):
    """Write the mean of the full block `b` of W payloads to `out`."""
    size = INT_BLOCK * bits // 8
    for w in range(W):
        at = w * row + 4 * blocks + b * size
        scale, codes = pf[w * (row // 4) + b], pu[at : at + size]
        if w == 0:
            _add(scale, codes, share, bits, True, out)
        else:
            _add(scale, codes, share, bits, False, out)


@part
def _read_tail(pf, pu, W, row, b, blocks, bits, share, out):
    """Write the mean of the last block of W payloads to `out`, if it is shorter."""
    for w in range(W if out.size else 0):
        at = w * row + 4 * blocks + b * (INT_BLOCK * bits // 8)
        _add_tail(pf[w * (row // 4) + b], pu[at : at + (out.size * bits + 7) // 8], share, bits, w == 0, out)


@part
def _mean(pf, pu, W, row, out, begin, end, bits):
    full, blocks = out.size // INT_BLOCK, (out.size + INT_BLOCK - 1) // INT_BLOCK
    share = np.float32(1.0 / W)
    scratch = scratch_beside(out, INT_BLOCK)
    for b in range(begin, min(end, full)):
        _read(pf, pu, W, row, b, blocks, bits, share, scratch)
        put_block(out, b * INT_BLOCK, scratch, INT_BLOCK)
    if end > full:
        ob = scratch[: out.size - full * INT_BLOCK]
        _read_tail(pf, pu, W, row, full, blocks, bits, share, ob)
        put_block(out, full * INT_BLOCK, ob, ob.size)
    settle_streams()


@part
def _recode(pf, pu, W, row, residual, qf, qu, n, begin, end, bits, stochastic):
    full, blocks = n // INT_BLOCK, (n + INT_BLOCK - 1) // INT_BLOCK
    share = np.float32(1.0 / W)
    mean = scratch_beside(pu, INT_BLOCK)
    for b in range(begin, min(end, full)):
        rb = part_of(residual, b * INT_BLOCK, INT_BLOCK)
        _read(pf, pu, W, row, b, blocks, bits, share, mean)
        remember(mean, rb, INT_BLOCK)
        _encode_block(mean, rb, b, blocks, bits, stochastic, qf, qu)
    if end > full:
        rest = n - full * INT_BLOCK
        mb, rb = mean[:rest], part_of(residual, full * INT_BLOCK, rest)
        _read_tail(pf, pu, W, row, full, blocks, bits, share, mb)
        remember(mb, rb, rest)
        _encode_tail(mb, rb, full, blocks, bits, stochastic, qf, qu)


@loop
def int8_encode(x, prologue, residual, pf, pu, begin, end):
    """Encode x + residual as scales and codes; the residual becomes their error."""
    widest()
    _encode(x, prologue, residual, pf, pu, begin, end, 8, False)


@loop
def int4_encode(x, prologue, residual, pf, pu, begin, end):
    """Encode x + residual as scales and codes; the residual becomes their error."""
    widest()
    _encode(x, prologue, residual, pf, pu, begin, end, 4, False)


@loop
def int8_stochastic_encode(x, prologue, residual, pf, pu, begin, end):
    """Encode x + residual as scales and codes; the residual becomes their error."""
    widest()
    _encode(x, prologue, residual, pf, pu, begin, end, 8, True)


@loop
def int4_stochastic_encode(x, prologue, residual, pf, pu, begin, end):
    """Encode x + residual as scales and codes; the residual becomes their error."""
    widest()
    _encode(x, prologue, residual, pf, pu, begin, end, 4, True)


@loop
def int8_mean(pf, pu, W, row, out, begin, end):
    """Write the mean of W payloads to `out`."""
    widest()
    _mean(pf, pu, W, row, out, begin, end, 8)


@loop
def int4_mean(pf, pu, W, row, out, begin, end):
    """Write the mean of W payloads to `out`."""
    widest()
    _mean(pf, pu, W, row, out, begin, end, 4)


@loop
def int8_recode(pf, pu, W, row, residual, qf, qu, n, begin, end):
    """Encode the mean of W payloads (plus residual): the middle of two_shot; the mean itself is never stored."""
    widest()
    _recode(pf, pu, W, row, residual, qf, qu, n, begin, end, 8, False)


@loop
def int4_recode(pf, pu, W, row, residual, qf, qu, n, begin, end):
    """Encode the mean of W payloads (plus residual): the middle of two_shot; the mean itself is never stored."""
    widest()
    _recode(pf, pu, W, row, residual, qf, qu, n, begin, end, 4, False)


@loop
def int8_stochastic_recode(pf, pu, W, row, residual, qf, qu, n, begin, end):
    """Encode the mean of W payloads (plus residual): the middle of two_shot; the mean itself is never stored."""
    widest()
    _recode(pf, pu, W, row, residual, qf, qu, n, begin, end, 8, True)


@loop
def int4_stochastic_recode(pf, pu, W, row, residual, qf, qu, n, begin, end):
    """Encode the mean of W payloads (plus residual): the middle of two_shot; the mean itself is never stored."""
    widest()
    _recode(pf, pu, W, row, residual, qf, qu, n, begin, end, 4, True)


LOOPS = {
    "int8": (int8_encode, int8_mean, int8_recode),
    "int4": (int4_encode, int4_mean, int4_recode),
    "int8(stochastic)": (int8_stochastic_encode, int8_mean, int8_stochastic_recode),
    "int4(stochastic)": (int4_stochastic_encode, int4_mean, int4_stochastic_recode),
}


def encode(codec: Any, x: Tensor, residual: Tensor | None, prologue: Any, payload: Tensor) -> None:
    """`encode` of the table."""
    coded = padded(payload)
    arguments = values(x), steps(prologue), floats(residual), coded.view(np.float32), coded
    in_slices(LOOPS[codec.spec][0], x.numel(), INT_BLOCK, *arguments)


def mean(codec: Any, payloads: Tensor, count: int, out: Tensor) -> None:
    """`mean` of the table."""
    coded, n = payloads.numpy(), out.numel()
    in_slices(LOOPS[codec.spec][1], n, INT_BLOCK, coded.view(np.float32), coded, count, codec.nbytes(n), values(out))


def recode(codec: Any, payloads: Tensor, n: int, count: int, residual: Tensor | None, payload: Tensor) -> None:
    """`recode` of the table."""
    before, after = payloads.numpy(), padded(payload)
    coded = before.view(np.float32), before, count, codec.nbytes(n)
    in_slices(LOOPS[codec.spec][2], n, INT_BLOCK, *coded, floats(residual), after.view(np.float32), after, n)
