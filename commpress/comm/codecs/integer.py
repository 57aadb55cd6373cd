"""Integers with a scale per block (Alistarh et al., arXiv:1610.02132, deterministic): x ~ scale * round(x / scale),
scale = max|x| / 127 (`int8`) or max|x| / 7 (`int4`) over 256 values.

Payload of n values in B = ceil(n / 256) blocks, zero-padded to a multiple of 4 bytes:

    [ scale_0 .. scale_(B-1) : float32 ][ codes of block 0 ][ codes of block 1 ] ...

int8: a byte a value, round(x / scale) + 128. int4: round(x / scale) + 8 in four bits; the byte j of a block of m values
holds value j in its low half and value j + ceil(m / 2) in its high half. 8.125 and 4.125 bits a value.

`int8(stochastic)`, `int4(stochastic)`, as in that paper: the same payload, but x / scale goes to the integer above with the
probability of its distance from the one below, so that it is right on average. The random number is a hash of the value, of its
block's scale and of its place in the block. So the bytes depend only on the values, only the payload is sent, and the
noise differs wherever the values do: on each rank, in each step. The same values, bit for bit, get the same noise.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from commpress.comm.codecs.base import ArgumentError, Codec, padded, scales_and

BLOCK = 256
FLUSH = 2.0**-100


@dataclass(frozen=True)
class BlockInteger(Codec):
    """The base of int8 and int4, which have 8 and 4 `bits` a value.

    Error of a value: at most scale / 2 = max|x| / 254 or max|x| / 14 of its block (and float32's rounding), twice that if it is
    rounded stochastically. A block whose magnitudes all lie below 2^-100 decodes to 0; one that holds NaN or Inf decodes to
    NaN. (The very largest float32 may round up to Inf.)
    """

    stochastic: bool = False
    """Whether a value is rounded up or down at random, so that it is right on average; else to the nearest."""

    bits: ClassVar[int]
    granularity: ClassVar[int] = BLOCK

    @classmethod
    def from_spec(cls, argument: str | None, values: Codec | None = None) -> "BlockInteger":
        if argument not in (None, "stochastic"):
            raise ArgumentError(f"{cls.word} takes (stochastic) or no argument, got ({argument})")
        return cls(argument == "stochastic")

    @property
    def spec(self) -> str:
        return f"{self.word}(stochastic)" if self.stochastic else self.word

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
        level = x * inverse[:, None]
        if self.stochastic:
            level = (level + noise(x, scale)).clamp(-levels, levels)
        codes = torch.where(usable[:, None], torch.round(level), 0.0).to(torch.int32) + offset
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


def noise(x: Tensor, scale: Tensor) -> Tensor:
    """Return the noise that x / scale gets before it is rounded to the nearest integer, float32 [blocks, 256].

    `x` has that shape, `scale` is [blocks]. Odd multiples of 2^-24 between -1/2 and 1/2, all equally likely: a hash of 32 bits
    (Wellons' lowbias32) of the bits of the value, its scale and its place in the block.
    """
    mask = 2**32 - 1
    place = torch.arange(BLOCK, dtype=torch.int64, device=x.device) * 0x85EBCA6B
    key = scale.view(torch.int32).to(torch.int64) * 0x9E3779B9
    h = (x.view(torch.int32).to(torch.int64) ^ (key[:, None] + place)) & mask
    h = ((h ^ h >> 16) * 0x7FEB352D) & mask
    h = ((h ^ h >> 15) * 0x846CA68B) & mask
    h = h ^ h >> 16
    signed = (h ^ 2**31) - 2**31
    return (signed >> 8 | 1).to(torch.float32) * 2.0**-24


@dataclass(frozen=True)
class Int8(BlockInteger):
    """`int8`: 3.9 times smaller than float32.

    >>> parse("int8").nbytes(256), parse("int8(stochastic)")
    (260, Int8(stochastic=True))
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
