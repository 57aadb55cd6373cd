"""A program of integers alone, for devices without floats (Jacob et al., arXiv:1712.05877); `integer_run.py` runs it.

A safetensors file of int8 weights and int32 biases, multipliers and shifts; its metadata, one key, has what to do with them:

    {"commpress": JSON of {"version": "integer-1", "checksum": 8 hex digits, "input_scale", "input_zero", "output_scale",
    "steps": [{"op": "linear", "weight": the name of a tensor, ...}, {"op": "clamp", "low", "high"}, ...]}}

A layer's sums, in units u = s_x s_w, become codes of the next layer's range (s, z) by u / s ~ m / 2^n, 2^30 <= m < 2^31.
The last layer has no range behind it: its outputs are int32 in steps of the largest u of its rows.

Taken are chains, from one input to one output: Linear and Conv2d of int8 weights with a scale a row and static inputs; ReLU,
ReLU6, Hardtanh, MaxPool2d, flatten, Dropout between them. What needs floats (softmax, a norm) or has no range of its own (a
sum of two layers) is refused by name.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from commpress.model import stored
from commpress.model.codes import Codes
from commpress.model.export import integer_run
from commpress.model.export.parts import Layer, decoded, replaced, tensors_of
from commpress.model.quantized import Quantized

FILE = "integer.safetensors"
LINEAR, CONV, MAX_POOL, HARDTANH = "integer_linear", "integer_conv2d", "max_pool2d", "hardtanh"
LAYERS = (LINEAR, CONV)
NOTHING = ("dropout", "clone", "alias", "contiguous", "detach", "detach_")
"""Operators that change no value in evaluation."""
SHAPES = ("view", "reshape", "flatten", "squeeze", "unsqueeze")
CLAMPS = {"relu": (0.0, math.inf), "relu_": (0.0, math.inf), "relu6": (0.0, 6.0), "relu6_": (0.0, 6.0)}
EXPECTED = (
    "expected a chain of Linear and Conv2d with int8 weights, a scale a row and static inputs, and between them ReLU, ReLU6, "
    "MaxPool2d, flatten or Dropout"
)

torch.library.define(f"commpress::{LINEAR}", "(Tensor x, int rows, int layer) -> Tensor")
torch.library.define(
    f"commpress::{CONV}",
    "(Tensor x, int[] weight, int[] stride, int[] padding, int[] dilation, int groups, int layer) -> Tensor",
)


def _rows(x: Tensor, rows: int, layer: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _channels(x: Tensor, weight: list[int], *how: Any) -> Tensor:
    return functional.conv2d(x, x.new_empty(weight), None, *how[:-1])


torch.library.register_fake(f"commpress::{LINEAR}")(_rows)
torch.library.register_fake(f"commpress::{CONV}")(_channels)


def write(path: Path, model: nn.Module, inputs: tuple[Any, ...], shapes: Any) -> None:
    """Write the model, which is in evaluation.

    Raises ValueError that names the first operator without an integer form, or a layer whose sums may leave int32; what
    torch.export raises for a model that it cannot trace.
    """
    layers: list[Layer] = []

    def module(layer: Layer) -> nn.Module:
        kinds, its = (nn.Linear, nn.Conv2d), layer.module
        fits = isinstance(its, kinds) and layer.activations == "static" and layer.codes.bits == 8 and layer.by_row
        if not fits or (isinstance(its, nn.Conv2d) and (its.padding_mode != "zeros" or isinstance(its.padding, str))):
            return _plain(layer)
        layers.append(layer)
        return (Linear if isinstance(its, nn.Linear) else Conv2d)(layer, len(layers) - 1)

    with replaced(model, module):
        program = torch.export.export(model, inputs, dynamic_shapes=shapes)
    tensors, header = _program(program, layers)
    stored.write_summed(path, tensors, integer_run.VERSION, header)


def run(path: Path, model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """The outputs of a file that was just written, by NumPy."""
    program = integer_run.load(path)
    codes = program.run(program.rounded(tensors_of(inputs)[0].numpy()))
    return torch.from_numpy(codes).double().mul(program.output_scale).float()


class Linear(nn.Module):
    """A Linear as one operator."""

    def __init__(self, layer: Layer, at: int) -> None:
        super().__init__()
        self.rows, self.at = len(layer.codes.values), at

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        sums: Tensor = torch.ops.commpress.integer_linear(x, self.rows, self.at)
        return sums


class Conv2d(nn.Module):
    """A convolution as one operator."""

    def __init__(self, layer: Layer, at: int) -> None:
        super().__init__()
        its = layer.module
        self.how = (
            [its.out_channels, its.in_channels // its.groups, *its.kernel_size],
            its.stride,
            its.padding,
            its.dilation,
            its.groups,
            at,
        )

    def forward(self, x: Tensor) -> Tensor:
        """[rows, inputs, height, width] to [rows, outputs, height, width]."""
        sums: Tensor = torch.ops.commpress.integer_conv2d(x, *self.how)
        return sums


class Values(nn.Module):
    """The floats of a weight whose layer has no integer form, so that the layer is named."""

    weight: Tensor

    def __init__(self, codes: Codes) -> None:
        super().__init__()
        self.register_buffer("weight", codes.dequantized())

    def forward(self) -> Tensor:
        """The weight."""
        return self.weight


def _plain(layer: Layer) -> nn.Module:
    """A layer that has no integer form, so that it is named."""
    if isinstance(layer.module, Quantized):
        return decoded(layer, {name: Values(codes) for name, codes in layer.weights.items()}, None)
    made: nn.Module = nn.Embedding(1, 1) if layer.embedding else nn.Linear(1, 1, bias=False)
    made.weight = nn.Parameter(layer.codes.dequantized(), requires_grad=False)
    return made


@dataclass(frozen=True)
class Grid:
    """The numbers that codes stand for: scale (code - zero)."""

    scale: float
    zero: int
    dtype: str

    def code(self, value: float) -> int:
        """The nearest code."""
        low, high = integer_run.LIMITS[self.dtype]
        steps = min(max(value / self.scale, -(2.0**40)), 2.0**40)  # infinities are no integers
        return min(max(round(steps) + self.zero, low), high)


def _program(program: Any, layers: list[Layer]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of the file. Raises ValueError for what has no integer form."""
    nodes = list(_chain(program))
    order = [layers[node.args[-1]] for node in nodes if _name(node) in LAYERS]
    if not order:
        raise ValueError(f"export to integer: the model has no layer quantised this way, {EXPECTED}")
    grids = [Grid(layer.scale, layer.zero, "int8") for layer in order]
    grids.append(Grid(_step(order[-1]), 0, "int32"))
    tensors: dict[str, Tensor] = {}
    steps, done = [], 0
    for node in nodes:
        if _name(node) in LAYERS:
            name, done = _place(node), done + 1
            integers, dtype = _integers(name, order[done - 1], grids[done]), grids[done].dtype
            tensors |= {f"{name}.{key}": x for key, x in integers.items()}
            names = {key: f"{name}.{key}" for key in integers}
            steps.append({**_operator(node, order[done - 1]), **names, "zero": grids[done].zero, "dtype": dtype})
        elif _name(node) not in NOTHING:
            steps.append(_between(node, grids[done]))
    ends = {"input_scale": grids[0].scale, "input_zero": grids[0].zero, "output_scale": grids[-1].scale}
    return tensors, {**ends, "steps": steps}


def _operator(node: Any, layer: Layer) -> dict[str, Any]:
    """Return what a layer's step does, but for its integers."""
    if _name(node) == LINEAR:
        return {"op": "linear"}
    stride, padding, dilation, groups = node.args[2:6]
    how = {"stride": list(stride), "padding": list(padding), "dilation": list(dilation), "groups": groups}
    return {"op": "conv2d", **how, "pad": layer.zero}  # the code of 0


def _chain(program: Any) -> Iterator[Any]:
    """The nodes of a graph from its only input to its only output. Raises ValueError for a graph that is no such chain."""
    names, graph = program.graph_signature.user_inputs, program.graph
    if len(names) != 1 or len(program.graph_signature.user_outputs) != 1:
        raise ValueError("export to integer: expected a model of one input and one output")
    node = next(each for each in graph.nodes if each.name == names[0])
    while True:
        if not (users := [user for user in node.users if not _is_size(user)]):
            raise ValueError(f"export to integer: the outputs of {_said(node)} do not depend on its inputs, {EXPECTED}")
        if len(users) > 1:
            both = " and ".join(_said(user) for user in users[:2])
            raise ValueError(f"export to integer: {_said(node)} goes to {both}, {EXPECTED}")
        node = users[0]
        if node.op == "output":
            return
        if _name(node) not in (*LAYERS, MAX_POOL, HARDTANH, *NOTHING, *SHAPES, *CLAMPS):
            raise ValueError(f"export to integer: {_said(node)} has no integer form, {EXPECTED}")
        yield node


def _integers(name: str, layer: Layer, to: Grid) -> dict[str, Tensor]:
    """Weight, bias, multiplier and shift of a layer whose outputs shall be codes of `to`."""
    codes = layer.codes.values
    unit = _unit(layer)
    # a row of zeros has no scale of its own that a bias could be counted in
    unit = torch.where(codes.any(1), unit, to.scale)
    bias = torch.zeros_like(unit) if layer.bias is None else layer.bias.detach().double()
    bias = (bias / unit).round() - layer.zero * codes.sum(1, dtype=torch.int64)
    most = float((bias.abs() + 128 * codes.abs().sum(1, dtype=torch.int64)).max())
    if not most <= integer_run.LIMITS["int32"][1]:
        raise ValueError(f"export to integer: the sums of {name!r} may reach {most:.3g}, expected at most 2^31 - 1")
    fraction, exponent = torch.frexp(unit / to.scale)
    multiplier = (fraction * 2**31).round()
    exponent, multiplier = torch.where(multiplier < 2**31, exponent, exponent + 1), multiplier.clamp(max=2**31 - 1)
    shift = 31 - exponent
    if not bool((shift > 0).all()):
        raise ValueError(f"export to integer: the sums of {name!r} are {float((unit / to.scale).max()):.3g} codes each")
    multiplier = torch.where(shift < 63, multiplier, 0)  # such a sum never reaches half a code
    whole = {"bias": bias, "multiplier": multiplier, "shift": shift.clamp(max=62)}
    return {"weight": layer.codes.as_weight(codes).contiguous(), **{key: x.to(torch.int32) for key, x in whole.items()}}


def _unit(layer: Layer) -> Tensor:
    """Return the number that a sum of 1 stands for, float64 [rows]."""
    return layer.scale * layer.codes.scale.flatten().double()


def _step(layer: Layer) -> float:
    """Return the number that an output of 1 of the last layer stands for."""
    used = layer.codes.values.any(1)
    if bool(used.any()):
        return float(_unit(layer)[used].max())
    most = 0.0 if layer.bias is None else float(layer.bias.detach().abs().max())
    return most / 2**24 or 1.0


def _between(node: Any, grid: Grid) -> dict[str, Any]:
    """A step that is not a layer's, on codes of a grid: clamping and maxima are the same before rounding and after it."""
    name = _name(node)
    if name in SHAPES:
        before, after = node.args[0].meta["val"].shape, node.meta["val"].shape
        if not before or not after or before[0] != after[0] or not all(isinstance(size, int) for size in after[1:]):
            raise ValueError(
                f"export to integer: {_said(node)} makes {tuple(after)} of {tuple(before)}, expected the same rows, and no "
                "other free dimension"
            )
        return {"op": "reshape", "shape": list(after[1:])}
    if name == MAX_POOL:
        return _pooled(node)
    low, high = CLAMPS.get(name) or (*node.args[1:], *(-1.0, 1.0)[len(node.args) - 1 :])
    return {"op": "clamp", "low": grid.code(low), "high": grid.code(high)}


def _pooled(node: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"stride": [], "padding": 0, "dilation": 1, "ceil_mode": False}
    given |= dict(zip(("kernel", *given), node.args[1:], strict=False))
    if given.pop("ceil_mode"):
        raise ValueError(f"export to integer: {_said(node)} has ceil_mode, expected none")
    given["stride"] = given["stride"] or given["kernel"]
    return {"op": "max_pool2d", **{key: _pair(value) for key, value in given.items()}}


def _pair(value: Any) -> list[int]:
    sizes = [value] if isinstance(value, int) else list(value)
    return sizes * 2 if len(sizes) == 1 else sizes


def _name(node: Any) -> str:
    """Return the name of an operator, without its overload."""
    return node.target.__name__.split(".")[0] if node.op == "call_function" else ""


def _is_size(node: Any) -> bool:
    return _name(node) in ("sym_size", "_assert_tensor_metadata")


def _place(node: Any) -> str:
    """The module in which an operator is."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def _said(node: Any) -> str:
    name = _name(node)
    what = "the input" if node.op == "placeholder" else "the output" if node.op == "output" else name or str(node)
    what = {LINEAR: "Linear", "linear": "Linear", CONV: "Conv2d", "conv2d": "Conv2d"}.get(name, what)
    return f"{what} of {_place(node)!r}" if _place(node) else what
