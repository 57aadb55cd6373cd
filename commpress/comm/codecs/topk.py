"""Top-k (Aji and Heafield, arXiv:1704.05021; Stich et al., arXiv:1809.07599): the k = ratio * n values of largest magnitude
and their positions, all else 0. The values may be coded in turn: `topk(0.01)|int4`.

The ascending positions p_0 < p_1 < ... are sent as an Elias-Fano code (Elias 1974; Fano 1971), whose length is fixed by n and
k: with l = floor(log2(n / k)), the l low bits of each, packed, and p >> l in unary (bit (p_i >> l) + i is set). Payload:

    [ low bits: k * l bits ][ high bits: k + (n >> l) + 1 bits ][ payload of the k values ]

each section zero-padded to a multiple of 4 bytes. 8.6 bits a position at 1 %; log2 of n over k, the minimum, is 8.1.

If more than k values are NaN or Inf, k positions cannot name them: then no bit of the first two sections is set, the k
values are NaN, and all n decode to NaN.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from commpress.comm.codecs.base import Codec, padded, read_share, require_share, share_text
from commpress.comm.codecs.cast import Identity

INFINITY_BITS = 0x7F800000


@dataclass(frozen=True)
class TopK(Codec):
    """`topk(ratio)` keeps exactly k = max(1, round(ratio * n)) of n values: those of the largest magnitudes.

    If several values equal the k-th largest, the kept ones are spread evenly over their positions, and with feedback none
    waits for longer than n / k steps (rounded up).
    NaN and Inf count as larger than all other values, so they arrive; more than k of them make all n NaN. Needs error feedback.

    >>> codec = parse("topk(0.5)")
    >>> codec.decode(codec.encode(torch.tensor([1.0, -3.0, 0.5, 2.0])), 4)
    tensor([ 0., -3.,  0.,  2.])
    """

    ratio: float
    values: Codec = field(default_factory=Identity)

    word: ClassVar[str] = "topk"
    exchange: ClassVar[str] = "one_shot"
    sparse: ClassVar[bool] = True
    outer: ClassVar[bool] = True

    @classmethod
    def from_spec(cls, argument: str | None, values: Codec | None = None) -> "TopK":
        return cls(read_share(cls.word, argument), values or Identity())

    def __post_init__(self) -> None:
        if self.values.sparse:
            raise ValueError(f"topk({self.ratio})|{self.values}: the values of topk(...) cannot be sparsified again")
        require_share(self.word, self.ratio)

    @property
    def spec(self) -> str:
        stage = share_text(self.word, self.ratio)
        return stage if self.values == Identity() else f"{stage}|{self.values}"

    def keeping(self, share: float) -> "TopK":
        return replace(self, ratio=max(share, self.ratio))

    def kept(self, n: int) -> int:
        """Return how many of n values are sent."""
        return max(1, round(self.ratio * n)) if n else 0

    def sections(self, n: int) -> tuple[int, int, int, int]:
        """Return k, the low bits of a position, and the bytes at which the high bits and the values start."""
        k = self.kept(n)
        low_bits = (n // k).bit_length() - 1
        high = padded(-(-k * low_bits // 8))
        return k, low_bits, high, high + padded(-(-(k + (n >> low_bits) + 1) // 8))

    def nbytes(self, n: int) -> int:
        if n == 0:
            return 0
        k, _, _, values = self.sections(n)
        return values + self.values.nbytes(k)

    def define_encode(self, x: Tensor) -> Tensor:
        n = x.numel()
        k, low_bits, _, _ = self.sections(n)
        magnitude = x.view(torch.int32) & 0x7FFFFFFF
        if int((magnitude >= INFINITY_BITS).sum()) > k:
            return self._all_nan(n, x.device)
        threshold = magnitude.topk(k).values[-1]
        tied = (magnitude == threshold).nonzero().view(-1)
        above = (magnitude > threshold).nonzero().view(-1)
        need, t = k - above.numel(), torch.arange(tied.numel(), dtype=torch.int64, device=x.device)
        spread = (t + 1) * need // tied.numel() > t * need // tied.numel()
        index = torch.cat([above, tied[spread]]).sort().values
        low = (index[:, None] >> torch.arange(low_bits, dtype=torch.int64, device=x.device) & 1).view(-1)
        high = torch.zeros(k + (n >> low_bits) + 1, dtype=torch.int64, device=x.device)
        high[(index >> low_bits) + torch.arange(k, dtype=torch.int64, device=x.device)] = 1
        return torch.cat([_pack_bits(low), _pack_bits(high), self.values.define_encode(x[index])])

    def define_decode(self, payload: Tensor, n: int) -> Tensor:
        k, _, _, values_at = self.sections(n)
        x = torch.zeros(n, dtype=torch.float32, device=payload.device)
        value = self.values.define_decode(payload[values_at:], k)
        index = self.define_positions(payload, n)
        self.require_positions(index.numel(), bool(value.isnan().all()), n)
        if index.numel():
            x[index] = value
        else:
            x.fill_(torch.nan)
        return x

    def _all_nan(self, n: int, device: torch.device) -> Tensor:
        """Return the payload of n values of which more than k are NaN or Inf."""
        k, _, _, values_at = self.sections(n)
        nan = torch.full((k,), torch.nan, dtype=torch.float32, device=device)
        return torch.cat([torch.zeros(values_at, dtype=torch.uint8, device=device), self.values.define_encode(nan)])

    def require_positions(self, found: int, all_nan: bool, n: int) -> None:
        """Raise ValueError unless a payload of n values has marked all k positions, or none of them if all are NaN."""
        if found != (k := self.kept(n)) and not (found == 0 and all_nan):
            raise ValueError(f"{self}: a payload of {n} values marks {found} positions, expected {k}")

    def define_positions(self, payload: Tensor, n: int) -> Tensor:
        k, low_bits, high_at, values_at = self.sections(n)
        high = _unpack_bits(payload[high_at:values_at]).nonzero().view(-1)
        if high.numel() != k:
            return high
        index = high - torch.arange(k, dtype=torch.int64, device=payload.device) << low_bits
        low = _unpack_bits(payload[:high_at])[: k * low_bits].view(k, low_bits)
        return index + (low << torch.arange(low_bits, dtype=torch.int64, device=payload.device)).sum(dim=1)


def _pack_bits(bits: Tensor) -> Tensor:
    """Pack int64 [m] of 0 and 1 into uint8, eight a byte, lowest bit first, padded to a multiple of 4 bytes."""
    size = padded(-(-bits.numel() // 8))
    rows = pad(bits, (0, 8 * size - bits.numel())).view(-1, 8)
    return (rows << torch.arange(8, dtype=torch.int64, device=bits.device)).sum(dim=1).to(torch.uint8)


def _unpack_bits(packed: Tensor) -> Tensor:
    """Unpack uint8 [m] into int64 [8 m] of 0 and 1."""
    return (packed.to(torch.int64)[:, None] >> torch.arange(8, dtype=torch.int64, device=packed.device) & 1).view(-1)
