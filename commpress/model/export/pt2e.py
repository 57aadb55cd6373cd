"""torch.export's file, for PyTorch's own compiler: the graph that torchao's pt2e leaves, with the scales that training learned.

    Linear, static   quantize_per_tensor, dequantize_per_tensor, dequantize_per_channel of int8 weights, linear
    Linear, else     dequantised weights, linear; inputs that are rounded by token are so by the arithmetic of torchao
    Embedding        codes of the rows times their scales
    Convolution      as a Linear: static quantize, dequantize and dequantize_per_channel, else dequantised weights
    all others       dequantised weights, and what computes with them
    4 bits           two codes a byte, [rows, width / 2], the first in the low half

Inductor makes integer kernels of the first, as it does of X86InductorQuantizer's graphs, once weights are frozen. So nothing is
calibrated here. Its operators round x * (1 / s), training x / s: one in some million inputs falls on the next code.

`torch.export.load` unpickles, and reads formulas with Python's eval: a .pt2 is code, load it from those whose code you run.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from commpress import extras
from commpress.files import replacing
from commpress.model.codes import Codes, halves, joined
from commpress.model.export.parts import Layer, decoded, replaced
from commpress.model.quantized import Quantized

FILE = "model.pt2"


def write(path: Path, model: nn.Module, inputs: tuple[Any, ...], shapes: Any) -> None:
    """Write the model, which is in evaluation. Raises what torch.export raises for one that it cannot trace."""
    _operators()
    with replaced(model, _module):
        program = torch.export.export(model, inputs, dynamic_shapes=shapes)
    with replacing(path) as beside, beside.open("wb") as file:
        torch.export.save(program, file)


def run(path: Path, model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """The outputs of a file that was just written, by the graph's operators."""
    _operators()
    return torch.export.load(path).module()(*inputs)


class Weight(nn.Module):
    """A weight of codes [rows, width]."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, codes: Codes) -> None:
        super().__init__()
        self.width, self.bits, self.by_row = codes.values.shape[1], codes.bits, codes.by_row
        self.row = codes.row
        self.integer = self.bits == 8 and self.by_row
        values = codes.as_weight(codes.values) if self.integer and codes.row else codes.values
        self.register_buffer("codes", values if self.bits == 8 else halves(values))
        scale = codes.scale.bfloat16() if self.bits == 4 else codes.scale  # at 4 bits that loses nothing
        self.register_buffer("scale", scale.flatten() if self.by_row else scale)
        if self.integer:
            self.register_buffer("zero", torch.zeros(codes.values.shape[0], dtype=torch.int64, device="cpu"))

    def forward(self) -> Tensor:
        """float32 [rows, width]; of a convolution [rows, inputs, kernel...]."""
        if self.integer:
            decode = _operators().dequantize_per_channel
            values: Tensor = decode(self.codes, self.scale, self.zero, 0, -128, 127, torch.int8)
            return values
        rows = self.rows(self.codes, self.scale)
        return rows.unflatten(1, self.row) if self.row else rows

    def rows(self, codes: Tensor, scale: Tensor) -> Tensor:
        """The values of rows as they are stored, [..., width]."""
        if self.bits == 4:
            codes, scale = joined(codes, self.width), scale.float()
        if self.by_row:
            return codes.float() * scale.unsqueeze(-1)
        groups: Tensor = codes.float().unflatten(-1, (scale.shape[-1], -1))
        return (groups * scale.unsqueeze(-1)).flatten(-2)


class Rounded(nn.Module):
    """Rounds static inputs, as uint8, which Inductor's kernels on x86 take."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.how = (layer.scale, layer.zero + 128, 0, 255, torch.uint8)

    def forward(self, x: Tensor) -> Tensor:
        """[...], of the dtype of x."""
        values: Tensor = _operators().dequantize_per_tensor(_operators().quantize_per_tensor(x, *self.how), *self.how)
        return values


class Linear(nn.Module):
    """A Linear of integers; its inputs by one scale, by one a token, or as they are."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.weight, self.bias, self.layer = Weight(layer.codes), layer.bias, layer
        self.inputs = Rounded(layer)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        if self.layer.activations == "static":
            x = self.inputs(x)
        elif self.layer.activations == "dynamic":
            x = by_token(x)
        return functional.linear(x, self.weight(), self.bias)


class Embedding(nn.Module):
    """An Embedding of integers."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.weight = Weight(layer.codes)

    def forward(self, index: Tensor) -> Tensor:
        """[...] to [..., width]."""
        return self.weight.rows(self.weight.codes[index], self.weight.scale[index])


def by_token(x: Tensor) -> Tensor:
    """[..., inputs] as int8 with a scale and a zero point a token would have it: torchao's `int8_asym_per_token`."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).smallest_normal)
    zero = (-128 - (low / scale).round()).clamp(-128, 127)
    return (((x * (1.0 / scale)).round() + zero).clamp(-128, 127) - zero) * scale


def _module(layer: Layer) -> nn.Module:
    if isinstance(layer.module, Quantized):
        inputs = Rounded(layer) if layer.activations else None
        return decoded(layer, {name: Weight(codes) for name, codes in layer.weights.items()}, inputs)
    return Embedding(layer) if layer.embedding else Linear(layer)


def _operators() -> Any:
    try:
        import torchao.quantization.pt2e  # noqa: F401  registers them
    except ModuleNotFoundError as error:
        raise extras.missing("export to pt2e", error, "model") from error
    return torch.ops.quantized_decomposed
