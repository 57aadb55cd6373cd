"""Conversions of CPU tensors to the arrays that the loops take."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Steps = tuple[Floats, Floats, np.float32, np.float32, np.float32] | tuple[Floats, np.float32]

Values = Floats | npt.NDArray[np.uint16]

BITS = {torch.bfloat16: torch.uint16}
READABLE = (torch.float32, *BITS)
"""The dtypes of gradients that the loops read, and of means that they write."""


def values(x: Tensor) -> Values:
    """Return a tensor [n] of a readable dtype as an array: float32, or the bits of bfloat16 as uint16."""
    return (x.view(BITS[x.dtype]) if x.dtype in BITS else x).numpy()


def floats(x: Tensor | None) -> Floats | None:
    """Return a float32 tensor [n] as an array; None for None."""
    return None if x is None else x.numpy()


def steps(prologue: Any) -> Steps | None:
    """Return the tensors and numbers of a `Prologue` or an `Ahead`, in float32; None for None."""
    if prologue is None:
        return None
    if hasattr(prologue, "momentum"):
        return prologue.momentum.numpy(), np.float32(prologue.fresh)
    scalars = np.float32(prologue.limit), np.float32(prologue.fresh), np.float32(prologue.kept)
    return prologue.inverse.numpy(), prologue.average.numpy(), *scalars


def padded(payload: Tensor) -> Bytes:
    """Return a payload to write to. Its last word is set to 0, which zeroes its padding."""
    payload[-4:].zero_()
    return payload.numpy()
