"""Loops of the optimizers' passes over memory. They repeat a few lines of the codecs' loops, and share no code with them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from commpress.kernels.compiled import loop


@loop
def _apply_update(p, update, average, keep, rate):
    for i in range(p.size):
        p[i] = keep * p[i] - rate * update[i]
        average[i] = update[i]


@loop
def _local_step(g, inverse, average, total, anchor, p, limit, beta, keep, rate, decay):
    fresh = np.float32(1) - beta
    for i in range(p.size):
        clipped = min(max(g[i] * inverse[i], -limit), limit)
        average[i] = beta * average[i] + fresh * clipped
        total[i] = keep * total[i] + rate * average[i]
        p[i] = decay * anchor[i] - total[i]


@loop
def _sync_payload(g, inverse, average, total, lead, limit, fresh, kept, share, carry):
    for i in range(g.size):
        scaled = g[i] * inverse[i]
        n = (
            fresh * min(max(scaled, -limit), limit) + kept * average[i] + (scaled - scaled)
        )  # the last term is 0, or NaN
        g[i] = share * n + carry * total[i]
        lead[i] = n - g[i]


@loop
def _sync_apply(p, update, average, total, anchor, lead, decay, weight, unscale):
    for i in range(p.size):
        anchor[i] = decay * anchor[i] - weight * update[i]
        p[i] = anchor[i]
        average[i] = update[i] + unscale * lead[i]
        total[i] = np.float32(0)


@loop
def _restore_local(p, anchor, total, decay):
    for i in range(p.size):
        p[i] = decay * anchor[i] - total[i]


@loop
def _estimate_momentum(differences, known, factor, most):
    for i in range(differences.size):
        k = np.float32(factor * differences[i])
        value = k if np.abs(k) <= most else np.float32(0)
        bits = np.float32(value).view(np.uint32)
        odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
        known[i] = np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))  # half to even


@loop
def _add_scaled(x, known, share):
    for i in range(x.size):
        x[i] += share * np.uint32(np.uint32(known[i]) << np.uint32(16)).view(np.float32)


@loop
def _momentum_correction(x, momentum, p, beta, decay, nesterov):
    for i in range(x.size):
        g = x[i] + decay * p[i]
        momentum[i] = beta * momentum[i] + g
        x[i] = g + beta * momentum[i] if nesterov else momentum[i]


@loop
def _momentum_ahead(x, momentum, fresh):
    for i in range(x.size):
        moved = fresh * (x[i] - momentum[i])
        momentum[i] += moved
        x[i] = moved


LOOPS: dict[str, Any] = {
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
    """Run an op of the table that is in this file. Scalars become float32, so that no loop computes in float64."""
    LOOPS[op](*(_array(x) if isinstance(x, Tensor) else np.float32(x) for x in arguments))


def _array(x: Tensor) -> Any:
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()
