"""Pieces that several families of Triton kernels share: reading the values to code, and writing the residual.

A program of a kernel has some whole blocks of a codec. `x` is float32, bfloat16 or float16, read where it lies and computed in
float32; `residual` is None without feedback, `prologue` None where x is coded as it is, else a tuple of the fields of
`Prologue`. A payload comes twice, as float32 (`pf`) and as bytes (`pu`) of the same memory. Triton compiles a kernel for each
of these types, so none of it is asked for while it runs.

What makes the bytes those of the definition on every GPU:

- no multiplication is fused with an addition (`launch.py` asks for that), and a division is `div_rn`: `/` is approximate;
- magnitudes are compared through their bits, which orders finite < Inf < NaN; a maximum of floats would lose a NaN;
- a NaN that is sent is always the same one.

What makes them fast: only the last program of a launch has values that may be missing, so all others read and write without a
mask, 16 bytes a thread (`inside` is None there).
"""

import triton
import triton.language as tl

INFINITY_BITS: tl.constexpr = tl.constexpr(0x7F800000)
MAGNITUDE: tl.constexpr = tl.constexpr(0x7FFFFFFF)
NAN_BITS: tl.constexpr = tl.constexpr(0x7FC00000)


@triton.jit
def read(place, inside, dtype: tl.constexpr = tl.float32):
    """The values at `place`, in `dtype`; 0 where `inside` is False."""
    if inside is None:
        return tl.load(place).to(dtype)
    else:
        return tl.load(place, inside, other=0).to(dtype)


@triton.jit
def row_start(w, row):
    """The word at which payload w starts, of payloads of `row` words."""
    return w * row.to(tl.int64)


@triton.jit
def only(value, inside):
    """Values, and 0 where `inside` is False."""
    if inside is None:
        return value
    else:
        return tl.where(inside, value, 0.0)


@triton.jit
def write(place, value, inside):
    """Store at `place`, where `inside` is not False."""
    if place.dtype.element_ty == tl.bfloat16:
        value = bfloat16_bits(value).to(tl.bfloat16, bitcast=True)
    if inside is None:
        tl.store(place, value)
    else:
        tl.store(place, value, inside)


@triton.jit
def bfloat16_bits(value):
    """The bits of the nearest bfloat16, int16; of NaN those that are sent."""
    bits = value.to(tl.uint32, bitcast=True)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)
    return tl.where(magnitude_bits(value) > INFINITY_BITS, 0x7FC0, rounded).to(tl.int16)


@triton.jit
def with_prologue(x, prologue, at, inside):
    """Return the values of a gradient from `at`, after its prologue."""
    value = read(x + at, inside)
    if prologue is not None:
        scaled, average = value * read(prologue[0] + at, inside), read(prologue[1] + at, inside)
        value = prologue[3] * clipped(scaled, prologue[2]) + prologue[4] * average + (scaled - scaled)  # 0, or NaN
    return value


@triton.jit
def clipped(value, limit):
    """Values within -limit and limit; NaN stays NaN."""
    return tl.where(value != value, value, tl.minimum(tl.maximum(value, -limit), limit))


@triton.jit
def total(x, prologue, residual, at, inside):
    """Return the values from `at` as they are coded: after the prologue, plus their residual."""
    return remembered(with_prologue(x, prologue, at, inside), residual, at, inside)


@triton.jit
def remembered(value, residual, at, inside):
    """Return values plus their residual, if there is one."""
    if residual is not None:
        value += read(residual + at, inside)
    return value


@triton.jit
def keep_lost(residual, at, lost, inside):
    """residual := the error of the payload; it keeps its old value where that is NaN or Inf."""
    before = read(residual + at, inside)  # from the cache; a mask of its own would make each store one of 4 bytes
    write(residual + at, tl.where(is_finite(lost), lost, before), inside)


@triton.jit
def magnitude_bits(value):
    """The bits of |value|, int32."""
    return value.to(tl.int32, bitcast=True) & MAGNITUDE


@triton.jit
def is_finite(value):
    """Whether values are neither NaN nor Inf."""
    return magnitude_bits(value) < INFINITY_BITS


@triton.jit
def nan_like(value):
    """The NaN that is sent, in the shape of float32 `value`."""
    return (value.to(tl.int32, bitcast=True) * 0 + NAN_BITS).to(tl.float32, bitcast=True)


@triton.jit
def block_scale(top, LEVELS: tl.constexpr, FLUSH: tl.constexpr):
    """The scale of blocks whose largest magnitudes have bits `top`, and what their values are multiplied by.

    Both are 0 for a block that is too small, and the scale is NaN for one that holds NaN or Inf.
    """
    peak = top.to(tl.float32, bitcast=True)
    usable = (top < INFINITY_BITS) & (peak >= FLUSH)
    divisor, levels = tl.where(usable, peak, 1.0), tl.full(top.shape, LEVELS, tl.float32)
    scale = tl.where(usable, tl.div_rn(divisor, levels), tl.where(top < INFINITY_BITS, 0.0, nan_like(peak)))
    return scale, tl.where(usable, tl.div_rn(levels, divisor), 0.0)
