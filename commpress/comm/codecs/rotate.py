"""Rotation before rounding (Suresh et al., arXiv:1611.00429; DRIVE, arXiv:2105.08339; SDP4Bit, arXiv:2410.15526): a randomised
Hadamard transform spreads large values over many, so that a code with one scale a block loses less:

    z = H D x / sqrt(m),  z is coded;  x ~ D H z / sqrt(m)        D: a sign for each value, H: Hadamard's matrix of m rows

Blocks are m = 1024 values; the rest at the end is cut into blocks of 512, 256, 128 ... 2, the largest first, and a single
value does not change. Value i has the sign of bit i % 8 of byte i // 8 of SHAKE-256 of b"rotate". The matrix is the same on all
ranks and in all steps, so a mean is rotated back once, after the sum.

A step h of the transform makes a + b and a - b of the values i and i + h. A full block takes the steps 16, 32 ... 512, then 1,
2, 4, 8, and its result leaves as 16 rows of 64: value 16 r + c is the value 64 c + r of z. Back it takes 4, 8, 1, 2, 16 ...
512.

The payload is that of the codec of the rotated values.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from commpress.comm.codecs.base import ArgumentError, Codec

BLOCK = 1024
COLUMNS = 16
DIGEST = hashlib.shake_256(b"rotate").digest(BLOCK // 8)
FORTH = (16, 32, 64, 128, 256, 512, 1, 2, 4, 8)
BACK = (4, 8, 1, 2, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Rotate(Codec):
    """`rotate|int4`, `rotate|sign`, ...: a code of the rotated values, as long as a code of the values themselves.

    The squared error is that of coding the rotated values, which are nearly normal: an eighth of their squares for int2, a
    third for sign, whatever the values were. Error feedback keeps the error of the original values. A block of 1024 that holds
    NaN or Inf, or whose sums overflow float32, decodes to NaN.

    >>> x = torch.ones(4096); x[::64] = 30.0
    >>> sign, turned = (c.decode(c.encode(x), 4096) for c in (parse("sign"), parse("rotate|sign")))
    >>> (x - sign).norm() > 1.4 * (x - turned).norm()
    tensor(True)
    """

    values: Codec

    word: ClassVar[str] = "rotate"
    outer: ClassVar[bool] = True
    granularity: ClassVar[int] = BLOCK

    @classmethod
    def from_spec(cls, argument: str | None, values: Codec | None = None) -> "Rotate":
        if argument is not None or values is None:
            got = "nothing" if argument is None else f"({argument})"
            raise ArgumentError(f"rotate needs the codec of the rotated values after it, as in rotate|int4, got {got}")
        return cls(values)

    def __post_init__(self) -> None:
        if self.values.outer or self.values.granularity == 1:
            raise ValueError(
                f"rotate|{self.values}: expected a codec with scales, such as int4 or sign, got {self.values}"
            )

    @property
    def spec(self) -> str:
        return f"{self.word}|{self.values}"

    @property
    def signs(self) -> Tensor:
        """Return the sign of each value of a block, on the CPU: float32 [1024]."""
        return signs(torch.device("cpu"))

    def nbytes(self, n: int) -> int:
        return self.values.nbytes(n)

    def define_encode(self, x: Tensor) -> Tensor:
        return self.values.define_encode(rotated(x))

    def define_decode(self, payload: Tensor, n: int) -> Tensor:
        return rotated(self.values.define_decode(payload, n), back=True)

    def define_mean(self, payloads: Tensor, n: int, count: int) -> Tensor:
        return rotated(self.values.define_mean(payloads, n, count), back=True)


def signs(device: torch.device) -> Tensor:
    """Return the sign of each value of a block: float32 [1024]."""
    bits = [DIGEST[i // 8] >> i % 8 & 1 for i in range(BLOCK)]
    return 1 - 2 * torch.tensor(bits, dtype=torch.float32, device=device)


def rotated(x: Tensor, back: bool = False) -> Tensor:
    """Rotate x (float32 [n]), or rotate it back: float32 [n]."""
    sign, parts, at = signs(x.device), [], 0
    for blocks, size in pieces(x.numel()):
        part = x[at : at + blocks * size].view(blocks, size)
        at += part.numel()
        factors = sign[:size] * size**-0.5
        parts.append((_turned_back(part, factors) if back else _turned(part, factors)).reshape(-1))
    return torch.cat([*parts, x[at:]])


def pieces(n: int) -> Iterator[tuple[int, int]]:
    """Return how many blocks of each size are cut from n values, one size after another."""
    if n >= BLOCK:
        yield n // BLOCK, BLOCK
    for size in (512, 256, 128, 64, 32, 16, 8, 4, 2):
        if n & size:
            yield 1, size


def _turned(x: Tensor, factors: Tensor) -> Tensor:
    """Rotate blocks: [blocks, m]."""
    size = x.shape[1]
    x = _transformed(x * factors, FORTH if size == BLOCK else _upwards(size))
    if size == BLOCK:
        x = x.view(-1, BLOCK // COLUMNS, COLUMNS).transpose(1, 2).reshape(-1, BLOCK)
    return _with_one_nan(x)


def _turned_back(x: Tensor, factors: Tensor) -> Tensor:
    """Rotate blocks back: [blocks, m]."""
    size = x.shape[1]
    if size == BLOCK:
        x = x.view(-1, COLUMNS, BLOCK // COLUMNS).transpose(1, 2).reshape(-1, BLOCK)
    return _with_one_nan(_transformed(x, BACK if size == BLOCK else _upwards(size)) * factors)


def _transformed(x: Tensor, steps: Iterable[int]) -> Tensor:
    """Apply these steps of Hadamard's transform to blocks: [blocks, m]."""
    shape = x.shape
    for step in steps:
        upper, lower = x.reshape(-1, 2, step).unbind(1)
        x = torch.stack([upper + lower, upper - lower], dim=1)
    return x.view(shape)


def _upwards(size: int) -> list[int]:
    """Return the steps of a block shorter than 1024."""
    return [1 << i for i in range(size.bit_length() - 1)]


def _with_one_nan(x: Tensor) -> Tensor:
    """Replace values that are not finite by one quiet NaN: the sign of a NaN differs from processor to processor."""
    return torch.where(x.isfinite(), x, torch.nan)
