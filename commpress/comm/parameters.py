"""A parameter as it is sent: real numbers, under a name that does not depend on wrappers of its module.

    complex64 [n]   a0+b0i  a1+b1i ..   ->   float32 [2 n]   a0 b0 a1 b1 ..        the same memory

A complex value is sent, and counted in memories and states, as two real values of half its size. `torch.compile` and activation
checkpointing put a module into another one and so add a word to its parameters' names. That word is left out: a state that was
saved with such a wrapper loads without it.
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
    """Return a complex tensor's values as pairs of real ones: a detached view [..., 2]. Others are unchanged."""
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
    """Return the number of real values in a tensor; a complex value counts as two."""
    return x.numel() * (2 if x.is_complex() else 1)


def bare_name(name: str) -> str:
    """Return a parameter's name without the words of wrappers: "net.0.weight" for "net._orig_mod.0.weight"."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def unfit_dtype(parameters: Mapping[str, Tensor]) -> str | None:
    """Return an error text if a parameter's gradients cannot be exchanged (a dtype neither float nor complex), else None."""
    for name, p in parameters.items():
        if real_view(p).dtype not in FLOAT_DTYPES:
            known = ", ".join(dtype_name(dtype) for dtype in FLOAT_DTYPES)
            return f"parameter {name!r} has dtype {dtype_name(p.dtype)}, expected one of {known}, or complex numbers of these"
    return None
