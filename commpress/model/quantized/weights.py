"""The seam of a layer that computes with codes: every weight that it reads comes from `computed`.

in training     the parameter, rounded as its codes have it, while the quantiser is on
converted       the codes that stand in the parameter's place, as floats
exported        what a format makes of them (`export/parts.py`)
"""

from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from commpress.model.codes import fake_quantize


class Quantized(nn.Module):
    """A module that takes its weights from `computed`: mixed into one of torch's own, whose parameters it has."""

    weight_fake_quantizer: nn.Module

    def computed(self, name: str) -> Any:
        """Return what to compute with in the place of the weight of this name, a Tensor."""
        return self.weight_fake_quantizer(attrgetter(name)(self))


class WeightQuantizer(nn.Module):
    """Gives a weight as its codes say, while `enabled`; in the place of torchao's `IntxFakeQuantizer`."""

    def __init__(self, bits: int, group: int | None, config: Any) -> None:
        super().__init__()
        self.bits, self.group = bits, group
        self.config = config
        """torchao's, for its own convert."""
        self.enabled = True
        self.dtype: Any = None
        """The dtype in which it last computed; under FSDP2's mixed precision another than the weight's."""

    def forward(self, w: Tensor) -> Tensor:
        """[rows, width...], of the weight's shape and dtype."""
        if not self.enabled:
            return w
        self.dtype = w.dtype
        rows = w.flatten(1)
        values: Tensor = fake_quantize(rows, self.bits, self.group or rows.shape[1])[0]
        return values.view(w.shape)


class Decoder(nn.Module):
    """In the place of a `WeightQuantizer` once a module is converted: gives codes [rows, width] as the floats of training."""

    def __init__(self, row: tuple[int, ...]) -> None:
        super().__init__()
        self.row = row
        """The shape of a row, if the weight is no matrix."""
        self.enabled = True

    def forward(self, w: Any) -> Tensor:
        """Return the floats, of the shape and dtype that the weight had."""
        if not self.enabled:
            return w  # type: ignore[no-any-return]
        values: Tensor = w.dequantize()
        return values.unflatten(1, self.row) if self.row else values
