"""Masks from scores, by pure functions: which weights stay, and how many are pruned at a step.

A mask is bool of its parameter's shape, True where a weight stays. By threshold it is the formula p(W, t):
m = 0 where |w| < t, else 1. By amount exactly round(amount * n) are pruned, as `torch.nn.utils.prune` rounds. Among equal
scores those go first that stand first (order of the mapping, then row by row), so equal scores give equal masks on all ranks.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

SCOPES = ("global", "local", "row")
SCHEDULES = ("one-shot", "cubic")


def by_threshold(scores: Mapping[str, Tensor], threshold: float) -> dict[str, Tensor]:
    """Prune what scores less than `threshold`. Raises ValueError for a NaN."""
    _require_numbers(scores)
    return {name: s >= threshold for name, s in scores.items()}


def by_amount(
    scores: Mapping[str, Tensor], amount: float, scope: str = "global", keep: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Prune the share `amount` of the weights, those that score least.

    They are ranked among all parameters ("global"), within each ("local") or within each output row of each ("row", as
    Wanda does). What the masks `keep` have pruned stays pruned and counts; if that is already more, no other is pruned.
    Raises ValueError for an amount outside [0, 1], an unknown scope, a NaN, or rows of a parameter that has none.
    """
    _require_share("amount", amount)
    if scope not in SCOPES:
        raise ValueError(f"scope {scope!r}: expected one of {', '.join(SCOPES)}")
    _require_numbers(scores)
    left = {name: s.masked_fill(~keep[name], -math.inf) if keep and name in keep else s for name, s in scores.items()}
    if not left:
        return {}
    if scope == "global":
        flat = torch.cat([s.flatten() for s in left.values()])
        staying = ~_smallest(flat[None], round(amount * flat.numel()))[0]
        parts = staying.split([s.numel() for s in left.values()])
        masks = {name: part.view(s.shape) for (name, s), part in zip(left.items(), parts, strict=True)}
    else:
        masks = {}
        for name, s in left.items():
            if scope == "row" and s.dim() < 2:
                raise ValueError(f"scope 'row': {name!r} has no rows, its shape is {tuple(s.shape)}")
            rows = s.flatten(1) if scope == "row" else s.reshape(1, -1)
            masks[name] = ~_smallest(rows, round(amount * rows.shape[1])).view(s.shape)
    return {name: mask & keep[name] if keep and name in keep else mask for name, mask in masks.items()}


def n_of_m(scores: Mapping[str, Tensor], n: int, m: int) -> dict[str, Tensor]:
    """Keep the n that score most of every m in a row along the last dimension (2 of 4: what sparse tensor cores take).

    Raises ValueError unless 0 <= n <= m and m divides the last dimension, and for a NaN.
    """
    _require_numbers(scores)
    return {name: ~_smallest(_groups(name, s, n, m), m - n).view(s.shape) for name, s in scores.items()}


def require_n_of_m(masks: Mapping[str, Tensor], n: int, m: int) -> None:
    """Raises ValueError that names the first m in a row along the last dimension of which more than n stay."""
    for name, mask in masks.items():
        kept = _groups(name, mask, n, m).sum(1)
        if bool((kept > n).any()):
            first = int((kept > n).nonzero()[0, 0])
            row, group = divmod(first, mask.shape[-1] // m)
            raise ValueError(
                f"{name!r}: {int(kept[first])} of the {m} weights from [{row}, {group * m}] on are kept, expected at most {n}"
            )


def regrow(
    masks: Mapping[str, Tensor], scores: Mapping[str, Tensor], gradients: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """Within each parameter prune `share` of what stays, and let as many others come back (RigL, arXiv:1911.11134).

    Those go that score least; of those pruned before, those come whose gradient is largest in absolute value (that of the
    mean over ranks, before masks are applied to it). They start from 0. As many stay as did; where fewer are pruned than
    `share` asks for, so many change places, and without a gradient none do. The paper may take back what it has just let
    go; here such a weight waits for the next time. Raises ValueError for a share outside [0, 1] or a NaN.
    """
    _require_share("share", share)
    _require_numbers(scores)
    _require_numbers(gradients)
    changed = {}
    for name, mask in masks.items():
        if name not in gradients:
            changed[name] = mask
            continue
        stay = int(mask.sum())
        k = min(round(share * stay), mask.numel() - stay)
        gone = _smallest(scores[name].masked_fill(~mask, math.inf).reshape(1, -1), k)
        come = _smallest((-gradients[name].abs()).masked_fill(mask, math.inf).reshape(1, -1), k)
        changed[name] = (mask.reshape(1, -1) & ~gone | come).view(mask.shape)
    return changed


def share_at(step: int, start: int, end: int, share: float) -> float:
    """RigL's share at a step: share / 2 * (1 + cos(pi * (step - start) / (end - start))), from `share` down to 0.

    `share` until `start`, 0 from `end` on. Raises ValueError for a share outside [0, 1] or an end before the start.
    """
    _require_share("share", share)
    _require_order(start, end)
    if step >= end:
        return 0.0
    return share / 2 * (1 + math.cos(math.pi * max(step - start, 0) / (end - start)))


def amount_at(step: int, start: int, end: int, amount: float, schedule: str) -> float:
    """The share that is to be pruned at a step: 0 before `start`, `amount` from `end` on.

    "one-shot": all of it from `start` on. "cubic" (Zhu & Gupta, arXiv:1710.01878), fast at first and then slower:
    amount * (1 - (1 - (step - start) / (end - start))^3). Raises ValueError for an unknown schedule, an amount outside [0, 1]
    or an end before the start.
    """
    _require_share("amount", amount)
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r}: expected one of {', '.join(SCHEDULES)}")
    _require_order(start, end)
    if step < start:
        return 0.0
    if schedule != "cubic" or step >= end:
        return amount
    return amount * (1 - (1 - (step - start) / (end - start)) ** 3)


def _smallest(s: Tensor, k: int) -> Tensor:
    """Bool [rows, n]: the k smallest of each row, the first of equal ones. Without ties it is one selection a row."""
    if k == 0:
        return torch.zeros_like(s, dtype=torch.bool)
    bound = s.kthvalue(k, dim=1, keepdim=True).values
    chosen = s <= bound
    if bool((chosen.sum(1) > k).any()):
        below, equal = s < bound, s == bound
        chosen = below | (equal & (equal.cumsum(1) <= k - below.sum(1, keepdim=True)))
    return chosen


def _groups(name: str, x: Tensor, n: int, m: int) -> Tensor:
    if not 0 <= n <= m or m < 1:
        raise ValueError(f"{n} of {m}: expected 0 <= n <= m")
    if x.dim() == 0 or x.shape[-1] % m:
        raise ValueError(
            f"{n} of {m}: the last dimension of {name!r} must be a multiple of {m}, its shape is {tuple(x.shape)}"
        )
    return x.reshape(-1, m)


def _require_order(start: int, end: int) -> None:
    if end < start:
        raise ValueError(f"end {end}: expected a step from the start on, {start}")


def _require_share(what: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{what} {value}: expected a share in [0, 1]")


def _require_numbers(scores: Mapping[str, Tensor]) -> None:
    for name, s in scores.items():
        if bool(s.isnan().any()):
            raise ValueError(f"scores of {name!r}: {int(s.isnan().sum())} of {s.numel()} are NaN")
