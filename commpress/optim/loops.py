"""The optimizers' passes over memory in plain torch, and the kernel of each where the table has one.

Tensors of one call have one shape and are dense in one order. Both ways agree to rounding.
"""

from itertools import product

import torch
from torch import Tensor

from commpress.comm.prologue import Ahead
from commpress.kernels.table import Kernel, compiles_by_place, lookup

ROW = 4096
"""Values in a row: so few that torch sums them in one thread."""


def apply_update(p: Tensor, update: Tensor, average: Tensor, keep: float, rate: float) -> None:
    """p <- keep * p - rate * update, average <- update, in place."""
    p, update, average = flat(p, update, average)
    if kernel := _kernel("apply_update", p, update, average):
        kernel(p, update, average, keep, rate)
        return
    p.mul_(keep).add_(update, alpha=-rate)
    average.copy_(update)


def local_step(
    g: Tensor,
    inverse: Tensor,
    average: Tensor,
    total: Tensor,
    anchor: Tensor,
    p: Tensor,
    limit: float,
    beta: float,
    keep: float,
    rate: float,
    decay: float,
) -> None:
    """A local step: average <- beta * average + (1 - beta) * clip(g * inverse, limit), total <- keep * total + rate * average,
    p <- decay * anchor - total, in place."""
    g, inverse, average, total, anchor, p = flat(g, inverse, average, total, anchor, p)
    if kernel := _kernel("local_step", g, inverse, average, total, anchor, p):
        kernel(g, inverse, average, total, anchor, p, limit, beta, keep, rate, decay)
        return
    average.mul_(beta).add_((g * inverse).clamp_(-limit, limit), alpha=1 - beta)
    total.mul_(keep).add_(average, alpha=rate)
    p.copy_(decay * anchor - total)


def sync_payload(
    g: Tensor,
    inverse: Tensor,
    average: Tensor,
    total: Tensor,
    lead: Tensor,
    limit: float,
    fresh: float,
    kept: float,
    share: float,
    carry: float,
) -> None:
    """Before a sync: n = fresh * clip(g * inverse, limit) + kept * average; g <- share * n + carry * total, lead <- n - g, in
    place. NaN and Inf become NaN."""
    g, inverse, average, total, lead = flat(g, inverse, average, total, lead)
    if kernel := _kernel("sync_payload", g, inverse, average, total, lead):
        kernel(g, inverse, average, total, lead, limit, fresh, kept, share, carry)
        return
    scaled = g * inverse
    n = fresh * scaled.clamp(-limit, limit) + kept * average + (scaled - scaled)
    g.copy_(share * n + carry * total)
    lead.copy_(n - g)


def sync_apply(
    p: Tensor,
    update: Tensor,
    average: Tensor,
    total: Tensor,
    anchor: Tensor,
    lead: Tensor,
    decay: float,
    weight: float,
    scale: float,
) -> None:
    """A sync: anchor <- decay * anchor - weight * update, p <- anchor, average <- update + lead / scale, total <- 0, in
    place."""
    p, update, average, total, anchor, lead = flat(p, update, average, total, anchor, lead)
    if kernel := _kernel("sync_apply", p, update, average, total, anchor, lead):
        kernel(p, update, average, total, anchor, lead, decay, weight, 1 / scale)
        return
    anchor.mul_(decay).add_(update, alpha=-weight)
    p.copy_(anchor)
    average.copy_(update + lead / scale)
    total.zero_()


def restore_local(p: Tensor, anchor: Tensor, total: Tensor, decay: float) -> None:
    """p <- decay * anchor - total, in place: the value that `local_step` left, bit for bit."""
    p, anchor, total = flat(p, anchor, total)
    if kernel := _kernel("restore_local", p, anchor, total):
        kernel(p, anchor, total, decay)
        return
    p.copy_(decay * anchor - total)


def estimate_momentum(differences: Tensor, known: Tensor, factor: float, most: float) -> None:
    """known <- factor * differences, in bfloat16, and 0 where that is more than `most` or NaN."""
    if kernel := _kernel("estimate_momentum", differences):
        kernel(differences, known, factor, most)
        return
    k = differences * factor
    known.copy_(torch.where(k.abs() <= most, k, 0.0))


def add_scaled(x: Tensor, known: Tensor, share: float) -> None:
    """x <- x + share * known, in place; `known` is bfloat16."""
    if kernel := _kernel("add_scaled", x):
        kernel(x, known, share)
        return
    x.add_(known.to(x.dtype), alpha=share)


def momentum_correction(x: Tensor, momentum: Tensor, p: Tensor, beta: float, decay: float, nesterov: bool) -> None:
    """x <- x + decay * p, momentum <- beta * momentum + x, x <- momentum (Nesterov's: x + beta * momentum), in place."""
    x, momentum, p = flat(x, momentum, p)
    if kernel := _kernel("momentum_correction", x, momentum, p):
        kernel(x, momentum, p, beta, decay, float(nesterov))
        return
    x.add_(p, alpha=decay)
    momentum.mul_(beta).add_(x)
    x.copy_(x + beta * momentum if nesterov else momentum)


def total(x: Tensor) -> Tensor:
    """Return the sum of a tensor: float64 []. One thread sums each row, so the bits do not depend on the number of threads."""
    rest = flat(x)[0].to(torch.float64)
    while rest.numel() > ROW:
        whole = rest.numel() // ROW * ROW
        rest = torch.cat([rest[:whole].view(-1, ROW).sum(dim=1), rest[whole:].sum().view(1)])
    return rest.sum()


def warm_up(device: torch.device) -> None:
    """Compile the loops for a device now, not in the middle of a step.

    Triton compiles anew for tensors that begin at no multiple of 16 bytes: gradients are views of a bucket, momenta and
    estimates have parts for those of a bucket, and a parameter may be a view of a flat one.
    """
    places = product((0, 1), repeat=3) if compiles_by_place(device) else [(0, 0, 0)]
    for g_at, part_at, p_at in places:
        g, part, p, r, s, t = (
            torch.ones(2, dtype=torch.float32, device=device)[at:][:1] for at in (g_at, part_at, p_at, 0, 0, 0)
        )
        known = torch.ones(2, dtype=torch.bfloat16, device=device)[part_at:][:1]
        apply_update(p, g, r, 1.0, 1.0)
        local_step(g, r, s, t, torch.ones_like(r), p, 1.0, 0.5, 1.0, 1.0, 1.0)
        sync_payload(g, r, s, t, part, 1.0, 0.5, 0.5, 1.0, 1.0)
        sync_apply(p, g, r, s, t, part, 1.0, 1.0, 1.0)
        restore_local(p, r, s, 1.0)
        momentum_correction(g, part, p, 0.5, 0.5, False)
        Ahead(part, 0.5).apply(g)
        estimate_momentum(g, known, 1.0, 1.0)
        add_scaled(g, known, 1.0)


def flat(*tensors: Tensor) -> list[Tensor]:
    """Return each tensor as [n], in the order of its memory."""
    return [
        t.detach().view(-1) if t.is_contiguous() else t.detach().as_strided((t.numel(),), (1,), t.storage_offset())
        for t in tensors
    ]


def _kernel(op: str, *tensors: Tensor) -> Kernel | None:
    """Return the kernel for these tensors; None if no kernel takes all of them."""
    kernel = lookup(op, None, tensors[0].device.type)
    one_place = all(x.device.type == tensors[0].device.type for x in tensors)
    return kernel if kernel is not None and one_place and kernel.takes(*tensors) else None
