"""Casts: every value in 16 bits (`bf16`, `fp16`), or in its own 32 (`none`). Sums of payloads are payloads: linear.

Payload: [ x0 | x1 | ... ], 2 or 4 bytes a value, zero-padded to a multiple of 4 bytes.
Relative error of a value in the normal range: at most 2^-8 for bf16 (the range of float32) and 2^-11 for fp16 (values above
65504 become Inf, below 3e-8 zero). Every NaN is sent as one quiet NaN without sign or payload, because torch's own conversions
give different NaNs on different processors.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from commpress.comm.codecs.base import Codec, padded


@dataclass(frozen=True)
class Identity(Codec):
    """`none`: float32 as it is; float64 is rounded to it. (A dense exchange of `none` sums the tensor's own dtype.)

    >>> parse("none").encode(torch.ones(2)).numel()
    8
    """

    word: ClassVar[str] = "none"
    exchange: ClassVar[str] = "all_reduce"
    lossy: ClassVar[bool] = False
    sum_dtype = torch.float32

    def nbytes(self, n: int) -> int:
        return 4 * n

    def define_encode(self, x: Tensor) -> Tensor:
        return x.clone().view(torch.uint8)

    def define_decode(self, payload: Tensor, n: int) -> Tensor:
        return payload.view(torch.float32).clone()


class HalfCast(Codec):
    """The base of the two 16-bit casts. `sum_dtype` is the dtype, `nan` the bits of the one NaN that is sent."""

    nan: ClassVar[int]
    exchange: ClassVar[str] = "all_reduce"

    def nbytes(self, n: int) -> int:
        return padded(2 * n)

    def define_encode(self, x: Tensor) -> Tensor:
        assert self.sum_dtype is not None
        payload = torch.zeros(self.nbytes(x.numel()), dtype=torch.uint8, device=x.device)
        words = payload[: 2 * x.numel()].view(torch.int16)
        words.copy_(x.to(self.sum_dtype).view(torch.int16))
        words.masked_fill_(x.isnan(), self.nan)  # torch's NaN differs from machine to machine
        return payload

    def define_decode(self, payload: Tensor, n: int) -> Tensor:
        assert self.sum_dtype is not None
        return payload[: 2 * n].view(self.sum_dtype).to(torch.float32)


@dataclass(frozen=True)
class BFloat16(HalfCast):
    """`bf16`: 8 bits of mantissa, float32's range. The usual choice."""

    word: ClassVar[str] = "bf16"
    sum_dtype = torch.bfloat16
    nan: ClassVar[int] = 0x7FC0


@dataclass(frozen=True)
class Float16(HalfCast):
    """`fp16`: 11 bits of mantissa, a small range: a gradient beyond 65504 becomes Inf."""

    word: ClassVar[str] = "fp16"
    sum_dtype = torch.float16
    nan: ClassVar[int] = 0x7E00
