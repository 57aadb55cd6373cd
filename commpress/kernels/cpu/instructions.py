"""Pieces of loops in LLVM's own words, for what a loop in Python cannot say, or LLVM would not make of it.

`blocks.py` and the families' loops use them. Arrays are 1-D and contiguous.
"""

import platform
from typing import Any

import llvmlite.binding as llvm  # type: ignore[import-untyped]
from llvmlite import ir
from numba import config, types
from numba.core import cgutils

from commpress.kernels.compiled import instruction

SIGN_BLOCK = 1024
SIGN_LANES = 64

STREAM = 64
"""Values that are written past the caches by one instruction of ours."""
PROCESSOR = config.CPU_NAME or llvm.get_host_cpu_name()
ASKS_AHEAD = not PROCESSOR.startswith("znver")
"""Whether loops ask for a block's memory before they read it. Intel's Emerald Rapids encodes momentum in 0.80 to 0.88 of the
time with it; AMD's Zen 4, whose own prefetchers follow all streams of a block, takes 1.3 to 1.9 times as long."""
FEATURES = llvm.get_host_cpu_features() if config.CPU_NAME is None else {}
"""The processor's instruction sets, as LLVM names them. Empty if NUMBA_CPU_NAME names another one, whose sets are not known."""
WIDE = bool(FEATURES.get("avx512f"))
"""Whether the processor has 32 registers of 16 lanes."""
CONVERTS_HALVES = platform.machine() == "aarch64" or bool(FEATURES.get("f16c"))
"""Whether the processor has an instruction for float16: all of x86 since 2013, and of Arm."""
MULTIPLIES_BFLOATS = bool(FEATURES.get("avx512bf16") or FEATURES.get("amx-bf16"))
"""Whether it has instructions for products of bfloat16: AMD's since Zen 4, Intel's servers since Sapphire Rapids."""


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
def is_aligned(typing: Any, x: Any) -> Any:
    """Whether float32 memory begins at a multiple of 64 bytes."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, word = context.make_array(signature.args[0])(context, builder, arguments[0]), ir.IntType(64)
        return builder.icmp_unsigned("==", builder.and_(builder.ptrtoint(array.data, word), word(63)), word(0))

    return types.boolean(x), build


@instruction
def stream(typing: Any, x: Any, at: Any, block: Any, start: Any) -> Any:
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
def prefetch(typing: Any, x: Any, at: Any) -> Any:
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


@instruction
def narrowed(typing: Any, value: Any) -> Any:
    """The bits of the float16 nearest to a float32, by the processor's own instruction."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        half = builder.fptrunc(arguments[0], ir.HalfType())
        return builder.zext(builder.bitcast(half, ir.IntType(16)), ir.IntType(32))

    return types.uint32(types.float32), build


@instruction
def widened(typing: Any, half: Any) -> Any:
    """The float32 of a float16's bits, by the processor's own instruction."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.trunc(arguments[0], ir.IntType(16))
        return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())

    return types.float32(types.uint32), build


# --- magnitudes of a block, in the order of the format: lane by lane, then halves of the lanes onto halves ----------


Value = Any  # llvmlite has no types
PACKED = SIGN_LANES if WIDE else 16
"""Lanes whose bits are packed at a time: what is kept of them must fit the registers."""


def _floats(lanes: int) -> Any:
    return ir.VectorType(ir.FloatType(), lanes)


def _words(lanes: int) -> Any:
    return ir.VectorType(ir.IntType(32), lanes)


def _all_words(lanes: int, word: int) -> Value:
    """Return the same word in so many lanes."""
    return ir.Constant(_words(lanes), [word] * lanes)


def _magnitudes(context: Any, builder: Any, array_type: Any, array: Value) -> list[Value]:
    """The magnitudes of SIGN_BLOCK values, SIGN_LANES at a time."""
    data = context.make_array(array_type)(context, builder, array).data
    words, mask = _words(SIGN_LANES), _all_words(SIGN_LANES, 0x7FFFFFFF)
    rows = []
    for o in range(0, SIGN_BLOCK, SIGN_LANES):
        place = builder.gep(data, [ir.IntType(64)(o)])
        bits = builder.load(builder.bitcast(place, words.as_pointer()), align=4)
        rows.append(builder.bitcast(builder.and_(bits, mask), _floats(SIGN_LANES)))
    return rows


def _everywhere(builder: Any, value: Value, lanes: int) -> Value:
    """Return one float32 in so many lanes."""
    undefined = ir.Constant(_floats(lanes), ir.Undefined)
    one = builder.insert_element(undefined, value, ir.IntType(32)(0))
    return builder.shuffle_vector(one, undefined, _all_words(lanes, 0))


def _folded(builder: Any, lanes: Value) -> Value:
    """The sum of the lanes, halves onto halves."""
    add = builder.fadd if lanes.type.element == ir.FloatType() else builder.add
    width = lanes.type.count // 2
    while width:
        parts = []
        for first in (0, width):
            places = ir.Constant(ir.VectorType(ir.IntType(32), width), list(range(first, first + width)))
            parts.append(builder.shuffle_vector(lanes, ir.Constant(lanes.type, ir.Undefined), places))
        lanes = add(*parts)
        width //= 2
    return builder.extract_element(lanes, ir.IntType(32)(0))


@instruction
def sum_magnitudes(typing: Any, x: Any) -> Any:
    """The sum of the magnitudes of a full block of SIGN_BLOCK values."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        total, *rows = _magnitudes(context, builder, signature.args[0], arguments[0])
        for row in rows:
            total = builder.fadd(total, row)
        return _folded(builder, total)

    return types.float32(x), build


@instruction
def pack_magnitudes(typing: Any, x: Any, mean: Any, signs: Any, sizes: Any) -> Any:
    """Write the bits of a full block to `signs` and `sizes`: which values are negative, and whose magnitudes exceed `mean`.
    Return the sum of the magnitudes up to it, the sum of those above it, and how many those are.

    All in one sweep, PACKED lanes at a time: what is summed up of them, and their bits, stay in registers.
    """
    returned = types.UniTuple(types.float32, 3)

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data, *planes = (context.make_array(signature.args[i])(context, builder, arguments[i]).data for i in (0, 2, 3))
        lows, highs, above = [], [], ir.Constant(_words(PACKED), [0] * PACKED)
        for first in range(0, SIGN_LANES, PACKED):
            low, high, bits = _packed(builder, data, arguments[1], first)
            lows.append(low)
            highs.append(high)
            for at, plane in ((0, planes[0]), (16, planes[1])):
                for half in (0, 1):
                    byte = builder.lshr(bits, _all_words(PACKED, at + 8 * half))
                    codes = builder.trunc(byte, ir.VectorType(ir.IntType(8), PACKED))
                    place = builder.gep(plane, [ir.IntType(64)(first + half * SIGN_LANES)])
                    builder.store(codes, builder.bitcast(place, codes.type.as_pointer()), align=1)
            above = builder.add(above, _ones(builder, builder.lshr(bits, _all_words(PACKED, 16))))
        count = builder.uitofp(_folded(builder, above), ir.FloatType())
        sums = [_folded(builder, _joined(builder, lanes)) for lanes in (lows, highs)]
        return context.make_tuple(builder, returned, [*sums, count])

    return returned(x, types.float32, signs, sizes), build


def _packed(builder: Any, data: Value, mean: Value, first: int) -> tuple[Value, Value, Value]:
    """Return of the lanes from `first` on the sums of magnitudes up to `mean` and above it, and the bits of their values.

    Of value k of a lane, bit 8 * (k % 2) + k // 2 of the word is its sign, and the one 16 above tells whether it exceeds.
    """
    zero, words = ir.Constant(_floats(PACKED), [0.0] * PACKED), _words(PACKED)
    low, high, bits = zero, zero, ir.Constant(words, [0] * PACKED)
    mean = _everywhere(builder, mean, PACKED)
    for k in range(SIGN_BLOCK // SIGN_LANES):
        place = builder.gep(data, [ir.IntType(64)(k * SIGN_LANES + first)])
        value = builder.load(builder.bitcast(place, words.as_pointer()), align=4)
        size = builder.bitcast(builder.and_(value, _all_words(PACKED, 0x7FFFFFFF)), zero.type)
        above = builder.fcmp_ordered(">", size, mean)
        low = builder.fadd(low, builder.select(above, zero, size), flags=("nsz",))
        high = builder.fadd(high, builder.select(above, size, zero), flags=("nsz",))
        at = 8 * (k % 2) + k // 2
        sign = builder.and_(builder.lshr(value, _all_words(PACKED, 31 - at)), _all_words(PACKED, 1 << at))
        bits = builder.or_(bits, sign)
        bits = builder.select(above, builder.or_(bits, _all_words(PACKED, 1 << 16 + at)), bits)
    return low, high, bits


def _ones(builder: Any, words: Value) -> Value:
    """Return how many bits of each word are 1."""
    kind = ir.FunctionType(words.type, [words.type])
    count = cgutils.get_or_insert_function(builder.module, kind, f"llvm.ctpop.v{words.type.count}i32")
    return builder.call(count, [words])


def _joined(builder: Any, parts: list[Value]) -> Value:
    """Return vectors of equal length behind one another as one."""
    while len(parts) > 1:
        width = 2 * parts[0].type.count
        places = ir.Constant(_words(width), list(range(width)))
        parts = [builder.shuffle_vector(a, b, places) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]
