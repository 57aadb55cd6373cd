"""Kernels of `topk`. The definition and the payload are in `comm/codecs/topk.py`.

The k-th largest magnitude is found by its bits, from the highest: a histogram over the first 11 (the exponent, and 3 of the
mantissa) of all values says which it has, and two more, over 10 bits each of the values that share all bits above, say the
rest. Only the first reads all values. A second pass over them sets apart those whose first bits are as large or larger, not
many more than k: each program writes its own into its own part of a scratch of n values, in their order, and later passes
look at these alone. Sums over the parts of what each keeps say where in the payload it belongs.

The host never waits: no size of a launch depends on values, and what one kernel finds the next one reads. Where more than k
values are NaN or Inf nothing is set apart, so nothing is kept, and the k values that are coded stay NaN.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from commpress.kernels.triton import elias_fano
from commpress.kernels.triton.blocks import INFINITY_BITS, is_finite, magnitude_bits, nan_like, read, total, write
from commpress.kernels.triton.elias_fano import MARKS, tile_positions
from commpress.kernels.triton.launch import counting, launch, steps

FIRST: tl.constexpr = tl.constexpr(2048)
"""The bins of the first histogram, by 11 bits,"""
NEXT: tl.constexpr = tl.constexpr(1024)
"""and those of the next two, by 10 bits each."""
REST: tl.constexpr = tl.constexpr(20)
"""The bits of a magnitude behind the first 11."""
UPPER: tl.constexpr = tl.constexpr(0)
"""Where the state of a search has the upper bits of the k-th largest magnitude,"""
RANK: tl.constexpr = tl.constexpr(1)
"""its rank among the values that share them, counted from the largest,"""
SHARING: tl.constexpr = tl.constexpr(2)
"""how many do,"""
KEPT: tl.constexpr = tl.constexpr(3)
"""and how many values are kept: k, or none if more are NaN or Inf."""
SIZE = 2048
"""The values of a part."""
CHUNK = 128
"""The number of candidates that are read at once."""
PROGRAMS = 2048
"""At most so many add to one histogram, each of several parts: its bins are few, and additions to one wait for each other."""


# --- the k-th largest magnitude -----------------------------------------------------------------------------------


@triton.jit
def _add(histogram, count, BINS: tl.constexpr):
    """Add what a program has counted to a histogram of all."""
    tl.atomic_add(histogram + tl.arange(0, BINS), count.to(tl.int64), count > 0, sem="relaxed")


@triton.jit
def _first_bits(x, prologue, residual, at, inside):
    """The histogram of the first bits of some values."""
    bits = magnitude_bits(total(x, prologue, residual, at, inside)) >> REST
    if inside is None:
        return tl.histogram(bits, FIRST)
    else:
        return tl.histogram(bits, FIRST, mask=inside)


@counting
def _count_all(x, prologue, residual, histogram, n, tiles, SIZE: tl.constexpr):
    """Count the first bits of all values."""
    count = tl.zeros([FIRST], tl.int32)
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        first = tile * SIZE
        at = first + tl.arange(0, SIZE)
        if first + SIZE <= n:
            count += _first_bits(x, prologue, residual, at, None)
        else:
            count += _first_bits(x, prologue, residual, at, at < n)
    _add(histogram, count, FIRST)


@counting
def _narrow(histogram, state, k, BINS: tl.constexpr):
    """Add the bits that a histogram tells to those that are known of the k-th largest magnitude."""
    bins = tl.arange(0, BINS)
    count = tl.load(histogram + bins)
    if BINS == FIRST:
        upper, rank = 0, k
        not_finite = tl.sum(tl.where(bins >= INFINITY_BITS >> REST, count, 0), 0)
        tl.store(state + KEPT, tl.where(not_finite > k, 0, k))
    else:
        upper, rank = tl.load(state + UPPER), tl.load(state + RANK)
    reach = tl.sum(count, 0) - tl.cumsum(count, 0) + count  # how many are in a bin or above
    found = tl.max(tl.where(reach >= rank, bins, 0), 0)
    tl.store(state + UPPER, upper * BINS + found)
    tl.store(state + RANK, rank - tl.sum(tl.where(bins > found, count, 0), 0))
    tl.store(state + SHARING, tl.sum(tl.where(bins == found, count, 0), 0))


@triton.jit
def _set_part_apart(
    x, prologue, residual, values, places, first, n, least, all_nan, WHOLE: tl.constexpr, SIZE: tl.constexpr
):
    """Write the values of a part whose first bits are at least `least`, and their places within it, to its scratch.

    The residual of all others becomes what they are; of these it is needed as it was. Returns how many they are."""
    here = tl.arange(0, SIZE)
    at = first + here
    inside = None if WHOLE else at < n
    value = total(x, prologue, residual, at, inside)
    apart = (magnitude_bits(value) >> REST) >= least
    if not WHOLE:
        apart = apart & inside
    slot = tl.cumsum(apart.to(tl.int32), 0) - 1
    tl.store(values + first + slot, value, apart)
    tl.store(places + first + slot, here.to(tl.int16), apart)
    if residual is not None:
        before = read(residual + at, inside)  # from the cache; a mask of its own would make each store one of 4 bytes
        write(residual + at, tl.where(apart | all_nan, before, value), inside)
    return tl.sum(apart.to(tl.int32), 0)


@counting
def _set_apart(x, prologue, residual, values, places, sizes, state, n, SIZE: tl.constexpr):
    """Set apart all values that may be kept: none if more than k are NaN or Inf, and then the residual stays what it was."""
    tile = tl.program_id(0).to(tl.int64)
    first = tile * SIZE
    least = tl.load(state + UPPER)
    all_nan = tl.load(state + KEPT) == 0
    least = tl.where(all_nan, FIRST, least).to(tl.int32)
    if first + SIZE <= n:
        size = _set_part_apart(x, prologue, residual, values, places, first, n, least, all_nan, True, SIZE)
    else:
        size = _set_part_apart(x, prologue, residual, values, places, first, n, least, all_nan, False, SIZE)
    tl.store(sizes + tile, size)


@counting
def _refine(values, sizes, histogram, state, tiles, SHIFT: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    """Count the 10 bits from SHIFT on of the values that share all bits above with the k-th largest."""
    upper = tl.load(state + UPPER)
    count = tl.zeros([NEXT], tl.int32)
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        size = tl.load(sizes + tile)
        for start in range(0, size, CHUNK):
            i = start + tl.arange(0, CHUNK)
            bits = magnitude_bits(tl.load(values + tile * SIZE + i, i < size, other=0)) >> SHIFT
            sharing = (i < size) & ((bits // NEXT) == upper)
            count += tl.histogram(bits % NEXT, NEXT, mask=sharing)
    _add(histogram, count, NEXT)


# --- what is kept -------------------------------------------------------------------------------------------------


@counting
def _count_kept(values, sizes, state, kinds, tiles, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    """Count how many of a part exceed the k-th largest, and how many equal it."""
    threshold = tl.load(state + UPPER)
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        size = tl.load(sizes + tile)
        above, tied = tl.zeros([CHUNK], tl.int32), tl.zeros([CHUNK], tl.int32)
        for start in range(0, size, CHUNK):
            i = start + tl.arange(0, CHUNK)
            bits = magnitude_bits(tl.load(values + tile * SIZE + i, i < size, other=0))
            above += ((i < size) & (bits > threshold)).to(tl.int32)
            tied += ((i < size) & (bits == threshold)).to(tl.int32)
        tl.store(kinds + tile, tl.sum(above, 0))
        tl.store(kinds + tiles + tile, tl.sum(tied, 0))


@counting
def _keep(
    values,
    places,
    sizes,
    state,
    kinds,
    ends,
    tiles,
    index,
    value,
    residual,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write positions and values of the k largest in their order. The residual of all others becomes what they are.

    Of `ties` that equal the k-th largest `need` are kept; tie t is, where (t + 1) * need / ties passes an integer."""
    threshold, need, ties = tl.load(state + UPPER), tl.load(state + RANK), tl.load(state + SHARING)
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        size = tl.load(sizes + tile)
        above = tl.load(ends + tile) - tl.load(kinds + tile)
        tied = tl.load(ends + tiles + tile) - tl.load(kinds + tiles + tile)
        for start in range(0, size, CHUNK):
            i = start + tl.arange(0, CHUNK)
            v = tl.load(values + tile * SIZE + i, i < size, other=0)
            at = tile * SIZE + tl.load(places + tile * SIZE + i, i < size, other=0).to(tl.int64)
            larger = ((i < size) & (magnitude_bits(v) > threshold)).to(tl.int64)
            equal = ((i < size) & (magnitude_bits(v) == threshold)).to(tl.int64)
            t = tied + tl.cumsum(equal, 0) - equal
            kept_before = t * need // ties
            passes = (t * need - kept_before * ties + need >= ties) & (equal != 0)
            slot = above + tl.cumsum(larger, 0) - larger + kept_before
            kept = (larger != 0) | passes
            tl.store(index + slot, at, kept)
            tl.store(value + slot, v, kept)
            if residual is not None:
                tl.store(residual + at, v, (i < size) & (kept == 0))
            above += tl.sum(larger, 0)
            tied += tl.sum(equal, 0)


@counting
def _settle(index, value, decoded, residual, kept, SIZE: tl.constexpr):
    """Set the residual of kept values to the error of their code; it keeps its old value where that is NaN or Inf."""
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = i < tl.load(kept)
    lost = tl.load(value + i, inside, other=0) - tl.load(decoded + i, inside, other=0)
    at = tl.load(index + i, inside, other=0)
    tl.store(residual + at, lost, inside & is_finite(lost))


def encode(codec: Any, x: Tensor, residual: Tensor | None, prologue: Any, payload: Tensor) -> None:
    """`encode` of the table. The inner codec encodes the values that are sent."""
    n, here = x.numel(), x.device
    k, _, _, values_at = codec.sections(n)
    index = torch.empty(k, dtype=torch.int64, device=here)
    value = torch.full((k,), torch.nan, dtype=torch.float32, device=here)
    kept = _select(x, residual, steps(prologue), index, value)
    elias_fano.put(codec, index, kept, n, payload)
    codec.values.encode(value, payload[values_at:])
    if residual is not None:
        decoded = codec.values.decode(payload[values_at:], k)
        launch(_settle, triton.cdiv(k, SIZE), index, value, decoded, residual, kept, SIZE=SIZE)


def _select(x: Tensor, residual: Tensor | None, prologue: Any, index: Tensor, value: Tensor) -> Tensor:
    """Write positions and values of the k largest. Returns how many they are, int64 [1]: k, or 0 if more are NaN or Inf."""
    n, k, here = x.numel(), index.numel(), x.device
    tiles = triton.cdiv(n, SIZE)
    bins = [FIRST.value, NEXT.value, NEXT.value]
    first, second, third = torch.zeros(sum(bins), dtype=torch.int64, device=here).split(bins)
    state = torch.empty(4, dtype=torch.int64, device=here)
    launch(_count_all, min(tiles, PROGRAMS), x, prologue, residual, first, n, tiles, SIZE=SIZE)
    launch(_narrow, 1, first, state, k, BINS=FIRST.value)
    values = torch.empty(tiles * SIZE, dtype=torch.float32, device=here)
    places = torch.empty(tiles * SIZE, dtype=torch.int16, device=here)
    sizes = torch.empty(tiles, dtype=torch.int32, device=here)
    launch(_set_apart, tiles, x, prologue, residual, values, places, sizes, state, n, SIZE=SIZE)

    parts, few = {"SIZE": SIZE, "CHUNK": CHUNK}, min(tiles, PROGRAMS)
    for histogram, shift in ((second, 10), (third, 0)):
        launch(_refine, few, values, sizes, histogram, state, tiles, SHIFT=shift, **parts)
        launch(_narrow, 1, histogram, state, k, BINS=NEXT.value)
    kinds = torch.empty(2, tiles, dtype=torch.int32, device=here)
    launch(_count_kept, few, values, sizes, state, kinds, tiles, **parts)
    ends = kinds.cumsum(1)
    launch(_keep, few, values, places, sizes, state, kinds, ends, tiles, index, value, residual, **parts)
    return state[KEPT.value :]


# --- back ---------------------------------------------------------------------------------------------------------


@counting
def _begin(out, ends, W, tiles, n, k, SIZE: tl.constexpr):
    """The sum of no values: 0, but NaN if one of W payloads does not mark k positions."""
    unmarked = tl.load(ends + tiles - 1) != k
    for w in range(1, W):
        unmarked = unmarked | (tl.load(ends + w * tiles + tiles - 1) != k)
    first = tl.program_id(0).to(tl.int64) * SIZE
    at, zero = first + tl.arange(0, SIZE), tl.zeros([SIZE], tl.float32)
    fill = tl.where(unmarked, nan_like(zero), zero)
    if first + SIZE <= n:
        write(out + at, fill, None)
    else:
        write(out + at, fill, at < n)


@counting
def _scatter(out, n, value, share, words, ends, k, low_bits, high_at, bits, MARKS: tl.constexpr):
    """Add the share of a payload's values to `out` where they belong."""
    i, at, inside = tile_positions(words, ends, k, low_bits, high_at, bits, MARKS)
    inside = inside & (at < n)
    part = tl.load(value + i, inside, other=0) * share
    before = tl.load(out + at, inside, other=0)
    tl.store(out + at, before + part, inside)


@counting
def _clear_marked(values, n, words, ends, k, low_bits, high_at, bits, MARKS: tl.constexpr):
    """Set the values to 0 that a payload marks."""
    _, at, inside = tile_positions(words, ends, k, low_bits, high_at, bits, MARKS)
    tl.store(values + at, tl.zeros([MARKS], tl.float32), inside & (at < n))


@counting
def _clear_all(values, n, ends, tiles, k, SIZE: tl.constexpr):
    """Set all values to 0 if the payload does not mark k of them."""
    if tl.load(ends + tiles - 1) != k:
        first = tl.program_id(0).to(tl.int64) * SIZE
        at, zero = first + tl.arange(0, SIZE), tl.zeros([SIZE], tl.float32)
        if first + SIZE <= n:
            write(values + at, zero, None)
        else:
            write(values + at, zero, at < n)


def mean(codec: Any, payloads: Tensor, count: int, out: Tensor) -> None:
    """`mean` of the table. Without k marked positions all values become NaN: to raise, the host would have to wait."""
    n, k = out.numel(), codec.kept(out.numel())
    values_at, marks = codec.sections(n)[3], elias_fano.find(codec, payloads, n, count)
    tiles, value = marks.ends.shape[1], torch.empty(k, dtype=torch.float32, device=out.device)
    launch(_begin, triton.cdiv(n, SIZE), out, marks.ends, count, tiles, n, k, SIZE=SIZE)
    for payload, words, ends in zip(payloads.view(count, -1), marks.words, marks.ends, strict=True):
        codec.values.decode(payload[values_at:], k, value)
        place = words, ends, *marks.arguments
        launch(_scatter, tiles, out, n, value, 1.0 / count, *place, MARKS=MARKS)


def clear(codec: Any, payload: Tensor, values: Tensor) -> None:
    """`clear` of the table. A payload that does not mark k positions sets all values to 0."""
    n, marks = values.numel(), elias_fano.find(codec, payload, values.numel(), 1)
    tiles = marks.ends.shape[1]
    launch(_clear_marked, tiles, values, n, marks.words, marks.ends, *marks.arguments, MARKS=MARKS)
    launch(_clear_all, triton.cdiv(n, SIZE), values, n, marks.ends, tiles, marks.arguments[0], SIZE=SIZE)
