"""Loops of `rotate`: Hadamard's transform of a block in the L1 cache, two steps in a pass.

A few hundred kilobytes at a time are rotated and then coded by the inner codec while they are in the L2 cache, so the gradient
itself is read once.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from commpress.kernels.compiled import loop, part
from commpress.kernels.cpu.arrays import Floats, floats, steps, values
from commpress.kernels.cpu.blocks import INFINITY_BITS, MAGNITUDE, NAN, block_of
from commpress.kernels.cpu.instructions import widest
from commpress.kernels.cpu.slices import in_slices

SHARED_SHA256 = "5d1d88ea2ebdd3a9"
"""The hash of `blocks.py` and `instructions.py`, which are compiled in: Numba's cache checks only this file's time stamp."""
ROTATED = 1024
QUARTER = ROTATED // 4
Planes = list[tuple[slice, slice]]
"""The planes of a chunk's payload, each with two places: in the payload of all values, and in that of the chunk alone."""
CHUNK = 128 * ROTATED
"""The number of values that are rotated before they are coded."""


@part
def _four(a, b, c, d):
    """Return two steps of the transform of four values."""
    ab, cd, a_b, c_d = a + b, c + d, a - b, c - d
    return ab + cd, a_b + c_d, ab - cd, a_b - c_d


@part
def _finite(value):
    """Return a value if it is finite, else the one NaN."""
    return value if np.int32(np.float32(value).view(np.int32) & MAGNITUDE) < INFINITY_BITS else NAN


@part
def _first_steps(x, factors, out):
    """Multiply by `factors`, and take the steps 16 and 32."""
    for o in range(0, ROTATED, 64):
        a, b, c, d = x[o : o + 16], x[o + 16 : o + 32], x[o + 32 : o + 48], x[o + 48 : o + 64]
        p, q, r, s = out[o : o + 16], out[o + 16 : o + 32], out[o + 32 : o + 48], out[o + 48 : o + 64]
        f, g, h, i = factors[o : o + 16], factors[o + 16 : o + 32], factors[o + 32 : o + 48], factors[o + 48 : o + 64]
        for j in range(16):
            p[j], q[j], r[j], s[j] = _four(a[j] * f[j], b[j] * g[j], c[j] * h[j], d[j] * i[j])


@part
def _steps(x, step):
    """Take the steps `step`, which is at least 64, and 2 `step`, in place."""
    for g in range(QUARTER // step):
        o = 4 * step * g
        a, b = x[o : o + step], x[o + step : o + 2 * step]
        c, d = x[o + 2 * step : o + 3 * step], x[o + 3 * step : o + 4 * step]
        for j in range(step):
            a[j], b[j], c[j], d[j] = _four(a[j], b[j], c[j], d[j])


@part
def _deal(x, out):
    """Take the steps 1 and 2, and deal out their results to the quarters of `out`."""
    p, q, r, s = out[:QUARTER], out[QUARTER : 2 * QUARTER], out[2 * QUARTER : 3 * QUARTER], out[3 * QUARTER :]
    for j in range(QUARTER):
        p[j], q[j], r[j], s[j] = _four(x[4 * j], x[4 * j + 1], x[4 * j + 2], x[4 * j + 3])


@part
def _collect(x, out):
    """Take two steps between the quarters of `x`, and collect their results to neighbours."""
    a, b, c, d = x[:QUARTER], x[QUARTER : 2 * QUARTER], x[2 * QUARTER : 3 * QUARTER], x[3 * QUARTER :]
    for j in range(QUARTER):
        out[4 * j], out[4 * j + 1], out[4 * j + 2], out[4 * j + 3] = _four(a[j], b[j], c[j], d[j])


@part
def _last(x, factors, out):
    """out := x * factors, or the one NaN for what is not finite; `out` may be `x`."""
    for j in range(ROTATED):
        out[j] = _finite(x[j] * factors[j])


@part
def _turn(x, factors, ones, one, other, out):
    """Write the rotation of a full block to `out`; `one` and `other` are room for a block."""
    _first_steps(x, factors, one)
    _steps(one, 64)
    _steps(one, 256)
    _deal(one, other)
    _deal(other, out)
    _last(out, ones, out)


@part
def _turn_back(x, factors, ones, one, other):
    """Rotate a full block back, in place."""
    _collect(x, one)
    _collect(one, other)
    _first_steps(other, ones, one)
    _steps(one, 64)
    _steps(one, 256)
    _last(one, factors, x)


@loop
def _turn_rest(x, signs, back):
    """Rotate a rest that is shorter than a block, in place: the largest power of two first."""
    o, size = 0, ROTATED // 2
    while size >= 2:
        if x.size & size:
            piece, scale = x[o : o + size], np.float32(np.float64(size) ** -0.5)
            for j in range(0 if back else size):
                piece[j] *= signs[j] * scale
            step = 1
            while step < size:
                for j in range(size):
                    if j & step == 0:
                        a, b = piece[j], piece[j + step]
                        piece[j], piece[j + step] = a + b, a - b
                step *= 2
            for j in range(size):
                piece[j] = _finite(piece[j] * (signs[j] * scale) if back else piece[j])
            o += size
        size //= 2


@loop
def rotate_forth(x, prologue, residual, signs, factors, total, out):
    """Write to `out` the rotation of x as it is coded; with a residual or a prologue `total` becomes what was rotated."""
    widest()
    one, other, ones = np.empty(ROTATED, np.float32), np.empty(ROTATED, np.float32), np.ones(ROTATED, np.float32)
    full = x.size // ROTATED
    for b in range(full):
        o = b * ROTATED
        block = block_of(x, prologue, residual, o, ROTATED, total[o : o + ROTATED])
        _turn(block, factors, ones, one, other, out[o : o + ROTATED])
    o = full * ROTATED
    rest = out[o : x.size]
    rest[:] = block_of(x, prologue, residual, o, x.size - o, total[o : x.size])
    _turn_rest(rest, signs, False)


@part
def _settle(total, decoded, residual):
    """Set the residual to total - decoded; it keeps its old value where that is not finite."""
    for j in range(residual.size):
        lost = np.float32(total[j] - decoded[j])
        finite = np.int32(lost.view(np.int32) & MAGNITUDE) < INFINITY_BITS
        residual[j] = lost if finite else residual[j]


@loop
def rotate_back(x, signs, factors, total, residual):
    """Rotate x back, in place; a residual becomes total - x."""
    widest()
    one, other, ones = np.empty(ROTATED, np.float32), np.empty(ROTATED, np.float32), np.ones(ROTATED, np.float32)
    full = x.size // ROTATED
    for b in range(full):
        o = b * ROTATED
        block = x[o : o + ROTATED]
        _turn_back(block, factors, ones, one, other)
        if residual is not None:
            _settle(total[o : o + ROTATED], block, residual[o : o + ROTATED])
    o = full * ROTATED
    _turn_rest(x[o:], signs, True)
    if residual is not None:
        _settle(total[o : x.size], x[o:], residual[o : x.size])


def _tables(codec: Any) -> tuple[Floats, Floats]:
    """The sign of each value of a block, and what the values of a full block are multiplied by."""
    signs: Floats = codec.signs.numpy()
    return signs, signs * np.float32(ROTATED**-0.5)


def _chunks(codec: Any, n: int, begin: int, end: int) -> Iterator[tuple[slice, Planes]]:
    """The chunks from `begin` to `end` of n values, and their planes."""
    inner = codec.values
    for start in range(begin * CHUNK, min(n, end * CHUNK), CHUNK):
        m = min(CHUNK, n - start)
        whole, before, own = (inner.planes(size) for size in (n, start, m))
        yield (
            slice(start, start + m),
            [
                (slice(w.start + b.stop - b.start, w.start + b.stop - b.start + o.stop - o.start), o)
                for w, b, o in zip(whole, before, own, strict=True)
            ],
        )


def encode(codec: Any, x: Tensor, residual: Tensor | None, prologue: Any, payload: Tensor) -> None:
    """`encode` of the table. The inner codec encodes the rotated values."""
    in_slices(_encode, x.numel(), CHUNK, codec, x, residual, prologue, payload)


def mean(codec: Any, payloads: Tensor, count: int, out: Tensor) -> None:
    """`mean` of the table: rotated back once."""
    in_slices(_mean, out.numel(), CHUNK, codec, payloads, count, out)


def recode(codec: Any, payloads: Tensor, n: int, count: int, residual: Tensor | None, payload: Tensor) -> None:
    """`recode` of the table: a chunk's mean is rotated back, and again with the residual, in the L2 cache. The rotation of the
    mean as it was summed would do without a residual, but for its rounding: the bytes would be others."""
    in_slices(_recode, n, CHUNK, codec, payloads, n, count, residual, payload)


def _encode(
    codec: Any, x: Tensor, residual: Tensor | None, prologue: Any, payload: Tensor, begin: int, end: int
) -> None:
    coder = _Coder(codec, x.numel(), 1)
    for at, planes in _chunks(codec, x.numel(), begin, end):
        coder.encode(x[at], None if residual is None else residual[at], prologue and prologue[at], payload, planes)


def _mean(codec: Any, payloads: Tensor, count: int, out: Tensor, begin: int, end: int) -> None:
    coder = _Coder(codec, out.numel(), count)
    for at, planes in _chunks(codec, out.numel(), begin, end):
        coder.mean(payloads, planes, out[at])


def _recode(
    codec: Any, payloads: Tensor, n: int, count: int, residual: Tensor | None, payload: Tensor, begin: int, end: int
) -> None:
    coder = _Coder(codec, n, count)
    between = torch.empty(min(n, CHUNK), dtype=torch.float32, device="cpu")
    for at, planes in _chunks(codec, n, begin, end):
        mean_of_it = between[: at.stop - at.start]
        coder.mean(payloads, planes, mean_of_it)
        coder.encode(mean_of_it, None if residual is None else residual[at], None, payload, planes)


class _Coder:
    """Codes one chunk of n values after the other, in the same memory. `count` payloads make a mean."""

    def __init__(self, codec: Any, n: int, count: int) -> None:
        self.inner, self.count, most = codec.values, count, min(n, CHUNK)
        self.tables = _tables(codec)
        self.rotated, self.total = torch.empty(2, most, dtype=torch.float32, device="cpu")
        self.coded = torch.empty(count * self.inner.nbytes(most), dtype=torch.uint8, device="cpu")

    def encode(self, x: Tensor, residual: Tensor | None, prologue: Any, payload: Tensor, planes: Planes) -> None:
        """Write the code of a chunk to its planes of the whole payload."""
        m, rest, total = x.numel(), floats(residual), self.total.numpy()
        z, own = self.rotated[:m], self.coded[: self.inner.nbytes(m)]
        rotate_forth(values(x), steps(prologue), rest, *self.tables, total, z.numpy())
        self.inner.encode(z, own)
        for place, plane in planes:
            payload.numpy()[place] = own.numpy()[plane]
        if rest is not None:
            self.inner.decode(own, m, z)
            rotate_back(z.numpy(), *self.tables, total, rest)

    def mean(self, payloads: Tensor, planes: Planes, out: Tensor) -> None:
        """Write the mean of a chunk to `out`."""
        m, given = out.numel(), payloads.view(self.count, -1).numpy()
        rows = self.coded[: self.count * self.inner.nbytes(m)].view(self.count, -1)
        for place, plane in planes:
            rows.numpy()[:, plane] = given[:, place]
        self.inner.mean(rows.view(-1), m, self.count, out)
        rotate_back(out.numpy(), *self.tables, None, None)
