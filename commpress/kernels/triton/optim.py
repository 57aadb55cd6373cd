"""Kernels of the optimizers' passes: one pass over memory each. The formulas are in `optim/loops.py`.

The bits are those of the loops for the CPU, since no product is fused with a sum in either.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from commpress.kernels.triton.blocks import clipped, read, write
from commpress.kernels.triton.launch import walk

SIZE = 1024


@triton.jit
def _apply_update(arguments, at, inside):
    p, update, average, keep, rate = arguments
    new = read(update + at, inside)
    write(p + at, keep * read(p + at, inside) - rate * new, inside)
    write(average + at, new, inside)


@triton.jit
def _local_step(arguments, at, inside):
    g, inverse, average, total, anchor, p, limit, beta, keep, rate, decay = arguments
    scaled = clipped(read(g + at, inside) * read(inverse + at, inside), limit)
    one = tl.full(at.shape, 1.0, tl.float32)  # a difference of two numbers is one of float64 on the interpreter
    momentum = beta * read(average + at, inside) + (one - beta) * scaled
    moved = keep * read(total + at, inside) + rate * momentum
    write(average + at, momentum, inside)
    write(total + at, moved, inside)
    write(p + at, decay * read(anchor + at, inside) - moved, inside)


@triton.jit
def _sync_payload(arguments, at, inside):
    g, inverse, average, total, lead, limit, fresh, kept, share, carry = arguments
    scaled = read(g + at, inside) * read(inverse + at, inside)
    n = (
        fresh * clipped(scaled, limit) + kept * read(average + at, inside) + (scaled - scaled)
    )  # the last term is 0, or NaN
    sent = share * n + carry * read(total + at, inside)
    write(g + at, sent, inside)
    write(lead + at, n - sent, inside)


@triton.jit
def _sync_apply(arguments, at, inside):
    p, update, average, total, anchor, lead, decay, weight, unscale = arguments
    new = read(update + at, inside)
    moved = decay * read(anchor + at, inside) - weight * new
    write(anchor + at, moved, inside)
    write(p + at, moved, inside)
    write(average + at, new + unscale * read(lead + at, inside), inside)
    write(total + at, tl.zeros_like(moved), inside)


@triton.jit
def _restore_local(arguments, at, inside):
    p, anchor, total, keep = arguments
    write(p + at, keep * read(anchor + at, inside) - read(total + at, inside), inside)


@triton.jit
def _estimate_momentum(arguments, at, inside):
    differences, known, factor, most = arguments
    k = factor * read(differences + at, inside)
    write(known + at, tl.where(tl.abs(k) <= most, k, 0.0), inside)


@triton.jit
def _add_scaled(arguments, at, inside):
    x, known, factor = arguments
    write(x + at, read(x + at, inside) + factor * read(known + at, inside), inside)


@triton.jit
def _momentum_correction(arguments, at, inside):
    x, momentum, p, beta, decay, nesterov = arguments
    g = read(x + at, inside) + decay * read(p + at, inside)
    moved = beta * read(momentum + at, inside) + g
    write(momentum + at, moved, inside)
    write(x + at, tl.where(nesterov != 0, g + beta * moved, moved), inside)


@triton.jit
def _momentum_ahead(arguments, at, inside):
    x, momentum, fresh = arguments
    before = read(momentum + at, inside)
    moved = fresh * (read(x + at, inside) - before)
    write(momentum + at, before + moved, inside)
    write(x + at, moved, inside)


FORMULAS: dict[str, Any] = {
    "apply_update": _apply_update,
    "local_step": _local_step,
    "sync_payload": _sync_payload,
    "sync_apply": _sync_apply,
    "restore_local": _restore_local,
    "estimate_momentum": _estimate_momentum,
    "add_scaled": _add_scaled,
    "momentum_correction": _momentum_correction,
    "momentum_ahead": _momentum_ahead,
}


def run(op: str, *arguments: Tensor | float) -> None:
    """Run an op of the table that is in this file: tensors come first, then numbers, which become float32."""
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    numbers = [float(x) for x in arguments if not isinstance(x, Tensor)]
    walk(FORMULAS[op], tensors[0].numel(), *tensors, *numbers, size=SIZE)
