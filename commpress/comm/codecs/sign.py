"""Sign with a magnitude per block (Seide et al., Interspeech 2014; Karimireddy et al., arXiv:1901.09847):
x ~ s * sign(x), s = mean|x| over 1024 values.

Payload of n values in B = ceil(n / 1024) blocks, zero-padded to a multiple of 4 bytes:

    [ s_0 .. s_(B-1) : float32 ][ signs of block 0 ][ signs of block 1 ] ...

Bit p of byte j of a block of m values is the sign bit of value p * ceil(m / 8) + j. 1.03 bits a value.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from commpress.comm.codecs.base import Codec, padded, scales_and

BLOCK = 1024
LANES = 64


@dataclass(frozen=True)
class Sign(Codec):
    """`sign`: 31 times smaller than float32. Needs error feedback.

    The squared error of a block is sum x^2 - (sum|x|)^2 / m: never more than the block's own squares, and 0 (to rounding)
    if all magnitudes are equal. A block that holds NaN or Inf, or whose sum overflows float32, decodes to NaN.

    >>> parse("sign").nbytes(1024)
    132
    """

    word: ClassVar[str] = "sign"
    granularity: ClassVar[int] = BLOCK

    def nbytes(self, n: int) -> int:
        return padded(4 * -(-n // BLOCK) + plane_bytes(n))

    def planes(self, n: int) -> tuple[slice, ...]:
        return scales_and(4 * -(-n // BLOCK), self.nbytes(n))

    def define_encode(self, x: Tensor) -> Tensor:
        n, blocks = x.numel(), -(-x.numel() // BLOCK)
        scale = block_sum(pad(x.abs(), (0, blocks * BLOCK - n))) * (1 / block_sizes(n, x.device))
        scale = torch.where(scale.isfinite(), scale, torch.nan)
        payload = torch.cat([scale.view(torch.uint8), pack_plane(x.view(torch.int32) < 0)])
        return pad(payload, (0, self.nbytes(n) - payload.numel()))

    def define_decode(self, payload: Tensor, n: int) -> Tensor:
        blocks = -(-n // BLOCK)
        scale = payload[: 4 * blocks].view(torch.float32).repeat_interleave(BLOCK)[:n]
        return torch.where(unpack_plane(payload[4 * blocks :], n), -scale, scale)


def block_sum(x: Tensor) -> Tensor:
    """Return the sum of each block of float32 [blocks * BLOCK]; its order is part of the format."""
    lanes = x.view(-1, BLOCK // LANES, LANES)
    total = lanes[:, 0].clone()
    for k in range(1, BLOCK // LANES):
        total += lanes[:, k]
    while total.shape[1] > 1:
        half = total.shape[1] // 2
        total = total[:, :half] + total[:, half:]
    return total[:, 0]


def block_sizes(n: int, device: torch.device) -> Tensor:
    """Return how many of n values are in each block: float32 [blocks]."""
    sizes = torch.full((-(-n // BLOCK),), float(BLOCK), dtype=torch.float32, device=device)
    if n % BLOCK:
        sizes[-1] = n % BLOCK
    return sizes


def plane_bytes(n: int) -> int:
    """Return the bytes of one bit for each of n values."""
    return n // BLOCK * (BLOCK // 8) + -(-(n % BLOCK) // 8)


def pack_plane(bits: Tensor) -> Tensor:
    """Pack bool [n] into uint8 [plane_bytes(n)], in the layout of a block's signs."""
    n = bits.numel()
    full = bits[: n // BLOCK * BLOCK].view(-1, 8, BLOCK // 8)
    tail = bits[n // BLOCK * BLOCK :]
    tail = pad(tail, (0, -tail.numel() % 8)).view(1, 8, -1)
    weights = (1 << torch.arange(8, dtype=torch.int64, device=bits.device)).view(1, 8, 1)
    return torch.cat([(part * weights).sum(dim=1).to(torch.uint8).view(-1) for part in (full, tail)])


def unpack_plane(packed: Tensor, n: int) -> Tensor:
    """Return the n bits at the start of `packed` (uint8): bool [n]."""
    full = packed[: n // BLOCK * (BLOCK // 8)].view(-1, 1, BLOCK // 8)
    tail = packed[full.numel() : plane_bytes(n)].view(1, 1, -1)
    places = torch.arange(8, dtype=torch.uint8, device=packed.device).view(1, 8, 1)
    return torch.cat([(part >> places & 1).bool().view(-1) for part in (full, tail)])[:n]
