"""PowerSGD, the strongest known baseline (Vogels et al., arXiv:1905.13727): a gradient matrix M ~ P Q^T of rank r.

P = mean(M Q), made orthonormal; Q = mean(M^T P). One power iteration a step, started from the last step's Q. All P travel in
one flat all-reduce, together with the gradients of vectors, and all Q in a second: r (rows + columns) floats a matrix. As
in the authors' own code it runs after backward, and what was lost stays in the gradient, where the next backward adds to it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass
class Batch:
    """All matrices of one shape. `gradient` holds what is to be sent, afterwards what was lost."""

    parameters: list[nn.Parameter]
    gradient: Tensor  # [matrices, rows, columns]
    mean: Tensor  # the same
    p: Tensor  # [matrices, rows, rank], in the flat buffer
    q: Tensor  # [matrices, rank, columns], in the other one: a third of the time that [columns, rank] takes


class PowerSGD:
    """Call `carry` before each backward and `exchange` after it. The same parameters on every rank, float32."""

    def __init__(self, parameters: Iterable[nn.Parameter], rank: int) -> None:
        shapes: dict[tuple[int, int], list[nn.Parameter]] = {}
        self.vectors: list[nn.Parameter] = []
        for p in parameters:
            if p.dim() < 2:
                self.vectors.append(p)
            else:
                shapes.setdefault((len(p), p[0].numel()), []).append(p)
        ranks = [min(rank, *shape) for shape in shapes]
        p_shapes = [(len(of), shape[0], r) for (shape, of), r in zip(shapes.items(), ranks, strict=True)]
        q_shapes = [(len(of), r, shape[1]) for (shape, of), r in zip(shapes.items(), ranks, strict=True)]
        self.p_buffer, ps = _flat(*p_shapes, (sum(v.numel() for v in self.vectors),))
        self.q_buffer, qs = _flat(*q_shapes)
        self.dense = ps.pop()
        self.q_buffer.normal_(generator=torch.Generator().manual_seed(0))  # the same on every rank
        self.batches = [
            Batch(of, torch.zeros(len(of), *shape), torch.zeros(len(of), *shape), p, q)
            for (shape, of), p, q in zip(shapes.items(), ps, qs, strict=True)
        ]

    def exchange(self) -> None:
        """Replace every gradient by its approximate mean over the ranks. Collective."""
        vectors = list(zip(self.vectors, self.dense.split([v.numel() for v in self.vectors]), strict=True))
        for v, part in vectors:
            assert v.grad is not None, "exchange: a parameter has no gradient; call it after backward"
            part.copy_(v.grad.flatten())
        for b in self.batches:
            torch.bmm(b.gradient, b.q.mT, out=b.p)
        _average(self.p_buffer)
        for b in self.batches:
            b.p.copy_(torch.linalg.qr(b.p).Q)
            torch.bmm(b.p.mT, b.gradient, out=b.q)
        _average(self.q_buffer)
        for b in self.batches:
            torch.bmm(b.p, b.q, out=b.mean)
            b.gradient -= b.mean
            for p, mean in zip(b.parameters, b.mean, strict=True):
                p.grad = mean.view_as(p)
        for v, part in vectors:
            v.grad = part.view_as(v)

    def carry(self) -> None:
        """Leave what was lost in the gradients of matrices; vectors, of which nothing is lost, start from nothing."""
        for b in self.batches:
            for p, lost in zip(b.parameters, b.gradient, strict=True):
                p.grad = lost.view_as(p)
        for v in self.vectors:
            v.grad = None


def _flat(*shapes: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
    """One float32 buffer, and a view of it for each shape."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    buffer = torch.zeros(sum(sizes))
    ends = accumulate(sizes)
    return buffer, [buffer[end - n : end].view(shape) for n, end, shape in zip(sizes, ends, shapes, strict=True)]


def _average(buffer: Tensor) -> None:
    dist.all_reduce(buffer)
    buffer /= dist.get_world_size()
