"""8-bit floats with a scale per block (Micikevicius et al., arXiv:2209.05433): x ~ scale * float8(x / scale),
scale = max|x| / 448 (`fp8`, e4m3) or max|x| / 57344 (`fp8(e5m2)`) over 256 values.

Payload of n values in B = ceil(n / 256) blocks, zero-padded to a multiple of 4 bytes:

    [ scale_0 .. scale_(B-1) : float32 ][ a byte a value ]

A byte is the sign, 4 or 5 bits of exponent, 3 or 2 of mantissa, rounded half to even: torch.float8_e4m3fn or
torch.float8_e5m2. 8.125 bits a value. int8 has the same step for all values of a block; these have finer steps for small
values: better for blocks of very different magnitudes, worse for even ones.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from commpress.comm.codecs.base import ArgumentError, Codec, padded, scales_and

BLOCK = 256
FLUSH = 2.0**-80
FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class Float8(Codec):
    """`fp8` (e4m3) and `fp8(e5m2)`: 3.9 times smaller than float32.

    Error of a value: at most 2^-4 |x| (e5m2: 2^-3 |x|), or, if less, 2^-10 (2^-17) times its block's scale, and
    float32's rounding. A block whose magnitudes all lie below 2^-80 decodes to 0; one that holds NaN or Inf decodes to NaN.
    (The very largest float32 may round up to Inf.)

    >>> parse("fp8(e4m3)"), parse("fp8(e5m2)").nbytes(256)
    (Float8(format='e4m3'), 260)
    """

    word: ClassVar[str] = "fp8"
    granularity: ClassVar[int] = BLOCK

    format: str = "e4m3"

    @classmethod
    def from_spec(cls, argument: str | None, values: Codec | None = None) -> "Float8":
        if argument is not None and argument not in FORMATS:
            raise ArgumentError(f"the format must be one of {', '.join(FORMATS)}, got {argument!r}")
        return cls(argument or "e4m3")

    @property
    def spec(self) -> str:
        return self.word if self.format == "e4m3" else f"{self.word}({self.format})"

    def nbytes(self, n: int) -> int:
        return padded(4 * -(-n // BLOCK) + n)

    def planes(self, n: int) -> tuple[slice, ...]:
        return scales_and(4 * -(-n // BLOCK), self.nbytes(n))

    def define_encode(self, x: Tensor) -> Tensor:
        n, blocks, dtype = x.numel(), -(-x.numel() // BLOCK), FORMATS[self.format]
        x = pad(x, (0, blocks * BLOCK - n)).view(blocks, BLOCK)
        peak = x.abs().amax(dim=1)
        usable = peak.isfinite() & (peak >= FLUSH)
        top = torch.full_like(
            peak, torch.finfo(dtype).max
        )  # by tensors: torch turns division by a scalar into a product
        scale = torch.where(usable, peak / top, torch.where(peak < FLUSH, 0.0, torch.full_like(peak, torch.nan)))
        inverse = torch.where(usable, top / peak, 0.0)
        codes = torch.where(usable[:, None], x * inverse[:, None], 0.0).to(dtype).view(torch.uint8)
        payload = torch.cat([scale.view(torch.uint8), codes.view(-1)[:n]])
        return pad(payload, (0, self.nbytes(n) - payload.numel()))

    def define_decode(self, payload: Tensor, n: int) -> Tensor:
        blocks = -(-n // BLOCK)
        scale = payload[: 4 * blocks].view(torch.float32)
        codes = payload[4 * blocks : 4 * blocks + n].view(FORMATS[self.format])
        return codes.to(torch.float32) * scale.repeat_interleave(BLOCK)[:n]
