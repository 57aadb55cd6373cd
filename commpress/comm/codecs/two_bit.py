"""Two bits: sign and one of two sizes per block, the means of its small and of its large magnitudes (Lloyd's condition,
IEEE Trans. Inf. Theory 1982; one step of it, from the mean): x ~ sign(x) * (high if |x| > mean|x| else low) over 1024 values.

Payload of n values in B = ceil(n / 1024) blocks, zero-padded to a multiple of 4 bytes:

    [ low_0 high_0 .. low_(B-1) high_(B-1) : float32 ][ signs of all blocks ][ sizes of all blocks ]

both planes of bits laid out as in `sign`. 2.06 bits a value.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from commpress.comm.codecs.base import Codec, padded
from commpress.comm.codecs.sign import BLOCK, block_sizes, block_sum, pack_plane, plane_bytes, unpack_plane


@dataclass(frozen=True)
class Int2(Codec):
    """`int2`: 15.5 times smaller than float32. Needs error feedback.

    The squared error of a block is sum x^2 - (sum of the l small |x|)^2 / l - (sum of the h large |x|)^2 / h: never more than
    that of `sign`. On normal values it is an eighth of their squares, that of `sign` a third. A block that holds NaN or Inf,
    or whose sum overflows float32, decodes to NaN.

    >>> parse("int2").nbytes(1024)
    264
    """

    word: ClassVar[str] = "int2"
    granularity: ClassVar[int] = BLOCK

    def nbytes(self, n: int) -> int:
        return padded(8 * -(-n // BLOCK) + 2 * plane_bytes(n))

    def planes(self, n: int) -> tuple[slice, ...]:
        signs = 8 * -(-n // BLOCK)
        sizes = signs + plane_bytes(n)
        return slice(0, signs), slice(signs, sizes), slice(sizes, self.nbytes(n))

    def define_encode(self, x: Tensor) -> Tensor:
        n, blocks = x.numel(), -(-x.numel() // BLOCK)
        size, count = pad(x.abs(), (0, blocks * BLOCK - n)), block_sizes(n, x.device)
        mean = block_sum(size) * (1 / count)
        spoilt = ~mean.isfinite()
        large = torch.where(spoilt, torch.inf, mean).repeat_interleave(BLOCK) < size
        above = block_sum(large.to(torch.float32))
        levels = []
        for members, number in ((~large, count - above), (large, above)):
            level = block_sum(torch.where(members, size, 0.0)) * (1 / number)
            levels.append(torch.where(spoilt, torch.nan, torch.where(number > 0, level, 0.0)))
        scales = torch.stack(levels, dim=1).view(-1)
        payload = torch.cat([scales.view(torch.uint8), pack_plane(x.view(torch.int32) < 0), pack_plane(large[:n])])
        return pad(payload, (0, self.nbytes(n) - payload.numel()))

    def define_decode(self, payload: Tensor, n: int) -> Tensor:
        blocks, signs = -(-n // BLOCK), 8 * -(-n // BLOCK)
        low, high = payload[: 8 * blocks].view(torch.float32).view(-1, 2).repeat_interleave(BLOCK, dim=0)[:n].unbind(1)
        size = torch.where(unpack_plane(payload[signs + plane_bytes(n) :], n), high, low)
        return torch.where(unpack_plane(payload[signs:], n), -size, size)
