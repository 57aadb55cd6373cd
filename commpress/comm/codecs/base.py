"""The base of every codec: tensor -> bytes -> tensor, pure, with a payload whose length depends only on the number of values.

A family states its *definition* in plain torch (`define_encode`, `define_decode`: any device, the oracle of the tests).
Where the table of kernels (`commpress/kernels/table.py`) has loops for its word and a device, they run instead and give
the same bytes at memory speed.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from commpress.comm import coding


class ArgumentError(ValueError):
    """An argument of a spec that cannot be read. `parse` puts the spec in front of the text."""


class Codec(ABC):
    """A codec of 1-D float tensors: n values become one 1-D `uint8` payload of `nbytes(n)` bytes, and come back.

    Values are coded in float32, whatever their dtype. A block that holds NaN or Inf decodes to NaN or Inf.
    """

    word: ClassVar[str]
    """The spec word, as in `topk(0.01)`."""
    exchange: ClassVar[str] = "two_shot"
    """The exchange that suits this codec if the plan names none."""
    lossy: ClassVar[bool] = True
    sparse: ClassVar[bool] = False
    """Whether it sends only some of the values."""
    outer: ClassVar[bool] = False
    """Whether another codec codes its values: its spec may go on with `|` and that codec."""
    flat: ClassVar[bool] = True
    """Whether it can code flat values; if not, only its own exchange can use it, which knows the tensors' shapes."""
    granularity: ClassVar[int] = 1
    """The block: two_shot cuts only at multiples of it."""

    @property
    def sum_dtype(self) -> torch.dtype | None:
        """Return the dtype in which payloads of a linear codec may be summed; None for others."""
        return None

    @property
    def linear(self) -> bool:
        """Return whether payloads can be summed, in `sum_dtype`."""
        return self.sum_dtype is not None

    @property
    def draw(self) -> int:
        """Return the number of a random codec's draw; 0 for others."""
        return 0

    @classmethod
    def from_spec(cls, argument: str | None, values: "Codec | None" = None) -> "Codec":
        """Return the codec for a spec's argument in brackets (None without one) and, for an outer one, the codec after `|`.

        Raises ArgumentError if the argument cannot be read, ValueError if it is out of range.
        """
        if argument is not None:
            raise ArgumentError(f"{cls.word} takes no argument, got ({argument})")
        return cls()

    @property
    def spec(self) -> str:
        """Return the canonical spec: `parse(codec.spec) == codec`."""
        return self.word

    def __str__(self) -> str:
        return self.spec

    def keeping(self, share: float) -> "Codec":
        """Return this codec with at least this share of the values sent; itself unless it is sparse."""
        return self

    def drawn(self, number: int) -> "Codec":
        """Return this codec with another number for its draw; itself unless it draws."""
        return self

    def summed(self, n: int) -> slice:
        """Return the place of the values in a linear codec's payload of n values, in bytes. The rest is equal on all ranks."""
        assert self.sum_dtype is not None
        return slice(0, n * self.sum_dtype.itemsize)

    @abstractmethod
    def nbytes(self, n: int) -> int:
        """Return the length in bytes of the payload of n values, a multiple of 4."""

    @abstractmethod
    def define_encode(self, x: Tensor) -> Tensor:
        """Encode by the definition, in plain torch: float32 [n] -> uint8 [nbytes(n)]."""

    @abstractmethod
    def define_decode(self, payload: Tensor, n: int) -> Tensor:
        """Decode by the definition, in plain torch: uint8 [nbytes(n)] -> float32 [n]."""

    def define_mean(self, payloads: Tensor, n: int, count: int) -> Tensor:
        """Return the mean of `count` payloads of n values by the definition: float32 [n]."""
        size, share = self.nbytes(n), 1.0 / count
        total = self.define_decode(payloads[:size], n) * share
        for r in range(1, count):
            total += self.define_decode(payloads[r * size : (r + 1) * size], n) * share
        return total

    def planes(self, n: int) -> tuple[slice, ...]:
        """Return the parts of a payload of n values; each part has the same number of bytes for each full block."""
        raise NotImplementedError(f"{self} has no blocks")

    def define_positions(self, payload: Tensor, n: int) -> Tensor:
        """Return the positions in a sparse payload by the definition: int64 [k], ascending, or none if all values are NaN."""
        raise NotImplementedError(f"{self} is not sparse: its payloads name no positions")

    def encode(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Encode `x` ([n], any float dtype), into `out` (uint8 [nbytes(n)]) if given.

        Raises TypeError for a dtype that is not a float, ValueError for a wrong shape.
        """
        return coding.encode(self, x, out=out)

    def decode(self, payload: Tensor, n: int, out: Tensor | None = None) -> Tensor:
        """Decode the payload of n values, into `out` ([n], any float dtype) if given, else as new float32."""
        return coding.mean(self, payload, n, 1, out)

    def mean(self, payloads: Tensor, n: int, count: int, out: Tensor | None = None) -> Tensor:
        """Return the mean of `count` payloads, one after the other: the sum over r of decode(payload r) / count.

        The order of the sum is fixed, so the bytes of the mean depend only on the payloads.
        """
        return coding.mean(self, payloads, n, count, out)


def scales_and(codes: int, nbytes: int) -> tuple[slice, slice]:
    """Return the planes of a payload of `nbytes`: scales, and from the byte `codes` on the codes."""
    return slice(0, codes), slice(codes, nbytes)


def padded(nbytes: int) -> int:
    """Return the next multiple of 4, at which the float32 words of a following section are aligned."""
    return (nbytes + 3) // 4 * 4


def read_share(word: str, argument: str | None) -> float:
    """Return the share that a spec has in brackets. Raises ArgumentError if it is not a number."""
    try:
        return float(argument or "")
    except ValueError:
        raise ArgumentError(f"{word} takes the kept share, as in {word}(0.01), got ({argument or ''})") from None


def require_share(word: str, share: float) -> None:
    """Raise ValueError unless a share is in (0, 1]."""
    if not 0 < share <= 1:
        raise ValueError(f"{word}({share}): the kept share must be in (0, 1], got {share}")


def share_text(word: str, share: float) -> str:
    """Return the canonical text of a share, which `float` reads as the same number."""
    return f"{word}({share:g})" if float(f"{share:g}") == share else f"{word}({share!r})"
