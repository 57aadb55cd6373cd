"""Kernels of `randomk`: a program has GROUP strata, one behind the other. The draw is in `comm/codecs/random_k.py`.

A program reads all values of its strata into registers and looks for NaN and Inf. Without any, all that is left is one store
of a residual, one gather and one scatter; with some, it goes through its strata once more: one by one if they are long, else
side by side (GROUP is at least SIDE then). A stratum that is too long for registers (FITS is False) is a program's only one,
and read twice.

Strata start anywhere, so the first and the last 8 values of a program are read apart: the others are accesses of 16 bytes.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from commpress.kernels.triton.blocks import (
    INFINITY_BITS,
    is_finite,
    magnitude_bits,
    nan_like,
    read,
    row_start,
    total,
    write,
)
from commpress.kernels.triton.blocks import with_prologue as value_of
from commpress.kernels.triton.launch import counting, launch, steps, words

STRATA: tl.constexpr = tl.constexpr(64)
CHUNK: tl.constexpr = tl.constexpr(1024)
EDGE: tl.constexpr = tl.constexpr(8)
SIDE: tl.constexpr = tl.constexpr(32)
HEAD = 8
LARGEST = 4096
"""The number of values that a program holds in registers."""
LANES = 512
"""The largest number of strata of a program."""


@triton.jit
def _mix(word):
    """Hash 32 bits to 32 others."""
    word = (word ^ (word >> 16)) * 0x21F0AAAD
    word = (word ^ (word >> 15)) * 0x735A2D97
    return word ^ (word >> 15)


@triton.jit
def _turn_of(draw, width):
    """For strata of this width: what hashes are mixed with in a draw, and how far its turn has come."""
    wide = width.to(tl.int64)
    turn = draw // wide
    at = draw - turn * wide
    turn, at = tl.where(at < 0, turn - 1, turn), tl.where(at < 0, at + wide, at)
    return _mix(turn.to(tl.uint32)), at.to(tl.int32)


@triton.jit
def _strata(lane, size, strata):
    """Where strata start, counted like `lane` from the start of a block, and their widths. Blocks have `size` values."""
    least, more = size // strata, size % strata
    block = lane // strata
    j = lane - block * strata
    cut = j * more // strata
    return block.to(tl.int64) * size + j * least + cut, least + (j + 1) * more // strata - cut


@triton.jit
def _places(number, start, width, size, strata, draw):
    """Where strata send their values from; `number` counts strata from the start of the tensor."""
    least = size // strata
    key, turn = _turn_of(draw, least)
    wide_key, wide_turn = _turn_of(draw, least + 1)
    wide = width > least
    hashed = _mix(number.to(tl.uint32) * 0x5F356495 ^ tl.where(wide, wide_key, key))
    offset = (hashed.to(tl.uint64) * width.to(tl.uint64) >> 32).to(tl.int32) + tl.where(wide, wide_turn, turn)
    return start + tl.where(offset >= width, offset - width, offset)


@triton.jit
def _share_of(program, block, blocks, rest, rest_strata, GROUP: tl.constexpr):
    """Return a program's share: the size of its blocks and how many strata they have; where the block of its first stratum
    starts, the number of that stratum among all, and in its block; how many strata are the program's."""
    full = blocks.to(tl.int64) * STRATA
    programs = (full + GROUP - 1) // GROUP
    whole = program < programs
    size, strata = tl.where(whole, block, rest).to(tl.int32), tl.where(whole, STRATA, rest_strata).to(tl.int32)
    first = tl.where(whole, program, program - programs) * GROUP
    origin = tl.where(whole, 0, blocks.to(tl.int64) * block) + first // strata * size
    left = tl.minimum(tl.where(whole, full, rest_strata) - first, GROUP).to(tl.int32)
    return size, strata, origin, tl.where(whole, 0, full) + first, (first % strata).to(tl.int32), left


@triton.jit
def _whole(lo, hi):
    """Where the whole groups of EDGE values from `lo` up to `hi` begin and end."""
    return tl.multiple_of((lo + EDGE - 1) // EDGE * EDGE, EDGE), tl.multiple_of(hi // EDGE * EDGE, EDGE)


@triton.jit
def _edges(lo, hi):
    """The values before and behind the whole groups, and which are there: EDGE places each."""
    low, high = _whole(lo, hi)
    i = tl.arange(0, 2 * EDGE)
    at = tl.where(i < EDGE, lo + i, tl.maximum(low, high) + i - EDGE)
    return at, at < tl.where(i < EDGE, tl.minimum(low, hi), hi)


@triton.jit
def _fill(out, lo, hi, VALUE: tl.constexpr):
    """out[lo : hi] := VALUE."""
    low, high = _whole(lo, hi)
    for at in range(low, high, CHUNK):
        place = tl.multiple_of(at, EDGE) + tl.arange(0, CHUNK)
        write(out + place, tl.full([CHUNK], VALUE, tl.float32), place < high)
    edge, edge_inside = _edges(lo, hi)
    write(out + edge, tl.full([2 * EDGE], VALUE, tl.float32), edge_inside)


@triton.jit
def _one_stratum(x, prologue, residual, value, number, start, width, place, EXACT: tl.constexpr):
    """Send from a stratum that may hold NaN or Inf: then it sends NaN, and its residual stays."""
    low, high = _whole(start, start + width)
    edge, edge_inside = _edges(start, start + width)
    edges, top = tl.max(magnitude_bits(total(x, prologue, residual, edge, edge_inside))), tl.zeros([CHUNK], tl.int32)
    for c in range(low, high, CHUNK):
        at = tl.multiple_of(c, EDGE) + tl.arange(0, CHUNK)
        top = tl.maximum(top, magnitude_bits(total(x, prologue, residual, at, at < high)))
    sent = total(x, prologue, residual, place, None)
    if tl.maximum(tl.max(top), edges) >= INFINITY_BITS:
        tl.store(value + number, nan_like(sent))
    else:
        tl.store(value + number, sent)
        if residual is not None:
            tl.debug_barrier()  # all have read what is written over now
            for c in range(low, high, CHUNK):
                at = tl.multiple_of(c, EDGE) + tl.arange(0, CHUNK)
                _leave(x, prologue, residual, at, at < high, place, EXACT)
            _leave(x, prologue, residual, edge, edge_inside, place, EXACT)


@triton.jit
def _leave(x, prologue, residual, at, inside, place, EXACT: tl.constexpr):
    """residual := what is coded; 0 at `place` if EXACT."""
    kept = total(x, prologue, residual, at, inside)
    if EXACT:
        kept = tl.where(at == place, 0.0, kept)
    write(residual + at, kept, inside)


@triton.jit
def _side_by_side(x, prologue, residual, value, number, start, width, place, there, EXACT: tl.constexpr):
    """Send from short strata some of which hold NaN or Inf."""
    longest, top = tl.max(tl.where(there, width, 0)), tl.zeros(width.shape, tl.int32)
    for c in range(0, longest):
        inside = there & (c < width)
        top = tl.maximum(top, magnitude_bits(total(x, prologue, residual, start + c, inside)))
    finite, sent = top < INFINITY_BITS, total(x, prologue, residual, place, there)
    write(value + number, tl.where(finite, sent, nan_like(sent)), there)
    if residual is not None:
        tl.debug_barrier()  # all have read what is written over now
        for c in range(0, longest):
            kept = total(x, prologue, residual, start + c, there & (c < width))
            if EXACT:
                kept = tl.where(start + c == place, 0.0, kept)
            write(residual + start + c, kept, there & finite & (c < width))


@triton.jit
def _with_nan(
    x,
    prologue,
    residual,
    value,
    draw,
    size,
    strata,
    origin,
    number,
    lane,
    left,
    EXACT: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Send from strata that may hold NaN or Inf."""
    if GROUP >= SIDE:
        index = tl.arange(0, GROUP)
        start, width = _strata(lane + index, size, strata)
        place = origin + _places(number + index, start, width, size, strata, draw)
        there = index < left
        _side_by_side(x, prologue, residual, value, number + index, origin + start, width, place, there, EXACT)
    else:
        for i in range(0, left):
            start, width = _strata(lane + i, size, strata)
            place = origin + _places(number + i, start, width, size, strata, draw)
            _one_stratum(x, prologue, residual, value, number + i, origin + start, width, place, EXACT)


@triton.jit
def _send(x, prologue, residual, value, number, place, there, EXACT: tl.constexpr):
    """Send what lies at `place`, where the residual holds the values as they are coded; `number` is that of the first."""
    at = number + tl.arange(0, place.shape[0])
    if residual is None:
        write(value + at, total(x, prologue, None, place, there), there)
    else:
        tl.debug_barrier()  # the residual is there, whoever has written it
        write(value + at, read(residual + place, there), there)
        if EXACT:
            tl.debug_barrier()
            write(residual + place, tl.zeros(place.shape, tl.float32), there)


@triton.jit
def _keep(residual, at, kept, inside):
    """residual := what is coded, if there is one."""
    if residual is not None:
        write(residual + at, kept, inside)


@counting
def _take(
    x, prologue, residual, head, value, draw, block, blocks, rest, rest_strata,
    EXACT: tl.constexpr, GROUP: tl.constexpr, FITS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Write what is sent to `value`, and the draw to `head`. The residual becomes what is coded; 0 of what is sent if EXACT."""
    program, draw = tl.program_id(0).to(tl.int64), draw.to(tl.int64)
    if program == 0:
        tl.store(head, draw.to(tl.int32))
        tl.store(head + 1, (draw >> 32).to(tl.int32))
    size, strata, origin, number, lane, left = _share_of(program, block, blocks, rest, rest_strata, GROUP)
    if FITS:
        lo, hi = origin + _strata(lane, size, strata)[0], origin + _strata(lane + left, size, strata)[0]
        low, high = _whole(lo, hi)
        at, inside = low + tl.arange(0, SIZE), low + tl.arange(0, SIZE) < high
        edge, edge_inside = _edges(lo, hi)
        kept = total(x, prologue, residual, at, inside)
        kept_edge = total(x, prologue, residual, edge, edge_inside)
        if tl.maximum(tl.max(magnitude_bits(kept)), tl.max(magnitude_bits(kept_edge))) < INFINITY_BITS:
            _keep(residual, at, kept, inside)
            _keep(residual, edge, kept_edge, edge_inside)
            index = tl.arange(0, GROUP)
            start, width = _strata(lane + index, size, strata)
            place = origin + _places(number + index, start, width, size, strata, draw)
            _send(x, prologue, residual, value, number, place, index < left, EXACT)
        else:
            _with_nan(x, prologue, residual, value, draw, size, strata, origin, number, lane, left, EXACT, GROUP)
    else:
        _with_nan(x, prologue, residual, value, draw, size, strata, origin, number, lane, left, EXACT, GROUP)


@counting
def _settle(x, prologue, residual, value, decoded, draw, block, blocks, rest, rest_strata, GROUP: tl.constexpr):
    """Set the residual of sent values to the error of their code; it keeps its old value where that is not finite."""
    program = tl.program_id(0).to(tl.int64)
    size, strata, origin, number, lane, left = _share_of(program, block, blocks, rest, rest_strata, GROUP)
    index = tl.arange(0, GROUP)
    there = index < left
    start, width = _strata(lane + index, size, strata)
    place = origin + _places(number + index, start, width, size, strata, draw.to(tl.int64))
    sent, got = read(value + number + index, there), read(decoded + number + index, there)
    lost = sent - got
    write(residual + place, lost, there & is_finite(lost))
    spoilt = there & (sent == sent) & (magnitude_bits(lost) >= INFINITY_BITS)
    if tl.max(spoilt.to(tl.int32)) > 0:
        alone = spoilt & (got == got)
        write(residual + place, sent - value_of(x, prologue, place, alone), alone)
        bad = (spoilt & (got != got)).to(tl.int32)  # NaN in the same block of the inner codec has spoilt it
        if GROUP >= SIDE:
            for c in range(0, tl.max(bad * width)):
                _forget(x, prologue, residual, origin + start + c, (bad != 0) & (c < width))
        else:
            for i in range(0, left):
                lo, many = _strata(lane + i, size, strata)
                for c in range(0, many * tl.max(tl.where(index == i, bad, 0)), CHUNK):
                    at = c + tl.arange(0, CHUNK)
                    _forget(x, prologue, residual, origin + lo + at, at < many)


@triton.jit
def _forget(x, prologue, residual, at, inside):
    """Take from the residual what was coded with it."""
    write(residual + at, read(residual + at, inside) - value_of(x, prologue, at, inside), inside)


@triton.jit
def _draw_at(heads):
    """Return the number by which a payload was drawn."""
    return (tl.load(heads + 1).to(tl.int64) << 32) | (tl.load(heads).to(tl.int64) & 0xFFFFFFFF)


@counting
def _mean(heads, head_row, values, row, W, share, out, block, blocks, rest, rest_strata, GROUP: tl.constexpr):
    """Write the mean of W payloads to `out`: zeros, and then what was sent. Rows are so many words apart."""
    program = tl.program_id(0).to(tl.int64)
    size, strata, origin, number, lane, left = _share_of(program, block, blocks, rest, rest_strata, GROUP)
    _fill(out, origin + _strata(lane, size, strata)[0], origin + _strata(lane + left, size, strata)[0], 0.0)
    index = tl.arange(0, GROUP)
    there = index < left
    start, width = _strata(lane + index, size, strata)
    draw = _draw_at(heads)
    place = _places(number + index, start, width, size, strata, draw)
    mean = read(values + number + index, there) * share
    bad = (mean != mean).to(tl.int32)
    alike = 0
    for w in range(1, W):
        value = read(values + row_start(w, row) + number + index, there)
        bad |= (value != value).to(tl.int32)
        mean += value * share
        alike += (_draw_at(heads + row_start(w, head_row)) == draw).to(tl.int32)
    tl.debug_barrier()  # the zeros are there
    if alike == W - 1:
        write(out + origin + place, mean, there)
    else:
        for w in range(0, W):
            place = _places(number + index, start, width, size, strata, _draw_at(heads + row_start(w, head_row)))
            mean = tl.zeros([GROUP], tl.float32)
            for v in range(0, W):
                other = _places(number + index, start, width, size, strata, _draw_at(heads + row_start(v, head_row)))
                value = read(values + row_start(v, row) + number + index, there)
                mean += tl.where(other == place, value * share, 0.0)
            write(out + origin + place, mean, there)
    if tl.max(bad) > 0:
        tl.debug_barrier()
        if GROUP >= SIDE:
            for c in range(0, tl.max(bad * width)):
                write(out + origin + start + c, nan_like(mean), (bad != 0) & (c < width))
        else:
            for i in range(0, left):
                if tl.max(tl.where(index == i, bad, 0)) > 0:
                    lo, many = _strata(lane + i, size, strata)
                    _fill(out, origin + lo, origin + lo + many, float("nan"))


@counting
def _clear(head, out, block, blocks, rest, rest_strata, GROUP: tl.constexpr):
    """Set to 0 what was sent."""
    program = tl.program_id(0).to(tl.int64)
    size, strata, origin, number, lane, left = _share_of(program, block, blocks, rest, rest_strata, GROUP)
    index = tl.arange(0, GROUP)
    start, width = _strata(lane + index, size, strata)
    place = _places(number + index, start, width, size, strata, _draw_at(head))
    write(out + origin + place, tl.zeros([GROUP], tl.float32), index < left)


def encode(codec: Any, x: Tensor, residual: Tensor | None, prologue: Any, payload: Tensor) -> None:
    """`encode` of the table. The inner codec encodes the values that are sent."""
    n, exact, coded = x.numel(), not codec.values.lossy, payload[HEAD:]
    k = codec.kept(n)
    value = words(coded) if exact else torch.empty(k, dtype=torch.float32, device=x.device)
    group, span = _group(codec)
    constants = {"EXACT": exact, "FITS": span <= LARGEST, "SIZE": triton.next_power_of_2(min(span, LARGEST))}
    source = x, steps(prologue), residual
    _launch(codec, n, group, _take, *source, payload[:HEAD].view(torch.int32), value, codec.draw, **constants)
    if exact:
        return
    codec.values.encode(value, coded)
    if residual is not None:
        _launch(codec, n, group, _settle, *source, value, codec.values.decode(coded, k), codec.draw)


def mean(codec: Any, payloads: Tensor, count: int, out: Tensor) -> None:
    """`mean` of the table."""
    n = out.numel()
    k, head_row = codec.kept(n), codec.nbytes(n) // 4
    if codec.values.lossy:
        value, row = torch.empty(count, k, dtype=torch.float32, device=out.device), k
        for payload, to in zip(payloads.view(count, -1), value, strict=True):
            codec.values.decode(payload[HEAD:], k, to)
    else:
        value, row = words(payloads)[HEAD // 4 :], head_row
    source = payloads.view(torch.int32), head_row, value, row, count, 1.0 / count
    _launch(codec, n, _group(codec)[0], _mean, *source, out)


def clear(codec: Any, payload: Tensor, values: Tensor) -> None:
    """`clear` of the table."""
    _launch(codec, values.numel(), LANES, _clear, payload[:HEAD].view(torch.int32), values)


def _group(codec: Any) -> tuple[int, int]:
    """How many strata a program has that looks at their values, and how many values these are at most."""
    group = LANES
    while group > 1 and group * codec.block > 64 * LARGEST:
        group //= 2
    return group, triton.cdiv(group * codec.block, 64)


def _launch(codec: Any, n: int, group: int, kernel: Any, *arguments: Any, **constants: Any) -> None:
    blocks, rest = divmod(n, codec.block)
    cut = codec.block, blocks, rest, codec.kept(rest)
    programs = triton.cdiv(64 * blocks, group) + triton.cdiv(cut[3], group)
    launch(kernel, programs, *arguments, *cut, GROUP=group, **constants)
