"""A parameter for the traffic: real numbers under a name that does not depend on wrappers of its module.

    complex64 [n]   a0+b0i  a1+b1i ..   ->   float32 [2 n]   a0 b0 a1 b1 ..        the same memory

So a complex value is sent, and counted in memories and states, as two reals of half its size. `torch.compile` and
activation checkpointing put a module into another one with its own name, which is left out of a parameter's name: a
state that was saved with them loads without them.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from commpress.comm.coding import FLOAT_DTYPES
from commpress.comm.meter import dtype_name

COMPILED = "_orig_mod"
WRAPPERS = (COMPILED, "_checkpoint_wrapped_module")
"""Names that torch gives the module inside a compiled one, and inside one whose activations are checkpointed."""


def real_view(x: Tensor) -> Tensor:
    """A complex tensor's values as pairs of reals: a detached view [..., 2]. Others are returned as they are."""
    if not x.is_complex():
        return x
    x = x.detach()
    return torch.view_as_real(x.conj() if x.is_conj() else x)  # a mean of conjugates is the conjugate of a mean


def dense(p: Tensor) -> bool:
    """Whether a tensor fills its memory without gaps or overlaps, in any order of its dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(p.stride(), p.shape, strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def real_numel(x: Tensor) -> int:
    """How many real numbers a tensor holds."""
    return x.numel() * (2 if x.is_complex() else 1)


def bare_name(name: str) -> str:
    """A parameter's name without what wrappers add, wherever it stands: "net._orig_mod.0.weight" is "net.0.weight"."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def unfit_dtype(parameters: Mapping[str, Tensor]) -> str | None:
    """Why the gradients of these parameters cannot be exchanged, if they cannot: a dtype that is neither float nor complex."""
    for name, p in parameters.items():
        if real_view(p).dtype not in FLOAT_DTYPES:
            known = ", ".join(dtype_name(dtype) for dtype in FLOAT_DTYPES)
            return f"parameter {name!r} has dtype {dtype_name(p.dtype)}, expected one of {known}, or complex numbers of these"
    return None
