"""The operations of `powersgd` on a matrix x ([rows, columns], float32) and its factors p ([rank, rows]), q ([rank, columns]).

    project        p <- q x^T           x <- x + residual before
    orthonormalize p <- its rows, orthonormal
    project_back   q <- p x
    expand         x <- p^T q           residual <- x before, minus p^T q

Plain torch here, for any device; the table of kernels may have loops. Only `expand` and `orthonormalize` decide which bits a
rank gets: if torch does them, on an accelerator, ranks with the same kind of device have the same bits. The loops for CPU
round in one order on every processor.
"""

from functools import lru_cache

import torch
from torch import Tensor

from commpress.kernels.table import lookup

WORD = "powersgd"
LEAST = 1e-10
"""A vector whose squared length falls to less than this share after Gram-Schmidt is no direction of its own."""


def project(x: Tensor, residual: Tensor | None, q: Tensor, p: Tensor) -> None:
    """Add the residual ([rows, columns]), if there is one, to x, and write q x^T to p."""
    if kernel := lookup("project", WORD, x.device.type):
        kernel(x, residual, q, p)
        return
    if residual is not None:
        x.add_(residual)
    torch.mm(q, x.T, out=p)


def project_back(x: Tensor, p: Tensor, q: Tensor) -> None:
    """Write p x to q."""
    if kernel := lookup("project_back", WORD, x.device.type):
        kernel(x, p, q)
        return
    torch.mm(p, x, out=q)


def expand(p: Tensor, q: Tensor, x: Tensor, residual: Tensor | None) -> None:
    """Write p^T q to x, and its error (x before, minus p^T q) to the residual ([rows, columns]), if there is one.

    If the factors are not finite, all of x becomes NaN and the residual does not change.
    """
    if kernel := lookup("expand", WORD, x.device.type):
        kernel(p, q, x, residual)
        return
    good = is_finite(p) & is_finite(q)
    mean = torch.mm(p.T, q)
    if residual is not None:
        residual.copy_(torch.where(good, x - mean, residual))
    x.copy_(torch.where(good, mean, torch.nan))


def orthonormalize(batch: Tensor) -> None:
    """Make the rows of factors ([matrices, rank, length]) orthonormal, in place, by Gram-Schmidt in float64.

    A row that depends on those before it becomes 0. NaN stays NaN.
    """
    if kernel := lookup("orthonormalize", WORD, batch.device.type):
        kernel(batch)
        return
    for k in range(batch.shape[1]):
        vector, done = batch[:, k].to(torch.float64), batch[:, :k].to(torch.float64)
        before = vector.square().sum(-1, keepdim=True)
        for other in done.unbind(1):
            vector = vector - (vector * other).sum(-1, keepdim=True) * other
        left = vector.square().sum(-1, keepdim=True)
        batch[:, k] = torch.where(left <= LEAST * before, 0.0, vector * left.rsqrt())


def is_finite(factor: Tensor) -> Tensor:
    """Whether all values are finite: bool []."""
    return factor.isfinite().all()


@lru_cache(maxsize=256)
def first_factor(rank: int, columns: int, device: torch.device) -> Tensor:
    """Return a matrix's first q: float32 [rank, columns] in [-1, 1), the same on every rank. Do not write to it."""
    draw = torch.Generator().manual_seed(columns)
    return (2 * torch.rand(rank, columns, dtype=torch.float32, device="cpu", generator=draw) - 1).to(device)


def warm_up(device: torch.device) -> None:
    """Compile the loops now, not in the middle of the first step."""
    for columns in (32, 128, 512):  # the tile widths of the kernels for CUDA
        x = torch.ones(64, columns, dtype=torch.float32, device=device)
        q, p = first_factor(2, columns, device).clone(), torch.empty(2, 64, dtype=torch.float32, device=device)
        for kept in (torch.zeros_like(x), None):
            project(x, kept, q, p)
            orthonormalize(p.unsqueeze(0))
            project_back(x, p, q)
            expand(p, q, x, kept)
