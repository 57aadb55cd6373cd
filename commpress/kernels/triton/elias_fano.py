"""Kernels that code ascending positions (Elias 1974; Fano 1971). The layout is in `comm/codecs/topk.py`.

Written: a program has some positions, each of which sets its high bit by an atomic operation, and some words of low bits,
which it gathers from the positions that reach into them. Read: position i is that of the i-th high bit that is set, so tiles
of bits are counted and the counts summed up, and each tile then knows which positions are its own.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from commpress.kernels.triton.launch import counting, launch

ENTRIES = 512
MARKS = 1024
"""The number of high bits that a program reads."""


@counting
def _put(index, kept, low_bits, low_words, high_at, words, ENTRIES: tl.constexpr):
    """Write the positions that are kept to the zeroed `words`."""
    k = tl.load(kept)
    first = tl.program_id(0).to(tl.int64) * ENTRIES
    i = first + tl.arange(0, ENTRIES)
    inside = i < k
    bit = (tl.load(index + i, inside, other=0) >> low_bits) + i
    one = tl.full([ENTRIES], 1, tl.int32) << (bit & 31).to(tl.int32)
    tl.atomic_or(words + high_at + (bit >> 5), one, inside, sem="relaxed")
    if first < low_words:  # there are no more words than positions
        tl.store(words + i, _low_word(index, i, k, low_bits).to(tl.int32), i < low_words)


@triton.jit
def _low_word(index, w, k, low_bits):
    """Words `w` of the low bits, in the lower half of int64."""
    first = w * 32 // low_bits
    word = w * 0
    for j in range(32 // low_bits + 2):
        start = (first + j) * low_bits - w * 32  # of its bits within the word; below 0 for what the word before began
        inside = (first + j < k) & (start < 32)
        low = tl.load(index + first + j, inside, other=0) & ((tl.full([1], 1, tl.int64) << low_bits) - 1)
        word |= tl.where(start >= 0, low << tl.maximum(start, 0), low >> tl.maximum(-start, 0))
    return word


@triton.jit
def _marks(high, q, bits):
    """The high bits at `q` (0 or 1), of which there are `bits`."""
    return (tl.load(high + (q >> 5), q < bits, other=0) >> (q & 31).to(tl.int32)) & 1


@counting
def _count_marks(words, row, high_at, bits, found, tiles, MARKS: tl.constexpr):
    """Count the high bits that are set in each tile of each payload."""
    payload, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    q = tile.to(tl.int64) * MARKS + tl.arange(0, MARKS)
    mark = _marks(words + payload.to(tl.int64) * row + high_at, q, bits)
    tl.store(found + tl.program_id(0), tl.sum(mark, 0))


@triton.jit
def tile_positions(words, ends, k, low_bits, high_at, bits, MARKS: tl.constexpr):
    """The positions that this program's tile of a payload marks: their numbers, they themselves, and which are there."""
    q = tl.program_id(0).to(tl.int64) * MARKS + tl.arange(0, MARKS)
    mark = _marks(words + high_at, q, bits)
    count = tl.cumsum(mark, 0)
    i = tl.load(ends + tl.program_id(0)) - tl.sum(mark, 0) + count - mark
    inside = (mark != 0) & (i < k)
    at = i * low_bits
    last = at + tl.maximum(low_bits - 1, 0)
    low = tl.load(words + (at >> 5), inside, other=0).to(tl.uint32, bitcast=True).to(tl.int64)
    next_low = tl.load(words + (last >> 5), inside, other=0).to(tl.int64) << 32  # the same word, or the one behind it
    low = ((low | next_low) >> (at & 31)) & ((tl.full([1], 1, tl.int64) << low_bits) - 1)
    return i, ((q - i) << low_bits) | low, inside


class Marks(NamedTuple):
    """Where the positions of payloads stand, all of n values."""

    words: Tensor
    """The payloads as int32, [count, words of a payload]."""
    ends: Tensor
    """int64 [count, tiles]: how many positions a payload's tiles up to this one mark."""
    arguments: tuple[int, ...]
    """What `tile_positions` takes behind `ends`."""


def put(codec: Any, index: Tensor, kept: Tensor, n: int, payload: Tensor) -> None:
    """Write positions `index` (int64 [k]) to the payload of n values: all, or none, as `kept` (int64 [1]) is k or 0."""
    k, low_bits, high_at, values_at = codec.sections(n)
    payload[:values_at].zero_()
    place = low_bits, triton.cdiv(k * low_bits, 32), high_at // 4
    launch(_put, triton.cdiv(k, ENTRIES), index, kept, *place, payload.view(torch.int32), ENTRIES=ENTRIES)


def find(codec: Any, payloads: Tensor, n: int, count: int) -> Marks:
    """Count what the tiles of `count` payloads of n values mark."""
    k, low_bits, high_at, values_at = codec.sections(n)
    bits = 8 * (values_at - high_at)
    tiles = triton.cdiv(bits, MARKS)
    words = payloads.view(torch.int32).view(count, -1)
    found = torch.empty(count, tiles, dtype=torch.int32, device=payloads.device)
    place = words.shape[1], high_at // 4, bits
    launch(_count_marks, count * tiles, words, *place, found, tiles, MARKS=MARKS)
    return Marks(words, found.cumsum(1), (k, low_bits, high_at // 4, bits))
