"""The optimizers' passes over memory: on CPU memory in float32 one loop each (Numba), elsewhere plain torch.

Tensors of one call have one shape and are dense in one order. Both ways agree to rounding. What a loop has in common with one
of `comm.kernels.cpu` it says again: Numba's cache would not see that the other file has changed.
"""

import numpy as np
import torch
from torch import Tensor

from commpress.kernels.compiled import loop

ROW = 4096
"""So few values torch sums in one thread."""


def advance(p: Tensor, update: Tensor, average: Tensor, keep: float, rate: float) -> None:
    """p <- keep * p - rate * update, average <- update, in place."""
    tensors = flat(p, update, average)
    if _loopable(tensors):
        _advance(*(t.numpy() for t in tensors), *_scalars(keep, rate))
        return
    p, update, average = tensors
    p.mul_(keep).add_(update, alpha=-rate)
    average.copy_(update)


def wander(
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
    tensors = flat(g, inverse, average, total, anchor, p)
    if _loopable(tensors):
        _wander(*(t.numpy() for t in tensors), *_scalars(limit, beta, keep, rate, decay))
        return
    g, inverse, average, total, anchor, p = tensors
    average.mul_(beta).add_((g * inverse).clamp_(-limit, limit), alpha=1 - beta)
    total.mul_(keep).add_(average, alpha=rate)
    p.copy_(decay * anchor - total)


def look_back(
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
    tensors = flat(g, inverse, average, total, lead)
    if _loopable(tensors):
        _look_back(*(t.numpy() for t in tensors), *_scalars(limit, fresh, kept, share, carry))
        return
    g, inverse, average, total, lead = tensors
    scaled = g * inverse
    n = fresh * scaled.clamp(-limit, limit) + kept * average + (scaled - scaled)
    g.copy_(share * n + carry * total)
    lead.copy_(n - g)


def meet(
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
    tensors = flat(p, update, average, total, anchor, lead)
    if _loopable(tensors):
        _meet(*(t.numpy() for t in tensors), *_scalars(decay, weight, 1 / scale))
        return
    p, update, average, total, anchor, lead = tensors
    anchor.mul_(decay).add_(update, alpha=-weight)
    p.copy_(anchor)
    average.copy_(update + lead / scale)
    total.zero_()


def stand(p: Tensor, anchor: Tensor, total: Tensor, decay: float) -> None:
    """p <- decay * anchor - total: where `wander` left it, bit for bit."""
    tensors = flat(p, anchor, total)
    if _loopable(tensors):
        _stand(*(t.numpy() for t in tensors), *_scalars(decay))
        return
    p, anchor, total = tensors
    p.copy_(decay * anchor - total)


def learn(differences: Tensor, known: Tensor, factor: float, most: float) -> None:
    """known <- factor * differences, in bfloat16, and 0 where that is more than `most` or NaN."""
    if differences.dtype == torch.float32 and differences.device.type == "cpu":
        _learn(differences.numpy(), known.view(torch.uint16).numpy(), *_scalars(factor, most))
        return
    k = differences * factor
    known.copy_(torch.where(k.abs() <= most, k, 0.0))


def lean(x: Tensor, known: Tensor, share: float) -> None:
    """x <- x + share * known, in place; `known` is bfloat16."""
    if x.dtype == torch.float32 and x.device.type == "cpu":
        _lean(x.numpy(), known.view(torch.uint16).numpy(), *_scalars(share))
        return
    x.add_(known.to(x.dtype), alpha=share)


def correct(x: Tensor, momentum: Tensor, p: Tensor, beta: float, decay: float, nesterov: bool) -> None:
    """x <- x + decay * p, momentum <- beta * momentum + x, x <- momentum (Nesterov's: x + beta * momentum), in place."""
    tensors = flat(x, momentum, p)
    if _loopable(tensors):
        _correct(*(t.numpy() for t in tensors), *_scalars(beta, decay, float(nesterov)))
        return
    x, momentum, p = tensors
    x.add_(p, alpha=decay)
    momentum.mul_(beta).add_(x)
    x.copy_(x + beta * momentum if nesterov else momentum)


def total(x: Tensor) -> Tensor:
    """The sum of a tensor in float64: the same bits with any number of threads, since each row is summed by one of them."""
    rest = flat(x)[0].to(torch.float64)
    while rest.numel() > ROW:
        whole = rest.numel() // ROW * ROW
        rest = torch.cat([rest[:whole].view(-1, ROW).sum(dim=1), rest[whole:].sum().view(1)])
    return rest.sum()


def warm_up() -> None:
    """Compile the loops now, not in the middle of a step."""
    x, y, z, p, q, r = (torch.ones(1, dtype=torch.float32, device="cpu") for _ in range(6))
    advance(x, y, z, 1.0, 1.0)
    wander(x, y, z, p, q, r, 1.0, 0.5, 1.0, 1.0, 1.0)
    look_back(x, y, z, p, q, 1.0, 0.5, 0.5, 1.0, 1.0)
    meet(x, y, z, p, q, r, 1.0, 1.0, 1.0)
    stand(x, y, z, 1.0)
    correct(x, y, z, 0.5, 0.5, False)
    learn(x, y.bfloat16(), 1.0, 1.0)
    lean(x, y.bfloat16(), 1.0)


def flat(*tensors: Tensor) -> list[Tensor]:
    """Each as [n], in the order of its memory."""
    return [
        t.detach().view(-1) if t.is_contiguous() else t.detach().as_strided((t.numel(),), (1,), t.storage_offset())
        for t in tensors
    ]


def _scalars(*values: float) -> tuple[np.float32, ...]:
    """So that no loop computes in float64."""
    return tuple(np.float32(value) for value in values)


def _loopable(tensors: list[Tensor]) -> bool:
    return all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)


@loop
def _advance(p, update, average, keep, rate):
    for i in range(p.size):
        p[i] = keep * p[i] - rate * update[i]
        average[i] = update[i]


@loop
def _wander(g, inverse, average, total, anchor, p, limit, beta, keep, rate, decay):
    fresh = np.float32(1) - beta
    for i in range(p.size):
        clipped = min(max(g[i] * inverse[i], -limit), limit)
        average[i] = beta * average[i] + fresh * clipped
        total[i] = keep * total[i] + rate * average[i]
        p[i] = decay * anchor[i] - total[i]


@loop
def _look_back(g, inverse, average, total, lead, limit, fresh, kept, share, carry):
    for i in range(g.size):
        scaled = g[i] * inverse[i]
        n = fresh * min(max(scaled, -limit), limit) + kept * average[i] + (scaled - scaled)  # which is 0, or NaN
        g[i] = share * n + carry * total[i]
        lead[i] = n - g[i]


@loop
def _meet(p, update, average, total, anchor, lead, decay, weight, unscale):
    for i in range(p.size):
        anchor[i] = decay * anchor[i] - weight * update[i]
        p[i] = anchor[i]
        average[i] = update[i] + unscale * lead[i]
        total[i] = np.float32(0)


@loop
def _stand(p, anchor, total, decay):
    for i in range(p.size):
        p[i] = decay * anchor[i] - total[i]


@loop
def _learn(differences, known, factor, most):
    for i in range(differences.size):
        k = np.float32(factor * differences[i])
        value = k if np.abs(k) <= most else np.float32(0)
        bits = np.float32(value).view(np.uint32)
        odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
        known[i] = np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))  # half to even


@loop
def _lean(x, known, share):
    for i in range(x.size):
        x[i] += share * np.uint32(np.uint32(known[i]) << np.uint32(16)).view(np.float32)


@loop
def _correct(x, momentum, p, beta, decay, nesterov):
    for i in range(x.size):
        g = x[i] + decay * p[i]
        momentum[i] = beta * momentum[i] + g
        x[i] = g + beta * momentum[i] if nesterov else momentum[i]
