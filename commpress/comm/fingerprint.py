"""A hash of a tensor that stays on its device: it shows whether the tensor has changed, without a wait of the host.

    hash  =  sum over i of mix(word i ^ 2654435761 i)        mix: the last steps of MurmurHash3, a bijection of 32 bits

A value is a word, one of eight bytes is two. One changed value always shows; several are missed once in 2**32. Compare
it only with other hashes of the same dtype. `kernels/cpu/fingerprint.py` has the hash for numbers that the host compares.
"""

from itertools import product

import torch
from torch import Tensor

from commpress.kernels.table import compiled_dtypes, compiles_by_place, lookup

WORD = 0xFFFFFFFF
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def fingerprint_on_device(x: Tensor) -> Tensor:
    """Return the hash of `x` ([n], contiguous, any dtype): int64 [], on its device. The host does not wait for it."""
    words = x.detach().view(BITS[min(4, x.element_size())])
    if words.numel() and (kernel := lookup("fingerprint", None, x.device.type)):
        result: Tensor = kernel(words)
        return result
    at = torch.arange(words.numel(), dtype=torch.int64, device=x.device)
    h = (words.to(torch.int64) ^ at * 0x9E3779B1) & WORD
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & WORD
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & WORD
    return (h ^ (h >> 16)).sum()


def warm_up(device: torch.device) -> None:
    """Compile the kernels of an accelerator now, not in the middle of a step, for tensors that begin anywhere."""
    for dtype, at in product(compiled_dtypes(device), (0, 1)) if compiles_by_place(device) else ():
        fingerprint_on_device(torch.zeros(2, dtype=dtype, device=device)[at:])
