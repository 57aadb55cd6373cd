"""Prologues: the pass that encodes turns a gradient into a momentum, or into the move of one, so no second pass over memory is
needed.

    Prologue    x <- fresh * clip(x * inverse, limit) + kept * average      1-bit Adam's momentum
    Ahead       x <- fresh * (x - momentum), momentum <- momentum + x       the move of a rank's own momentum
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from commpress.kernels.table import encodes_moves, lookup

if TYPE_CHECKING:
    from commpress.comm.codecs.base import Codec


@dataclass(frozen=True)
class Prologue:
    """The operation x <- fresh * clip(x * inverse, limit) + kept * average on x ([n]). NaN and Inf become NaN."""

    inverse: Tensor
    """[n]; it must be float32 for the pass that encodes."""
    average: Tensor
    """[n], in the dtype of `inverse`."""
    limit: float
    fresh: float
    kept: float

    def __getitem__(self, part: slice) -> "Prologue":
        return replace(self, inverse=self.inverse[part], average=self.average[part])

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Return its tensors by name."""
        return {"inverse": self.inverse, "average": self.average}

    def fits(self, codec: "Codec", x: Tensor) -> bool:
        """Return whether the pass that encodes x by `codec` can apply it."""
        return True

    def apply(self, x: Tensor) -> None:
        """Apply the operation to x ([n], contiguous, any float dtype), in place."""
        kernel = lookup("prologue", None, x.device.type)
        if kernel is not None and kernel.takes(x):
            kernel(x, self)
            return
        scaled = x * self.inverse
        clipped = scaled.clamp(-self.limit, self.limit)
        x.copy_(self.fresh * clipped + self.kept * self.average + (scaled - scaled))


@dataclass(frozen=True)
class Ahead:
    """The operation x <- fresh * (x - momentum), momentum <- momentum + x: x ([n]) becomes the move of a momentum."""

    momentum: Tensor
    """[n], in the dtype of x; it must be float32 for the pass that encodes."""
    fresh: float

    def __getitem__(self, part: slice) -> "Ahead":
        return replace(self, momentum=self.momentum[part])

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Return its tensors by name."""
        return {"momentum": self.momentum}

    def fits(self, codec: "Codec", x: Tensor) -> bool:
        """Return whether the pass that encodes x by `codec` can apply it: that of a sparse codec reads values twice."""
        return encodes_moves(x.device) and not codec.sparse and x.dtype == self.momentum.dtype == torch.float32

    def apply(self, x: Tensor) -> None:
        """Apply the operation to x ([n], contiguous, any float dtype), in place."""
        kernel = lookup("momentum_ahead", None, x.device.type)
        if kernel is not None and kernel.takes(x, self.momentum):
            kernel(x, self.momentum, self.fresh)
            return
        x.sub_(self.momentum).mul_(self.fresh)
        self.momentum.add_(x)
