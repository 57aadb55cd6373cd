"""low_rank: two thin factors of each matrix, one after the other (PowerSGD, Vogels et al., arXiv:1905.13727).

             M + e: times Q of the last step       mean: P, orthonormal; P M     mean: Q
    rank 0   [p0 | b0]  \\                          [q0]  \\                        P Q -> M, b
    rank 1   [p1 | b1]   > mean (two_shot, none)   [q1]   > mean                   P Q -> M, b
    rank 2   [p2 | b2]  /                          [q2]  /                         P Q -> M, b

Tensors that factors do not make smaller (b: biases, norms) are sent whole with the first factors. A matrix of rank r sends
r (rows + columns) float32, so of n such values in all a rank sends 2 (W - 1) / W * 4 n bytes. Feedback keeps M + e - P Q.

The next step begins with this one's Q. A direction that a matrix does not have (a gradient of zeros) starts again.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from commpress.comm import factors
from commpress.comm.codecs import Codec
from commpress.comm.codecs.cast import Identity
from commpress.comm.codecs.powersgd import PowerSGD
from commpress.comm.encoder import Encoder
from commpress.comm.exchange.base import Exchange, Message
from commpress.comm.exchange.label import Label
from commpress.comm.exchange.two_shot import TwoShot
from commpress.comm.exchange.wire import Transfer, Wire
from commpress.comm.scratch import Scratch
from commpress.comm.segments import Segment, Segments, sizes

EXACT = Identity()


@dataclass(frozen=True)
class Matrix:
    """A parameter whose gradient is sent as two factors: `rows` times `columns` values that begin at `start` in its bucket."""

    name: str
    start: int
    rows: int
    columns: int
    rank: int

    def of(self, values: Tensor) -> Tensor:
        """Return its part of a bucket, [rows, columns]."""
        return values[self.start : self.start + self.rows * self.columns].view(self.rows, self.columns)

    @property
    def kind(self) -> tuple[int, int, int]:
        """The rank of the factors, and the shape."""
        return self.rank, self.rows, self.columns


@dataclass(frozen=True)
class LowRank(Exchange):
    """The two rounds of a bucket of these matrices; those of one kind are batched. `whole` has the ranges sent whole."""

    matrices: tuple[Matrix, ...] = ()
    whole: tuple[tuple[int, int], ...] = ()

    name: ClassVar[str] = "low_rank"
    encodes_bucket: ClassVar[bool] = False
    flat: ClassVar[bool] = False

    def laid_out(self, n: int, segments: Segments, codec: Codec) -> Exchange:
        assert isinstance(codec, PowerSGD)
        if sum(sizes(segments)) != n:  # the segments do not say where the matrices are
            return LowRank((), ((0, n),))
        matrices: list[Matrix] = []
        whole: list[tuple[int, int]] = []
        at = 0
        for segment in segments:
            rows, columns = matrix_shape(segment)
            if rank := codec.rank_of(rows, columns):
                matrices.append(Matrix(segment.name, at, rows, columns, rank))
            elif whole and whole[-1][1] == at:
                whole[-1] = whole[-1][0], at + segment.n
            else:
                whole.append((at, at + segment.n))
            at += segment.n
        return LowRank(tuple(sorted(matrices, key=lambda matrix: matrix.kind)), tuple(whole))

    def run(self, x: Tensor, encoder: Encoder, wire: Wire, label: Label) -> Iterator[Transfer]:
        memory, n = encoder.memory, x.numel()
        first, second = (
            encoder.buffer(name, 4 * length, x.device).view(torch.float32)
            for name, length in zip(("first factors", "second factors"), self._lengths(n), strict=True)
        )
        p_batches, q_batches = self._batches(first, "rows"), self._batches(second, "columns")
        ps, qs = ([one for batch in batches for one in batch] for batches in (p_batches, q_batches))
        values = x
        if x.dtype != torch.float32:
            values = encoder.buffer("values", 4 * n, x.device).view(torch.float32).copy_(x)
        kept = [None if memory.residual is None else matrix.of(memory.residual) for matrix in self.matrices]
        gradients = [matrix.of(values) for matrix in self.matrices]

        for matrix, gradient, residual, p in zip(self.matrices, gradients, kept, ps, strict=True):
            if (before := memory.factors.get(matrix.name)) is None:
                before = factors.first_factor(matrix.rank, matrix.columns, x.device).clone()
                memory.factors[matrix.name] = before
            factors.project(gradient, residual, before, p)
        whole = first[first.numel() - sum(stop - start for start, stop in self.whole) :]
        kept_whole = self._gather(values, memory.residual, whole) if self.whole else None
        yield from _mean(first, encoder.scratch.inner("first"), wire, label, last=not self.matrices)

        for batch in p_batches:
            factors.orthonormalize(batch)
        for gradient, p, q in zip(gradients, ps, qs, strict=True):
            factors.project_back(gradient, p, q)
        if self.matrices:
            yield from _mean(second, encoder.scratch.inner("second"), wire, label.second().second(), last=True)

        for gradient, residual, p, q in zip(gradients, kept, ps, qs, strict=True):
            factors.expand(p, q, gradient, residual)
        self._scatter(whole, values)
        if kept_whole is not None and memory.residual is not None:  # all of it has been sent
            self._scatter(kept_whole.masked_fill_(whole.isfinite(), 0), memory.residual)
        if values is not x:
            x.copy_(values)
        self._remember(q_batches, memory.factors)

    def _gather(self, values: Tensor, residual: Tensor | None, out: Tensor) -> Tensor | None:
        """Copy the values that are sent whole to `out`, plus their residual from another codec; return that residual."""
        torch.cat([values[start:stop] for start, stop in self.whole], out=out)
        if residual is None:
            return None
        kept = torch.cat([residual[start:stop] for start, stop in self.whole])
        out.add_(kept)
        return kept

    def _scatter(self, parts: Tensor, values: Tensor) -> None:
        """Write the values that were sent whole to their places."""
        for (start, stop), part in zip(self.whole, parts.split([b - a for a, b in self.whole]), strict=True):
            values[start:stop] = part

    def _remember(self, batches: list[Tensor], kept: dict[str, Tensor]) -> None:
        """Keep the second factors, made orthonormal, for the next step. Factors that are not finite do not replace old ones."""
        matrices = iter(self.matrices)
        for batch in batches:
            factors.orthonormalize(batch)
            good = batch.isfinite().all(-1).all(-1)
            fresh = factors.first_factor(batch.shape[1], batch.shape[2], batch.device)
            found = torch.where((batch != 0).any(-1, keepdim=True), batch, fresh)
            for q, is_good, matrix in zip(found, good, matrices, strict=False):
                kept[matrix.name].copy_(torch.where(is_good, q, kept[matrix.name]))

    def _batches(self, flat: Tensor, length: str) -> list[Tensor]:
        """Return the factors of the matrices of each kind in a flat buffer, [matrices, rank, rows or columns]."""
        batches, at = [], 0
        for _, alike in itertools.groupby(self.matrices, lambda matrix: matrix.kind):
            found = list(alike)
            shape = len(found), found[0].rank, getattr(found[0], length)
            batches.append(flat[at : at + math.prod(shape)].view(shape))
            at += math.prod(shape)
        return batches

    def _lengths(self, n: int) -> tuple[int, int]:
        """Return how many float32 values are sent in the first round for n values, and in the second."""
        whole = n - sum(matrix.rows * matrix.columns for matrix in self.matrices)
        first = sum(matrix.rank * matrix.rows for matrix in self.matrices)
        return first + whole, sum(matrix.rank * matrix.columns for matrix in self.matrices)

    def nbytes(self, n: int, codec: Codec) -> int:
        return 4 * sum(self._lengths(n))

    def messages(self, n: int, itemsize: int, codec: Codec, world_size: int, rank: int) -> tuple[Message, ...]:
        inner, lengths = TwoShot().among(world_size), filter(None, self._lengths(n))
        return tuple(m for length in lengths for m in inner.messages(length, 4, EXACT, world_size, rank))


def matrix_shape(segment: Segment) -> tuple[int, int]:
    """Return the matrix shape of a segment as it lies in memory, split where rows + columns are fewest.

    It is a linear layer's own shape, [out, in kh kw] for a convolution, and [n, 1] for a vector or a part that is no tensor.
    """
    best, rows = (segment.n, 1), 1
    for _, size in sorted(zip(segment.strides, segment.shape, strict=True), reverse=True):
        rows *= size
        if segment.n % rows == 0 and rows + segment.n // rows < sum(best):
            best = rows, segment.n // rows
    return best


def _mean(x: Tensor, scratch: Scratch, wire: Wire, label: Label, last: bool) -> Iterator[Transfer]:
    """Replace `x` ([n], float32) by the mean over the ranks, the same bits on every rank."""
    for transfer in TwoShot().among(wire.world_size).run(x, Encoder(EXACT, scratch=scratch), wire, label):
        transfer.last = transfer.last and last
        yield transfer
