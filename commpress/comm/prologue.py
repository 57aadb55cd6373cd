"""Prologues: the pass that encodes turns a gradient into a momentum first, so no second pass over memory is needed."""

from dataclasses import dataclass, replace

from torch import Tensor

from commpress.kernels.table import lookup


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

    def apply(self, x: Tensor) -> None:
        """Apply the operation to x ([n], contiguous, any float dtype), in place."""
        kernel = lookup("prologue", None, x.device.type)
        if kernel is not None and kernel.takes(x):
            kernel(x, self)
            return
        scaled = x * self.inverse
        clipped = scaled.clamp(-self.limit, self.limit)
        x.copy_(self.fresh * clipped + self.kept * self.average + (scaled - scaled))
