"""Kernel of `fingerprint_on_device`: a program leaves the sum of its words' hashes. The formula is in `comm/fingerprint.py`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from commpress.kernels.triton.launch import walk

SIZE = 2048


@triton.jit
def _sum(arguments, at, inside):
    x, sums = arguments
    h = tl.load(x + at, inside).to(tl.uint32) ^ (at.to(tl.uint32) * 0x9E3779B1)
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    hashed = (h ^ (h >> 16)).to(tl.int64)
    if inside is not None:
        hashed = tl.where(inside, hashed, 0)
    tl.store(sums + tl.program_id(0), tl.sum(hashed))


def fingerprint(words: Tensor) -> Tensor:
    """`fingerprint` of the table."""
    n = words.numel()
    sums = torch.empty(triton.cdiv(n, SIZE), dtype=torch.int64, device=words.device)
    walk(_sum, n, words, sums, size=SIZE)
    return sums.sum()
