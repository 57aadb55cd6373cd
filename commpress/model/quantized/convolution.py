"""Convolutions with fake quantisers. A row of a weight is all of one output channel: [outputs, inputs / groups * kernel]."""

from typing import Any

from torch import Tensor, nn

from commpress.model.quantized.weights import Quantized


class Convolution(Quantized):
    """A convolution whose weight and, if it has a quantiser for them, inputs are computed with as their codes say."""

    activation_fake_quantizer: nn.Module | None

    def forward(self: Any, x: Tensor) -> Any:
        """[batch, inputs, ...] to [batch, outputs, ...]; padding is of rounded inputs, and zeros stay zeros."""
        if not self.weight_fake_quantizer.enabled:
            return super().forward(x)
        if self.activation_fake_quantizer is not None:
            x = self.activation_fake_quantizer(x)
        return self._conv_forward(x, self.computed("weight"), self.bias)


class QuantizedConv1d(Convolution, nn.Conv1d):
    """nn.Conv1d."""


class QuantizedConv2d(Convolution, nn.Conv2d):
    """nn.Conv2d."""


class QuantizedConv3d(Convolution, nn.Conv3d):
    """nn.Conv3d."""
