"""Pieces that several families of loops share, for CPU memory, in Numba: one pass over the gradient, blocks small enough for
the L1 cache.

Arrays are 1-D and contiguous. A payload comes twice, as float32 (`pf`) and as bytes (`pu`) of the same memory;
`W` payloads of one length stand one behind the other (`row` bytes each). `residual` is None without feedback, `prologue` None
where x is coded as it is; else it has the fields of `Prologue`, or those of `Ahead`, which moves its momentum when a value is
read: a loop for it reads each value once. A gradient is float32, or the bits of bfloat16 (uint16); one of
float16 is copied to float32 before. In a payload of `fp16` int16 are the bits of float16. Numba compiles a loop for each of
these types, so none of it is asked for while it runs.
The formulas and layouts stand in `commpress/comm/codecs`; what stands here is how to reach memory speed:

- a full block of ordinary values is read where it lies, twice if need be (the second time it is in the L1 cache), by loops of
  constant length without a branch; the last block and values near Inf or beyond take a slower way to the same bytes;
- magnitudes are compared through their bits, which orders finite < Inf < NaN and vectorises without fastmath;
- rounding is one addition: the low bits of `x * inv + 1.5 * 2**23 + offset` are the code, half to even;
- halves (or eighths) of a block are packed together, not neighbours, so that packing vectorises;
- a block is addressed by slices of fixed start: `range(start, stop, step)` and bare offsets keep LLVM from vectorising;
- integers are cast back after every operation: Numba widens int32 to int64, which halves the width of a vector;
- a long mean is summed up in the L1 cache and written past the caches: it is not read before all of it is there, and a store
  that goes through them reads the memory first.

Numba's cache looks at the time stamp of a loop's own file only. So a file that uses a piece of this one or of `instructions.py`
holds the hash of both, and a loop uses no piece of any other file.
"""

from typing import Any

import numpy as np
from numba import types

from commpress.kernels.compiled import by_type, loop, part
from commpress.kernels.cpu.instructions import (
    ASKS_AHEAD,
    CONVERTS_HALVES,
    STREAM,
    is_aligned,
    narrowed,
    prefetch,
    stream,
    widened,
)

MAGNITUDE = np.int32(0x7FFFFFFF)
INFINITY_BITS = np.int32(0x7F800000)
NAN = np.float32(np.nan)
LARGEST = np.finfo(np.float32).max

LONG = 2**19
"""From how many values on a mean is: 2 MB, more than most cores have in their own caches."""
PIECE = 256
"""Values that are asked for at once: more lines of memory than a core can wait for make it stand still."""
AHEAD = 512
"""How far ahead of the block that is coded. Intel's processors look no further than some lines behind the last one that was
read, and read nothing while a block is coded."""

PAGE = 4096
"""Bytes after which addresses have the same low bits, by which a core first tells loads from stores."""

ONES = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)
PLACES = np.array(
    [sum(p << 8 * i for i, p in enumerate(p for p in range(8) if byte >> p & 1)) for byte in range(256)], np.uint64
)
"""Byte i of entry `byte`: where the i-th one of its bits stands."""


# --- memory -------------------------------------------------------------------------------------------------------


def _is_ahead(prologue: Any) -> bool:
    """Whether a prologue of this type is an `Ahead`: (momentum, fresh)."""
    return isinstance(prologue, types.BaseTuple) and len(prologue) == 2


@by_type
def fetch(x: Any, o: Any, size: Any) -> Any:
    """Have x[o : o + size] brought to the caches, of a gradient, a residual or a prologue's tensors, where that helps."""
    if not ASKS_AHEAD or isinstance(x, types.NoneType):
        return lambda x, o, size: None
    if isinstance(x, types.Array):
        step = 64 // (x.dtype.bitwidth // 8)

        def fetched(x, o, size):
            for k in range(size // step):
                prefetch(x, o + k * step)

        return fetched

    if _is_ahead(x):
        return lambda x, o, size: fetch(x[0], o, size)

    def both(x, o, size):
        fetch(x[0], o, size)
        fetch(x[1], o, size)

    return both


@part
def scratch_beside(x, size):
    """Return float32 memory for `size` values at a multiple of 64 bytes, a quarter of a page from the place of x in its own.

    A load waits for an earlier store to an address of the same low twelve bits, and one that is part of two lines of the cache
    counts twice. With blocks of a page all of them meet, or none: `int2` with feedback takes 1.5 or 1.8 copies.
    """
    memory = np.empty(size + PAGE // 4, np.float32)
    start = x.ctypes.data // 64 * 64 + PAGE // 4
    first = (start - memory.ctypes.data) % PAGE // 4
    return memory[first : first + size]


# --- 16-bit floats, as uint32, in whose vectors the loops compute -------------------------------------------------


@part
def to_bfloat16(value):
    """The bits of the bfloat16 nearest to a float32, half to even."""
    bits = np.float32(value).view(np.uint32)
    odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
    half = np.uint32(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
    return half if value == value else np.uint32(0x7FC0)


@part
def from_bfloat16(half):
    """The float32 of a bfloat16's bits."""
    return np.uint32(half << np.uint32(16)).view(np.float32)


@part
def to_float16(value):
    """The bits of the float16 nearest to a float32, half to even."""
    half = narrowed(np.float32(value)) if CONVERTS_HALVES else _rounded_to_float16(value)
    return half if value == value else np.uint32(0x7E00)


@part
def from_float16(half):
    """The float32 of a float16's bits."""
    return widened(np.uint32(half)) if CONVERTS_HALVES else _spread_float16(half)


@part
def _rounded_to_float16(value):
    """Round a float32 to float16 by its bits, but for NaN.

    Below 2**-14, where float16 is denormal, the addition of 0.5 rounds, since one unit of its last place is then float16's
    smallest denormal, 2**-24.
    """
    bits = np.float32(value).view(np.uint32)
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    odd = np.uint32((magnitude >> np.uint32(13)) & np.uint32(1))
    rebased = np.uint32(magnitude - np.uint32(112 << 23) + np.uint32(0xFFF) + odd)
    normal = min(np.uint32(rebased >> np.uint32(13)), np.uint32(0x7C00))
    tiny = np.uint32(np.float32(np.abs(value) + np.float32(0.5)).view(np.uint32) - np.uint32(0x3F000000))
    half = tiny if magnitude < np.uint32(0x38800000) else normal
    sign = np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000))
    return np.uint32(half | sign)


@part
def _spread_float16(half):
    """Return the float32 of a float16's bits, by bits: a denormal is its integer times 2**-24; Inf and NaN need the exponent
    255."""
    magnitude = np.uint32(half & np.uint32(0x7FFF))
    shifted = np.uint32(np.uint32(magnitude << np.uint32(13)) + np.uint32(112 << 23))
    special = np.uint32(shifted + np.uint32(112 << 23))
    tiny = np.float32(np.float32(np.int32(magnitude)) * np.float32(2.0**-24)).view(np.uint32)
    bits = special if magnitude >= np.uint32(0x7C00) else (tiny if magnitude < np.uint32(0x400) else shifted)
    sign = np.uint32(np.uint32(half & np.uint32(0x8000)) << np.uint32(16))
    return np.uint32(bits | sign).view(np.float32)


@by_type
def real(value: Any) -> Any:
    """The float32 of an element of a gradient, or of a payload of `bf16` or `fp16`."""
    if value == types.float32:
        return lambda value: value
    if value == types.uint16:
        return lambda value: from_bfloat16(np.uint32(value))
    return lambda value: from_float16(np.uint32(value))


@by_type
def put(x: Any, i: Any, value: Any) -> Any:
    """x[i] := a float32, rounded to the nearest that x can hold."""
    if x.dtype == types.float32:

        def store(x, i, value):
            x[i] = value

    elif x.dtype == types.uint16:

        def store(x, i, value):
            x[i] = np.uint16(to_bfloat16(value))

    else:

        def store(x, i, value):
            x[i] = np.int16(to_float16(value))

    return store


# --- blocks -------------------------------------------------------------------------------------------------------


@part
def _is_streamed(out, o):
    """Whether the block at `o` is written past the caches."""
    return out.size >= LONG and o % 16 == 0 and is_aligned(out)


@by_type
def put_block(out: Any, o: Any, block: Any, size: Any) -> Any:
    """out[o : o + size] := the first `size` values of `block`, float32. Call `settle_streams` behind the last one."""
    if out.dtype == types.float32:

        def stored(out, o, block, size):
            done = size // STREAM if _is_streamed(out, o) else 0
            for k in range(done):
                stream(out, o + k * STREAM, block, k * STREAM)
            rest, ob = block[done * STREAM : size], out[o + done * STREAM : o + size]
            for j in range(ob.size):  # from 0 on: with another start they would be gathered one by one
                ob[j] = rest[j]

        return stored

    def rounded(out, o, block, size):
        ob = out[o : o + size]
        for j in range(size):
            put(ob, j, block[j])

    return rounded


@part
def prologue_value(x, inverse, average, limit, fresh, kept):
    """Return what a prologue makes of one value."""
    scaled = x * inverse
    return fresh * min(max(scaled, -limit), limit) + kept * average + (scaled - scaled)  # which is 0, or NaN


@part
def block_of(x, prologue, residual, o, size, scratch):
    """Return the `size` values from `o` on as they are coded, in float32: where they lie, or in `scratch`."""
    done = size // PIECE * PIECE
    for start in range(o, o + done, PIECE):
        fetch(x, start + AHEAD, PIECE)
        fetch(prologue, start + AHEAD, PIECE)
        fetch(residual, start + AHEAD, PIECE)
        _gather(x, prologue, residual, start, PIECE, scratch[start - o : start - o + PIECE])
    _gather(x, prologue, residual, o + done, size - done, scratch[done:size])
    return _either(x[o : o + size], prologue, residual, scratch)


@part
def _gather(x, prologue, residual, o, size, scratch):
    """Write the `size` values from `o` on as they are coded to `scratch`, unless they are coded where they lie."""
    if not _lies_there(x, prologue, residual):
        xb, pb, rb = x[o : o + size], part_of(prologue, o, size), part_of(residual, o, size)
        for j in range(size):
            scratch[j] = total(xb, pb, rb, j)


def _is_plain(x: Any, prologue: Any, residual: Any) -> bool:
    """Whether values of these types are coded as they lie there."""
    return x.dtype == types.float32 and isinstance(prologue, types.NoneType) and isinstance(residual, types.NoneType)


@by_type
def _lies_there(x: Any, prologue: Any, residual: Any) -> Any:
    plain = _is_plain(x, prologue, residual)
    return lambda x, prologue, residual: plain


@by_type
def _either(xb: Any, prologue: Any, residual: Any, scratch: Any) -> Any:
    if _is_plain(xb, prologue, residual):
        return lambda xb, prologue, residual, scratch: xb
    return lambda xb, prologue, residual, scratch: scratch[: xb.size]


@by_type
def part_of(whole: Any, o: Any, size: Any) -> Any:
    """The block of at most `size` values that starts at `o`, of a residual or of a prologue's tensors; None of None."""
    if isinstance(whole, types.NoneType):
        return lambda whole, o, size: None
    if isinstance(whole, types.Array):
        return lambda whole, o, size: whole[o : o + size]

    if _is_ahead(whole):
        return lambda whole, o, size: (whole[0][o : o + size], whole[1])

    def cut(whole, o, size):
        inverse, average, limit, fresh, kept = whole
        return inverse[o : o + size], average[o : o + size], limit, fresh, kept

    return cut


@by_type
def remember(block: Any, residual: Any, size: Any) -> Any:
    """block += residual, if there is one: `size` values."""
    if isinstance(residual, types.NoneType):
        return lambda block, residual, size: None

    def added(block, residual, size):
        for j in range(size):
            block[j] += residual[j]

    return added


@part
def total(x, prologue, residual, i):
    """Return one value as it is coded: behind its prologue, with what is remembered of it."""
    value = value_of(x, prologue, i)
    return value if residual is None else np.float32(value + residual[i])


@by_type
def value_of(x: Any, prologue: Any, i: Any) -> Any:
    """One value of a gradient, behind its prologue."""
    if isinstance(prologue, types.NoneType):
        return lambda x, prologue, i: real(x[i])
    if _is_ahead(prologue):

        def moved(x, prologue, i):
            momentum, fresh = prologue
            move = fresh * (real(x[i]) - momentum[i])
            momentum[i] += move
            return move

        return moved

    def made(x, prologue, i):
        inverse, average, limit, fresh, kept = prologue
        return prologue_value(real(x[i]), inverse[i], average[i], limit, fresh, kept)

    return made


@part
def top_of(x, size):
    """The bits of the largest magnitude among `size` values."""
    top = np.int32(0)
    for j in range(size):
        top = max(top, np.int32(np.float32(x[j]).view(np.int32) & MAGNITUDE))
    return top


@loop
def run_prologue(x, prologue):
    """x := what `prologue` makes of it."""
    for i in range(x.size):
        put(x, i, value_of(x, prologue, i))


@part
def sign_bit(value, p):
    """Return the sign of a float32, as bit p of a byte."""
    return np.uint32(np.uint32(np.float32(value).view(np.uint32) >> np.uint32(31 - p)) & np.uint32(1 << p))


@part
def pack_tail_signs(x, codes):
    """Bit p of byte j: the sign of value p * ceil(m / 8) + j of the m values x."""
    width = (x.size + 7) // 8
    codes[:width] = 0
    for i in range(x.size):
        codes[i % width] |= np.uint8((np.float32(x[i]).view(np.int32) < 0) << (i // width))


@part
def pad(x, a):
    """a := x, and zeros behind it."""
    for j in range(x.size):
        a[j] = x[j]
    a[x.size :] = np.float32(0)
