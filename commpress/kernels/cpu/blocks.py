"""Pieces that several families of loops share, for CPU memory, in Numba: one pass over the gradient, blocks small enough for
the L1 cache.

Arrays are 1-D and contiguous. A payload comes twice, as float32 (`pf`) and as bytes (`pu`) of the same memory;
`W` payloads of one length stand one behind the other (`row` bytes each). `residual` is None without feedback, `prologue` None
where x is coded as it is; else it has the fields of `Prologue`. A gradient is float32, or the bits of bfloat16 (uint16) or of
float16 (int16). Numba compiles a loop for each of these types, so none of it is asked for while it runs.
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

Numba's cache looks at the time stamp of a loop's own file only. So a file that uses a piece of this one holds its hash, and a
loop uses no piece of any other file.
"""

import platform
from typing import Any

import llvmlite.binding as llvm  # type: ignore[import-untyped]
import numpy as np
from llvmlite import ir
from numba import config, types
from numba.core import cgutils

from commpress.kernels.compiled import by_type, instruction, loop, part

SIGN_BLOCK = 1024
SIGN_LANES = 64

MAGNITUDE = np.int32(0x7FFFFFFF)
INFINITY_BITS = np.int32(0x7F800000)
NAN = np.float32(np.nan)
LARGEST = np.finfo(np.float32).max

STREAM = 64
"""Values that are written past the caches by one instruction of ours."""
LONG = 2**19
"""From how many values on a mean is: 2 MB, more than most cores have in their own caches."""
PIECE = 256
"""Values that are asked for at once: more lines of memory than a core can wait for make it stand still."""
AHEAD = 512
"""How far ahead of the block that is coded: the processor itself looks no further than some lines behind the last one that
was read, and reads nothing while a block is coded."""
CONVERTS_HALVES = platform.machine() == "aarch64" or (
    config.CPU_NAME is None and bool(llvm.get_host_cpu_features().get("f16c"))
)
"""Whether the processor has an instruction for float16: all of x86 since 2013, and of Arm."""

ONES = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)
PLACES = np.array(
    [sum(p << 8 * i for i, p in enumerate(p for p in range(8) if byte >> p & 1)) for byte in range(256)], np.uint64
)
"""Byte i of entry `byte`: where the i-th one of its bits stands."""


# --- bits ---------------------------------------------------------------------------------------------------------


@instruction
def reach_mask(typing: Any, a: Any, start: Any, threshold: Any) -> Any:
    """Bit j: whether the magnitude of a[start + j] (float32, 64 of them) has bits of at least `threshold`.

    In LLVM's own words, since a loop cannot say it: a comparison of vectors is a mask in one instruction.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        vector, word = ir.VectorType(ir.IntType(32), 64), ir.IntType(64)
        place = builder.gep(array.data, [arguments[1]])
        bits = builder.load(builder.bitcast(place, vector.as_pointer()), align=4)
        magnitudes = builder.and_(bits, ir.Constant(vector, [0x7FFFFFFF] * 64))
        least = builder.insert_element(ir.Constant(vector, ir.Undefined), arguments[2], ir.IntType(32)(0))
        every = ir.Constant(vector, [0] * 64)
        least = builder.shuffle_vector(least, ir.Constant(vector, ir.Undefined), every)
        return builder.bitcast(builder.icmp_signed(">=", magnitudes, least), word)

    return types.uint64(a, types.int64, types.int32), build


@instruction
def popcount(typing: Any, mask: Any) -> Any:
    """How many bits of a uint64 are 1."""
    return types.uint64(types.uint64), lambda context, builder, signature, arguments: builder.ctpop(arguments[0])


@instruction
def trailing_zeros(typing: Any, mask: Any) -> Any:
    """The place of the lowest bit that is 1, an int64; 64 if there is none."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.IntType(1)(0))

    return types.int64(types.uint64), build


@instruction
def put_word(typing: Any, x: Any, at: Any, word: Any) -> Any:
    """x[at : at + 8] := the bytes of a uint64, the lowest first; x is uint8 and has room for them."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        place = builder.bitcast(builder.gep(array.data, [arguments[1]]), ir.IntType(64).as_pointer())
        builder.store(arguments[2], place, align=1)
        return context.get_dummy_value()

    return types.void(x, types.int64, types.uint64), build


@instruction
def _is_aligned(typing: Any, x: Any) -> Any:
    """Whether float32 memory begins at a multiple of 64 bytes."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, word = context.make_array(signature.args[0])(context, builder, arguments[0]), ir.IntType(64)
        return builder.icmp_unsigned("==", builder.and_(builder.ptrtoint(array.data, word), word(63)), word(0))

    return types.boolean(x), build


@instruction
def _stream(typing: Any, x: Any, at: Any, block: Any, start: Any) -> Any:
    """x[at : at + 64] := block[start : start + 64], past the caches; float32, and x[at] at a multiple of 64 bytes."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, source = (context.make_array(signature.args[i])(context, builder, arguments[i]).data for i in (0, 2))
        vector = ir.VectorType(ir.FloatType(), STREAM).as_pointer()
        values = builder.load(builder.bitcast(builder.gep(source, [arguments[3]]), vector), align=4)
        stored = builder.store(values, builder.bitcast(builder.gep(target, [arguments[1]]), vector), align=64)
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()

    return types.void(x, types.int64, block, types.int64), build


@instruction
def settle_streams(typing: Any) -> Any:
    """Have what was written past the caches be seen by other threads before anything that this one writes later."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), build


@instruction
def widest(typing: Any) -> Any:
    """Have the function that calls this one made of the widest vectors of the processor; call it in a loop, not in a part.

    LLVM takes half of AVX-512's by itself, lest the clock slow down, as it did on the first processors that had them.
    """

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')  # their own `add` knows no such words
        return context.get_dummy_value()

    return types.void(), build


@instruction
def _prefetch(typing: Any, x: Any, at: Any) -> Any:
    """Have x[at] brought to the caches; what lies beyond x is not looked at."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, flag = context.make_array(signature.args[0])(context, builder, arguments[0]), ir.IntType(32)
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, flag, flag, flag])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        place = builder.bitcast(builder.gep(array.data, [arguments[1]]), pointer)
        builder.call(fetch, [place, flag(0), flag(3), flag(1)])
        return context.get_dummy_value()

    return types.void(x, types.int64), build


@by_type
def fetch(x: Any, o: Any, size: Any) -> Any:
    """Have x[o : o + size] brought to the caches, of a gradient, a residual or a prologue's tensors."""
    if isinstance(x, types.NoneType):
        return lambda x, o, size: None
    if isinstance(x, types.Array):
        step = 64 // (x.dtype.bitwidth // 8)

        def fetched(x, o, size):
            for k in range(size // step):
                _prefetch(x, o + k * step)

        return fetched

    def both(x, o, size):
        fetch(x[0], o, size)
        fetch(x[1], o, size)

    return both


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


@instruction
def _narrowed(typing: Any, value: Any) -> Any:
    """The bits of the float16 nearest to a float32, by the processor's own instruction."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        half = builder.fptrunc(arguments[0], ir.HalfType())
        return builder.zext(builder.bitcast(half, ir.IntType(16)), ir.IntType(32))

    return types.uint32(types.float32), build


@instruction
def _widened(typing: Any, half: Any) -> Any:
    """The float32 of a float16's bits, by the processor's own instruction."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.trunc(arguments[0], ir.IntType(16))
        return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())

    return types.float32(types.uint32), build


@part
def to_float16(value):
    """The bits of the float16 nearest to a float32, half to even."""
    half = _narrowed(np.float32(value)) if CONVERTS_HALVES else _rounded_to_float16(value)
    return half if value == value else np.uint32(0x7E00)


@part
def from_float16(half):
    """The float32 of a float16's bits."""
    return _widened(np.uint32(half)) if CONVERTS_HALVES else _spread_float16(half)


@part
def _rounded_to_float16(value):
    """Do that by bits, but for NaN: below 2**-14, where float16 is denormal, the addition of 0.5 rounds, since one unit of
    its last place is then float16's smallest denormal, 2**-24."""
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
    """The float32 of an element of a gradient."""
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
    return out.size >= LONG and o % 16 == 0 and _is_aligned(out)


@by_type
def put_block(out: Any, o: Any, block: Any, size: Any) -> Any:
    """out[o : o + size] := the first `size` values of `block`, float32. Call `settle_streams` behind the last one."""
    if out.dtype == types.float32:

        def stored(out, o, block, size):
            done = size // STREAM if _is_streamed(out, o) else 0
            for k in range(done):
                _stream(out, o + k * STREAM, block, k * STREAM)
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


@part
def value_of(x, prologue, i):
    """One value of a gradient, behind its prologue."""
    if prologue is None:
        return real(x[i])
    inverse, average, limit, fresh, kept = prologue
    return prologue_value(real(x[i]), inverse[i], average[i], limit, fresh, kept)


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
def sum_magnitudes(x, lanes):
    """Return the sum of the magnitudes of a full block of SIGN_BLOCK values, in the order of the format: lane by lane."""
    for lane in range(SIGN_LANES):
        lanes[lane] = np.abs(x[lane])
    for k in range(1, SIGN_BLOCK // SIGN_LANES):
        row = x[k * SIGN_LANES : (k + 1) * SIGN_LANES]
        for lane in range(SIGN_LANES):
            lanes[lane] += np.abs(row[lane])
    return fold(lanes)


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


@part
def fold(acc):
    """The sum of the lanes, halves onto halves."""
    width = SIGN_LANES // 2
    while width > 0:
        for lane in range(width):
            acc[lane] += acc[lane + width]
        width //= 2
    return acc[0]
