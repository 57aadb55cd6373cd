"""Integers with a scale per block (Alistarh et al., arXiv:1610.02132, deterministic): x ~ scale * round(x / scale),
scale = max|x| / 127 (`int8`) or max|x| / 7 (`int4`) over 256 values.

Payload of n values in B = ceil(n / 256) blocks, zero-padded to a multiple of 4 bytes:

    [ scale_0 .. scale_(B-1) : float32 ][ codes of block 0 ][ codes of block 1 ] ...

int8: a byte a value, round(x / scale) + 128. int4: round(x / scale) + 8 in four bits; the byte j of a block of m values
holds value j in its low half and value j + ceil(m / 2) in its high half. 8.125 and 4.125 bits a value.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from commpress.comm.codecs.base import Codec, padded, scales_and

BLOCK = 256
FLUSH = 2.0**-100


class BlockInteger(Codec):
    """int8 and int4; `bits` says which.

    Error of a value: at most scale / 2 = max|x| / 254 or max|x| / 14 of its block (and float32's rounding). A block whose
    magnitudes all lie below 2^-100 decodes to 0; one that holds NaN or Inf decodes to NaN. (The very largest float32 may
    round up to Inf.)
    """

    bits: ClassVar[int]
    granularity: ClassVar[int] = BLOCK

    def nbytes(self, n: int) -> int:
        tail = n % BLOCK
        return padded(4 * -(-n // BLOCK) + n // BLOCK * (BLOCK * self.bits // 8) + -(-tail * self.bits // 8))

    def planes(self, n: int) -> tuple[slice, ...]:
        return scales_and(4 * -(-n // BLOCK), self.nbytes(n))

    def define_encode(self, x: Tensor) -> Tensor:
        n, blocks = x.numel(), -(-x.numel() // BLOCK)
        levels, offset = 2 ** (self.bits - 1) - 1, 2 ** (self.bits - 1)
        x = pad(x, (0, blocks * BLOCK - n)).view(blocks, BLOCK)
        peak = x.abs().amax(dim=1)
        usable = peak.isfinite() & (peak >= FLUSH)
        top = torch.full_like(peak, levels)  # by tensors: torch turns division by or of a scalar into a product
        scale = torch.where(usable, peak / top, torch.where(peak < FLUSH, 0.0, torch.full_like(peak, torch.nan)))
        inverse = torch.where(usable, top / peak, 0.0)
        codes = torch.where(usable[:, None], torch.round(x * inverse[:, None]), 0.0).to(torch.int32) + offset
        flat = codes.to(torch.uint8).view(-1)
        if self.bits == 4:
            full = flat[: n // BLOCK * BLOCK].view(-1, 2, BLOCK // 2)
            tail = flat[n // BLOCK * BLOCK : n]
            tail = pad(tail, (0, tail.numel() % 2), value=offset).view(2, -1)
            packed = torch.cat([(full[:, 0] | full[:, 1] << 4).view(-1), tail[0] | tail[1] << 4])
        else:
            packed = flat[:n]
        payload = torch.cat([scale.view(torch.uint8), packed])
        return pad(payload, (0, self.nbytes(n) - payload.numel()))

    def define_decode(self, payload: Tensor, n: int) -> Tensor:
        blocks, tail, offset = -(-n // BLOCK), n % BLOCK, 2 ** (self.bits - 1)
        scale = payload[: 4 * blocks].view(torch.float32)
        codes = payload[4 * blocks :]
        if self.bits == 4:
            full = codes[: n // BLOCK * (BLOCK // 2)].view(-1, BLOCK // 2)
            rest = codes[full.numel() : full.numel() + -(-tail // 2)]
            full = torch.cat([full & 15, full >> 4], dim=1).view(-1)
            codes = torch.cat([full, rest & 15, rest >> 4])
        values: Tensor = codes[:n].to(torch.float32) - offset
        return values * scale.repeat_interleave(BLOCK)[:n]


@dataclass(frozen=True)
class Int8(BlockInteger):
    """`int8`: 3.9 times smaller than float32.

    >>> parse("int8").nbytes(256)
    260
    """

    word: ClassVar[str] = "int8"
    bits: ClassVar[int] = 8


@dataclass(frozen=True)
class Int4(BlockInteger):
    """`int4`: 7.8 times smaller than float32.

    >>> parse("int4").nbytes(256)
    132
    """

    word: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4
