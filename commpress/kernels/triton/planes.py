"""Pieces of the kernels of `sign` and `int2`: sums over a block in the order of the format, and planes of bits.

A program that encodes has ROWS blocks of 1024 values and looks at 64 of each at a time. What it needs more than once it reads
again: it is in the cache by then, where 1024 values a block would not fit into the registers. `i` is the place of a value
within its block, `size` how many values blocks have, which matters only where they may be shorter than 1024 (WHOLE is False).
Planes of bits begin at multiples of WORDS bytes, 4 or 1, and are read by so many at once.
"""

import triton
import triton.language as tl

BLOCK: tl.constexpr = tl.constexpr(1024)
LANES: tl.constexpr = tl.constexpr(64)
STEPS: tl.constexpr = tl.constexpr(16)
WIDTH: tl.constexpr = tl.constexpr(128)


@triton.jit
def lanes(k):
    """The places within a block of the k-th 64 values."""
    return k * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def sizes(b, n):
    """How many of n values lie in each of blocks `b`."""
    return tl.minimum(tl.maximum(n - b * BLOCK, 0), BLOCK).to(tl.int32)


@triton.jit
def folded(acc, ROWS: tl.constexpr):
    """The sums of 64 lanes, halves onto halves: [ROWS, 64] -> [ROWS, 1]."""
    acc = tl.sum(tl.reshape(acc, [ROWS, 2, 32]), axis=1)
    acc = tl.sum(tl.reshape(acc, [ROWS, 2, 16]), axis=1)
    acc = tl.sum(tl.reshape(acc, [ROWS, 2, 8]), axis=1)
    acc = tl.sum(tl.reshape(acc, [ROWS, 2, 4]), axis=1)
    acc = tl.sum(tl.reshape(acc, [ROWS, 2, 2]), axis=1)
    return tl.sum(acc, axis=1, keep_dims=True)


@triton.jit
def bit(plane, b, i, size, WHOLE: tl.constexpr, WORDS: tl.constexpr):
    """The bits (0 or 1) of values `i` of blocks `b` in a plane."""
    if WHOLE:
        place = tl.multiple_of(plane + b * WIDTH + i % WIDTH, [1, WORDS])
        return (tl.load(place).to(tl.int32) >> (i // WIDTH)) & 1
    else:
        width = tl.maximum((size + 7) // 8, 1)
        packed = tl.load(plane + b * WIDTH + i % width, i < size, other=0).to(tl.int32)
        return (packed >> tl.minimum(i // width, 7)) & 1  # i may lie behind the block


@triton.jit
def bits_of_blocks(plane, b, p, j, size, WHOLE: tl.constexpr, WORDS: tl.constexpr):
    """All bits (0 or 1) of blocks `b` in a plane, [ROWS, 8, 128]: bit p of byte j."""
    place = tl.multiple_of(plane + b * WIDTH + j, [1, 1, WORDS])
    if WHOLE:
        return (tl.load(place).to(tl.int32) >> p) & 1
    else:
        return (tl.load(place, j < (size + 7) // 8, other=0).to(tl.int32) >> p) & 1


@triton.jit
def spread(b, j, p, size, WHOLE: tl.constexpr):
    """The place within its block of the value whose bit p stands in byte j."""
    return p * WIDTH + j if WHOLE else p * ((size + 7) // 8) + j
