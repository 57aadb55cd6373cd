"""Tensors on CPU memory as the loops take them."""

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Steps = tuple[Floats, Floats, np.float32, np.float32, np.float32]

NO_FLOATS: Floats = np.empty(0, np.float32)
NO_STEPS: Steps = (NO_FLOATS, NO_FLOATS, np.float32(0), np.float32(0), np.float32(0))


def floats(x: Tensor | None) -> Floats:
    """A float32 tensor [n]; an empty array for None."""
    return NO_FLOATS if x is None else x.numpy()


def steps(prologue: Any) -> Steps:
    """The tensors and numbers of a `Prologue`, in float32; empty arrays for None."""
    if prologue is None:
        return NO_STEPS
    scalars = np.float32(prologue.limit), np.float32(prologue.fresh), np.float32(prologue.kept)
    return prologue.inverse.numpy(), prologue.average.numpy(), *scalars


def padded(payload: Tensor) -> Bytes:
    """A payload that is to be written, its last word 0: what of that is padding stays so."""
    payload[-4:].zero_()
    return payload.numpy()
