"""Loops of `powersgd`: three passes over a matrix, and Gram-Schmidt. Matrices lie row by row, float32; factors [rank, length].

`project` and `project_back` may sum in any order: what they make is averaged over the ranks before it is used. `expand` and
`orthonormalize`, which every rank does by itself on the same numbers, round in one order on every processor.
"""

import numpy as np
from torch import Tensor

from commpress.kernels.compiled import loop, part, summing_loop
from commpress.kernels.cpu.blocks import put_block
from commpress.kernels.cpu.instructions import settle_streams, widest
from commpress.kernels.cpu.slices import in_slices

SHARED_SHA256 = "5d1d88ea2ebdd3a9"
"""The hash of `blocks.py` and `instructions.py`, which are compiled in: Numba's cache checks only this file's time stamp."""
TOGETHER = 4
"""Rows of a factor that are worked on at once. Factors are filled up with rows of zeros to a multiple of it."""
WIDTH = 4096
"""Columns of a tile: one thread sums up so many."""
LEAST = np.float64(1e-10)
"""The share of a vector's square that must be left of it, if it is to be a direction of its own."""


@part
def _filled(factor):
    """A copy of a factor, with rows of zeros up to a multiple of TOGETHER."""
    rank, length = factor.shape
    copy = np.zeros(((rank + TOGETHER - 1) // TOGETHER * TOGETHER, length), np.float32)
    copy[:rank] = factor
    return copy


@summing_loop
def _project(x, residual, q, p, columns, begin, end):
    factor = _filled(q)
    products = np.empty((factor.shape[0], end - begin), np.float32)
    for i in range(begin, end):
        row = x[i * columns : (i + 1) * columns]
        if residual is not None:
            kept = residual[i * columns : (i + 1) * columns]
            for j in range(columns):
                row[j] += kept[j]
        for k in range(0, factor.shape[0], TOGETHER):
            q0, q1, q2, q3 = factor[k], factor[k + 1], factor[k + 2], factor[k + 3]
            a, b, c, d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for j in range(columns):
                value = row[j]
                a += value * q0[j]
                b += value * q1[j]
                c += value * q2[j]
                d += value * q3[j]
            products[k, i - begin], products[k + 1, i - begin] = a, b
            products[k + 2, i - begin], products[k + 3, i - begin] = c, d
    p[:, begin:end] = products[: p.shape[0]]


@part
def _row(x, i, rows, columns, first, last):
    """Return the columns of a tile in row i; behind the last row, where weights are 0, those of the last."""
    start = min(i, rows - 1) * columns
    return x[start + first : start + last]


@summing_loop
def _project_back(x, p, q, columns, begin, end):
    """Four rows at a time: the sums are read and written a quarter as often, and more memory is under way."""
    widest()
    rows = p.shape[1]
    weights = np.zeros(((p.shape[0] + TOGETHER - 1) // TOGETHER * TOGETHER, rows + 3), np.float32)
    weights[: p.shape[0], :rows] = p
    for tile in range(begin, end):
        first, last = tile * WIDTH, min(columns, (tile + 1) * WIDTH)
        sums = np.zeros((weights.shape[0], last - first), np.float32)
        for k in range(0, weights.shape[0], TOGETHER):
            q0, q1, q2, q3 = sums[k], sums[k + 1], sums[k + 2], sums[k + 3]
            p0, p1, p2, p3 = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
            for i in range(0, rows, 4):
                r0, r1 = _row(x, i, rows, columns, first, last), _row(x, i + 1, rows, columns, first, last)
                r2, r3 = _row(x, i + 2, rows, columns, first, last), _row(x, i + 3, rows, columns, first, last)
                a0, a1, a2, a3 = p0[i], p0[i + 1], p0[i + 2], p0[i + 3]
                b0, b1, b2, b3 = p1[i], p1[i + 1], p1[i + 2], p1[i + 3]
                c0, c1, c2, c3 = p2[i], p2[i + 1], p2[i + 2], p2[i + 3]
                d0, d1, d2, d3 = p3[i], p3[i + 1], p3[i + 2], p3[i + 3]
                for j in range(last - first):
                    v0, v1, v2, v3 = r0[j], r1[j], r2[j], r3[j]
                    q0[j] += v0 * a0 + v1 * a1 + v2 * a2 + v3 * a3
                    q1[j] += v0 * b0 + v1 * b1 + v2 * b2 + v3 * b3
                    q2[j] += v0 * c0 + v1 * c1 + v2 * c2 + v3 * c3
                    q3[j] += v0 * d0 + v1 * d1 + v2 * d2 + v3 * d3
        q[:, first:last] = sums[: q.shape[0]]


@part
def _write(row, q0, q1, q2, q3, a, b, c, d):
    """Write a mean's row over that of the gradient."""
    for j in range(row.size):
        row[j] = (a * q0[j] + b * q1[j]) + (c * q2[j] + d * q3[j])


@part
def _add(row, q0, q1, q2, q3, a, b, c, d):
    """Add to a mean's row what the next rows of the factors make."""
    for j in range(row.size):
        row[j] += (a * q0[j] + b * q1[j]) + (c * q2[j] + d * q3[j])


@part
def _write_and_keep(row, kept, q0, q1, q2, q3, a, b, c, d):
    """Write a mean's row over that of the gradient, and to `kept` what it misses of that."""
    for j in range(row.size):
        value = (a * q0[j] + b * q1[j]) + (c * q2[j] + d * q3[j])
        kept[j] = row[j] - value
        row[j] = value


@part
def _add_and_take(row, kept, q0, q1, q2, q3, a, b, c, d):
    """Add to a mean's row what the next rows of the factors make, and take it from `kept`."""
    for j in range(row.size):
        value = (a * q0[j] + b * q1[j]) + (c * q2[j] + d * q3[j])
        kept[j] -= value
        row[j] += value


@loop
def _expand(p, q, x, residual, columns, begin, end):
    """A long residual whose rows begin at whole lines of the cache is written past it: the old one is not read first."""
    widest()
    factor, weights, kept = _filled(q), _filled(p), np.empty(columns, np.float32)
    for i in range(begin, end):
        row = x[i * columns : (i + 1) * columns]
        a, b, c, d = weights[0, i], weights[1, i], weights[2, i], weights[3, i]
        if residual is None:
            _write(row, factor[0], factor[1], factor[2], factor[3], a, b, c, d)
        else:
            _write_and_keep(row, kept, factor[0], factor[1], factor[2], factor[3], a, b, c, d)
        for k in range(TOGETHER, factor.shape[0], TOGETHER):
            a, b, c, d = weights[k, i], weights[k + 1, i], weights[k + 2, i], weights[k + 3, i]
            q0, q1, q2, q3 = factor[k], factor[k + 1], factor[k + 2], factor[k + 3]
            if residual is None:
                _add(row, q0, q1, q2, q3, a, b, c, d)
            else:
                _add_and_take(row, kept, q0, q1, q2, q3, a, b, c, d)
        if residual is not None:
            put_block(residual, i * columns, kept, columns)
    settle_streams()


@loop
def _is_finite(values):
    total = np.float32(0)
    for i in range(values.size):
        total += values[i] - values[i]  # 0, or NaN
    return total == 0


@part
def _dot(a, b):
    """The sum of products in float64, four sums side by side."""
    s0, s1, s2, s3 = np.float64(0), np.float64(0), np.float64(0), np.float64(0)
    whole = a.size // 4 * 4
    for i in range(0, whole, 4):
        s0 += np.float64(a[i]) * np.float64(b[i])
        s1 += np.float64(a[i + 1]) * np.float64(b[i + 1])
        s2 += np.float64(a[i + 2]) * np.float64(b[i + 2])
        s3 += np.float64(a[i + 3]) * np.float64(b[i + 3])
    for i in range(whole, a.size):
        s0 += np.float64(a[i]) * np.float64(b[i])
    return (s0 + s1) + (s2 + s3)


@loop
def _orthonormalize(batch):
    rest = np.empty(batch.shape[2], np.float64)
    for m in range(batch.shape[0]):
        for k in range(batch.shape[1]):
            vector = batch[m, k]
            for i in range(rest.size):
                rest[i] = vector[i]
            before = _dot(rest, rest)
            for other in range(k):
                along = _dot(rest, batch[m, other])
                for i in range(rest.size):
                    rest[i] -= along * np.float64(batch[m, other, i])
            left = _dot(rest, rest)
            share = np.float64(0) if left <= LEAST * before else 1 / np.sqrt(left)
            for i in range(rest.size):
                vector[i] = np.float32(rest[i] * share)


def project(x: Tensor, residual: Tensor | None, q: Tensor, p: Tensor) -> None:
    """`project` of the table."""
    columns = x.shape[1]
    kept = None if residual is None else residual.view(-1).numpy()
    in_slices(_project, x.numel(), columns, x.view(-1).numpy(), kept, q.numpy(), p.numpy(), columns)


def project_back(x: Tensor, p: Tensor, q: Tensor) -> None:
    """`project_back` of the table."""
    rows, columns = x.shape
    in_slices(_project_back, x.numel(), rows * WIDTH, x.view(-1).numpy(), p.numpy(), q.numpy(), columns)


def expand(p: Tensor, q: Tensor, x: Tensor, residual: Tensor | None) -> None:
    """`expand` of the table."""
    if not (_is_finite(p.view(-1).numpy()) and _is_finite(q.view(-1).numpy())):
        x.fill_(np.nan)
        return
    kept = None if residual is None else residual.view(-1).numpy()
    in_slices(_expand, x.numel(), x.shape[1], p.numpy(), q.numpy(), x.view(-1).numpy(), kept, x.shape[1])


def orthonormalize(batch: Tensor) -> None:
    """`orthonormalize` of the table."""
    _orthonormalize(batch.numpy())
