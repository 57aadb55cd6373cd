"""Loops of `topk`: which values are the largest, and where."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from commpress.kernels.compiled import loop, part
from commpress.kernels.cpu.arrays import floats, steps
from commpress.kernels.cpu.blocks import (
    INFINITY_BITS,
    MAGNITUDE,
    ONES,
    PLACES,
    block_of,
    load,
    prologue_value,
    run_prologue,
)
from commpress.kernels.cpu.elias_fano import ef_decode, ef_encode

BLOCKS_SHA256 = "c51943699b3cf74d"
"""Of `blocks.py`, which is compiled into these loops: Numba's cache looks at the time stamp of this file alone."""
KEEP_BLOCK = 256
BINS = 2048
GATHER = np.uint64(0x0102040810204080)
"""Times eight bytes that are 0 or 1, this moves them to the eight bits of the highest byte."""


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
def _sampled_threshold(x, prologue, residual, ratio):
    """Magnitude bits that a little more than `ratio` of the values reach, and every Inf and NaN, from one value in each of
    `m` strata.

    The place within a stratum is hashed, since a fixed stride can follow the columns of a matrix. Returns the
    threshold and more values than can be expected to reach it."""
    inverse, average, limit, fresh, kept = prologue
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
        value = prologue_value(x[i], inverse[i], average[i], limit, fresh, kept) if inverse.size else x[i]
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
def _collect(x, prologue, residual, threshold, room):
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
        xb, rb = block_of(x, prologue, o, KEEP_BLOCK, scratch), residual[o : o + KEEP_BLOCK]
        a = xb
        top = np.int32(0)
        if feedback or xb.size < KEEP_BLOCK:
            top = load(xb, rb, total, KEEP_BLOCK)
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
def topk_select(x, prologue, residual, k):
    """Positions (ascending) and values of the k largest magnitudes of `x + residual`; the residual becomes that sum,
    but keeps its old value where the sum is NaN or Inf. If more than k of them are NaN or Inf there are no positions, and
    the residual is what it was, to the rounding of the sum.

    A sampled threshold lets a few more than k through in one pass, and the k largest of those are the k largest of all.
    Where the sample was wrong (too few or far too many came through) the threshold is found over everything."""
    n = x.size
    threshold, room = _sampled_threshold(x, prologue, residual, k / n)
    room = min(n, room)
    index, value, count, spared = _collect(x, prologue, residual, threshold, room)
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
            run_prologue(x, prologue)
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
        inverse, average, limit, fresh, kept_share = prologue
        for i in range(residual.size):
            own = prologue_value(x[i], inverse[i], average[i], limit, fresh, kept_share) if inverse.size else x[i]
            residual[i] -= own
        k = 0
    for i in range(spared.size):
        if not np.isfinite(residual[i]):
            residual[i] = spared[i]
    return index[:k], value[:k]


@loop
def topk_settle(x, prologue, residual, index, value, decoded):
    """The residual of the kept entries once their values are coded: value - decoded; what it was where that is NaN."""
    inverse, average, limit, fresh, kept = prologue
    for i in range(index.size):
        lost, at = value[i] - decoded[i], index[i]
        if np.isfinite(lost):
            residual[at] = lost
        elif np.isfinite(value[i]):
            own = prologue_value(x[at], inverse[at], average[at], limit, fresh, kept) if inverse.size else x[at]
            residual[at] = value[i] - own


@loop
def scatter_add(index, value, share, out):
    """out[index] += value * share; a position beyond `out` is passed over."""
    n = out.size
    for i in range(index.size):
        if index[i] < n:
            out[index[i]] += value[i] * share


def encode(codec: Any, x: Tensor, residual: Tensor | None, prologue: Any, payload: Tensor) -> None:
    """`encode` of the table. The codec of the values encodes them as it does any others."""
    k, low_bits, high_at, values_at = codec.sections(x.numel())
    before, memory = steps(prologue), floats(residual)
    index, value = topk_select(x.numpy(), before, memory, k)
    payload[:values_at] = 0
    if not index.size:
        codec.values.encode(torch.full((k,), torch.nan, dtype=torch.float32, device="cpu"), payload[values_at:])
        return
    coded = payload.numpy()
    ef_encode(index, low_bits, coded[:high_at], coded[high_at:values_at])
    codec.values.encode(torch.from_numpy(value), payload[values_at:])
    if memory.size:
        decoded = codec.values.decode(payload[values_at:], k)
        topk_settle(x.numpy(), before, memory, index, value, decoded.numpy())


def mean(codec: Any, payloads: Tensor, count: int, out: Tensor) -> None:
    """`mean` of the table. Raises ValueError for a payload that does not mark k positions."""
    k, low_bits, high_at, values_at = codec.sections(out.numel())
    index, value = np.empty(k, np.int64), torch.empty(k, dtype=torch.float32, device="cpu")
    out.zero_()
    for payload in payloads.view(count, -1):
        coded = payload.numpy()
        found = ef_decode(low_bits, coded[:high_at], coded[high_at:values_at], index)
        codec.values.decode(payload[values_at:], k, value)
        codec.require_positions(found, not found and bool(value.isnan().all()), out.numel())
        if found:
            scatter_add(index, value.numpy(), np.float32(1.0 / count), out.numpy())
        else:
            out.fill_(torch.nan)


def clear(codec: Any, payload: Tensor, values: Tensor) -> None:
    """`clear` of the table."""
    k, low_bits, high_at, values_at = codec.sections(values.numel())
    index, coded = np.empty(k, np.int64), payload.numpy()
    found = ef_decode(low_bits, coded[:high_at], coded[high_at:values_at], index)
    if found:
        values[torch.from_numpy(index[:found])] = 0
    else:  # it names all of them
        values.zero_()
