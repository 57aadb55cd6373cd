"""Kernels of `powersgd`: three passes over a matrix, and Gram-Schmidt. The operations are in `comm/factors.py`.

A program of `project` is one warp with a tile of x in its registers, so that each sum stays within the warp; one of
`project_back` goes down a strip of columns with four rows of p. Both leave a part of a sum for each tile or strip, which torch
adds up in one order. `expand` sums up products of its own alone. Nothing is added atomically, so equal numbers make equal bits.

The rank, the rows and the columns are numbers that the kernels get, and so is whether rows can be read 16 bytes at once, which
depends on where a bucket has the matrix. They are compiled for three widths of a tile.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from commpress.kernels.triton.blocks import INFINITY_BITS, magnitude_bits, row_start
from commpress.kernels.triton.launch import COUNTS, PAYLOADS, launch

LEAST: tl.constexpr = tl.constexpr(1e-10)
"""The share of a vector's square that must be left of it, if it is to be a direction of its own."""
TILE = 1024
"""Values of a program of `project`."""
STRIP = 1024
"""Values that a program of `project_back` holds at once."""
AREA = 2048
"""Values of a program of `expand`."""
GROUP = 4
"""Rows of p that a program of `project_back` sums up for."""
PROGRAMS = 1024
"""As many programs `project_back` is cut into, if each then has LEAST_ROWS rows of x: what they leave is little beside x."""
LEAST_ROWS = 128
CHECKED = 4096
"""Values of a factor that a program looks at for NaN and Inf."""
LENGTH = 4096
"""Values of a vector that `orthonormalize` works on at once, by as many warps as a program may have at this size."""
WARPS = 16
anywhere: Any = triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=(*PAYLOADS, "x", "residual"))
"""Makes a kernel that is compiled once for all matrices, wherever they lie."""


@triton.jit
def _place(i, j, rows, width):
    """Where values of rows `i` and columns `j` lie, and which there are."""
    at = i.to(tl.int64)[:, None] * width + j[None, :]
    return at, (i < rows)[:, None] & (j < width)[None, :]


@triton.jit
def _in(matrix, at, WORDS: tl.constexpr):
    """Pointers to values of a matrix whose rows all begin at multiples of WORDS."""
    return tl.multiple_of(matrix + at, [1, 4 * WORDS])


@triton.jit
def _weights(factors, k, length, at, inside):
    """Values `at` of row k of factors ([rank, length]); 0 where `inside` is False."""
    return tl.load(factors + row_start(k, length) + at, inside, other=0.0)


@triton.jit
def _project_tile(x, residual, q, sums, rows, columns, rank, tile, i, j, WORDS: tl.constexpr):
    width = columns // WORDS * WORDS  # the same, and known to be a multiple
    at, inside = _place(i, j, rows, width)
    value = tl.load(_in(x, at, WORDS), inside, other=0.0)
    if residual is not None:
        value += tl.load(_in(residual, at, WORDS), inside, other=0.0)
        tl.store(_in(x, at, WORDS), value, inside)
    for k in range(rank):
        sum_of_row = tl.sum(value * _weights(q, k, width, j, j < width)[None, :], 1)
        tl.store(sums + row_start(tile * rank + k, rows) + i, sum_of_row, i < rows)


@anywhere
def _project(
    x, residual, q, sums, rows, columns, rank, together, tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Add the residual to x; write q x^T of each tile's columns to sums [tiles, rank, rows]."""
    program = tl.program_id(0)
    tile = program % tiles
    i, j = program // tiles * ROWS + tl.arange(0, ROWS), tile * COLUMNS + tl.arange(0, COLUMNS)
    if together == 4:  # then all rows are read 16 bytes at once
        _project_tile(x, residual, q, sums, rows, columns, rank, tile, i, j, 4)
    else:
        _project_tile(x, residual, q, sums, rows, columns, rank, tile, i, j, 1)


@triton.jit
def _project_back_strip(
    x, p, sums, rows, columns, rank, first, last, k, strip, j, WORDS: tl.constexpr, ROWS: tl.constexpr
):
    width = columns // WORDS * WORDS
    a = tl.zeros([ROWS, j.shape[0]], tl.float32)
    b, c, d = a, a, a
    for start in range(first, last, ROWS):
        i = start + tl.arange(0, ROWS)
        at, inside = _place(i, j, rows, width)
        value = tl.load(_in(x, at, WORDS), inside, other=0.0)
        a += value * _weights(p, k, rows, i, i < rows)[:, None]
        b += value * _weights(p, tl.minimum(k + 1, rank - 1), rows, i, i < rows)[:, None]
        c += value * _weights(p, tl.minimum(k + 2, rank - 1), rows, i, i < rows)[:, None]
        d += value * _weights(p, tl.minimum(k + 3, rank - 1), rows, i, i < rows)[:, None]
    out = sums + row_start(strip * rank + k, width) + j
    tl.store(out, tl.sum(a, 0), j < width)
    if k + 1 < rank:
        tl.store(out + width, tl.sum(b, 0), j < width)
    if k + 2 < rank:
        tl.store(out + 2 * width, tl.sum(c, 0), j < width)
    if k + 3 < rank:
        tl.store(out + 3 * width, tl.sum(d, 0), j < width)


@anywhere
def _project_back(
    x, p, sums, rows, columns, rank, together, tiles, groups, height, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Write p x of each strip of `height` rows to sums [strips, rank, columns], four rows of p a program."""
    program = tl.program_id(0)
    tile, group, strip = program % tiles, program // tiles % groups, program // tiles // groups
    first, j = strip * height, tile * COLUMNS + tl.arange(0, COLUMNS)
    last = tl.minimum(first + height, rows)
    if together == 4:
        _project_back_strip(x, p, sums, rows, columns, rank, first, last, 4 * group, strip, j, 4, ROWS)
    else:
        _project_back_strip(x, p, sums, rows, columns, rank, first, last, 4 * group, strip, j, 1, ROWS)


@anywhere
def _count_wild(p, q, found, p_size, q_size, p_tiles, SIZE: tl.constexpr):
    """Write to `found`, a number a program, how many values of two factors are NaN or Inf."""
    program = tl.program_id(0)
    of_p = program < p_tiles
    at = (program - tl.where(of_p, 0, p_tiles)).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    value = tl.load(p + at, at < tl.where(of_p, p_size, 0), other=0.0)
    value += tl.load(q + at, at < tl.where(of_p, 0, q_size), other=0.0)  # of which one is 0
    tl.store(found + program, tl.sum((magnitude_bits(value) >= INFINITY_BITS).to(tl.int32)))


@triton.jit
def _expand_tile(p, q, wild, x, residual, rows, columns, rank, i, j, WORDS: tl.constexpr):
    width = columns // WORDS * WORDS
    at, inside = _place(i, j, rows, width)
    mean = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    for k in range(rank):
        mean += _weights(p, k, rows, i, i < rows)[:, None] * _weights(q, k, width, j, j < width)[None, :]
    if wild > 0:
        tl.store(_in(x, at, WORDS), tl.full(mean.shape, float("nan"), tl.float32), inside)
    else:
        if residual is not None:
            tl.store(_in(residual, at, WORDS), tl.load(_in(x, at, WORDS), inside, other=0.0) - mean, inside)
        tl.store(_in(x, at, WORDS), mean, inside)


@anywhere
def _expand(
    p, q, found, checks, x, residual, rows, columns, rank, together, tiles,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHECKS: tl.constexpr,
):  # fmt: skip
    """Write p^T q to x, and what that misses of x to the residual; NaN to all of x if `found` has any but 0."""
    wild = 0
    for start in range(0, checks, CHECKS):
        check = start + tl.arange(0, CHECKS)
        wild += tl.sum(tl.load(found + check, check < checks, other=0))
    program = tl.program_id(0)
    i, j = program // tiles * ROWS + tl.arange(0, ROWS), program % tiles * COLUMNS + tl.arange(0, COLUMNS)
    if together == 4:
        _expand_tile(p, q, wild, x, residual, rows, columns, rank, i, j, 4)
    else:
        _expand_tile(p, q, wild, x, residual, rows, columns, rank, i, j, 1)


@triton.jit
def _dots(a, b, length, SIZE: tl.constexpr):
    """The sum of products of two vectors, in float64."""
    total = tl.zeros([SIZE], tl.float64)
    for start in range(0, length, SIZE):
        at = start + tl.arange(0, SIZE)
        total += tl.load(a + at, at < length, other=0).to(tl.float64) * tl.load(b + at, at < length, other=0).to(
            tl.float64
        )
    return tl.sum(total)


@anywhere
def _orthonormalize(batch, rest, rank, length, SIZE: tl.constexpr):
    """Gram-Schmidt of one matrix's vectors by one program. `rest` [matrices, length], float64, holds what is left of one."""
    matrix = tl.program_id(0)
    rest += row_start(matrix, length)
    first = batch + row_start(matrix, length) * rank
    for k in range(rank):
        vector = first + row_start(k, length)
        before = _dots(vector, vector, length, SIZE)
        for start in range(0, length, SIZE):
            at = start + tl.arange(0, SIZE)
            tl.store(rest + at, tl.load(vector + at, at < length).to(tl.float64), at < length)
        for other in range(k):
            tl.debug_barrier()  # threads read of `rest` what others have written
            direction = first + row_start(other, length)
            along = _dots(rest, direction, length, SIZE)
            for start in range(0, length, SIZE):
                at = start + tl.arange(0, SIZE)
                share = along * tl.load(direction + at, at < length, other=0).to(tl.float64)
                tl.store(rest + at, tl.load(rest + at, at < length, other=0) - share, at < length)
        tl.debug_barrier()
        left = _dots(rest, rest, length, SIZE)
        for start in range(0, length, SIZE):
            at = start + tl.arange(0, SIZE)
            unit = tl.load(rest + at, at < length, other=0) / tl.sqrt(left)
            tl.store(vector + at, tl.where(left <= LEAST * before, 0.0, unit).to(tl.float32), at < length)
        tl.debug_barrier()


def project(x: Tensor, residual: Tensor | None, q: Tensor, p: Tensor) -> None:
    """`project` of the table."""
    (rows, columns), rank, width = x.shape, len(q), _width(x, 512)
    tiles = triton.cdiv(columns, width)
    sums = p if tiles == 1 else torch.empty(tiles, rank, rows, dtype=torch.float32, device=x.device)
    programs, size = tiles * triton.cdiv(rows, TILE // width), {"ROWS": TILE // width, "COLUMNS": width}
    launch(
        _project,
        programs,
        x,
        residual,
        q,
        sums,
        rows,
        columns,
        rank,
        _together(x, residual),
        tiles,
        **size,
        num_warps=1,
    )
    _add_up(sums, p)


def project_back(x: Tensor, p: Tensor, q: Tensor) -> None:
    """`project_back` of the table."""
    (rows, columns), rank, width = x.shape, len(q), _width(x, 128)
    tiles, groups = triton.cdiv(columns, width), triton.cdiv(rank, GROUP)
    deep, most = STRIP // width, max(1, PROGRAMS // (tiles * groups))
    height = triton.cdiv(max(LEAST_ROWS, triton.cdiv(rows, most)), deep) * deep
    strips = triton.cdiv(rows, height)
    sums = q if strips == 1 else torch.empty(strips, rank, columns, dtype=torch.float32, device=x.device)
    numbers, size = (rows, columns, rank, _together(x), tiles, groups, height), {"ROWS": deep, "COLUMNS": width}
    launch(_project_back, tiles * groups * strips, x, p, sums, *numbers, **size)
    _add_up(sums, q)


def expand(p: Tensor, q: Tensor, x: Tensor, residual: Tensor | None) -> None:
    """`expand` of the table: whether the factors are finite, which decides about all of x, stays on the device."""
    (rows, columns), rank, width = x.shape, len(q), _width(x, 128)
    p_tiles, tiles = triton.cdiv(p.numel(), CHECKED), triton.cdiv(columns, width)
    checks = p_tiles + triton.cdiv(q.numel(), CHECKED)
    found = torch.empty(checks, dtype=torch.int32, device=x.device)
    launch(_count_wild, checks, p, q, found, p.numel(), q.numel(), p_tiles, SIZE=CHECKED)
    programs, size = tiles * triton.cdiv(rows, AREA // width), {"ROWS": AREA // width, "COLUMNS": width}
    numbers = rows, columns, rank, _together(x, residual), tiles
    launch(_expand, programs, p, q, found, checks, x, residual, *numbers, **size, CHECKS=128)


def orthonormalize(batch: Tensor) -> None:
    """`orthonormalize` of the table: one launch, where plain torch has some 2 rank^2 of a few microseconds each.

    One program goes through all of a matrix's vectors. They are short beside the matrix, and lie in the cache.
    """
    matrices, rank, length = batch.shape
    rest = torch.empty(matrices, length, dtype=torch.float64, device=batch.device)
    launch(_orthonormalize, matrices, batch, rest, rank, length, SIZE=LENGTH, num_warps=WARPS)


def _width(x: Tensor, widest: int) -> int:
    """Return how many columns of x a tile has: one of three widths, the smallest that is wide enough or `widest`."""
    return next(width for width in (32, 128, widest) if x.shape[1] <= width or width == widest)


def _together(x: Tensor, residual: Tensor | None = None) -> int:
    """Return how many float32 a thread reads at once: 4 if all rows begin at multiples of 16 bytes, else 1."""
    return 4 if all(m.data_ptr() % 16 == 0 for m in (x, residual) if m is not None) and x.shape[1] % 4 == 0 else 1


def _add_up(sums: Tensor, out: Tensor) -> None:
    """Write the sum of the programs' parts ([parts, rank, length]) to `out`, unless `out` is the only part."""
    if sums is not out:
        torch.sum(sums, 0, out=out)
