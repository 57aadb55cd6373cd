"""ExecuTorch's program for phones and boards: the trained integers, and XNNPACK's kernels for what it takes.

    Linear, static, int8    quantize_per_tensor, dequantize_per_channel, linear. XNNPACK computes in int8 where the next layer
                            rounds its inputs right behind it or behind a ReLU; elsewhere as the last
    Linear, by token        XNNPACK's int8 kernels with float outputs, for int8 or int4 rows and int4 in groups of 32 k
    Linear, else            decoded in each call (`embedding_byte`, `embedding_4bit` of all rows), XNNPACK's float32 matrices
    Embedding               the same operators, of the rows that are asked for
    all others              decoded in each call, computed in floats; static inputs of a convolution are rounded there

XNNPACK has its own copy of a weight, so one that an embedding shares with a Linear by token is in the file twice. Memory is
planned when the file is written: inputs have at most as many rows as the example, or as a Dim's `max` says. The runtime of the
target needs XNNPACK's backend and the portable and the quantised kernels. A .pte holds tensors and a graph: reading it runs no
code of the file's.
"""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from commpress import extras
from commpress.files import replacing
from commpress.model.codes import Codes, halves
from commpress.model.export.parts import Layer, decoded, replaced, tensors_of
from commpress.model.export.pt2e import by_token
from commpress.model.quantized import Quantized

FILE = "model.pte"
BLOCK = 32
"""XNNPACK's groups of int4 are multiples of it."""


def write(path: Path, model: nn.Module, inputs: tuple[Any, ...], shapes: Any) -> None:
    """Write the model, which is in evaluation.

    Raises what torch.export raises for one that it cannot trace, what ExecuTorch raises for operators that it has not,
    ModuleNotFoundError without it.
    """
    with _quietly():
        program = lowered(model, inputs, shapes).to_executorch()
    with replacing(path) as beside, beside.open("wb") as file:
        program.write_to_file(file)


def lowered(model: nn.Module, inputs: tuple[Any, ...], shapes: Any) -> Any:
    """ExecuTorch's graph of a model in evaluation, where XNNPACK has what it takes."""
    exir, partitioners = _libraries()
    with replaced(model, _module), _quietly():
        program = torch.export.export(model, inputs, dynamic_shapes=shapes)
        return exir.to_edge_transform_and_lower(program, partitioner=partitioners)


def run(path: Path, model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """The outputs of a file that was just written, in ExecuTorch's runtime on this machine."""
    _libraries()
    from executorch.runtime import Runtime

    return Runtime.get().load_program(path).load_method("forward").execute(tensors_of(inputs))


class Rows(nn.Module):
    """A weight [rows, width] of codes, two a byte at 4 bits and an even width."""

    def __init__(self, codes: Codes) -> None:
        super().__init__()
        self.bits, self.packed = codes.bits, codes.bits == 4 and codes.values.shape[1] % 2 == 0
        self.register_buffer("codes", _swapped(codes.values) if self.packed else codes.values)
        self.register_buffer("scale", codes.scale.flatten() if codes.scale.shape[1] == 1 else codes.scale)

    def forward(self, index: Tensor) -> Tensor:
        """The values of these rows, float32 [..., width]."""
        ops = torch.ops.quantized_decomposed
        decode = ops.embedding_4bit if self.packed else ops.embedding_byte
        values: Tensor = decode(self.codes, self.scale, None, *_range(self.bits), index)
        return values


class Weight(nn.Module):
    """A weight of codes [rows, width], in the operators that XNNPACK reads."""

    def __init__(self, codes: Codes) -> None:
        super().__init__()
        self.by_row, self.bits = codes.by_row, codes.bits
        self.group = codes.values.shape[1] // codes.scale.shape[1]
        scale = codes.scale.flatten() if self.by_row else codes.scale
        self.register_buffer("codes", codes.values)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", torch.zeros(scale.shape, dtype=torch.int64, device="cpu"))

    def forward(self) -> Tensor:
        """float32 [rows, width]."""
        ops, its, to = (
            torch.ops.quantized_decomposed,
            (self.codes, self.scale, self.zero),
            (*_range(self.bits), torch.int8),
        )
        values: Tensor
        if self.by_row:
            values = ops.dequantize_per_channel(*its, 0, *to)
        else:
            values = ops.dequantize_per_channel_group(*its, *to, self.group, torch.float32)
        return values


class Decoded(nn.Module):
    """A weight of codes [rows, width] that is decoded in each call."""

    def __init__(self, codes: Codes) -> None:
        super().__init__()
        self.rows, self.count, self.stored = Rows(codes), len(codes.values), codes

    def forward(self) -> Tensor:
        """The weight, float32."""
        values: Tensor = self.rows(torch.arange(self.count, dtype=torch.int64, device="cpu"))
        return values.unflatten(1, self.stored.row) if self.stored.row else values


class RoundedInFloats(nn.Module):
    """Rounds static inputs of a convolution, by plain arithmetic.

    ExecuTorch 1.5.1 computes a convolution wrong that is behind quantize_per_tensor and that XNNPACK has not taken: one reads
    rows, channels, height, width, and the other has written channels last.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.scale, self.zero = layer.scale, layer.zero

    def forward(self, x: Tensor) -> Tensor:
        """[...], float32."""
        codes = ((x / self.scale).round() + self.zero).clamp(-128, 127)
        return (codes - self.zero) * self.scale


class Linear(nn.Module):
    """A Linear of integers; its inputs by one scale, by one a token, or as they are."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer, self.bias, self.native = layer, layer.bias, _is_native(layer)
        self.weight = Weight(layer.codes) if self.native else Decoded(layer.codes)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        ops, whole = torch.ops.quantized_decomposed, (-128, 127, torch.int8)
        if self.layer.activations == "static":
            how = (self.layer.scale, self.layer.zero, *whole)
            x = ops.dequantize_per_tensor(ops.quantize_per_tensor(x, *how), *how)
        elif self.layer.activations == "dynamic" and self.native:
            its = ops.choose_qparams_per_token_asymmetric(x, torch.int8)
            x = ops.dequantize_per_token(ops.quantize_per_token(x, *its, *whole), *its, *whole, torch.float32)
        elif self.layer.activations == "dynamic":
            x = by_token(x)
        return functional.linear(x, self.weight(), self.bias)


def _is_native(layer: Layer) -> bool:
    """Whether XNNPACK may have a kernel for it."""
    width, groups = layer.codes.values.shape[1], layer.codes.scale.shape[1]
    if layer.codes.bits == 8:
        return layer.by_row and layer.activations is not None
    fits = width % 2 == 0 if layer.by_row else width // groups % BLOCK == 0
    return layer.activations == "dynamic" and fits


def _module(layer: Layer) -> nn.Module:
    if isinstance(layer.module, Quantized):
        weights = {name: Decoded(codes) for name, codes in layer.weights.items()}
        return decoded(layer, weights, RoundedInFloats(layer) if layer.activations == "static" else None)
    return Rows(layer.codes) if layer.embedding else Linear(layer)


def _range(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def _swapped(codes: Tensor) -> Tensor:
    """int8 codes as ExecuTorch packs them: the first in the high half, and 8 more than the code."""
    packed = halves(codes)
    return ((packed << 4) | (packed >> 4)) ^ 0x88


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without warnings of torch's pytrees, of which ExecuTorch takes many copies."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _libraries() -> tuple[Any, list[Any]]:
    """The compiler, and what takes operators for XNNPACK: at first what it has kernels for as it is, then float matrices with
    weights that others decode."""
    try:
        import executorch.kernels.quantized  # noqa: F401  registers operators
        import torchao.quantization.pt2e  # noqa: F401  as well
        from executorch import exir
        from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    except ModuleNotFoundError as error:
        raise extras.missing("export to executorch", error, "executorch") from error
    floats = ConfigPrecisionType.FP32
    decoded = XnnpackPartitioner(config_precisions=floats, force_non_static_weights_for_f32_linear=True)
    return exir, [XnnpackPartitioner(), decoded]
