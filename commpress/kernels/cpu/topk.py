"""Loops of `topk`: the largest values and their positions."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from commpress.kernels.compiled import loop, part
from commpress.kernels.cpu.arrays import Floats, floats, steps, values
from commpress.kernels.cpu.blocks import AHEAD, INFINITY_BITS, MAGNITUDE, block_of, fetch, pad, scratch_beside, value_of
from commpress.kernels.cpu.elias_fano import ef_decode, ef_encode
from commpress.kernels.cpu.instructions import popcount, prefetch, reach_mask, trailing_zeros, widest
from commpress.kernels.cpu.scatter import ZEROS, fill_zeros, scatter_add
from commpress.kernels.cpu.slices import in_slices

SHARED_SHA256 = "5d1d88ea2ebdd3a9"
"""The hash of `blocks.py` and `instructions.py`, which are compiled in: Numba's cache checks only this file's time stamp."""
KEEP_BLOCK = 256
SOON = 64
"""The number of values ahead for which the memory of the residual is prefetched."""
BINS = 2048


@part
def _bin(bits, base, shift):
    """Return the bin of a magnitude; the bin after the last for a magnitude below `base`."""
    above = np.int64(bits & MAGNITUDE) - base
    return np.uint64(above) >> np.uint64(shift) if above >= 0 else np.uint64(BINS)


@part
def _largest(raw):
    """Return the bits of the largest magnitude of the float32 bits `raw`."""
    top = np.int32(0)
    for i in range(raw.size):
        top = max(top, np.int32(raw[i] & MAGNITUDE))
    return top


@loop
def kth_largest(raw, k, low=0):
    """The k-th largest magnitude of the float32 bits `raw`, as bits; at least k of them must reach `low`.

    A histogram of BINS bins between `low` and the largest finds the bin that holds it, the next one splits that bin."""
    base, span, rank = np.int64(low), np.int64(0), np.int64(k)
    span = np.int64(_largest(raw)) - base
    counts, odd = np.empty(BINS + 1, np.int64), np.empty(BINS + 1, np.int64)
    while True:
        shift = np.int64(0)
        while span >> shift >= BINS:
            shift += 1
        counts[:] = 0
        odd[:] = 0
        for i in range(raw.size // 2):  # neighbours often fall into one bin: in one table they would wait
            counts[_bin(raw[2 * i], base, shift)] += 1
            odd[_bin(raw[2 * i + 1], base, shift)] += 1
        if raw.size % 2:
            counts[_bin(raw[raw.size - 1], base, shift)] += 1
        for b in range(BINS):
            counts[b] += odd[b]
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
        sample[s] = value_of(x, prologue, i) if residual is None else value_of(x, prologue, i) + residual[i]
        start += size
    want = m * ratio
    rank = min(m, np.int64(want + 4.0 * np.sqrt(want)) + 2)
    threshold = min(max(kth_largest(sample.view(np.int32), rank, np.int32(0)), np.int32(1)), INFINITY_BITS)
    return threshold, np.int64((1.5 * rank + 6.0 * np.sqrt(rank) + 6.0) * (n / m)) + 1


@loop
def _spare(a, old, o, spared):
    """Note in `spared` the old residual of the values of the block `a` at `o` that are NaN or Inf."""
    for j in range(a.size):
        if not np.isfinite(a[j]):
            spared[o + j] = old[j]


@part
def _write_places(mask, first, batch, index, at):
    """Write to `index[at:]` the places of the lowest `batch` bits of `mask`, counted from `first`; return the other bits.

    All are written, whether they are there or not: no branch depends on how many there are."""
    places = index[at : at + batch]
    for i in range(batch):
        places[i] = first + trailing_zeros(mask)
        mask &= mask - np.uint64(1)
    return mask


@part
def _positions(a, threshold, o, dense, index, at):
    """Write to `index[at:]` where the magnitudes of the block `a` (KEEP_BLOCK values from `o` on) reach `threshold`."""
    for w in range(KEEP_BLOCK // 64):
        mask = reach_mask(a, 64 * w, threshold)
        count, first, done = np.int64(popcount(mask)), o + 64 * w, np.int64(0)
        if dense:
            mask, done = _write_places(mask, first, 16, index, at), np.int64(16)
        while done < count or done == 0:  # mostly once
            mask = _write_places(mask, first, 4, index, at + done)
            done += 4
        at += count
    return at


@part
def _remember(a, rb, old, size):
    """rb := a + rb, old := what it was; return the bits of the largest magnitude among them."""
    top = np.int32(0)
    for j in range(size):
        old[j] = rb[j]
        value = np.float32(a[j] + rb[j])
        rb[j] = value
        top = max(top, np.int32(value.view(np.int32) & MAGNITUDE))
    return top


@part
def _summed(a, residual, old, o, size, spared):
    """The `size` values of a block at `o` and what is remembered of them, and `spared`, which notes what it must."""
    if residual is None:
        return a, spared
    rb = residual[o : o + size]
    if _remember(a, rb, old, size) >= INFINITY_BITS:
        if spared.size == 0:
            spared = np.zeros(residual.size, np.float32)
        _spare(rb, old, o, spared)
    return rb, spared


@loop
def _collect(x, prologue, residual, threshold, room, begin, stop):
    """One pass over the blocks from `begin` to `stop`: residual := x + residual, and where its magnitude reaches `threshold`,
    position and value.

    Counts all, stores the first `room` (at least). Returns positions, values, the count, and the old residual where
    the sum is NaN or Inf (an array as long as x; empty where there was none)."""
    widest()
    n = x.size
    old, scratch = scratch_beside(x, KEEP_BLOCK), scratch_beside(x, KEEP_BLOCK)
    index = np.empty(room + KEEP_BLOCK + 16, np.int64)
    value = np.empty(room + KEEP_BLOCK, np.float32)
    spared = np.empty(0, np.float32)
    full, dense = n // KEEP_BLOCK, room > n // 32
    count, at = np.int64(0), np.int64(0)
    for b in range(begin, min(stop, full)):
        o = b * KEEP_BLOCK
        fetch(residual, o + AHEAD, KEEP_BLOCK)
        xb = block_of(x, prologue, None, o, KEEP_BLOCK, scratch)
        a, spared = _summed(xb, residual, old, o, KEEP_BLOCK, spared)
        end = _positions(a, threshold, o, dense, index, at)
        for i in range(at, end):
            value[i] = a[index[i] - o]
        count += end - at
        at = min(end, room)
    if stop > full:
        o = full * KEEP_BLOCK
        xb = block_of(x, prologue, None, o, n - o, scratch)
        a, spared = _summed(xb, residual, old, o, n - o, spared)
        pad(a, old)
        end = _positions(old, threshold, o, dense, index, at)
        for i in range(at, end):
            value[i] = old[index[i] - o]
        count += end - at
    return index, value, count, spared


@part
def _count_ties(raw, threshold):
    """Return how many magnitudes exceed the threshold, and how many equal it."""
    above, ties = np.int64(0), np.int64(0)
    for i in range(raw.size):
        magnitude = np.int32(raw[i] & MAGNITUDE)
        above += np.int64(magnitude > threshold)
        ties += np.int64(magnitude == threshold)
    return above, ties


@loop
def keep_largest(index, value, threshold, k):
    """Move the k largest magnitudes of `value`, of which the smallest is `threshold`, to its front, and theirs of `index`.

    Of those that equal it an evenly spread choice stays. No branch depends on the values: each is moved, and written over by
    the next one if it is not kept."""
    raw = value.view(np.int32)
    above, ties = _count_ties(raw, threshold)
    need = k - above
    c, share = np.int64(0), np.int64(0)
    if need == ties:
        for i in range(raw.size):
            bits, place = raw[i], index[i]
            raw[c], index[c] = bits, place
            c += np.int64(np.int32(bits & MAGNITUDE) >= threshold)
    else:
        for i in range(raw.size):
            bits, place = raw[i], index[i]
            magnitude = np.int32(bits & MAGNITUDE)
            # tie t stays where (t + 1) * need / ties passes an integer
            share += need * np.int64(magnitude == threshold)
            take = share >= ties
            share -= ties * np.int64(take)
            raw[c], index[c] = bits, place
            c += np.int64(take or magnitude > threshold)


@loop
def largest_of(whole, threshold, k):
    """Return the positions of the k largest magnitudes of `whole`, whose smallest is `threshold`, and their values."""
    raw = whole.view(np.int32)
    above, ties = _count_ties(raw, threshold)
    need = k - above
    index, value = np.empty(k, np.int64), np.empty(k, np.float32)
    c, share = np.int64(0), np.int64(0)
    for i in range(raw.size):
        magnitude = np.int32(raw[i] & MAGNITUDE)
        share += need * np.int64(magnitude == threshold)
        take = share >= ties
        share -= ties * np.int64(take)
        index[c], value[c] = i, whole[i]
        c += np.int64(take or magnitude > threshold)
        if c == k:
            break
    return index, value


@part
def _not_finite(raw):
    """Return how many of the float32 bits `raw` are NaN or Inf."""
    count = np.int64(0)
    for i in range(raw.size):
        count += np.int64((raw[i] & MAGNITUDE) >= INFINITY_BITS)
    return count


@part
def _whole(x, prologue, residual):
    """Return the array of all coded values; with feedback that is `residual`, which holds the sums by now."""
    if residual is not None:
        return residual
    whole = np.empty(x.size, np.float32)
    for i in range(x.size):
        whole[i] = value_of(x, prologue, i)
    return whole


@loop
def _choose(x, prologue, residual, threshold, room, index, value, count, spared, k):
    """Choose the k largest of the values that passed the threshold, or of all values if too few or too many passed."""
    if k <= count <= room:
        raw = value[:count].view(np.int32)
        exact = kth_largest(raw, k, threshold)
        overflows = exact >= INFINITY_BITS and _not_finite(raw) > k
        if not overflows:
            keep_largest(index[:count], value[:count], exact, k)
    else:
        whole = _whole(x, prologue, residual)
        raw = whole.view(np.int32)
        if count > room:
            exact = kth_largest(raw, k, threshold)
        elif threshold > 1:
            exact = kth_largest(raw, k, np.int32(0))
        else:  # fewer than k values are not 0, and all of those passed
            exact = np.int32(0)
        overflows = exact >= INFINITY_BITS and _not_finite(raw) > k
        if not overflows:
            index, value = largest_of(whole, exact, k)
    if overflows:
        k = 0
    if residual is not None:
        for i in range(residual.size if overflows else 0):
            residual[i] -= value_of(x, prologue, i)
        for i in range(spared.size):
            if not np.isfinite(residual[i]):
                residual[i] = spared[i]
    return index[:k], value[:k]


def _select(x: Any, prologue: Any, residual: Any, k: int) -> tuple[npt.NDArray[np.int64], Floats]:
    """Positions (ascending) and values of the k largest magnitudes of `x + residual`; the residual becomes that sum,
    but keeps its old value where the sum is NaN or Inf. If more than k of them are NaN or Inf there are no positions, and
    the residual is what it was, to the rounding of the sum.

    A sampled threshold lets a few more than k through in one pass, and the k largest of those are the k largest of all.
    Where the sample was wrong (too few or far too many came through) the threshold is found over everything."""
    n = x.size
    sampled, expected = _sampled_threshold(x, prologue, residual, k / n)
    threshold, room = np.int32(sampled), min(n, expected)
    found: dict[tuple[int, int], Any] = {}

    def collect(begin: int, stop: int) -> None:
        found[begin, stop] = _collect(x, prologue, residual, threshold, room, begin, stop)

    in_slices(collect, n, KEEP_BLOCK)
    slices = [found[cut] for cut in sorted(found)]
    through: tuple[Any, ...] = slices[0] if len(slices) == 1 else _joined(slices, room)
    index, value, count, spared = through
    return _choose(x, prologue, residual, threshold, room, index, value, count, spared, k)  # type: ignore[no-any-return]


def _joined(slices: list[Any], room: int) -> tuple[Any, ...]:
    """Join the values of each slice that passed the threshold, in order. More than `room` of them are not used."""
    index, value, counts, spared = zip(*slices, strict=True)
    bits = [s.view(np.int32) for s in spared if s.size]  # each is 0 outside its slice
    all_spared = np.bitwise_or.reduce(bits).view(np.float32) if bits else spared[0]
    if (count := sum(counts)) > room:
        return index[0], value[0], count, all_spared
    joined = (np.concatenate([a[:c] for a, c in zip(arrays, counts, strict=True)]) for arrays in (index, value))
    return *joined, count, all_spared


@loop
def topk_settle(x, prologue, residual, index, value, decoded, begin, end):
    """Set the residual of the kept entries to value - decoded; it keeps its old value where that is NaN."""
    for i in range(begin * KEEP_BLOCK, min(index.size, end * KEEP_BLOCK)):
        prefetch(residual, index[min(i + SOON, index.size - 1)])
        lost, at = value[i] - decoded[i], index[i]
        if np.isfinite(lost):
            residual[at] = lost
        elif np.isfinite(value[i]):
            residual[at] = value[i] - value_of(x, prologue, at)


def encode(codec: Any, x: Tensor, residual: Tensor | None, prologue: Any, payload: Tensor) -> None:
    """`encode` of the table. The inner codec encodes the values that are sent."""
    k, low_bits, high_at, values_at = codec.sections(x.numel())
    before, memory = steps(prologue), floats(residual)
    index, value = _select(values(x), before, memory, k)
    payload[:values_at] = 0
    if not index.size:
        codec.values.encode(torch.full((k,), torch.nan, dtype=torch.float32, device="cpu"), payload[values_at:])
        return
    coded = payload.numpy()
    ef_encode(index, low_bits, coded[:high_at], coded[high_at:values_at])
    codec.values.encode(torch.from_numpy(value), payload[values_at:])
    if memory is not None:
        decoded = codec.values.decode(payload[values_at:], k)
        in_slices(topk_settle, k, KEEP_BLOCK, values(x), before, memory, index, value, decoded.numpy())


def mean(codec: Any, payloads: Tensor, count: int, out: Tensor) -> None:
    """`mean` of the table. Raises ValueError for a payload that does not mark k positions."""
    k, low_bits, high_at, values_at = codec.sections(out.numel())
    index, value = np.empty(k, np.int64), torch.empty(k, dtype=torch.float32, device="cpu")
    in_slices(fill_zeros, out.numel(), ZEROS, out.numpy())
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
    else:  # the payload names all values
        values.zero_()
