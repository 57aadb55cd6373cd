"""Random-k (Konecny et al., arXiv:1610.05492; Stich et al., arXiv:1809.07599): a share r of the values, at places that follow
from a number, all else 0. All ranks draw by the same number, so no indices are sent and payloads can be summed.

The draw is stratified: blocks of B = round(64 / r) values have 64 strata of nearly equal width, and each stratum sends one of
its values; a last block of t values has ceil(64 t / B) strata. So no place is sorted or searched for, and a block stays in the
cache. In draw d stratum i of width w sends, counted within it, the value

    (h(i, d // w) * w / 2^32 + d mod w) mod w        h: 32 hashed bits

Within w draws each value of the stratum is sent once; the next w draws begin at another value. Payload:

    [ d : int64 ][ payload of the k values ]

Decoding uses the d of the payload, so a mean is right even if payloads were drawn by different numbers. A stratum that holds
NaN or Inf sends NaN, and if NaN arrives the whole stratum decodes to NaN.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from commpress.comm.codecs.base import Codec, read_share, require_share, share_text
from commpress.comm.codecs.cast import Identity

STRATA = 64
LARGEST_BLOCK = 2**30
WORD = 0xFFFFFFFF
HEAD = 8


@dataclass(frozen=True)
class RandomK(Codec):
    """`randomk(ratio)` sends one value in 1 / ratio, at other places in each draw. Needs error feedback.

    A value is not scaled up, since error feedback sends the rest later. It waits for less than 2 / ratio draws (rounded
    up). `draw` is the number of the draw, which a spec does not name: `drawn` sets it. The values may be coded in turn, as
    in `randomk(0.1)|int4`; then payloads cannot be summed, unless those of the values can.

    >>> codec = parse("randomk(0.5)")
    >>> sum(codec.drawn(d).decode(codec.drawn(d).encode(torch.ones(6)), 6) for d in range(2))
    tensor([1., 1., 1., 1., 1., 1.])
    """

    ratio: float
    values: Codec = field(default_factory=Identity)
    draw: int = 0

    word: ClassVar[str] = "randomk"
    sparse: ClassVar[bool] = True
    outer: ClassVar[bool] = True

    @classmethod
    def from_spec(cls, argument: str | None, values: Codec | None = None) -> "RandomK":
        return cls(read_share(cls.word, argument), values or Identity())

    def __post_init__(self) -> None:
        if self.values.sparse:
            raise ValueError(
                f"randomk({self.ratio})|{self.values}: the values of randomk(...) cannot be sparsified again"
            )
        require_share(self.word, self.ratio)

    @property
    def spec(self) -> str:
        stage = share_text(self.word, self.ratio)
        return stage if self.values == Identity() else f"{stage}|{self.values}"

    @property
    def sum_dtype(self) -> torch.dtype | None:
        return self.values.sum_dtype

    def summed(self, n: int) -> slice:
        part = self.values.summed(self.kept(n))
        return slice(HEAD + part.start, HEAD + part.stop)

    def drawn(self, number: int) -> "RandomK":
        return replace(self, draw=number)

    def keeping(self, share: float) -> "RandomK":
        return replace(self, ratio=max(share, self.ratio))

    @property
    def block(self) -> int:
        """Return the length of a block of 64 strata."""
        return round(min(max(STRATA, STRATA / self.ratio), LARGEST_BLOCK))

    def kept(self, n: int) -> int:
        """Return how many of n values are sent."""
        full, rest = divmod(n, self.block)
        return STRATA * full + -(-STRATA * rest // self.block)

    def nbytes(self, n: int) -> int:
        return HEAD + self.values.nbytes(self.kept(n)) if n else 0

    def define_encode(self, x: Tensor) -> Tensor:
        n = x.numel()
        starts, widths = self._strata(n, x.device)
        words = torch.full((1,), self.draw, dtype=torch.int64, device=x.device).view(torch.uint8)
        bad = torch.zeros(n + 1, dtype=torch.int64, device=x.device)
        bad[1:] = (~x.isfinite()).cumsum(0)
        spoilt = bad[starts + widths] > bad[starts]
        value = torch.where(spoilt, torch.nan, x[_places(starts, widths, words)])
        return torch.cat([words, self.values.define_encode(value)])

    def define_decode(self, payload: Tensor, n: int) -> Tensor:
        starts, widths = self._strata(n, payload.device)
        value = self.values.define_decode(payload[HEAD:], self.kept(n))
        x = torch.zeros(n, dtype=torch.float32, device=payload.device)
        x[_places(starts, widths, payload)] = value
        return x.masked_fill_(value.isnan().repeat_interleave(widths, output_size=n), torch.nan)

    def define_positions(self, payload: Tensor, n: int) -> Tensor:
        return _places(*self._strata(n, payload.device), payload)

    def _strata(self, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the starts of the strata of n values, and their widths: int64 [k] each."""
        full, rest = divmod(n, self.block)
        starts, widths = bounds(self.block, STRATA, device)
        first = torch.arange(full, dtype=torch.int64, device=device) * self.block
        tail, tail_widths = bounds(rest, self.kept(rest), device)
        starts = torch.cat([(first[:, None] + starts).view(-1), tail + full * self.block])
        return starts, torch.cat([widths.repeat(full), tail_widths])


def bounds(size: int, strata: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the starts and the widths of the strata in a block of this size: int64 [strata] each."""
    cuts = torch.arange(strata + 1, dtype=torch.int64, device=device) * size // max(strata, 1)
    return cuts[:-1], cuts[1:] - cuts[:-1]


def _places(starts: Tensor, widths: Tensor, payload: Tensor) -> Tensor:
    """Return the place of the sent value in each stratum, by the draw at the start of a payload: int64 [k]."""
    low, high = payload[:HEAD].view(torch.int32).to(torch.int64)
    draw = (high << 32) | (low & WORD)
    number = torch.arange(starts.numel(), dtype=torch.int64, device=starts.device)
    hashed = mix((number * 0x5F356495 & WORD) ^ mix(draw // widths & WORD))
    places: Tensor = starts + ((hashed * widths >> 32) + draw % widths) % widths
    return places


def mix(word: Tensor) -> Tensor:
    """Hash 32 bits, as int64, to 32 others. Products stay below 2^63."""
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97), (15, 1)):
        word = (word ^ word >> shift) * factor & WORD
    return word
