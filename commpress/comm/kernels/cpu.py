"""The codecs' loops for CPU memory, in Numba: one pass over the gradient, blocks small enough for the L1 cache.

Arrays are 1-D and contiguous. A payload comes twice, as float32 (`pf`) and as bytes (`pu`) of the same memory;
`W` payloads of one length stand one behind the other (`row` bytes each). An empty `residual` means no feedback, a `source` of
empty arrays that x is coded as it is (else what `Blend` makes of it).
The formulas and layouts stand in `commpress/comm/codecs`; what stands here is how to reach memory speed:

- magnitudes are compared through their bits, which orders finite < Inf < NaN and vectorises without fastmath;
- rounding is one addition: the low bits of `x * inv + 1.5 * 2**23 + offset` are the code, half to even;
- halves (or eighths) of a block are packed together, not neighbours, so that packing vectorises;
- a block is addressed by slices of fixed start: `range(start, stop, step)` and bare offsets keep LLVM from vectorising;
- a full block has loops of its own, of constant length: with a length known at run time alone they cost half as much again;
- all loops of the codecs stand in this one file, because Numba's cache looks at the time stamp of a loop's own file only;
- integers are cast back after every operation: Numba widens int32 to int64, which halves the width of a vector.
"""

import numpy as np

from commpress.kernels.compiled import loop, part

INT_BLOCK = 256
SIGN_BLOCK = 1024
SIGN_LANES = 64

MAGNITUDE = np.int32(0x7FFFFFFF)
INFINITY_BITS = np.int32(0x7F800000)
NAN = np.float32(np.nan)
LARGEST = np.finfo(np.float32).max
FLUSH = np.float32(2.0**-100)
ROUND = np.float32(1.5 * 2**23)
KEEP_BLOCK = 256
BINS = 2048

GATHER = np.uint64(0x0102040810204080)
"""Times eight bytes that are 0 or 1, this moves them to the eight bits of the highest byte."""
ONES = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)
PLACES = np.array(
    [sum(p << 8 * i for i, p in enumerate(p for p in range(8) if byte >> p & 1)) for byte in range(256)], np.uint64
)
"""Byte i of entry `byte`: where the i-th one of its bits stands."""


# --- blocks ------------------------------------------------------------------------------------------------------


@part
def _load(x, residual, a, block):
    """a := x (+ residual), a full block or the last one, behind which `a` is filled with zeros. Returns the largest
    magnitude's bits."""
    top = np.int32(0)
    if x.size < block:
        for j in range(x.size):
            a[j] = x[j] + residual[j] if residual.size else x[j]
            top = max(top, np.int32(np.float32(a[j]).view(np.int32) & MAGNITUDE))
        a[x.size :] = np.float32(0)
    elif residual.size:
        for j in range(block):
            a[j] = x[j] + residual[j]
            top = max(top, np.int32(np.float32(a[j]).view(np.int32) & MAGNITUDE))
    else:
        for j in range(block):
            a[j] = x[j]
            top = max(top, np.int32(np.float32(a[j]).view(np.int32) & MAGNITUDE))
    return top


@part
def _blended(x, inverse, average, limit, fresh, kept):
    """What a source makes of one value."""
    scaled = x * inverse
    return fresh * min(max(scaled, -limit), limit) + kept * average + (scaled - scaled)  # which is 0, or NaN


@part
def _block(x, source, o, size, scratch):
    """The block of at most `size` values that starts at `o`: of x, or in `scratch` what `source` makes of it."""
    inverse, average, limit, fresh, kept = source
    xb = x[o : o + size]
    if inverse.size:
        ib, vb = inverse[o : o + size], average[o : o + size]
        if xb.size == size:
            for j in range(size):
                scratch[j] = _blended(xb[j], ib[j], vb[j], limit, fresh, kept)
        else:
            for j in range(xb.size):
                scratch[j] = _blended(xb[j], ib[j], vb[j], limit, fresh, kept)
        xb = scratch[: xb.size]
    return xb


@loop
def blend(x, source):
    """x := what `source` makes of it."""
    inverse, average, limit, fresh, kept = source
    for i in range(inverse.size):
        x[i] = _blended(x[i], inverse[i], average[i], limit, fresh, kept)


# --- bf16 and fp16 -----------------------------------------------------------------------------------------------


@part
def _to_bfloat16(value):
    """The bits of the bfloat16 nearest to a float32, half to even (as uint32, in whose vectors the loops compute)."""
    bits = np.float32(value).view(np.uint32)
    odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
    half = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
    return half if value == value else np.uint32(0x7FC0)


@part
def _from_bfloat16(half):
    """The float32 of a bfloat16's bits."""
    return np.uint32(half << np.uint32(16)).view(np.float32)


@part
def _to_float16(value):
    """The bits of the float16 nearest to a float32, half to even: below 2**-14, where float16 is denormal, the addition
    of 0.5 rounds, since one unit of its last place is then float16's smallest denormal, 2**-24."""
    bits = np.float32(value).view(np.uint32)
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    odd = np.uint32((magnitude >> np.uint32(13)) & np.uint32(1))
    rebased = np.uint32(magnitude - np.uint32(112 << 23) + np.uint32(0xFFF) + odd)
    normal = min(np.uint32(rebased >> np.uint32(13)), np.uint32(0x7C00))
    tiny = np.uint32(np.float32(np.abs(value) + np.float32(0.5)).view(np.uint32) - np.uint32(0x3F000000))
    half = tiny if magnitude < np.uint32(0x38800000) else normal
    sign = np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000))
    return np.uint32(half | sign) if value == value else np.uint32(0x7E00)


@part
def _from_float16(half):
    """The float32 of a float16's bits: a denormal is its integer times 2**-24; Inf and NaN need the exponent 255."""
    magnitude = np.uint32(half & np.uint32(0x7FFF))
    shifted = np.uint32(np.uint32(magnitude << np.uint32(13)) + np.uint32(112 << 23))
    special = np.uint32(shifted + np.uint32(112 << 23))
    tiny = np.float32(np.float32(np.int32(magnitude)) * np.float32(2.0**-24)).view(np.uint32)
    bits = special if magnitude >= np.uint32(0x7C00) else (tiny if magnitude < np.uint32(0x400) else shifted)
    sign = np.uint32(np.uint32(half & np.uint32(0x8000)) << np.uint32(16))
    return np.uint32(bits | sign).view(np.float32)


@part
def _cast_encode(x, residual, halves, to_half, from_half):
    if residual.size:
        for i in range(x.size):
            total = x[i] + residual[i]
            half = to_half(total)
            halves[i] = np.uint16(half)
            lost = total - from_half(half)
            residual[i] = lost if np.abs(lost) <= LARGEST else residual[i]  # not NaN, not Inf
    else:
        for i in range(x.size):
            halves[i] = np.uint16(to_half(x[i]))


@part
def _cast_mean(halves, W, row, out, from_half):
    n = out.size
    share = np.float32(1.0 / W)
    for o in range(0, n, 1024):  # a block at a time: its sum stays in the L1 cache
        ob = out[o : min(o + 1024, n)]
        for w in range(W):
            hb = halves[w * row + o : w * row + o + ob.size]
            if w:
                for j in range(ob.size):
                    ob[j] += from_half(np.uint32(hb[j])) * share
            else:
                for j in range(ob.size):
                    ob[j] = from_half(np.uint32(hb[j])) * share


@loop
def bfloat16_encode(x, residual, halves):
    """The bfloat16 of `x + residual`; the residual becomes what they miss."""
    _cast_encode(x, residual, halves, _to_bfloat16, _from_bfloat16)


@loop
def float16_encode(x, residual, halves):
    """The float16 of `x + residual`; the residual becomes what they miss."""
    _cast_encode(x, residual, halves, _to_float16, _from_float16)


@loop
def bfloat16_mean(halves, W, row, out):
    """The mean of W payloads of `row` 16-bit words each."""
    _cast_mean(halves, W, row, out, _from_bfloat16)


@loop
def float16_mean(halves, W, row, out):
    """The mean of W payloads of `row` 16-bit words each."""
    _cast_mean(halves, W, row, out, _from_float16)


# --- int8 and int4 -----------------------------------------------------------------------------------------------


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
def int_encode(x, source, residual, pf, pu, bits):
    """Codes and scales of x + residual; the residual becomes what they miss."""
    n = x.size
    blocks = (n + INT_BLOCK - 1) // INT_BLOCK
    a = np.empty(INT_BLOCK, np.float32)
    t = np.empty(INT_BLOCK, np.float32)
    scratch = np.empty(INT_BLOCK, np.float32)
    for b in range(blocks):
        o = b * INT_BLOCK
        xb, rb = _block(x, source, o, INT_BLOCK, scratch), residual[o : o + INT_BLOCK]  # rb is empty without feedback
        top = _load(xb, rb, a, INT_BLOCK)
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
        top = _load(mean[:m], rb, a, INT_BLOCK)
        _int_write(a, top, t, m, b, blocks, bits, rb, qf, qu)


# --- sign --------------------------------------------------------------------------------------------------------


@part
def _sign_pack(ai, m, codes):
    """Bit p of byte j: the sign of value p * ceil(m / 8) + j."""
    if m == SIGN_BLOCK:
        codes = codes[: SIGN_BLOCK // 8]
        for j in range(SIGN_BLOCK // 8):
            byte = np.uint32(0)
            for p in range(8):
                byte |= (np.uint32(ai[p * (SIGN_BLOCK // 8) + j]) >> np.uint32(31 - p)) & np.uint32(1 << p)
            codes[j] = np.uint8(byte)
    else:
        width = (m + 7) // 8
        codes[:width] = 0
        for i in range(m):
            codes[i % width] |= np.uint8((ai[i] < 0) << (i // width))


@part
def _fold(acc):
    """The sum of the lanes, halves onto halves."""
    width = SIGN_LANES // 2
    while width > 0:
        for lane in range(width):
            acc[lane] += acc[lane + width]
        width //= 2
    return acc[0]


@part
def _sign_write(a, acc, m, b, blocks, residual, pf, pu):
    """Encode the block `b` in `a` (SIGN_BLOCK values, zeros behind the m real ones), leave in `residual` what was lost."""
    for lane in range(SIGN_LANES):
        acc[lane] = np.abs(a[lane])
    for k in range(1, SIGN_BLOCK // SIGN_LANES):
        row = a[k * SIGN_LANES : (k + 1) * SIGN_LANES]
        for lane in range(SIGN_LANES):
            acc[lane] += np.abs(row[lane])
    scale = _fold(acc) * (np.float32(1) / np.float32(m))
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
    _sign_pack(a.view(np.int32), m, pu[start : start + SIGN_BLOCK // 8])


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
def sign_encode(x, source, residual, pf, pu):
    """Signs and magnitudes of x + residual; the residual becomes what they miss."""
    n = x.size
    blocks = (n + SIGN_BLOCK - 1) // SIGN_BLOCK
    a = np.empty(SIGN_BLOCK, np.float32)
    acc = np.empty(SIGN_LANES, np.float32)
    scratch = np.empty(SIGN_BLOCK, np.float32)
    for b in range(blocks):
        o = b * SIGN_BLOCK
        xb, rb = _block(x, source, o, SIGN_BLOCK, scratch), residual[o : o + SIGN_BLOCK]
        _load(xb, rb, a, SIGN_BLOCK)
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
        _load(mean[:m], rb, a, SIGN_BLOCK)
        _sign_write(a, acc, m, b, blocks, rb, qf, qu)


# --- int2: sign and one of two sizes -----------------------------------------------------------------------------


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
    mean = _fold(low) * (np.float32(1) / np.float32(m))
    low[:], high[:], count[:] = np.float32(0), np.float32(0), np.float32(0)
    for k in range(SIGN_BLOCK // SIGN_LANES):
        row = a[k * SIGN_LANES : (k + 1) * SIGN_LANES]
        for lane in range(SIGN_LANES):
            size = np.abs(row[lane])
            low[lane] += np.float32(0) if size > mean else size
            high[lane] += size if size > mean else np.float32(0)
            count[lane] += np.float32(1) if size > mean else np.float32(0)
    above = _fold(count)
    below = np.float32(m) - above
    least = _fold(low) * (np.float32(1) / below) if below > 0 else np.float32(0)
    most = _fold(high) * (np.float32(1) / above) if above > 0 else np.float32(0)
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
    _sign_pack(a.view(np.int32), m, pu[start : start + width])
    _sign_pack(t.view(np.int32), m, pu[start + plane : start + plane + width])


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
def int2_encode(x, source, residual, pf, pu):
    """Signs and sizes of x + residual; the residual becomes what they miss."""
    blocks, plane = (x.size + SIGN_BLOCK - 1) // SIGN_BLOCK, _plane(x.size)
    a, t = np.empty(SIGN_BLOCK, np.float32), np.empty(SIGN_BLOCK, np.float32)
    lanes = np.empty((3, SIGN_LANES), np.float32)
    scratch = np.empty(SIGN_BLOCK, np.float32)
    for b in range(blocks):
        o = b * SIGN_BLOCK
        xb, rb = _block(x, source, o, SIGN_BLOCK, scratch), residual[o : o + SIGN_BLOCK]
        _load(xb, rb, a, SIGN_BLOCK)
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
        _load(mean[:m], rb, a, SIGN_BLOCK)
        _int2_write(a, t, lanes, m, b, blocks, plane, rb, qf, qu)


# --- survivors of masks -------------------------------------------------------------------------------------------


@loop
def pack(x, places, out):
    """out[i] <- x[places[i]], 0 where the place is negative; integers of any width, the bits of the values."""
    for i in range(places.size):
        p = places[i]
        out[i] = x[p] if p >= 0 else 0


@loop
def unpack(packed, places, out):
    """out <- 0, out[places[i]] <- packed[i] where the place is not negative."""
    out[:] = 0
    for i in range(places.size):
        p = places[i]
        if p >= 0:
            out[p] = packed[i]


# --- top-k -------------------------------------------------------------------------------------------------------


@loop
def kth_largest(raw, k, low=0):
    """The k-th largest magnitude of the float32 bits `raw`, as bits; at least k of them must reach `low`.

    A histogram of BINS bins between `low` and the largest finds the bin that holds it, the next one splits that bin."""
    base, span, rank = np.int64(low), np.int64(0), np.int64(k)
    top = np.int32(0)
    for i in range(raw.size):
        top = max(top, np.int32(raw[i] & MAGNITUDE))
    span = np.int64(top) - base
    counts = np.empty(BINS, np.int64)
    while True:
        shift = np.int64(0)
        while span >> shift >= BINS:
            shift += 1
        counts[:] = 0
        for i in range(raw.size):
            above = np.int64(raw[i] & MAGNITUDE) - base
            if above >= 0:
                counts[np.uint64(above) >> np.uint64(shift)] += 1
        b = BINS - 1
        while counts[b] < rank:
            rank -= counts[b]
            b -= 1
        if shift == 0:
            return np.int32(base + b)
        inside = np.empty(counts[b], np.int32)
        c = 0
        for i in range(raw.size):
            if (np.int64(raw[i] & MAGNITUDE) - base) >> shift == b:
                inside[c] = raw[i]
                c += 1
        raw = inside
        base += b << shift
        span = (np.int64(1) << shift) - 1


@loop
def _sampled_threshold(x, source, residual, ratio):
    """Magnitude bits that a little more than `ratio` of the values reach, and every Inf and NaN, from one value in each of
    `m` strata.

    The place within a stratum is hashed, since a fixed stride can follow the columns of a matrix. Returns the
    threshold and more values than can be expected to reach it."""
    inverse, average, limit, fresh, kept = source
    n = x.size
    m = min(n, max(4096, min(16384, n // 64)))
    width, rest = n // m, n % m
    sample = np.empty(m, np.float32)
    start, carry = np.int64(0), np.int64(0)
    for s in range(m):
        carry += rest
        size = width + np.int64(carry >= m)
        carry -= m * np.int64(carry >= m)
        hashed = np.uint64(s) * np.uint64(0x9E3779B97F4A7C15)
        hashed = np.uint64((hashed ^ (hashed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)) >> np.uint64(40)
        i = start + (np.int64(hashed) * size >> 24)
        value = _blended(x[i], inverse[i], average[i], limit, fresh, kept) if inverse.size else x[i]
        sample[s] = value + residual[i] if residual.size else value
        start += size
    want = m * ratio
    rank = min(m, np.int64(want + 4.0 * np.sqrt(want)) + 2)
    threshold = min(max(kth_largest(sample.view(np.int32), rank, np.int32(0)), np.int32(1)), INFINITY_BITS)
    return threshold, np.int64((1.5 * rank + 6.0 * np.sqrt(rank) + 6.0) * (n / m)) + 1


@loop
def _spare(a, old, o, spared):
    """Note in `spared` the old residual of the values of the block `a` at `o` that are NaN or Inf."""
    for j in range(old.size):
        if not np.isfinite(a[j]):
            spared[o + j] = old[j]


@part
def _positions(a, threshold, mark, dense, o, index, at):
    """Write to `index[at:]` where the magnitudes of the block `a` (KEEP_BLOCK values from `o` on) reach `threshold`.

    Eight comparisons make a byte, and a table says where its ones stand; eight entries are written, the first of them
    count. No branch depends on the values, unless few are kept: then most bytes are 0 and passed over."""
    ai = a.view(np.int32)
    words = mark.view(np.uint64)
    for j in range(KEEP_BLOCK):
        mark[j] = np.uint8((ai[j] & MAGNITUDE) >= threshold)
    for w in range(KEEP_BLOCK // 8):
        if dense or words[w]:
            byte = np.uint64(words[w] * GATHER) >> np.uint64(56)
            ones = PLACES[byte]
            first = o + 8 * w
            eight = index[at : at + 8]
            for i in range(8):
                eight[i] = first + np.int64((ones >> np.uint64(8 * i)) & np.uint64(255))
            at += np.int64(ONES[byte])
    return at


@loop
def _collect(x, source, residual, threshold, room):
    """One pass: residual := x + residual, and where its magnitude reaches `threshold`, position and value.

    Counts all, stores the first `room` (at least). Returns positions, values, the count, and the old residual where
    the sum is NaN or Inf (an array as long as x; empty where there was none)."""
    n = x.size
    feedback = residual.size > 0
    mark = np.empty(KEEP_BLOCK, np.uint8)
    total, scratch = np.zeros(KEEP_BLOCK, np.float32), np.empty(KEEP_BLOCK, np.float32)
    index = np.empty(room + KEEP_BLOCK + 8, np.int64)
    value = np.empty(room + KEEP_BLOCK, np.float32)
    spared = np.empty(0, np.float32)
    dense = room > n // 32
    count, at = np.int64(0), np.int64(0)
    for b in range((n + KEEP_BLOCK - 1) // KEEP_BLOCK):
        o = b * KEEP_BLOCK
        xb, rb = _block(x, source, o, KEEP_BLOCK, scratch), residual[o : o + KEEP_BLOCK]
        a = xb
        top = np.int32(0)
        if feedback or xb.size < KEEP_BLOCK:
            top = _load(xb, rb, total, KEEP_BLOCK)
            a = total
        end = _positions(a, threshold, mark, dense, o, index, at)
        for i in range(at, end):
            value[i] = a[index[i] - o]
        count += end - at
        at = min(end, room)
        if feedback:
            if top >= INFINITY_BITS:
                if spared.size == 0:
                    spared = np.zeros(n, np.float32)
                _spare(a, rb, o, spared)
            if rb.size == KEEP_BLOCK:
                for j in range(KEEP_BLOCK):
                    rb[j] = a[j]
            else:
                for j in range(rb.size):
                    rb[j] = a[j]
    return index, value, count, spared


@loop
def _keep(raw, threshold, above, k, kept):
    """Note in `kept` where the k largest magnitudes of `raw` stand: the `above` ones that exceed the threshold and, of
    those equal to it, an evenly spread choice. No branch depends on the values: each place is written, and written over
    by the next one if it is not kept."""
    ties = np.int64(0)
    for i in range(raw.size):
        ties += np.int64((raw[i] & MAGNITUDE) == threshold)
    need = k - above
    c, share = np.int64(0), np.int64(0)
    for i in range(raw.size):
        magnitude = np.int32(raw[i] & MAGNITUDE)
        share += need * np.int64(magnitude == threshold)  # tie t is kept where (t + 1) * need / ties passes an integer
        take = share >= ties
        share -= ties * np.int64(take)
        kept[c] = i
        c += np.int64(take or magnitude > threshold)
        if c == k:
            break


@loop
def _largest(raw, threshold, k):
    """Where the k largest magnitudes of `raw` stand, of which the smallest is `threshold`."""
    above = np.int64(0)
    for i in range(raw.size):
        above += np.int64((raw[i] & MAGNITUDE) > threshold)
    kept = np.empty(k, np.int64)
    _keep(raw, threshold, above, k, kept)
    return kept


@part
def _not_finite(raw):
    """How many of the float32 bits `raw` are NaN or Inf."""
    count = np.int64(0)
    for i in range(raw.size):
        count += np.int64((raw[i] & MAGNITUDE) >= INFINITY_BITS)
    return count


@loop
def topk_select(x, source, residual, k):
    """Positions (ascending) and values of the k largest magnitudes of `x + residual`; the residual becomes that sum,
    but keeps its old value where the sum is NaN or Inf. If more than k of them are NaN or Inf there are no positions, and
    the residual is what it was, to the rounding of the sum.

    A sampled threshold lets a few more than k through in one pass, and the k largest of those are the k largest of all.
    Where the sample was wrong (too few or far too many came through) the threshold is found over everything."""
    n = x.size
    threshold, room = _sampled_threshold(x, source, residual, k / n)
    room = min(n, room)
    index, value, count, spared = _collect(x, source, residual, threshold, room)
    if k <= count <= room:
        raw = value[:count].view(np.int32)
        exact = kth_largest(raw, k, threshold)
        overflows = exact >= INFINITY_BITS and _not_finite(raw) > k
        if not overflows:
            kept = _largest(raw, exact, k)
            for i in range(k):
                value[i] = value[kept[i]]
                index[i] = index[kept[i]]
    else:
        if residual.size == 0:
            blend(x, source)
        whole = residual if residual.size else x
        raw = whole.view(np.int32)
        if count > room:
            exact = kth_largest(raw, k, threshold)
        elif threshold > 1:
            exact = kth_largest(raw, k, np.int32(0))
        else:  # all that is not 0 came through, and is fewer than k
            exact = np.int32(0)
        overflows = exact >= INFINITY_BITS and _not_finite(raw) > k
        if not overflows:
            index = _largest(raw, exact, k)
            value = np.empty(k, np.float32)
            for i in range(k):
                value[i] = whole[index[i]]
    if overflows:
        inverse, average, limit, fresh, kept_share = source
        for i in range(residual.size):
            own = _blended(x[i], inverse[i], average[i], limit, fresh, kept_share) if inverse.size else x[i]
            residual[i] -= own
        k = 0
    for i in range(spared.size):
        if not np.isfinite(residual[i]):
            residual[i] = spared[i]
    return index[:k], value[:k]


@loop
def topk_settle(x, source, residual, index, value, decoded):
    """The residual of the kept entries once their values are coded: value - decoded; what it was where that is NaN."""
    inverse, average, limit, fresh, kept = source
    for i in range(index.size):
        lost, at = value[i] - decoded[i], index[i]
        if np.isfinite(lost):
            residual[at] = lost
        elif np.isfinite(value[i]):
            own = _blended(x[at], inverse[at], average[at], limit, fresh, kept) if inverse.size else x[at]
            residual[at] = value[i] - own


@loop
def ef_encode(index, low_bits, low, high):
    """Elias-Fano of ascending positions: `low_bits` of each packed in `low`, the rest unary in `high` (both zeroed).
    A byte is gathered in a register: in memory, each of its bits would wait for the one before."""
    mask = (np.int64(1) << low_bits) - 1
    store, filled, at = np.uint64(0), np.int64(0), np.int64(0)
    unary, byte = np.int64(0), np.int64(0)
    for i in range(index.size):
        p = index[i]
        if low_bits:
            store |= np.uint64(p & mask) << np.uint64(filled)
            filled += low_bits
            while filled >= 8:
                low[at] = np.uint8(store & np.uint64(255))
                store >>= np.uint64(8)
                filled -= 8
                at += 1
        bit = (p >> low_bits) + i
        if bit >> 3 != byte:
            high[byte] = np.uint8(unary)
            unary, byte = np.int64(0), bit >> 3
        unary |= np.int64(1) << (bit & 7)
    high[byte] = np.uint8(unary)
    if filled:
        low[at] = np.uint8(store & np.uint64(255))


@loop
def ef_decode(low_bits, low, high, index):
    """Positions back from Elias-Fano; returns how many there are, fills `index` and no more."""
    k = index.size
    i = np.int64(0)
    for byte in range(high.size):
        v = high[byte]
        if i + 8 <= k:  # eight are written, those of the bits that are set count
            first, ones = 8 * byte - i, PLACES[v]
            eight = index[i : i + 8]
            for j in range(8):
                eight[j] = (first - j + np.int64((ones >> np.uint64(8 * j)) & np.uint64(255))) << low_bits
            i += np.int64(ONES[v])
        elif v:
            for bit in range(8):
                if i < k:
                    index[i] = (byte * 8 + bit - i) << low_bits
                    i += np.int64((v >> np.uint8(bit)) & np.uint8(1))
    mask = np.uint64((np.int64(1) << low_bits) - 1)
    store, filled, at = np.uint64(0), np.int64(0), np.int64(0)
    for j in range(k):
        while filled < low_bits:
            store |= np.uint64(low[at]) << np.uint64(filled)
            filled += 8
            at += 1
        index[j] += np.int64(store & mask)
        store >>= np.uint64(low_bits)
        filled -= low_bits
    return i


@loop
def scatter_add(index, value, share, out):
    """out[index] += value * share; a position beyond `out` is passed over."""
    n = out.size
    for i in range(index.size):
        if index[i] < n:
            out[index[i]] += value[i] * share
