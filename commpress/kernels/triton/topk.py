"""Kernels of `topk`. The definition and the payload stand in `comm/codecs/topk.py`.

The k-th largest magnitude is found by its bits, from the highest: a histogram over the exponents of all values says which
exponent it has, and one over each of the next 8, 8 and 7 bits, of the values that share all bits above, says the rest. Only
the first reads all values. A second pass over them sets apart those whose exponent is large enough, mostly a few in a hundred:
each program writes its own into its own part of a scratch of n values, in their order, and later passes look at these alone.
Sums over the parts of what each keeps say where in the payload it belongs.

The host never waits: no size of a launch depends on values, and what one kernel finds the next one reads. Where more than k
values are NaN or Inf nothing is set apart, so nothing is kept, and the k values that are coded stay NaN.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from commpress.kernels.triton import elias_fano
from commpress.kernels.triton.blocks import is_finite, magnitude_bits, nan_like, read, total, write
from commpress.kernels.triton.elias_fano import MARKS, tile_positions
from commpress.kernels.triton.launch import launch, steps

BINS: tl.constexpr = tl.constexpr(256)
EXPONENT: tl.constexpr = tl.constexpr(23)
"""The bits of a magnitude below its exponent."""
LEVELS = ((23, 15), (15, 7), (7, 0))
"""The bits that are refined behind the exponent: from here down to there."""
SIZE = 2048
"""The values of a part."""
CHUNK = 128
"""How many of those that are set apart are looked at at once."""
PROGRAMS = 2048
"""At most so many add to one histogram, each of several parts: its bins are few, and additions to one wait for each other."""


# --- the k-th largest magnitude -----------------------------------------------------------------------------------


@triton.jit
def _add(histogram, count):
    """Add what a program has counted to a histogram of all."""
    tl.atomic_add(histogram + tl.arange(0, BINS), count.to(tl.int64), count > 0, sem="relaxed")


@triton.jit
def _exponents(x, prologue, residual, at, inside):
    """The histogram of the exponents of some values."""
    exponent = magnitude_bits(total(x, prologue, residual, at, inside)) >> EXPONENT
    if inside is None:
        return tl.histogram(exponent, BINS)
    else:
        return tl.histogram(exponent, BINS, mask=inside)


@triton.jit
def _count_exponents(x, prologue, residual, histogram, n, tiles, SIZE: tl.constexpr):
    count = tl.zeros([BINS], tl.int32)
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        first = tile * SIZE
        at = first + tl.arange(0, SIZE)
        if first + SIZE <= n:
            count += _exponents(x, prologue, residual, at, None)
        else:
            count += _exponents(x, prologue, residual, at, at < n)
    _add(histogram, count)


@triton.jit
def _bin_of(histogram, rank):
    """The bin that holds the value of this rank, counted from the largest, and its rank within the bin."""
    bins = tl.arange(0, BINS)
    count = tl.load(histogram + bins)
    found = tl.max(tl.where(tl.cumsum(count, 0, reverse=True) >= rank, bins, 0), 0)
    return found, rank - tl.sum(tl.where(bins > found, count, 0), 0)


@triton.jit
def _narrow(histograms, state, LEVEL: tl.constexpr, BITS: tl.constexpr):
    """The upper bits of the k-th largest magnitude, by the BITS that a histogram tells beyond those that were known, and its
    rank among the values that share them; both are noted for the next kernel."""
    known, rank = tl.load(state + 2 * LEVEL - 2), tl.load(state + 2 * LEVEL - 1)
    found, rank = _bin_of(histograms + LEVEL * BINS, rank)
    _note(state + 2 * LEVEL, (known << BITS) | found, rank)
    return (known << BITS) | found, rank


@triton.jit
def _note(state, upper, rank):
    if tl.program_id(0) == 0:
        tl.store(state, upper)
        tl.store(state + 1, rank)


@triton.jit
def _set_apart(
    x, prologue, residual, values, places, first, n, least, all_nan, WHOLE: tl.constexpr, SIZE: tl.constexpr
):
    """Write the values of a part whose exponent is at least `least` and their places within it to its scratch; count them.

    The residual of all others becomes what they are; of these it is needed as it was."""
    here = tl.arange(0, SIZE)
    at = first + here
    inside = None if WHOLE else at < n
    value = total(x, prologue, residual, at, inside)
    apart = (magnitude_bits(value) >> EXPONENT) >= least
    if not WHOLE:
        apart = apart & inside
    slot = first + tl.cumsum(apart.to(tl.int32), 0) - 1
    tl.store(values + slot, value, apart)
    tl.store(places + slot, here.to(tl.int16), apart)
    if residual is not None:
        before = read(residual + at, inside)  # from the cache; a mask of its own would make each store one of 4 bytes
        write(residual + at, tl.where(apart | all_nan, before, value), inside)
    return tl.sum(apart.to(tl.int32), 0)


@triton.jit
def _candidates(x, prologue, residual, values, places, sizes, histograms, state, n, k, SIZE: tl.constexpr):
    """Set apart what may be kept: all values whose exponent is that of the k-th largest or above."""
    least, rank = _bin_of(histograms, k)
    _note(state, least, rank)
    all_nan = tl.load(histograms + BINS - 1) > k
    least = tl.where(all_nan, BINS, least)  # which no exponent reaches
    tile = tl.program_id(0).to(tl.int64)
    first = tile * SIZE
    if first + SIZE <= n:
        size = _set_apart(x, prologue, residual, values, places, first, n, least, all_nan, True, SIZE)
        tl.store(sizes + tile, size)
    else:
        size = _set_apart(x, prologue, residual, values, places, first, n, least, all_nan, False, SIZE)
        tl.store(sizes + tile, size)


@triton.jit
def _refine(
    values,
    sizes,
    histograms,
    state,
    tiles,
    LEVEL: tl.constexpr,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Count the bits FROM to TO of those that share all bits above with the k-th largest."""
    if LEVEL == 1:
        upper = tl.load(state)
    else:
        upper, _ = _narrow(histograms, state, LEVEL - 1, 8)
    count = tl.zeros([BINS], tl.int32)
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        size = tl.load(sizes + tile)
        for start in range(0, size, CHUNK):
            i = start + tl.arange(0, CHUNK)
            bits = magnitude_bits(tl.load(values + tile * SIZE + i, i < size, other=0))
            shared = (i < size) & ((bits >> FROM) == upper)
            count += tl.histogram((bits >> TO) & ((1 << (FROM - TO)) - 1), BINS, mask=shared)
    _add(histograms + LEVEL * BINS, count)


# --- what is kept -------------------------------------------------------------------------------------------------


@triton.jit
def _count_kept(values, sizes, histograms, state, kinds, tiles, SIZE: tl.constexpr, CHUNK: tl.constexpr):
    """Count how many of a part exceed the k-th largest, and how many equal it."""
    threshold, _ = _narrow(histograms, state, 3, 7)
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


@triton.jit
def _keep(
    values,
    places,
    sizes,
    histograms,
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
    threshold, need = tl.load(state + 6), tl.load(state + 7)
    ties = tl.load(histograms + 3 * BINS + (threshold & 127))
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        size = tl.load(sizes + tile)
        above = tl.load(ends + tile) - tl.load(kinds + tile)
        tied = tl.load(ends + tiles + tile) - tl.load(kinds + tiles + tile)
        for start in range(0, size, CHUNK):
            i = start + tl.arange(0, CHUNK)
            v = tl.load(values + tile * SIZE + i, i < size, other=0)
            at = tile * SIZE + tl.load(places + tile * SIZE + i, i < size, other=0)
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


@triton.jit
def _settle(index, value, decoded, residual, not_finite, k, SIZE: tl.constexpr):
    """The residual of what was kept becomes what its code misses; where that is NaN or Inf it stays what it was."""
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = i < tl.where(tl.load(not_finite) <= k, k, 0)
    lost = tl.load(value + i, inside, other=0) - tl.load(decoded + i, inside, other=0)
    at = tl.load(index + i, inside, other=0)
    tl.store(residual + at, lost, inside & is_finite(lost))


def encode(codec: Any, x: Tensor, residual: Tensor | None, prologue: Any, payload: Tensor) -> None:
    """`encode` of the table. The codec of the values encodes them as it does any others."""
    n, k, here = x.numel(), codec.kept(x.numel()), x.device
    tiles, values_at = triton.cdiv(n, SIZE), codec.sections(n)[3]
    histograms = torch.zeros(4 * BINS.value, dtype=torch.int64, device=here)
    index = torch.empty(k, dtype=torch.int64, device=here)
    value = torch.full((k,), torch.nan, dtype=torch.float32, device=here)
    _select(x, steps(prologue), residual, histograms, n, k, tiles, index, value)
    not_finite = histograms[BINS.value - 1 :]
    elias_fano.put(codec, index, n, payload, not_finite)
    codec.values.encode(value, payload[values_at:])
    if residual is not None:
        decoded = codec.values.decode(payload[values_at:], k)
        launch(_settle, triton.cdiv(k, SIZE), index, value, decoded, residual, not_finite, k, SIZE=SIZE)


def _select(
    x: Tensor,
    prologue: Any,
    residual: Tensor | None,
    histograms: Tensor,
    n: int,
    k: int,
    tiles: int,
    index: Tensor,
    value: Tensor,
) -> None:
    """Find positions and values of the k largest; neither is written if more than k are NaN or Inf."""
    here, few = x.device, min(tiles, PROGRAMS)
    launch(_count_exponents, few, x, prologue, residual, histograms, n, tiles, SIZE=SIZE)
    state = torch.empty(8, dtype=torch.int64, device=here)  # the upper bits of the k-th largest and its rank, by level
    values = torch.empty(tiles * SIZE, dtype=torch.float32, device=here)
    places = torch.empty(tiles * SIZE, dtype=torch.int16, device=here)
    sizes = torch.empty(tiles, dtype=torch.int32, device=here)
    launch(_candidates, tiles, x, prologue, residual, values, places, sizes, histograms, state, n, k, SIZE=SIZE)
    parts = {"SIZE": SIZE, "CHUNK": CHUNK}
    for level, (above, below) in enumerate(LEVELS, 1):
        bits = {"LEVEL": level, "FROM": above, "TO": below}
        launch(_refine, few, values, sizes, histograms, state, tiles, **bits, **parts)
    kinds = torch.empty(2, tiles, dtype=torch.int32, device=here)
    launch(_count_kept, few, values, sizes, histograms, state, kinds, tiles, **parts)
    found = values, places, sizes, histograms, state, kinds, kinds.cumsum(1)
    launch(_keep, few, *found, tiles, index, value, residual, **parts)


# --- back ---------------------------------------------------------------------------------------------------------


@triton.jit
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


@triton.jit
def _scatter(out, n, value, share, words, ends, k, low_bits, high_at, bits, ALONE: tl.constexpr, MARKS: tl.constexpr):
    """Add the share of a payload's values to `out` where they belong; ALONE has nothing to add to."""
    i, at, inside = tile_positions(words, ends, k, low_bits, high_at, bits, MARKS)
    inside = inside & (at < n)
    part = tl.load(value + i, inside, other=0) * share
    before = tl.load(out + at, inside, other=0)
    tl.store(out + at, tl.where(is_finite(before), part, before) if ALONE else before + part, inside)


@triton.jit
def _clear(values, n, words, ends, k, low_bits, high_at, bits, MARKS: tl.constexpr):
    _, at, inside = tile_positions(words, ends, k, low_bits, high_at, bits, MARKS)
    tl.store(values + at, tl.zeros([MARKS], tl.float32), inside & (at < n))


@triton.jit
def _clear_all(values, n, ends, tiles, k, SIZE: tl.constexpr):
    """Set all values to 0 if the payload does not mark k of them."""
    if tl.load(ends + tiles - 1) != k:
        at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
        tl.store(values + at, tl.zeros([SIZE], tl.float32), at < n)


def mean(codec: Any, payloads: Tensor, count: int, out: Tensor) -> None:
    """`mean` of the table. A payload that does not mark k positions makes all NaN: to raise, the host would have to wait."""
    n, k = out.numel(), codec.kept(out.numel())
    values_at, marks = codec.sections(n)[3], elias_fano.find(codec, payloads, n, count)
    tiles, value = marks.ends.shape[1], torch.empty(k, dtype=torch.float32, device=out.device)
    launch(_begin, triton.cdiv(n, SIZE), out, marks.ends, count, tiles, n, k, SIZE=SIZE)
    for payload, words, ends in zip(payloads.view(count, -1), marks.words, marks.ends, strict=True):
        codec.values.decode(payload[values_at:], k, value)
        place = words, ends, *marks.arguments
        launch(_scatter, tiles, out, n, value, 1.0 / count, *place, ALONE=count == 1, MARKS=MARKS)


def clear(codec: Any, payload: Tensor, values: Tensor) -> None:
    """`clear` of the table. Nothing is left where a payload does not mark k positions."""
    n, marks = values.numel(), elias_fano.find(codec, payload, values.numel(), 1)
    tiles = marks.ends.shape[1]
    launch(_clear, tiles, values, n, marks.words, marks.ends, *marks.arguments, MARKS=MARKS)
    launch(_clear_all, triton.cdiv(n, SIZE), values, n, marks.ends, tiles, marks.arguments[0], SIZE=SIZE)
