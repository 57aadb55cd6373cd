"""ONNX, opset 21: integers in the file, QuantizeLinear and DequantizeLinear around what computes with them.

    Linear, static       QuantizeLinear, DequantizeLinear of the input, DequantizeLinear of int8 weights, Gemm or MatMul
    Linear, by token     the codes by plain arithmetic, MatMulInteger: onnx's DynamicQuantizeLinear has one scale for all tokens
    Linear, else         DequantizeLinear of the weights, in blocks where a group has a scale, MatMul
    Embedding            Gather of codes and of scales, Mul; in groups or at 4 bits DequantizeLinear, Gather
    Convolution, static  QuantizeLinear, DequantizeLinear of the input, DequantizeLinear of the weights, Conv; a batch norm
                         behind it is part of the scales (`onnx_batchnorm.py`)
    all others           DequantizeLinear of the weights, and what computes with them
    4 bits               tensors of ONNX's INT4, two codes a byte

torch.onnx traces the model with one operator in the place of each layer, and makes these nodes of it. What they compute is
what training computed, but for a bias of a Gemm: that is rounded to the scale of the products, s_x s_w, as ONNX's int8 Gemm
wants it. Pruned weights are not in the file where that saves bytes (`onnx_masks.py`). It holds tensors and a graph: reading it
runs no code.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from commpress import extras
from commpress.files import replacing
from commpress.model.codes import Codes
from commpress.model.export import onnx_batchnorm, onnx_masks
from commpress.model.export.parts import Layer, decoded, replaced, tensors_of
from commpress.model.quantized import Quantized

FILE = "model.onnx"
OPSET = 21
MOST = 2**31
"""Bytes of a protobuf message."""
HALF = "int4_codes"
"""The name of a buffer of 4 bits, int8 until the graph is there."""
SCHEMAS = {
    "onnx_static": "(Tensor x, Tensor codes, Tensor scale, Tensor? bias, Tensor input_scale, Tensor input_zero) -> Tensor",
    "onnx_gemm": "(Tensor x, Tensor codes, Tensor scale, Tensor zero, Tensor bias, Tensor bias_scale, Tensor bias_zero, "
    "Tensor input_scale, Tensor input_zero) -> Tensor",
    "onnx_by_token": "(Tensor x, Tensor codes, Tensor scale, Tensor? bias, Tensor? sums) -> Tensor",
    "onnx_weights": "(Tensor x, Tensor codes, Tensor scale, Tensor? bias) -> Tensor",
    "onnx_embedding": "(Tensor x, Tensor codes, Tensor scale) -> Tensor",
    "onnx_rounded": "(Tensor x, Tensor input_scale, Tensor input_zero) -> Tensor",
    "onnx_decoded": "(Tensor codes, Tensor scale, Tensor? zero) -> Tensor",
}
for _name, _schema in SCHEMAS.items():
    torch.library.define(f"commpress::{_name}", _schema)


def _linear_shape(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _embedding_shape(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return scale.new_empty((*x.shape, codes.shape[1]))


def _same_shape(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


SHAPES = {"onnx_embedding": _embedding_shape, "onnx_rounded": _same_shape, "onnx_decoded": _same_shape}
for _name in SCHEMAS:
    torch.library.register_fake(f"commpress::{_name}")(SHAPES.get(_name, _linear_shape))


def write(path: Path, model: nn.Module, inputs: tuple[Any, ...], shapes: Any) -> None:
    """Write the model, which is in evaluation.

    Raises what torch.onnx raises for one that it cannot trace, ValueError for 2 GB and more, ModuleNotFoundError without onnx.
    """
    _libraries()
    with replaced(model, _module), _quietly():
        program: Any = torch.onnx.export(
            model,
            inputs,
            dynamo=True,
            dynamic_shapes=shapes,
            opset_version=OPSET,
            custom_translation_table=_translations(),
            optimize=False,
            verbose=False,
        )
    _make_halves(program.model)
    program.optimize()
    onnx_batchnorm.fold(program.model.graph)
    onnx_masks.leave_out(program.model.graph)
    _forget_sources(program.model.graph)
    size = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    if size >= MOST:
        raise ValueError(f"export to onnx: the model has {size} bytes of weights, expected less than {MOST}")
    with replacing(path) as beside:
        program.save(beside, external_data=False)


def run(path: Path, model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """The outputs of a file that was just written, in onnxruntime on the CPU."""
    session = _libraries().InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    given = dict(zip(names, (x.numpy() for x in tensors_of(inputs)), strict=True))
    return [torch.from_numpy(y) for y in session.run(None, given)]


MOST_OF_BIAS = 2.0**31 - 128
"""The largest code of a bias: float32 has no 2^31 - 1."""


def row_scales(codes: Codes) -> Tensor:
    """The scale of each row, float32 [rows]; that of a row whose codes are all 0, which may be any, is the largest.

    A bias is rounded to the scale of the products: next to a tiny one it would be out of int32's reach.
    """
    scale = codes.scale.flatten()
    return torch.where(codes.values.flatten(1).any(1), scale, scale.max())


class Linear(nn.Module):
    """A Linear as one operator, of the integers that the file shall have."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        codes, rows = layer.codes, layer.codes.values.shape[0]
        self.layer, self.bias = layer, layer.bias
        self.codes_name = "codes" if codes.bits == 8 else HALF
        self.register_buffer(self.codes_name, codes.values)
        scale = row_scales(codes) if layer.by_row else codes.scale
        self.integer = codes.bits == 8 and layer.by_row
        if layer.activations == "static":
            self.register_buffer("input_scale", torch.tensor(layer.scale, dtype=torch.float32, device="cpu"))
            self.register_buffer("input_zero", torch.tensor(layer.zero, dtype=torch.int8, device="cpu"))
        if layer.activations == "static" and self.integer:
            bias = scale.new_zeros(rows) if layer.bias is None else layer.bias.detach()
            unit = layer.scale * scale
            self.integer = bool((bias.abs() <= unit * MOST_OF_BIAS).all())
        if layer.activations == "static" and self.integer:
            self.register_buffer("bias_codes", (bias / unit).round().clamp(-MOST_OF_BIAS, MOST_OF_BIAS).to(torch.int32))
            self.register_buffer("bias_scale", unit)
            self.register_buffer("bias_zero", torch.zeros(rows, dtype=torch.int32, device="cpu"))
            self.register_buffer("zero", torch.zeros(rows, dtype=torch.int8, device="cpu"))
        self.register_buffer("scale", scale)
        if layer.activations == "dynamic" and self.integer:
            self.register_buffer("sums", codes.values.sum(1, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        ops: Any = torch.ops.commpress
        its = dict(self.named_buffers())
        weight = (its[self.codes_name], its["scale"])
        result: Tensor
        if self.layer.activations == "dynamic":
            result = ops.onnx_by_token(x, *weight, self.bias, its.get("sums"))
        elif self.layer.activations is None:
            result = ops.onnx_weights(x, *weight, self.bias)
        elif x.dim() == 2 and self.integer:
            # MatMul and Add of matrices become a Gemm of floats in onnxruntime
            bias = (its["bias_codes"], its["bias_scale"], its["bias_zero"])
            result = ops.onnx_gemm(x, *weight, its["zero"], *bias, its["input_scale"], its["input_zero"])
        else:
            result = ops.onnx_static(x, *weight, self.bias, its["input_scale"], its["input_zero"])
        return result


class Embedding(nn.Module):
    """An Embedding as one operator."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.codes_name = "codes" if layer.codes.bits == 8 else HALF
        self.register_buffer(self.codes_name, layer.codes.values)
        self.register_buffer("scale", layer.codes.scale.flatten() if layer.by_row else layer.codes.scale)

    def forward(self, x: Tensor) -> Tensor:
        """[...] to [..., width]."""
        its = dict(self.named_buffers())
        rows: Tensor = torch.ops.commpress.onnx_embedding(x, its[self.codes_name], its["scale"])
        return rows


class Rounded(nn.Module):
    """Rounds static inputs of a convolution, as one operator."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(layer.scale, dtype=torch.float32, device="cpu"))
        self.register_buffer("zero", torch.tensor(layer.zero, dtype=torch.int8, device="cpu"))

    def forward(self, x: Tensor) -> Tensor:
        """[...], of the dtype of x."""
        rounded: Tensor = torch.ops.commpress.onnx_rounded(x, self.scale, self.zero)
        return rounded


class Decoded(nn.Module):
    """A weight as one operator, of the integers that the file shall have."""

    def __init__(self, codes: Codes) -> None:
        super().__init__()
        self.stored, self.codes_name = codes, "codes" if codes.bits == 8 else HALF
        # with a scale a row the codes have the weight's shape: onnxruntime makes no integers of what is reshaped
        self.register_buffer(self.codes_name, codes.as_weight(codes.values) if codes.by_row else codes.values)
        self.register_buffer("scale", row_scales(codes) if codes.by_row else codes.scale)
        zero = torch.zeros(len(codes.scale), dtype=torch.int8, device="cpu")
        self.register_buffer("zero", zero if codes.bits == 8 and codes.by_row else None)

    def forward(self) -> Tensor:
        """The weight."""
        its = dict(self.named_buffers())
        values: Tensor = torch.ops.commpress.onnx_decoded(its[self.codes_name], its["scale"], its.get("zero"))
        return values if self.stored.by_row else self.stored.as_weight(values)


def _module(layer: Layer) -> nn.Module:
    if isinstance(layer.module, nn.LSTM) and layer.module.proj_size:
        size = layer.module.proj_size
        raise ValueError(
            f"export to onnx: an nn.LSTM has proj_size={size}, expected none: ONNX's LSTM has no projection"
        )
    if isinstance(layer.module, Quantized):
        inputs = Rounded(layer) if layer.activations else None
        return decoded(layer, {name: Decoded(codes) for name, codes in layer.weights.items()}, inputs)
    return Embedding(layer) if layer.embedding else Linear(layer)


def _translations() -> dict[Any, Any]:
    """The nodes of each operator."""
    from onnxscript import opset21 as op

    def weight(codes: Any, scale: Any) -> Any:
        """[width, rows]."""
        turned = op.Transpose(codes, perm=[1, 0])
        if len(scale.shape) == 1:
            return op.DequantizeLinear(turned, scale, axis=1)
        return op.DequantizeLinear(turned, op.Transpose(scale, perm=[1, 0]), axis=0, block_size=group(codes, scale))

    def group(codes: Any, scale: Any) -> int:
        return int(codes.shape[1]) // int(scale.shape[1])

    def added(x: Any, y: Any, bias: Any) -> Any:
        if bias is None:
            return y
        # of matrices, onnxruntime makes one Gemm of floats of a MatMul and an Add, and decodes the weights in each run
        return op.Sub(y, op.Neg(bias)) if len(x.shape) == 2 else op.Add(y, bias)

    def rounded(x: Any, scale: Any, zero: Any) -> Any:
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero), scale, zero)

    def static(x: Any, codes: Any, scale: Any, bias: Any, input_scale: Any, input_zero: Any) -> Any:
        w = weight(codes, scale)
        if len(scale.shape) == 2 and not codes.name.endswith(HALF):
            # onnxruntime 1.32 takes blocks of int8 straight in front of a MatMul for rows, and fails when it runs
            w = op.Transpose(op.DequantizeLinear(codes, scale, axis=1, block_size=group(codes, scale)), perm=[1, 0])
        return added(x, op.MatMul(rounded(x, input_scale, input_zero), w), bias)

    def gemm(
        x: Any, codes: Any, scale: Any, zero: Any, bias: Any, unit: Any, none: Any, input_scale: Any, input_zero: Any
    ) -> Any:
        w = op.DequantizeLinear(codes, scale, zero, axis=0)
        b = op.DequantizeLinear(bias, unit, none, axis=0)
        return op.Gemm(rounded(x, input_scale, input_zero), w, b, transB=1)

    def by_token(x: Any, codes: Any, scale: Any, bias: Any, sums: Any) -> Any:
        def f(value: float) -> Any:
            return op.Constant(value_float=value)

        last = op.Constant(value_ints=[-1])
        low = op.Min(op.ReduceMin(x, last, keepdims=1), f(0.0))
        high = op.Max(op.ReduceMax(x, last, keepdims=1), f(0.0))
        s = op.Max(op.Div(op.Sub(high, low), f(255.0)), f(torch.finfo(torch.float32).smallest_normal))
        zero = op.Clip(op.Sub(f(0.0), op.Round(op.Div(low, s))), f(0.0), f(255.0))
        # of 0 to 255: onnxruntime has kernels for uint8 times int8 on x86
        q = op.Clip(op.Add(op.Round(op.Mul(x, op.Div(f(1.0), s))), zero), f(0.0), f(255.0))
        if sums is None:
            return added(x, op.MatMul(op.Mul(op.Sub(q, zero), s), weight(codes, scale)), bias)
        products = op.MatMulInteger(op.Cast(q, to=2), op.Transpose(codes, perm=[1, 0]))
        products = op.Sub(products, op.Mul(op.Cast(zero, to=6), sums))
        return added(x, op.Mul(op.Cast(products, to=1), op.Mul(s, scale)), bias)

    def weights(x: Any, codes: Any, scale: Any, bias: Any) -> Any:
        return added(x, op.MatMul(x, weight(codes, scale)), bias)

    def embedding(x: Any, codes: Any, scale: Any) -> Any:
        if len(scale.shape) == 2:
            return op.Gather(op.DequantizeLinear(codes, scale, axis=1, block_size=group(codes, scale)), x)
        if codes.name.endswith(HALF):
            return op.Gather(op.DequantizeLinear(codes, scale, axis=0), x)
        last = op.Constant(value_ints=[-1])
        return op.Mul(op.Cast(op.Gather(codes, x), to=1), op.Unsqueeze(op.Gather(scale, x), last))

    def decode(codes: Any, scale: Any, zero: Any) -> Any:
        if len(scale.shape) == 2:
            return op.DequantizeLinear(codes, scale, axis=1, block_size=group(codes, scale))
        if zero is None:
            return op.DequantizeLinear(codes, scale, axis=0)
        return op.DequantizeLinear(codes, scale, zero, axis=0)

    made = (static, gemm, by_token, weights, embedding, rounded, decode)
    return {getattr(torch.ops.commpress, name).default: how for name, how in zip(SCHEMAS, made, strict=True)}


def _make_halves(model: Any) -> None:
    """Give the codes of 4 bits their own type, two a byte, and those that are made of them."""
    import ml_dtypes
    import onnx_ir as ir

    for name, value in model.graph.initializers.items():
        if name.endswith(HALF):
            value.const_value = ir.Tensor(value.const_value.numpy().astype(ml_dtypes.int4), name=name)
            value.dtype = ir.DataType.INT4
            for node, _ in value.uses():
                if node.op_type == "Transpose":
                    node.outputs[0].dtype = ir.DataType.INT4


def _forget_sources(graph: Any) -> None:
    """Remove what torch.onnx notes of each node: lines of source code with their paths, up to a kilobyte each."""
    for each in (graph, *graph.all_nodes(), *graph.initializers.values()):
        each.metadata_props.clear()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what torch.onnx says of other packages, and of its own parts, while nothing is wrong."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        log.setLevel(level)


def _libraries() -> Any:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise extras.missing("export to onnx", error, "export") from error
    return onnxruntime
