"""A watch over the exchanged values: a script that changes `grad` between backward and `step` changes the update.

With a compressed optimizer `grad` holds an update, not a gradient. Clipping it by norm, as one does with gradients, is then a
mistake.
"""

import functools
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from commpress.notice import warn


class GradientWatch:
    """Remembers the gradients of parameters as they arrived, and warns, once, if one of them was changed."""

    def __init__(self) -> None:
        self.on = True
        """Whether a change is still to be warned about."""
        self._arrived: dict[Tensor, tuple[Tensor, int]] | None = None

    def forget(self) -> None:
        """Stop comparing the gradients that were remembered."""
        self._arrived = None

    def remember(self, parameters: Iterable[Tensor], scaled: bool) -> None:
        """Remember `grad` of these parameters after a backward. `scaled`: a GradScaler will divide it in place."""
        if not scaled or not unscaling_counts():
            self._arrived = {p: (p.grad, p.grad._version) for p in parameters if p.grad is not None}

    def check(self, parameters: Mapping[str, Tensor], kind: str, speaks: bool) -> None:
        """Warn if a gradient of these was changed. `kind` is the optimizer's class; `speaks`: this rank may warn."""
        arrived, self._arrived = self._arrived, None
        if arrived is None or not self.on:
            return
        for name, p in parameters.items():
            if p not in arrived or p.grad is None:
                continue
            gradient, version = arrived[p]
            if p.grad is not gradient or gradient._version > version:
                self.on = False
                warn(
                    f"commpress: the grad of {name!r} was changed between backward and {kind}.step(), as "
                    f"torch.nn.utils.clip_grad_norm_ does. It holds what {kind} is about to apply, which is no gradient: "
                    f"leave clipping out and set {kind}(..., max_norm=...), scale by lr, and give a GradScaler to "
                    "attach(grad_scaler=)",
                    speaks,
                )
                return


@functools.cache
def unscaling_counts() -> bool:
    """Whether a GradScaler's division counts as a change of a tensor's version; in the versions of torch so far it does not."""
    x, found, scale = (torch.ones(1, device="cpu", dtype=torch.float32) for _ in range(3))
    before = x._version
    torch._amp_foreach_non_finite_check_and_unscale_([x], found, scale)
    return x._version != before
