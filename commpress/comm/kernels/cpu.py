"""The codecs' loops for CPU memory, in Numba: one pass over the gradient, blocks small enough for the L1 cache.

Arrays are 1-D and contiguous. A payload comes twice, as float32 (`pf`) and as bytes (`pu`) of the same memory;
`W` payloads of one length stand one behind the other (`row` bytes each). An empty `residual` means no feedback.
The formulas and layouts stand in `commpress/comm/codecs`; what stands here is how to reach memory speed:

- magnitudes are compared through their bits, which orders finite < Inf < NaN and vectorises without fastmath;
- rounding is one addition: the low bits of `x * inv + 1.5 * 2**23 + offset` are the code, half to even;
- halves (or eighths) of a block are packed together, not neighbours, so that packing vectorises;
- a block is addressed by slices of fixed start: `range(start, stop, step)` and bare offsets keep LLVM from vectorising.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import njit

INT_BLOCK = 256
SIGN_BLOCK = 1024
SIGN_LANES = 64

MAGNITUDE = np.int32(0x7FFFFFFF)
INFINITY_BITS = np.int32(0x7F800000)
NAN_BITS = np.int32(0x7FC00000)
FLUSH = np.float32(2.0**-100)
ROUND = np.float32(1.5 * 2**23)
BINS = 2048

F = TypeVar("F", bound=Callable[..., Any])


def loop(function: F) -> F:
    """Compile on first call, GIL released; cached on disk where a cache can be written, else compiled anew."""
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # Numba found no folder that it may write
        return njit(nogil=True, error_model="numpy")(function)  # type: ignore[no-any-return]


# --- int8 and int4 -----------------------------------------------------------------------------------------------


@loop
def _int_write(a, t, b, blocks, bits, residual, pf, pu):  # type: ignore[no-untyped-def]
    """Encode the block `b` that stands in `a` (m values), leave what was lost in `residual` (m values or none)."""
    m = a.size
    ai, ti = a.view(np.int32), t.view(np.int32)
    top = np.int32(0)
    for j in range(m):
        top = max(top, ai[j] & MAGNITUDE)
    levels = np.float32(127) if bits == 8 else np.float32(7)
    offset = np.int32(128) if bits == 8 else np.int32(8)
    ti[0] = top
    peak = t[0]
    if top >= INFINITY_BITS:  # the block decodes to NaN; its residual stays as it was
        ti[0] = NAN_BITS
        pf[b] = t[0]
    elif peak < FLUSH:
        pf[b] = np.float32(0)
    else:
        pf[b] = peak / levels
    magic = ROUND + np.float32(offset)
    if top >= INFINITY_BITS or peak < FLUSH:
        for j in range(m):
            t[j] = magic
        if top < INFINITY_BITS:
            for j in range(residual.size):
                residual[j] = a[j]
    else:
        inv = levels / peak
        scale = pf[b]
        for j in range(m):
            t[j] = a[j] * inv + magic
        for j in range(residual.size):
            residual[j] = a[j] - (t[j] - magic) * scale
    start = 4 * blocks
    if bits == 8:
        codes = pu[start + b * INT_BLOCK : start + b * INT_BLOCK + m]
        for j in range(m):
            codes[j] = np.uint8(ti[j] & np.int32(255))
    else:
        half = (m + 1) // 2
        if m % 2:
            t[m] = magic
        codes = pu[start + b * (INT_BLOCK // 2) : start + b * (INT_BLOCK // 2) + half]
        high = ti[half : 2 * half]
        for j in range(half):
            codes[j] = np.uint8((ti[j] & np.int32(15)) | ((high[j] & np.int32(15)) << np.int32(4)))


@loop
def _int_read(scale, share, codes, bits, add, out):  # type: ignore[no-untyped-def]
    """Decode one block into `out` (m values) or add it there, times `share`. One loop a half, or LLVM gives up."""
    m = out.size
    if bits == 8:
        if add:
            for j in range(m):
                out[j] += np.float32(np.int32(codes[j]) - np.int32(128)) * scale * share
        else:
            for j in range(m):
                out[j] = np.float32(np.int32(codes[j]) - np.int32(128)) * scale * share
    else:
        half = (m + 1) // 2
        upper = out[half:]
        if add:
            for j in range(half):
                out[j] += np.float32(np.int32(codes[j] & np.uint8(15)) - np.int32(8)) * scale * share
            for j in range(m - half):
                upper[j] += np.float32(np.int32(codes[j] >> np.uint8(4)) - np.int32(8)) * scale * share
        else:
            for j in range(half):
                out[j] = np.float32(np.int32(codes[j] & np.uint8(15)) - np.int32(8)) * scale * share
            for j in range(m - half):
                upper[j] = np.float32(np.int32(codes[j] >> np.uint8(4)) - np.int32(8)) * scale * share


@loop
def int_encode(x, residual, pf, pu, bits):  # type: ignore[no-untyped-def]
    """Codes and scales of `x + residual`; the residual becomes what they miss."""
    n = x.size
    blocks = (n + INT_BLOCK - 1) // INT_BLOCK
    a = np.empty(INT_BLOCK, np.float32)
    t = np.empty(INT_BLOCK, np.float32)
    for b in range(blocks):
        o = b * INT_BLOCK
        m = min(INT_BLOCK, n - o)
        xb, ab = x[o : o + m], a[:m]
        if residual.size:
            rb = residual[o : o + m]
            for j in range(m):
                ab[j] = xb[j] + rb[j]
            _int_write(ab, t, b, blocks, bits, rb, pf, pu)
        else:
            for j in range(m):
                ab[j] = xb[j]
            _int_write(ab, t, b, blocks, bits, residual, pf, pu)


@loop
def int_mean(pf, pu, W, row, bits, out):  # type: ignore[no-untyped-def]
    """The mean of W payloads."""
    n = out.size
    blocks = (n + INT_BLOCK - 1) // INT_BLOCK
    share = np.float32(1.0 / W)
    for b in range(blocks):
        o = b * INT_BLOCK
        m = min(INT_BLOCK, n - o)
        ob = out[o : o + m]
        for w in range(W):
            at = w * row + 4 * blocks + b * (INT_BLOCK * bits // 8)
            _int_read(pf[w * (row // 4) + b], share, pu[at : at + INT_BLOCK], bits, w > 0, ob)


@loop
def int_recode(pf, pu, W, row, bits, residual, qf, qu, n):  # type: ignore[no-untyped-def]
    """Encode the mean of W payloads (plus residual): the middle of two_shot; the mean itself is never stored."""
    blocks = (n + INT_BLOCK - 1) // INT_BLOCK
    share = np.float32(1.0 / W)
    a = np.empty(INT_BLOCK, np.float32)
    t = np.empty(INT_BLOCK, np.float32)
    for b in range(blocks):
        o = b * INT_BLOCK
        m = min(INT_BLOCK, n - o)
        ab = a[:m]
        for w in range(W):
            at = w * row + 4 * blocks + b * (INT_BLOCK * bits // 8)
            _int_read(pf[w * (row // 4) + b], share, pu[at : at + INT_BLOCK], bits, w > 0, ab)
        if residual.size:
            rb = residual[o : o + m]
            for j in range(m):
                ab[j] += rb[j]
            _int_write(ab, t, b, blocks, bits, rb, qf, qu)
        else:
            _int_write(ab, t, b, blocks, bits, residual, qf, qu)


# --- sign --------------------------------------------------------------------------------------------------------


@loop
def _sign_write(a, acc, m, b, blocks, residual, pf, pu):  # type: ignore[no-untyped-def]
    """Encode the block `b` in `a` (SIGN_BLOCK values, zeros behind the m real ones)."""
    ai = a.view(np.int32)
    for lane in range(SIGN_LANES):
        acc[lane] = np.abs(a[lane])
    for k in range(1, SIGN_BLOCK // SIGN_LANES):
        row = a[k * SIGN_LANES : (k + 1) * SIGN_LANES]
        for lane in range(SIGN_LANES):
            acc[lane] += np.abs(row[lane])
    width = SIGN_LANES // 2
    while width > 0:
        for lane in range(width):
            acc[lane] += acc[lane + width]
        width //= 2
    scale = acc[0] * (np.float32(1) / np.float32(m))
    if np.isfinite(scale):
        pf[b] = scale
        for j in range(residual.size):
            residual[j] = a[j] - np.copysign(scale, a[j])
    else:  # the block decodes to NaN; its residual stays as it was
        acc.view(np.int32)[0] = NAN_BITS
        pf[b] = acc[0]
    width = (m + 7) // 8
    start = 4 * blocks + b * (SIGN_BLOCK // 8)
    codes = pu[start : start + width]
    if m == SIGN_BLOCK:
        for j in range(SIGN_BLOCK // 8):
            byte = np.uint32(0)
            for p in range(8):
                byte |= (np.uint32(ai[p * (SIGN_BLOCK // 8) + j]) >> np.uint32(31 - p)) & np.uint32(1 << p)
            codes[j] = np.uint8(byte)
    else:
        for j in range(width):
            byte = np.uint32(0)
            for p in range(8):
                if p * width + j < m:
                    byte |= (np.uint32(ai[p * width + j]) >> np.uint32(31 - p)) & np.uint32(1 << p)
            codes[j] = np.uint8(byte)


@loop
def _sign_read(scale, codes, add, out):  # type: ignore[no-untyped-def]
    """Decode one block into `out` (m values), or add it there."""
    m = out.size
    width = (m + 7) // 8
    one = np.empty(1, np.float32)
    one[0] = scale
    bits = one.view(np.int32)[0]
    oi = out.view(np.int32)
    for p in range(8):
        if p * width < m:
            plane = out[p * width : min((p + 1) * width, m)]
            raw = oi[p * width : min((p + 1) * width, m)]
            if add:
                for j in range(plane.size):
                    negative = np.int32((codes[j] >> np.uint8(p)) & np.uint8(1))
                    plane[j] += scale * np.float32(np.int32(1) - (negative + negative))
            else:
                for j in range(raw.size):
                    raw[j] = bits | (np.int32((codes[j] >> np.uint8(p)) & np.uint8(1)) << np.int32(31))


@loop
def sign_encode(x, residual, pf, pu):  # type: ignore[no-untyped-def]
    """Signs and magnitudes of `x + residual`; the residual becomes what they miss."""
    n = x.size
    blocks = (n + SIGN_BLOCK - 1) // SIGN_BLOCK
    a = np.empty(SIGN_BLOCK, np.float32)
    acc = np.empty(SIGN_LANES, np.float32)
    for b in range(blocks):
        o = b * SIGN_BLOCK
        m = min(SIGN_BLOCK, n - o)
        if m < SIGN_BLOCK:
            a[:] = np.float32(0)
        xb = x[o : o + m]
        if residual.size:
            rb = residual[o : o + m]
            for j in range(m):
                a[j] = xb[j] + rb[j]
            _sign_write(a, acc, m, b, blocks, rb, pf, pu)
        else:
            for j in range(m):
                a[j] = xb[j]
            _sign_write(a, acc, m, b, blocks, residual, pf, pu)


@loop
def sign_mean(pf, pu, W, row, out):  # type: ignore[no-untyped-def]
    """The mean of W payloads."""
    n = out.size
    blocks = (n + SIGN_BLOCK - 1) // SIGN_BLOCK
    share = np.float32(1.0 / W)
    for b in range(blocks):
        o = b * SIGN_BLOCK
        m = min(SIGN_BLOCK, n - o)
        ob = out[o : o + m]
        for w in range(W):
            at = w * row + 4 * blocks + b * (SIGN_BLOCK // 8)
            _sign_read(pf[w * (row // 4) + b] * share, pu[at : at + SIGN_BLOCK // 8], w > 0, ob)


@loop
def sign_recode(pf, pu, W, row, residual, qf, qu, n):  # type: ignore[no-untyped-def]
    """Encode the mean of W payloads (plus residual): the middle of two_shot."""
    blocks = (n + SIGN_BLOCK - 1) // SIGN_BLOCK
    share = np.float32(1.0 / W)
    a = np.empty(SIGN_BLOCK, np.float32)
    acc = np.empty(SIGN_LANES, np.float32)
    for b in range(blocks):
        o = b * SIGN_BLOCK
        m = min(SIGN_BLOCK, n - o)
        if m < SIGN_BLOCK:
            a[:] = np.float32(0)
        for w in range(W):
            at = w * row + 4 * blocks + b * (SIGN_BLOCK // 8)
            _sign_read(pf[w * (row // 4) + b] * share, pu[at : at + SIGN_BLOCK // 8], w > 0, a[:m])
        if residual.size:
            rb = residual[o : o + m]
            for j in range(m):
                a[j] += rb[j]
            _sign_write(a, acc, m, b, blocks, rb, qf, qu)
        else:
            _sign_write(a, acc, m, b, blocks, residual, qf, qu)


# --- top-k -------------------------------------------------------------------------------------------------------


@loop
def kth_largest(bits, k):  # type: ignore[no-untyped-def]
    """The k-th largest of non-negative int32 (1 <= k <= size): histograms of 11, 11 and 9 bits."""
    low, width = np.int64(0), np.int64(31)
    rank = np.int64(k)
    counts = np.zeros(BINS, np.int64)
    while width > 0:
        step = min(np.int64(11), width)
        width -= step
        counts[:] = 0
        bins = np.int64(1) << step
        for i in range(bits.size):
            bin_ = (np.int64(bits[i]) - low) >> width
            if bin_ >= 0 and bin_ < bins:
                counts[bin_] += 1
        b = bins - 1
        while counts[b] < rank:
            rank -= counts[b]
            b -= 1
        low += b << width
    return np.int32(low)


@loop
def _sampled_threshold(x, residual, ratio):  # type: ignore[no-untyped-def]
    """Magnitude bits that a little more than `ratio` of the values reach, from one value in each of `m` strata.

    The place within a stratum is hashed, since a fixed stride can follow the columns of a matrix. Returns the
    threshold and how many values are expected to reach it."""
    n = x.size
    m = min(n, max(4096, min(32768, n // 64)))
    sample = np.empty(m, np.int32)
    one = np.empty(1, np.float32)
    raw = one.view(np.int32)
    for s in range(m):
        lo = s * n // m
        hi = (s + 1) * n // m
        i = lo + (np.int64(s) * 2654435761 % 4294967296) % (hi - lo)
        one[0] = x[i] + residual[i] if residual.size else x[i]
        sample[s] = raw[0] & MAGNITUDE
    want = m * ratio
    rank = min(m, np.int64(want + 4.0 * np.sqrt(want)) + 2)
    return max(kth_largest(sample, rank), np.int32(1)), np.int64(rank) * n // m


@loop
def _collect(x, residual, threshold, index, value, room):  # type: ignore[no-untyped-def]
    """One pass: residual := x + residual, and where its magnitude reaches `threshold`, position and value.

    Counts all, stores the first `room`. Returns the count and the old residual where a value is NaN or Inf
    (an array as long as x; empty where there was none)."""
    n = x.size
    blocks = (n + 255) // 256
    feedback = residual.size > 0
    mark = np.zeros(256, np.uint8)
    words = mark.view(np.uint64)
    old = np.empty(256, np.float32)
    local = np.empty(256, np.float32)
    spared = np.empty(0, np.float32)
    last = np.int64(room)
    c = np.int64(0)
    for b in range(blocks):
        o = b * 256
        m = min(256, n - o)
        xb = x[o : o + m]
        if feedback:
            a = residual[o : o + m]
            for j in range(m):
                old[j] = a[j]
            for j in range(m):
                a[j] = xb[j] + a[j]
        else:
            a = local[:m]
            for j in range(m):
                a[j] = xb[j]
        ai = a.view(np.int32)
        if m < 256:
            mark[:] = 0
        for j in range(m):
            mark[j] = np.uint8((ai[j] & MAGNITUDE) >= threshold)
        for w in range((m + 7) // 8):
            if words[w]:
                for j in range(8 * w, min(8 * w + 8, m)):
                    at = min(c, last)
                    index[at] = o + j
                    value[at] = a[j]
                    c += np.int64(mark[j])
                    if feedback and (ai[j] & MAGNITUDE) >= INFINITY_BITS:
                        if spared.size == 0:
                            spared = np.zeros(n, np.float32)
                        spared[o + j] = old[j]
    return c, spared


@loop
def _keep(bits, threshold, above, k, kept):  # type: ignore[no-untyped-def]
    """Mark in `kept` all bits above the threshold and, of those equal to it, an evenly spread choice of k - above."""
    ties = np.int64(0)
    for i in range(bits.size):
        ties += np.int64(bits[i] == threshold)
    need = k - above
    t = np.int64(0)
    c = 0
    for i in range(bits.size):
        if bits[i] > threshold:
            kept[c] = i
            c += 1
        elif bits[i] == threshold:
            if (t + 1) * need // ties > t * need // ties:
                kept[c] = i
                c += 1
            t += 1


@loop
def topk_select(x, residual, k, index, value):  # type: ignore[no-untyped-def]
    """Positions (ascending) and values of the k largest magnitudes of `x + residual`; the residual becomes that sum,
    but keeps its old value where the sum is NaN or Inf.

    A sampled threshold lets a few more than k through in one pass, and the k largest of those are the k largest of all.
    Where the sample was wrong (too few or far too many came through) the threshold is found over everything."""
    n = x.size
    threshold, expected = _sampled_threshold(x, residual, k / n)
    room = min(n, expected + expected // 2 + 1024)
    ci = np.empty(room + 1, np.int64)
    cv = np.empty(room + 1, np.float32)
    c, spared = _collect(x, residual, threshold, ci, cv, room)
    if c < k or c > room:
        whole = residual if residual.size else x
        bits = np.empty(n, np.int32)
        raw = whole.view(np.int32)
        for i in range(n):
            bits[i] = raw[i] & MAGNITUDE
        exact = kth_largest(bits, k)
        above = np.int64(0)
        for i in range(n):
            above += np.int64(bits[i] > exact)
        _keep(bits, exact, above, k, index)
        for i in range(k):
            value[i] = whole[index[i]]
    else:
        bits = np.empty(c, np.int32)
        raw = cv.view(np.int32)
        for i in range(c):
            bits[i] = raw[i] & MAGNITUDE
        exact = kth_largest(bits, k)
        above = np.int64(0)
        for i in range(c):
            above += np.int64(bits[i] > exact)
        _keep(bits, exact, above, k, index)
        for i in range(k):
            value[i] = cv[index[i]]
            index[i] = ci[index[i]]
    if spared.size:
        raw = residual.view(np.int32)
        for i in range(n):
            if (raw[i] & MAGNITUDE) >= INFINITY_BITS:
                residual[i] = spared[i]


@loop
def topk_settle(x, residual, index, value, decoded):  # type: ignore[no-untyped-def]
    """The residual of the kept entries once their values are coded: value - decoded; what it was where that is NaN."""
    for i in range(index.size):
        lost = value[i] - decoded[i]
        if np.isfinite(lost):
            residual[index[i]] = lost
        elif np.isfinite(value[i]):
            residual[index[i]] = value[i] - x[index[i]]


@loop
def ef_encode(index, low_bits, low, high):  # type: ignore[no-untyped-def]
    """Elias-Fano of ascending positions: `low_bits` of each packed in `low`, the rest unary in `high` (both zeroed)."""
    mask = (np.int64(1) << low_bits) - 1
    store, filled, at = np.uint64(0), np.int64(0), np.int64(0)
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
        high[bit >> 3] |= np.uint8(1 << (bit & 7))
    if filled:
        low[at] = np.uint8(store & np.uint64(255))


@loop
def ef_decode(low_bits, low, high, index):  # type: ignore[no-untyped-def]
    """Positions back from Elias-Fano; reads as many as `index` holds."""
    k = index.size
    i = np.int64(0)
    for byte in range(high.size):
        v = high[byte]
        if v:
            for bit in range(8):
                if i < k:
                    index[i] = (byte * 8 + bit - i) << low_bits
                    i += np.int64((v >> np.uint8(bit)) & np.uint8(1))
    if low_bits:
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
def scatter_add(index, value, share, out):  # type: ignore[no-untyped-def]
    """out[index] += value * share; a position beyond `out` is passed over."""
    n = out.size
    for i in range(index.size):
        if index[i] < n:
            out[index[i]] += value[i] * share
