"""Weights as integers: a code of b bits each, and a scale s for g neighbours of a row (all of the row without groups).

With half to even,

    s = max |w| / (2^b - 1) * 2,    code = clamp(round(w / s), -2^(b-1), 2^(b-1) - 1),    w ~ s * code

Backward goes straight through (Bengio et al., arXiv:1308.3432): d/dw is 1, and 0 where a code was clamped, which happens to a
positive w that is its group's maximum. The mapping is symmetric, so 0 stays 0: pruned weights stay pruned.

A compiler sees one operator, `fake_quantize`, and not its arithmetic: fused, a scale would stay wider than its dtype, or be
divided by another way, and a code at the edge would be another than the file's. So training computes with the same bits,
compiled or not.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

INTEGERS: dict[int, torch.dtype] = {4: torch.int4, 8: torch.int8}  # type: ignore[attr-defined]
"""Dtypes that weights are quantised to, by bits."""


def fixed_point(w: Tensor, bits: int) -> Tensor:
    """q(w, b) = round(w * 2^b) / 2^b, half to even: the nearest number with `bits` binary places, 0 to 23 of them.

    Any shape; float16, bfloat16 and float32 are kept, and the result is exact (for |w| < 2^104). Nothing is clamped: the
    part before the point is free, so a code round(w * 2^b) takes b bits, those of the largest part before the point, and a
    sign. There is no gradient through it. Raises ValueError for other `bits`, TypeError for other dtypes.
    """
    if not 0 <= bits <= 23:
        raise ValueError(f"fixed_point(bits={bits}): expected 0 to 23 binary places, which float32 can hold")
    if w.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(
            f"fixed_point: expected float16, bfloat16 or float32, got {str(w.dtype).removeprefix('torch.')}"
        )
    unit = 2.0**-bits
    return (torch.round(w.detach().float() / unit) * unit).to(w.dtype)


@dataclass(frozen=True)
class Codes:
    """A quantised weight [rows, width]: code * scale of the code's group."""

    values: Tensor
    """int8 [rows, width], of -8 to 7 at 4 bits."""
    scale: Tensor
    """[rows, groups]: bfloat16 at 4 bits, of the weight's dtype at 8."""
    bits: int
    transposed: bool = False
    """Whether the weight is [width, rows], as Conv1D's."""
    row: tuple[int, ...] = ()
    """The shape of a row in the weight, as (inputs, kernel...) of a convolution; empty where it is (width,)."""

    @property
    def by_row(self) -> bool:
        """Whether a row has one scale."""
        return self.scale.shape[1] == 1

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight; in its own dtype it is bit for bit what the fake-quantised model computes with."""
        groups: Tensor = self.values.to(dtype).unflatten(1, (self.scale.shape[1], -1))
        rows = (groups * self.scale.unsqueeze(-1)).flatten(1).to(dtype)
        return self.as_weight(rows).contiguous()

    def as_weight(self, rows: Tensor) -> Tensor:
        """A matrix [rows, width] as the weight has it."""
        if self.row:
            shaped: Tensor = rows.unflatten(1, self.row)
            return shaped
        return rows.t() if self.transposed else rows

    def as_rows(self, x: Tensor) -> Tensor:
        """A tensor of the weight's shape as [rows, width]."""
        return x.t() if self.transposed else x.flatten(1)


@torch.no_grad()
def quantize(w: Tensor, bits: int, group: int | None = None) -> Codes:
    """The codes of a weight [rows, width] of float16, bfloat16 or float32: the definition, in plain torch.

    Bit for bit what prepared modules compute with, compiled or not, and torchao's fake quantisers in eager; 1 / s is rounded
    first.
    """
    codes, scale = _codes(w.detach(), bits, group or w.shape[1])
    low, high = _range(bits)
    return Codes(codes.clamp_(low, high).flatten(1).to(torch.int8), scale, bits)


def halves(codes: Tensor) -> Tensor:
    """int8 codes [..., n] of -8 to 7 as uint8 [..., n / 2, rounded up], two a byte, the first in the low half."""
    nibbles = codes.view(torch.uint8) & 15
    low, high = nibbles[..., ::2], nibbles[..., 1::2]
    packed = low.clone()
    packed[..., : high.shape[-1]] |= high << 4
    return packed


def joined(packed: Tensor, n: int) -> Tensor:
    """The int8 [..., n] codes that `halves` packed."""
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :n]
    return (nibbles ^ 8).view(torch.int8) - 8


@torch.library.custom_op("commpress::fake_quantize", mutates_args=())
def fake_quantize(w: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Return s * code, of the weight's shape and dtype, and where no code was clamped. NaN and Inf make their group NaN."""
    codes, scale = _codes(w, bits, group)
    low, high = _range(bits)
    inside = (codes >= low) & (codes <= high)
    values = codes.clamp_(low, high).add_(0)  # -0 is no code
    return (values * scale.unsqueeze(-1)).to(w.dtype).flatten(1), inside.flatten(1)


@fake_quantize.register_fake
def _(w: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    return w.new_empty(w.shape), w.new_empty(w.shape, dtype=torch.bool)


def _keep_inside(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _straight_through(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor, None, None]:
    (inside,) = ctx.saved_tensors
    return torch.where(inside, gradient, 0), None, None


fake_quantize.register_autograd(_straight_through, setup_context=_keep_inside)


def _codes(w: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Codes before they are clamped, of the weight's dtype [rows, groups, group], and scales [rows, groups]."""
    low, high = _range(bits)
    groups = w.unflatten(1, (-1, group))
    may_cast = torch.amp.is_autocast_available(w.device.type)  # on CUDA 1 / s to float32
    with torch.autocast(w.device.type, enabled=False) if may_cast else contextlib.nullcontext():
        scale = groups.abs().amax(-1) / ((high - low) / 2)
        scale = scale.clamp(min=torch.finfo(w.dtype).smallest_normal).to(scale_dtype(bits) or w.dtype)
        return (groups * (1.0 / scale).unsqueeze(-1)).round(), scale


def _range(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def scale_dtype(bits: int) -> torch.dtype | None:
    """Return the dtype of the scales, None for the weight's own."""
    # At 4 bits scales weigh: 16 bits in a group of 32 are an eighth of the codes. They are rounded here, in training, so
    # that the file need not round them. bfloat16 has float32's range: a group of zeros has the smallest scale, not 0.
    # At 8 bits 1 / s with 8 bits would move codes.
    return torch.bfloat16 if bits == 4 else None
