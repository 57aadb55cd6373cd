"""What of a momentum is coded instead of a gradient: the gradient's share in it, in the pass that encodes."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from commpress.comm.kernels import cpu

Floats = npt.NDArray[np.float32]
Source = tuple[Floats, Floats, np.float32, np.float32, np.float32]
"""A `Blend` for the loops; empty arrays mean x as it is."""

AS_IT_IS: Source = (np.empty(0, np.float32), np.empty(0, np.float32), np.float32(0), np.float32(0), np.float32(0))


@dataclass(frozen=True)
class Blend:
    """Makes of x ([n]) fresh * clip(x * inverse, limit) + kept * average; of NaN and Inf it makes NaN."""

    inverse: Tensor
    """[n]; float32, if it is to be done in the pass that encodes."""
    average: Tensor
    """Likewise."""
    limit: float
    fresh: float
    kept: float

    def __getitem__(self, part: slice) -> "Blend":
        return replace(self, inverse=self.inverse[part], average=self.average[part])

    @property
    def source(self) -> Source:
        """For the loops, which compute in float32."""
        scalars = np.float32(self.limit), np.float32(self.fresh), np.float32(self.kept)
        return self.inverse.numpy(), self.average.numpy(), *scalars

    def apply(self, x: Tensor) -> None:
        """Make it of x ([n], contiguous, any float dtype), in place."""
        if x.device.type == "cpu" and x.dtype == torch.float32:
            cpu.blend(x.numpy(), self.source)
            return
        scaled = x * self.inverse
        clipped = scaled.clamp(-self.limit, self.limit)
        x.copy_(self.fresh * clipped + self.kept * self.average + (scaled - scaled))
