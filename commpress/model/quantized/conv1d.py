"""Transformers' Conv1D with fake quantisers: torchao's FakeQuantizedLinear, for a weight [inputs, outputs].

A row is what makes up one output, as in a Linear: a column of this weight. Only imported where there is a Conv1D.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class FakeQuantizedConv1D(Conv1D):  # type: ignore[misc]
    """A Conv1D whose weight and, if it has a quantiser for them, inputs are computed with as their codes say."""

    weight_fake_quantizer: nn.Module
    activation_fake_quantizer: nn.Module | None

    def forward(self, x: Tensor) -> Any:
        """[..., inputs] to [..., outputs]; bit for bit what a Conv1D does with the weight that its codes give."""
        if not self.weight_fake_quantizer.enabled:
            return super().forward(x)
        if self.activation_fake_quantizer is not None:
            x = self.activation_fake_quantizer(x)
        rows: Tensor = self.weight_fake_quantizer(self.weight.t().contiguous())
        outputs = torch.addmm(self.bias, x.view(-1, x.shape[-1]), rows.t().contiguous())
        return outputs.view(*x.shape[:-1], self.nf)
