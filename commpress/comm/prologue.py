"""Prologues: the gradient's share in a momentum is coded instead of the gradient, in the pass that encodes."""

from dataclasses import dataclass, replace

from torch import Tensor

from commpress.kernels.table import lookup


@dataclass(frozen=True)
class Prologue:
    """Makes of x ([n]) fresh * clip(x * inverse, limit) + kept * average; of NaN and Inf it makes NaN."""

    inverse: Tensor
    """[n]; float32, if it is to be done in the pass that encodes."""
    average: Tensor
    """[n], of the dtype of `inverse`."""
    limit: float
    fresh: float
    kept: float

    def __getitem__(self, part: slice) -> "Prologue":
        return replace(self, inverse=self.inverse[part], average=self.average[part])

    def apply(self, x: Tensor) -> None:
        """Make it of x ([n], contiguous, any float dtype), in place."""
        kernel = lookup("prologue", None, x.device.type)
        if kernel is not None and kernel.takes(x):
            kernel(x, self)
            return
        scaled = x * self.inverse
        clipped = scaled.clamp(-self.limit, self.limit)
        x.copy_(self.fresh * clipped + self.kept * self.average + (scaled - scaled))
