"""LiteRT's file for phones and microcontrollers: the trained integers, by the scales that training learned.

    Linear and Conv2d, static         quantize, dequantize, and weights by channel: LiteRT computes in int8 where the next layer
                                      rounds its inputs right after it or after a ReLU; elsewhere in floats, with float weights.
                                      An input of the model that is rounded first is int8 in the file
    Linear, by token                  int8 weights, inputs that LiteRT rounds by row, if no layer of the model is static, and no
                                      embedding shares the weights
    all others, and all in groups     weights as floats, computed in floats

Codes of 4 bits are stored in 8.

Inputs have the shape of the example: the converter knows no free dimensions (litert-torch 0.10), and the file's memory is
planned. A .tflite holds tensors and a graph: reading it runs no code of the file's.
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from commpress import extras
from commpress.files import replacing
from commpress.model.codes import Codes
from commpress.model.export.parts import Layer, decoded, layers_of, replaced, tensors_of
from commpress.model.export.pt2e import by_token
from commpress.model.quantized import Quantized

FILE = "model.tflite"


def write(path: Path, model: nn.Module, inputs: tuple[Any, ...], shapes: Any) -> None:
    """Write the model, which is in evaluation.

    Raises what torch.export raises for one that it cannot trace, what LiteRT raises for operators that it does not have,
    ModuleNotFoundError without it.
    """
    convert, _, settings = _libraries()
    found = layers_of(model).values()
    static = any(layer.activations == "static" for layer in found)
    tables = {id(layer.module.weight) for layer in found if layer.embedding}
    with replaced(model, partial(_module, static, tables)), _quietly():
        program = convert(model, inputs, quant_config=settings(static))
    with replacing(path) as beside:
        program.export(str(beside))


def run(path: Path, model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """The outputs of a file that was just written, in LiteRT's interpreter on this machine."""
    _, interpreter, _ = _libraries()
    it = interpreter(str(path))
    it.allocate_tensors()
    for its, x in zip(it.get_input_details(), tensors_of(inputs), strict=True):
        scale, zero = its["quantization"]
        rounded = ((x / scale).round() + zero).clamp(-128, 127).to(torch.int8) if scale else x
        it.set_tensor(its["index"], rounded.numpy().astype(its["dtype"]))
    it.invoke()
    return [torch.from_numpy(it.get_tensor(its["index"])) for its in it.get_output_details()]


class Weight(nn.Module):
    """A weight of codes [rows, width]; `integer`: in the operators that LiteRT stores as int8."""

    values: Tensor
    scale: Tensor

    def __init__(self, codes: Codes, integer: bool) -> None:
        super().__init__()
        self.integer = integer and codes.by_row
        self.register_buffer("values", replace(codes, transposed=False).dequantized())
        self.register_buffer("scale", codes.scale.flatten())
        self.register_buffer("zero", torch.zeros(self.scale.shape, dtype=torch.int64, device="cpu"))

    def forward(self) -> Tensor:
        """float32 [rows, width]; of a convolution [rows, inputs, kernel...]."""
        values = self.values
        if self.integer:  # LiteRT's converter takes floats that are rounded, no integers: these come out as the codes
            how = (self.scale, self.zero, 0, -128, 127, torch.int8)
            ops = torch.ops.quantized_decomposed
            values = ops.dequantize_per_channel(ops.quantize_per_channel(values, *how), *how)
        return values


class Rounded(nn.Module):
    """Rounds static inputs."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.how = (layer.scale, layer.zero, -128, 127, torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        """[...], of the dtype of x."""
        ops = torch.ops.quantized_decomposed
        values: Tensor = ops.dequantize_per_tensor(ops.quantize_per_tensor(x, *self.how), *self.how)
        return values


class Linear(nn.Module):
    """A Linear of integers; its inputs by one scale, by one a token, or as they are."""

    def __init__(self, layer: Layer, by_row: bool) -> None:
        super().__init__()
        self.bias, self.inputs = layer.bias, Rounded(layer) if layer.activations == "static" else None
        self.weight = Weight(layer.codes, self.inputs is not None or by_row)
        self.rounds = layer.activations == "dynamic" and not by_row  # else LiteRT does

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        if self.inputs is not None:
            x = self.inputs(x)
        elif self.rounds:
            x = by_token(x)
        return functional.linear(x, self.weight(), self.bias)


class Embedding(nn.Module):
    """An Embedding of integers, in floats."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.weight = Weight(layer.codes, False)

    def forward(self, index: Tensor) -> Tensor:
        """[...] to [..., width]."""
        return functional.embedding(index, self.weight())


def _module(static: bool, tables: set[int], layer: Layer) -> nn.Module:
    if isinstance(layer.module, Quantized):
        inputs = Rounded(layer) if layer.activations else None
        integer = inputs is not None and isinstance(layer.module, nn.Conv2d)
        return decoded(layer, {name: Weight(codes, integer) for name, codes in layer.weights.items()}, inputs)
    if layer.embedding:
        return Embedding(layer)
    shared = id(layer.module.weight) in tables  # LiteRT's lookup knows no scale a row
    return Linear(layer, layer.activations == "dynamic" and layer.by_row and not static and not shared)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the converter's lines on each of its steps."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
            yield
    finally:
        logging.disable(before)


def _libraries() -> Any:
    """Return LiteRT's converter, its interpreter, and a function that makes settings for a static model or another."""
    try:
        import litert_torch
        import torchao.quantization.pt2e  # noqa: F401  registers operators
        from ai_edge_litert.interpreter import Interpreter
        from litert_torch.quantize import pt2e_quantizer
        from litert_torch.quantize.quant_config import QuantConfig
    except ModuleNotFoundError as error:
        raise extras.missing("export to litert", error, "litert") from error

    def settings(static: bool) -> Any:
        its = pt2e_quantizer.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=not static)
        return QuantConfig(pt2e_quantizer=pt2e_quantizer.PT2EQuantizer().set_global(its))

    return litert_torch.convert, Interpreter, settings
