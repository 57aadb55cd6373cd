"""Static activation scales (Jacob et al., arXiv:1712.05877): inputs of a layer as int8, by a range that training has learned.

With the range low <= 0 <= high, half to even,

    s = (high - low) / 255,    z = -128 - round(low / s),    code = clamp(round(x / s) + z, -128, 127),    x ~ s (code - z)

which is what ONNX's QuantizeLinear computes. Backward goes straight through, and is 0 where a code was clamped.

    each forward in training   seen <- the extremes of its inputs, and of those before it in this step
    `learn`, once a step       range <- 0.99 range + 0.01 of the extremes of all ranks; at first those alone

Maxima of the ranks' extremes are the same bits in any order, so all ranks have one range. Until the first `learn` inputs are
not rounded. The range is a float64 buffer: `attach(buffers=)` sends those as they are.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

MOMENTUM = 0.99
LOW, HIGH = -128, 127
NOTHING = -torch.inf
"""In the place of -low and high, where no value has been seen."""


class InputQuantizer(nn.Module):
    """Gives inputs [...] as int8 with one scale would have them, while `enabled`, and learns their range in training."""

    range: Tensor
    """float64 [2]: low and high; both 0 as long as nothing is known."""

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.enabled = True
        self.frozen = False
        """Whether the range stays as it is, also in training."""
        self.register_buffer("range", torch.zeros(2, dtype=torch.float64, device=device))
        self.seen: Tensor | None = None
        """float32 [2]: -low and high of what came since the last `learn`. No buffer: DDP would make rank 0's of it."""

    def forward(self, x: Tensor) -> Tensor:
        """[...], of the dtype of x. NaN and Inf give NaN."""
        if not self.enabled:
            return x
        if self.training and not self.frozen:
            self._observe(x.detach())
        scale, zero = scale_and_zero(self.range)
        codes = (x.detach().float() / scale).round() + zero
        values = ((codes.clamp(LOW, HIGH) - zero) * scale).to(x.dtype)
        inside = (codes >= LOW) & (codes <= HIGH)
        return torch.where(scale > 0, values + (x - x.detach()) * inside, x)

    def scale_and_zero(self) -> tuple[float, int]:
        """Return s, which float32 holds exactly, and z of the range. Raises ValueError if none has been learned."""
        scale, zero = scale_and_zero(self.range)
        if not float(scale) > 0:
            raise ValueError("no range of inputs has been learned: train it with its quantiser on, for a step at least")
        return float(scale), int(zero)

    def _observe(self, x: Tensor) -> None:
        if not x.numel():
            return
        low, high = x.aminmax()
        extremes = torch.stack((-low, high)).float()
        # a step that overflowed says nothing, and neither may NaN enter a maximum of all ranks
        extremes = torch.where(extremes.isfinite().all(), extremes, NOTHING)
        self.seen = extremes if self.seen is None else torch.maximum(self.seen, extremes)

    def extra_repr(self) -> str:
        """Show the range where the module is printed."""
        return "range=[{:.4g}, {:.4g}]".format(*self.range.tolist())


class StaticLinear(nn.Linear):
    """A Linear whose inputs are rounded by a range that stays; what `quantization.convert` makes of a static one."""

    input_quantizer: InputQuantizer

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        return functional.linear(self.input_quantizer(x), self.weight, self.bias)


def scale_and_zero(range_: Tensor) -> tuple[Tensor, Tensor]:
    """Return s and z of a range [2], both float32 [1] on its device; s is 0 where the range is empty."""
    low, high = range_.split(1)
    scale = ((high - low) / (HIGH - LOW)).float()
    tiny = torch.finfo(torch.float32).smallest_normal
    scale = torch.where(high > low, scale.clamp(min=tiny), scale)
    zero = (LOW - (low.float() / scale).round()).clamp(LOW, HIGH)
    return scale, torch.where(scale > 0, zero, 0.0)


@torch.no_grad()
def learn(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Move the ranges towards what all ranks of `group` (None: the default group) have seen since the last call. Collective.

    One all-reduce of two numbers a layer, and none if the model has no static scales that are switched on. A scheduler does it
    after each step of the optimizer; a loop of one's own does it there.
    """
    learning = [m for m in quantizers(model) if m.enabled and not m.frozen]
    if not learning:
        return
    nothing = torch.full((2,), NOTHING, dtype=torch.float32, device=learning[0].range.device)
    seen = torch.stack([nothing if m.seen is None else m.seen for m in learning])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(seen, dist.ReduceOp.MAX, group=group)
    for quantizer, extremes in zip(learning, seen.double(), strict=True):
        found = torch.stack((-extremes[0], extremes[1]))
        found = torch.stack((found[0].clamp(max=0), found[1].clamp(min=0)))
        old = quantizer.range
        moved = torch.where((old == 0).all(), found, MOMENTUM * old + (1 - MOMENTUM) * found)
        old.copy_(torch.where(extremes.isfinite().all(), moved, old))
        quantizer.seen = None


def quantizers(model: nn.Module) -> list[InputQuantizer]:
    """Return those of a model, in the order of its modules."""
    return [m for m in model.modules() if isinstance(m, InputQuantizer)]


def quantizer_of(module: Any) -> InputQuantizer | None:
    """Return the static quantiser of a prepared or converted layer, if it has one."""
    for name in ("activation_fake_quantizer", "input_quantizer"):
        if isinstance(found := getattr(module, name, None), InputQuantizer):
            return found
    return None
