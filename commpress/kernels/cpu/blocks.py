"""Pieces that several families of loops share, for CPU memory, in Numba: one pass over the gradient, blocks small enough for
the L1 cache.

Arrays are 1-D and contiguous. A payload comes twice, as float32 (`pf`) and as bytes (`pu`) of the same memory;
`W` payloads of one length stand one behind the other (`row` bytes each). An empty `residual` means no feedback, a `prologue`
of empty arrays that x is coded as it is (else what `Prologue` makes of it).
The formulas and layouts stand in `commpress/comm/codecs`; what stands here is how to reach memory speed:

- magnitudes are compared through their bits, which orders finite < Inf < NaN and vectorises without fastmath;
- rounding is one addition: the low bits of `x * inv + 1.5 * 2**23 + offset` are the code, half to even;
- halves (or eighths) of a block are packed together, not neighbours, so that packing vectorises;
- a block is addressed by slices of fixed start: `range(start, stop, step)` and bare offsets keep LLVM from vectorising;
- a full block has loops of its own, of constant length: with a length known at run time alone they cost half as much again;
- integers are cast back after every operation: Numba widens int32 to int64, which halves the width of a vector.

Numba's cache looks at the time stamp of a loop's own file only. So a file that uses a piece of this one holds its hash, and a
loop uses no piece of any other file.
"""

import numpy as np

from commpress.kernels.compiled import loop, part

SIGN_BLOCK = 1024
SIGN_LANES = 64

MAGNITUDE = np.int32(0x7FFFFFFF)
INFINITY_BITS = np.int32(0x7F800000)
NAN = np.float32(np.nan)
LARGEST = np.finfo(np.float32).max

ONES = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)
PLACES = np.array(
    [sum(p << 8 * i for i, p in enumerate(p for p in range(8) if byte >> p & 1)) for byte in range(256)], np.uint64
)
"""Byte i of entry `byte`: where the i-th one of its bits stands."""


@part
def load(x, residual, a, block):
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
def prologue_value(x, inverse, average, limit, fresh, kept):
    """What a prologue makes of one value."""
    scaled = x * inverse
    return fresh * min(max(scaled, -limit), limit) + kept * average + (scaled - scaled)  # which is 0, or NaN


@part
def block_of(x, prologue, o, size, scratch):
    """The block of at most `size` values that starts at `o`: of x, or in `scratch` what `prologue` makes of it."""
    inverse, average, limit, fresh, kept = prologue
    xb = x[o : o + size]
    if inverse.size:
        ib, vb = inverse[o : o + size], average[o : o + size]
        if xb.size == size:
            for j in range(size):
                scratch[j] = prologue_value(xb[j], ib[j], vb[j], limit, fresh, kept)
        else:
            for j in range(xb.size):
                scratch[j] = prologue_value(xb[j], ib[j], vb[j], limit, fresh, kept)
        xb = scratch[: xb.size]
    return xb


@loop
def run_prologue(x, prologue):
    """x := what `prologue` makes of it."""
    inverse, average, limit, fresh, kept = prologue
    for i in range(inverse.size):
        x[i] = prologue_value(x[i], inverse[i], average[i], limit, fresh, kept)


@part
def pack_signs(ai, m, codes):
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
def fold(acc):
    """The sum of the lanes, halves onto halves."""
    width = SIGN_LANES // 2
    while width > 0:
        for lane in range(width):
            acc[lane] += acc[lane + width]
        width //= 2
    return acc[0]
