"""Loops of `randomk`: blocks of one size, each with as many strata, whose cuts are the same in all of them.

A last block that is shorter runs through the same loops, as one block of its own.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from commpress.kernels.compiled import loop, part
from commpress.kernels.cpu.arrays import floats, steps, values
from commpress.kernels.cpu.blocks import AHEAD, INFINITY_BITS, MAGNITUDE, block_of, fetch, put_block, top_of, value_of
from commpress.kernels.cpu.instructions import settle_streams, widest
from commpress.kernels.cpu.slices import in_slices

SHARED_SHA256 = "5d1d88ea2ebdd3a9"
"""The hash of `blocks.py` and `instructions.py`, which are compiled in: Numba's cache checks only this file's time stamp."""
NAN = np.float32(np.nan)
STRATA = 64
HEAD = 8


@part
def _mix(word):
    """Hash 32 bits to 32 others."""
    word = np.uint32(np.uint32(word ^ np.uint32(word >> np.uint32(16))) * np.uint32(0x21F0AAAD))
    word = np.uint32(np.uint32(word ^ np.uint32(word >> np.uint32(15))) * np.uint32(0x735A2D97))
    return np.uint32(word ^ np.uint32(word >> np.uint32(15)))


@part
def _place(number, starts, widths, keys, turns, places):
    """Write to `places` where in a block each stratum sends its value; `number` is that of the block's first stratum."""
    for j in range(places.size):
        hashed = _mix(np.uint32(np.uint32(np.uint32(number) + np.uint32(j)) * np.uint32(0x5F356495)) ^ keys[j])
        offset = np.int32(np.uint64(hashed) * np.uint64(widths[j]) >> np.uint64(32))
        offset = np.int32(offset + turns[j])
        places[j] = np.int32(starts[j] + offset - (widths[j] if offset >= widths[j] else np.int32(0)))


@part
def _add(x, residual, old):
    """residual += x, old := what it was; return the bits of the largest magnitude among the sums."""
    top = np.int32(0)
    for j in range(x.size):
        old[j] = residual[j]
        value = np.float32(x[j] + residual[j])
        residual[j] = value
        top = max(top, np.int32(value.view(np.int32) & MAGNITUDE))
    return top


@loop
def _spoil(block, residual, old, starts, widths, value):
    """Send NaN for the strata of a block that hold NaN or Inf; their residual becomes what it was."""
    for j in range(value.size):
        stop = starts[j] + widths[j]
        if not np.isfinite(block[starts[j] : stop]).all():
            value[j] = NAN
            if residual is not None:
                residual[starts[j] : stop] = old[starts[j] : stop]


@loop
def _take(block, residual, old, top, starts, widths, places, exact, value):
    """Write to `value` what a block sends; `exact`: nothing is lost of it."""
    for j in range(value.size):
        value[j] = block[places[j]]
    if top >= INFINITY_BITS:
        _spoil(block, residual, old, starts, widths, value)
    if residual is not None and exact:
        for j in range(value.size):
            if top < INFINITY_BITS or np.isfinite(value[j]):
                residual[places[j]] = np.float32(0)


@loop
def randomk_take(x, prologue, residual, number, size, starts, widths, keys, turns, exact, value, begin, end):
    """Write to `value` ([k]) what blocks of `size` values send; the residual becomes x + residual, or 0 there if `exact`."""
    widest()
    lanes = starts.size
    places, scratch, old = np.empty(lanes, np.int32), np.empty(size, np.float32), np.empty(size, np.float32)
    for b in range(begin, end):
        o = b * size
        sent = value[b * lanes : (b + 1) * lanes]
        _place(number + b * lanes, starts, widths, keys, turns, places)
        fetch(residual, o + AHEAD, size)
        block = block_of(x, prologue, None, o, size, scratch)
        if residual is None:
            _take(block, None, old, top_of(block, size), starts, widths, places, exact, sent)
        else:
            rb = residual[o : o + size]
            _take(rb, rb, old, _add(block, rb, old), starts, widths, places, exact, sent)


@loop
def randomk_settle(x, prologue, residual, number, size, starts, widths, keys, turns, value, decoded, begin, end):
    """Set the residual of sent values to value - decoded; it keeps its old value where that is not finite."""
    widest()
    lanes = starts.size
    places = np.empty(lanes, np.int32)
    for b in range(begin, end):
        _place(number + b * lanes, starts, widths, keys, turns, places)
        for j in range(lanes):
            sent, got, at = value[b * lanes + j], decoded[b * lanes + j], b * size + places[j]
            if np.isnan(sent):
                continue
            if np.isfinite(sent - got):
                residual[at] = sent - got
            elif not np.isnan(got):
                residual[at] = sent - value_of(x, prologue, at)
            else:  # NaN in the same block of the inner codec has spoilt it
                for i in range(widths[j]):
                    place = b * size + starts[j] + i
                    residual[place] -= value_of(x, prologue, place)


@part
def _put(block, places, value, share):
    """Write the values of a block to their places, times `share`, and 0 elsewhere."""
    block[:] = np.float32(0)
    for j in range(places.size):
        block[places[j]] = value[j] * share


@part
def _fill(block, starts, widths, value):
    """Fill with NaN the strata of a block that have sent it."""
    for j in range(value.size):
        if np.isnan(value[j]):
            block[starts[j] : starts[j] + widths[j]] = NAN


@part
def _mean_block(value, b, number, starts, widths, keys, turns, alike, places, block):
    """Write to `block` the mean of block `b` of W payloads, and to `places` where the last of them has its values.

    `randomk_mean` has these lines, too, and gives the same bytes. It does not call this function, since it would take half as
    long again.
    """
    lanes, W = starts.size, value.shape[0]
    share = np.float32(1.0 / W)
    bad = False
    for w in range(W):
        sent = value[w, b * lanes : (b + 1) * lanes]
        if w == 0 or not alike:
            _place(number + b * lanes, starts, widths, keys[w], turns[w], places)
        if w == 0:
            _put(block, places, sent, share)
        else:
            for j in range(lanes):
                block[places[j]] += sent[j] * share
        for j in range(lanes):
            bad |= np.isnan(sent[j])
    if bad:
        for w in range(W):
            _fill(block, starts, widths, value[w, b * lanes : (b + 1) * lanes])


@loop
def randomk_mean(value, number, size, starts, widths, keys, turns, alike, out, begin, end):
    """Write to `out` the mean of W payloads, whose values are `value` ([W, k]); `alike`: all have one draw."""
    widest()
    lanes, W = starts.size, value.shape[0]
    share = np.float32(1.0 / W)
    places, block = np.empty(lanes, np.int32), np.empty(size, np.float32)
    for b in range(begin, end):
        bad = False
        for w in range(W):
            sent = value[w, b * lanes : (b + 1) * lanes]
            if w == 0 or not alike:
                _place(number + b * lanes, starts, widths, keys[w], turns[w], places)
            if w == 0:
                _put(block, places, sent, share)
            else:
                for j in range(lanes):
                    block[places[j]] += sent[j] * share
            for j in range(lanes):
                bad |= np.isnan(sent[j])
        if bad:
            for w in range(W):
                _fill(block, starts, widths, value[w, b * lanes : (b + 1) * lanes])
        put_block(out, b * size, block, size)
    settle_streams()


@loop
def randomk_recode(
    value, number, size, starts, widths, keys, turns, alike, residual, key, turn, exact, taken, begin, end
):
    """Write to `taken` ([k]) what the mean of W payloads (plus residual) sends by the draw of `key` and `turn`: the middle of
    two_shot; the mean itself is never stored."""
    widest()
    lanes = starts.size
    places, block, old = np.empty(lanes, np.int32), np.empty(size, np.float32), np.empty(size, np.float32)
    for b in range(begin, end):
        o = b * size
        fetch(residual, o + AHEAD, size)
        _mean_block(value, b, number, starts, widths, keys, turns, alike, places, block)
        _place(number + b * lanes, starts, widths, key, turn, places)
        sent = taken[b * lanes : (b + 1) * lanes]
        if residual is None:
            _take(block, None, old, top_of(block, size), starts, widths, places, exact, sent)
        else:
            rb = residual[o : o + size]
            _take(rb, rb, old, _add(block, rb, old), starts, widths, places, exact, sent)


@loop
def _all_finite(value, decoded):
    """Tell whether all errors of the values that are sent are finite."""
    top = np.int32(0)
    for j in range(value.size):
        top = max(top, np.int32(np.float32(value[j] - decoded[j]).view(np.int32) & MAGNITUDE))
    return top < INFINITY_BITS


@loop
def randomk_clear(x, number, size, starts, widths, keys, turns, begin, end):
    """Set the values that were sent to 0."""
    widest()
    lanes = starts.size
    places = np.empty(lanes, np.int32)
    for b in range(begin, end):
        _place(number + b * lanes, starts, widths, keys, turns, places)
        block = x[b * size : (b + 1) * size]
        for j in range(lanes):
            block[places[j]] = np.float32(0)


Ints = npt.NDArray[np.int32]


class Part(NamedTuple):
    """All full blocks of n values, or the shorter last one.

    `x` says where its values lie among the n, `value` where those that it sends lie among all that are sent. A block has
    `size` values, and strata that begin at `starts` and are `widths` long.
    """

    x: slice
    value: slice
    size: int
    starts: Ints
    widths: Ints

    def drawn(self, draw: int) -> tuple[int, int, Ints, Ints, npt.NDArray[np.uint32], Ints]:
        """Return what the loops need to find the places of a draw: what hashes are mixed with, how far a turn has come."""
        widths = self.widths.astype(np.int64)
        key = (draw // widths).astype(np.uint32)
        key = (key ^ key >> np.uint32(16)) * np.uint32(0x21F0AAAD)
        key = (key ^ key >> np.uint32(15)) * np.uint32(0x735A2D97)
        keys = key ^ key >> np.uint32(15)
        return self.value.start, self.size, self.starts, self.widths, keys, (draw % widths).astype(np.int32)


def _parts(codec: Any, n: int) -> list[Part]:
    """Return the parts of n values; none is empty."""
    found, full = [], n // codec.block * codec.block
    for first, stop, size, strata in ((0, full, codec.block, STRATA), (full, n, n - full, codec.kept(n - full))):
        if stop > first:
            cuts = np.arange(strata + 1, dtype=np.int64) * size // strata
            starts, widths = cuts[:-1].astype(np.int32), np.diff(cuts).astype(np.int32)
            found.append(Part(slice(first, stop), slice(codec.kept(first), codec.kept(stop)), size, starts, widths))
    return found


def encode(codec: Any, x: Tensor, residual: Tensor | None, prologue: Any, payload: Tensor) -> None:
    """`encode` of the table. The inner codec encodes the values that are sent."""
    k, exact = codec.kept(x.numel()), not codec.values.lossy
    value, coded = _begun(codec, x.numel(), payload)
    parts, sent = _parts(codec, x.numel()), value.numpy()
    given = [
        (values(x[p.x]), steps(prologue and prologue[p.x]), floats(None if residual is None else residual[p.x]))
        for p in parts
    ]
    for p, of in zip(parts, given, strict=True):
        in_slices(randomk_take, p.x.stop - p.x.start, p.size, *of, *p.drawn(codec.draw), exact, sent[p.value])
    if exact:
        return
    codec.values.encode(value, coded)
    if residual is not None:
        decoded = codec.values.decode(coded, k).numpy()
        for p, of in zip(parts, given, strict=True):
            _settle(codec, p, *of, sent, decoded)


def mean(codec: Any, payloads: Tensor, count: int, out: Tensor) -> None:
    """`mean` of the table."""
    for p, given in _given(codec, payloads, count, out.numel()):
        in_slices(randomk_mean, p.x.stop - p.x.start, p.size, *given, out.numpy()[p.x])


def recode(codec: Any, payloads: Tensor, n: int, count: int, residual: Tensor | None, payload: Tensor) -> None:
    """`recode` of the table."""
    value, coded = _begun(codec, n, payload)
    exact, sent, memory = not codec.values.lossy, value.numpy(), floats(residual)
    for p, given in _given(codec, payloads, count, n):
        rest = None if memory is None else memory[p.x]
        into = rest, *p.drawn(codec.draw)[-2:], exact, sent[p.value]
        in_slices(randomk_recode, p.x.stop - p.x.start, p.size, *given, *into)
    if exact:
        return
    codec.values.encode(value, coded)
    if memory is not None:
        decoded, x = codec.values.decode(coded, codec.kept(n)).numpy(), memory
        if not _all_finite(sent, decoded):  # then the mean is needed again
            again = torch.empty(n, dtype=torch.float32, device="cpu")
            mean(codec, payloads, count, again)
            x = again.numpy()
        for p in _parts(codec, n):
            _settle(codec, p, x[p.x], None, memory[p.x], sent, decoded)


def _begun(codec: Any, n: int, payload: Tensor) -> tuple[Tensor, Tensor]:
    """Write the head of a payload; return float32 [k] for the values that are sent, and the bytes that hold their code."""
    payload.numpy()[:HEAD] = np.frombuffer(codec.draw.to_bytes(HEAD, "little"), np.uint8)
    coded = payload[HEAD:]
    if codec.values.lossy:
        return torch.empty(codec.kept(n), dtype=torch.float32, device="cpu"), coded
    return coded.view(torch.float32), coded


def _settle(codec: Any, p: Part, x: Any, prologue: Any, residual: Any, sent: Any, decoded: Any) -> None:
    """Set the residual of what a part sends to what is lost of it."""
    given = x, prologue, residual, *p.drawn(codec.draw), sent[p.value], decoded[p.value]
    in_slices(randomk_settle, p.x.stop - p.x.start, p.size, *given)


def _given(codec: Any, payloads: Tensor, count: int, n: int) -> Iterator[tuple[Part, tuple[Any, ...]]]:
    """Yield the parts of n values, and what a loop is given of each to find its mean."""
    rows, k = payloads.view(count, -1), codec.kept(n)
    if codec.values.lossy:
        decoded = torch.empty(count, k, dtype=torch.float32, device="cpu")
        for row, to in zip(rows, decoded, strict=True):
            codec.values.decode(row[HEAD:], k, to)
        value = decoded.numpy()
    else:
        value = rows.view(torch.float32)[:, HEAD // 4 :].numpy()
    draws = [_draw_of(row) for row in rows]
    for p in _parts(codec, n):
        keys, turns = (np.stack(rows) for rows in zip(*(p.drawn(draw)[-2:] for draw in draws), strict=True))
        yield p, (value[:, p.value], p.value.start, p.size, p.starts, p.widths, keys, turns, len(set(draws)) == 1)


def clear(codec: Any, payload: Tensor, values: Tensor) -> None:
    """`clear` of the table."""
    target, draw = values.numpy(), _draw_of(payload)
    for p in _parts(codec, values.numel()):
        in_slices(randomk_clear, p.x.stop - p.x.start, p.size, target[p.x], *p.drawn(draw))


def _draw_of(payload: Tensor) -> int:
    """Return the number by which a payload was drawn."""
    return int.from_bytes(payload[:HEAD].numpy().tobytes(), "little")
