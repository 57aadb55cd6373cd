"""Quantisation-aware training (Jacob et al., arXiv:1712.05877) of Linear and Embedding weights, on torchao's fake quantisers.

Transformers' Conv1D is a Linear whose weight is transposed: a row of it is a column of the parameter.
A group of g weights of a row (all of the row without groups) shares one scale s; at b bits, with half to even,

    s = max |w| / (2^b - 1) * 2,    code = clamp(round(w / s), -2^(b-1), 2^(b-1) - 1),    w ~ s * code

Forward computes with s * code, backward goes straight through (Bengio et al., arXiv:1308.3432): d/dw is 1, and 0 where a code
was clamped, which happens to a positive w that is its group's maximum. The mapping is symmetric, so 0 stays 0: pruned weights
stay pruned.

A compiler sees one operator and not its arithmetic: fused, a scale would stay wider than its dtype, or be divided by another
way, and a code at the edge would be another than the file's. So training computes with the same bits, compiled or not.
"""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from commpress.model.distillation import PROJECTIONS
from commpress.model.layers import input_dim, is_conv1d
from commpress.model.masks import whole

INTEGERS: dict[int, torch.dtype] = {4: torch.int4, 8: torch.int8}  # type: ignore[attr-defined]
"""By bits, the dtypes that weights are quantised to."""


def fixed_point(w: Tensor, bits: int) -> Tensor:
    """q(w, b) = round(w * 2^b) / 2^b, half to even: the nearest number with `bits` binary places, 0 to 23 of them.

    Any shape; float16, bfloat16 and float32 are kept, and the result is exact (for |w| < 2^104). Nothing is clamped: the
    part before the point is free, so a code round(w * 2^b) takes b bits, those of the largest part before the point, and a
    sign. There is no gradient through it. Raises ValueError for other `bits`, TypeError for other dtypes.
    """
    if not 0 <= bits <= 23:
        raise ValueError(f"fixed_point(bits={bits}): expected 0 to 23 binary places, which float32 can hold")
    if w.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"fixed_point: expected float16, bfloat16 or float32, got {_name(w.dtype)}")
    unit = 2.0**-bits
    return (torch.round(w.detach().float() / unit) * unit).to(w.dtype)


@dataclass(frozen=True)
class Quantization:
    """How weights are quantised.

    Raises ValueError if bits are not 4 or 8, if a group has fewer than 2 weights, or if there are no globs.
    """

    bits: int = 8
    group: int | None = None
    """How many neighbours in a row share a scale; None: the whole row, which is an output channel or an embedding."""
    activations: bool = False
    """Whether the input of a Linear is int8 as well: asymmetric, with a scale and a zero point a token from its values."""
    layers: tuple[str, ...] = ("*",)
    """Globs on the names of modules; only `nn.Linear`, `nn.Embedding` and Transformers' Conv1D are meant, no subclass."""

    def __post_init__(self) -> None:
        if self.bits not in INTEGERS:
            raise ValueError(f"Quantization(bits={self.bits}): expected 4 or 8")
        if self.group is not None and self.group < 2:
            raise ValueError(f"Quantization(group={self.group}): expected at least 2 weights, or None for whole rows")
        if not self.layers or isinstance(self.layers, str):
            raise ValueError(f"Quantization(layers={self.layers!r}): expected a tuple of globs, as in ('blocks.*',)")


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

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight; in its own dtype it is bit for bit what the fake-quantised model computes with."""
        groups: Tensor = self.values.to(dtype).unflatten(1, (self.scale.shape[1], -1))
        rows = (groups * self.scale.unsqueeze(-1)).flatten(1).to(dtype)
        return self.as_weight(rows).contiguous()

    def as_weight(self, rows: Tensor) -> Tensor:
        """A matrix [rows, width] as the weight has it, or one of the weight's shape as [rows, width]."""
        return rows.t() if self.transposed else rows


@torch.no_grad()
def quantize(w: Tensor, bits: int, group: int | None = None) -> Codes:
    """The codes of a weight [rows, width] of float16, bfloat16 or float32: the definition, in plain torch.

    Bit for bit what prepared modules compute with, compiled or not, and torchao's fake quantisers in eager; 1 / s is rounded
    first.
    """
    codes, scale = _codes(w.detach(), bits, group or w.shape[1])
    low, high = _range(bits)
    return Codes(codes.clamp_(low, high).flatten(1).to(torch.int8), scale, bits)


def _codes(w: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Codes before they are clamped, of the weight's dtype [rows, groups, group], and scales [rows, groups]."""
    low, high = _range(bits)
    groups = w.unflatten(1, (-1, group))
    may_cast = torch.amp.is_autocast_available(w.device.type)  # on CUDA 1 / s to float32
    with torch.autocast(w.device.type, enabled=False) if may_cast else contextlib.nullcontext():
        scale = groups.abs().amax(-1) / ((high - low) / 2)
        scale = scale.clamp(min=torch.finfo(w.dtype).smallest_normal).to(_scale_dtype(bits) or w.dtype)
        return (groups * (1.0 / scale).unsqueeze(-1)).round(), scale


def _range(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


@torch.library.custom_op("commpress::fake_quantize", mutates_args=())
def _fake_quantize(w: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """s * code, of the weight's shape and dtype, and where no code was clamped. NaN and Inf make their group NaN."""
    codes, scale = _codes(w, bits, group)
    low, high = _range(bits)
    inside = (codes >= low) & (codes <= high)
    values = codes.clamp_(low, high).add_(0)  # -0 is no code
    return (values * scale.unsqueeze(-1)).to(w.dtype).flatten(1), inside.flatten(1)


@_fake_quantize.register_fake
def _(w: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    return w.new_empty(w.shape), w.new_empty(w.shape, dtype=torch.bool)


def _keep_inside(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _straight_through(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor, None, None]:
    (inside,) = ctx.saved_tensors
    return torch.where(inside, gradient, 0), None, None


_fake_quantize.register_autograd(_straight_through, setup_context=_keep_inside)


class WeightQuantizer(nn.Module):
    """Gives a weight [rows, width] as its codes say, while `enabled`; in the place of torchao's `IntxFakeQuantizer`."""

    def __init__(self, bits: int, group: int | None, config: Any) -> None:
        super().__init__()
        self.bits, self.group = bits, group
        self.config = config
        """torchao's, for its own convert."""
        self.enabled = True
        self.dtype: torch.dtype | None = None
        """In which it last computed; under FSDP2's mixed precision another than the weight's."""

    def forward(self, w: Tensor) -> Tensor:
        """[rows, width], of the weight's dtype."""
        if not self.enabled:
            return w
        self.dtype = w.dtype
        values: Tensor = _fake_quantize(w, self.bits, self.group or w.shape[1])[0]
        return values


def computed_codes(module: Any) -> Codes:
    """The codes that a prepared module computes with, of its whole weight. Collective if that is sharded.

    FSDP2's mixed precision rounds a weight before it is quantised; so does this, once the module has computed.
    """
    s: Quantization = module.quantization
    w = whole(module.weight)
    if isinstance(module.weight, DTensor):
        w = w.to(module.weight_fake_quantizer.dtype or w.dtype)
    if is_conv1d(module):
        return replace(quantize(w.t().contiguous(), s.bits, s.group), transposed=True)
    return quantize(w, s.bits, s.group)


def prepare(model: nn.Module, settings: Quantization) -> list[str]:
    """Give the chosen modules fake quantisers, switched off; return the modules' names.

    Modules and parameters stay the objects that they are, with names, hooks and gradients, and forward gives the same bits
    until `enable`. So it may come before DDP or `fully_shard` wrap the model, or in the middle of a run under DDP (give it
    what DDP wraps); after `fully_shard` it is too late. Modules that were prepared before keep their settings: a second
    call with other settings takes others. `nn.TransformerEncoderLayer` no longer takes its fused path of evaluation, which
    reads weights past their modules. Of `nn.MultiheadAttention` nothing is quantised.

    Raises ValueError, with nothing changed, for a glob without a match; a group that does not divide a row; dtypes but
    float16, bfloat16 and float32; an embedding with `max_norm` or `sparse`; a weight that a module outside the choice shares.
    """
    chosen = _chosen(model, settings)
    for name, module in chosen.items():
        _check(name, module, settings)
    _check_shared(model, chosen)
    qat = _qat()
    for module in chosen.values():
        # what torchao's own swap gives, without a new module: that one would lose hooks, draw random numbers for weights
        # that nobody uses, and leave those behind who hold the old one
        module.__class__ = _prepared_class(qat, module)
        module.weight_fake_quantizer = _of_weights(qat, settings)
        of_activations = _of_activations(qat) if settings.activations else None
        if not isinstance(module, nn.Embedding):
            module.activation_fake_quantizer = of_activations
        module.quantization = settings
        _enable(module, False)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # torch's own word for: no fused path
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return list(chosen)


def is_prepared(model: nn.Module) -> bool:
    """Whether any module has a fake quantiser, on or off."""
    return any(True for _ in prepared(model))


def prepared(model: nn.Module) -> Iterator[tuple[str, Any, Quantization]]:
    """Name, module and settings of each module that has a fake quantiser."""
    for name, module in model.named_modules():
        if isinstance(settings := getattr(module, "quantization", None), Quantization):
            yield name, module, settings


def enable(model: nn.Module, on: bool = True, *, settings: Quantization | None = None) -> None:
    """Switch fake quantisers on or off: all, or those that were prepared with these settings.

    Raises ValueError if there are none.
    """
    modules = [module for _, module, its in prepared(model) if settings in (None, its)]
    if not modules:
        raise ValueError(
            f"enable: the model has no fake quantisers{f' of {settings}' if settings else ''}, see prepare"
        )
    for module in modules:
        _enable(module, on)


def state_dict(model: nn.Module) -> dict[str, dict[str, Any]]:
    """By module: its settings, and whether fake quantisation is on. All there is to save: scales come from the weights."""
    return {
        name: {
            "bits": s.bits,
            "group": s.group,
            "activations": s.activations,
            "enabled": bool(module.weight_fake_quantizer.enabled),
        }
        for name, module, s in prepared(model)
    }


def load_state_dict(model: nn.Module, state: Mapping[str, Mapping[str, Any]]) -> None:
    """Switch on and off as it was when `state_dict` was called; the model is prepared as it was then.

    Raises ValueError, with nothing changed, if modules or their settings are others.
    """
    here = state_dict(model)
    if here.keys() != state.keys():
        raise ValueError(
            "quantisation: the saved model was prepared at other modules: "
            f"{', '.join(sorted(here.keys() ^ state.keys()))} are prepared on one side only"
        )
    for name, saved in state.items():
        now, then = ({k: v for k, v in side.items() if k != "enabled"} for side in (here[name], saved))
        if now != then:
            raise ValueError(f"quantisation of {name!r}: saved with {then}, prepared with {now}")
    modules = dict(model.named_modules())
    for name, saved in state.items():
        _enable(modules[name], bool(saved["enabled"]))


def convert(model: nn.Module) -> nn.Module:
    """Put integers in the place of the prepared weights, as torchao's `IntxUnpackedToInt8Tensor`; return the model.

    In place: the model trains no more, and what held the old parameters holds them still. For a copy, `copy.deepcopy`
    first. Outputs are bit for bit those of the model with fake quantisation on. Weights that were shared stay shared.
    Raises ValueError if nothing is prepared, if weights are sharded, or for a Conv1D: torchao has no kernel for it (its
    integers can be stored, and its float32 values loaded).
    """
    modules = {name: module for name, module, _ in prepared(model)}
    if not modules:
        raise ValueError("convert: the model has no fake quantisers, see prepare")
    for name, module in modules.items():
        if is_conv1d(module):
            raise ValueError(
                f"convert: {name!r} is a Conv1D, expected nn.Linear and nn.Embedding; store the model instead"
            )
        if isinstance(module.weight, DTensor):
            raise ValueError(
                f"convert: {name}.weight is sharded. Load the full state dict into a model that is not, and that is prepared"
            )
    converted: dict[int, nn.Parameter] = {}
    kept = [module.weight for module in modules.values()]  # while they live, no other parameter has their id
    for module, w in zip(modules.values(), kept, strict=True):
        if id(w) not in converted:
            converted[id(w)] = nn.Parameter(_integers(module), requires_grad=False)
        module.__class__ = nn.Linear if isinstance(module, nn.Linear) else nn.Embedding
        for attribute in ("weight_fake_quantizer", "activation_fake_quantizer", "quantization"):
            if hasattr(module, attribute):
                delattr(module, attribute)
        module.weight = converted[id(w)]
    return model


def converted_codes(w: Any) -> Codes | None:
    """The codes of a weight that `convert` or torchao's own convert made; None for any other tensor.

    Raises ValueError for what we cannot hold: other integers than 4 and 8 bits, zero points, groups over several rows.
    """
    if not (hasattr(w, "qdata") and hasattr(w, "target_dtype")):
        return None
    if w.target_dtype not in INTEGERS.values() or bool(w.zero_point.any()) or w.block_size[0] != 1:
        raise ValueError(
            f"a converted weight: expected symmetric int4 or int8 with groups within rows, got {_name(w.target_dtype)}, "
            f"groups of {tuple(w.block_size)}{', zero points' if bool(w.zero_point.any()) else ''}"
        )
    return Codes(w.qdata, w.scale, 4 if w.target_dtype == INTEGERS[4] else 8)


def _chosen(model: nn.Module, settings: Quantization) -> dict[str, Any]:
    # by exact type: whoever subclasses Linear, as MultiheadAttention's `out_proj`, may not call its forward
    kinds = (nn.Linear, nn.Embedding, *_conv1d())
    free = {name: m for name, m in model.named_modules() if name and type(m) in kinds}
    free = {name: m for name, m in free.items() if not name.startswith(PROJECTIONS)}  # they leave before the model does
    for glob in settings.layers:
        if not any(fnmatchcase(name, glob) for name in free):
            known = ", ".join(free) or "none"
            raise ValueError(
                f"Quantization(layers={settings.layers}): {glob!r} matches no Linear or Embedding of the model "
                f"that is not prepared yet. There are: {known}"
            )
    return {name: m for name, m in free.items() if any(fnmatchcase(name, glob) for glob in settings.layers)}


def _check(name: str, module: Any, settings: Quantization) -> None:
    w = module.weight
    width = w.shape[input_dim(module)]
    if width < 2 or width % (settings.group or width):
        raise ValueError(
            f"Quantization(group={settings.group}): {name!r} has rows of {width} weights, "
            + ("expected at least 2" if width < 2 else "which the group does not divide")
        )
    if w.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"quantisation of {name!r}: expected float16, bfloat16 or float32, got {_name(w.dtype)}")
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
        raise ValueError(
            f"quantisation of {name!r}: an embedding with max_norm or sparse gradients cannot be quantised"
        )
    if isinstance(w, DTensor):
        raise ValueError(f"quantisation of {name!r}: {name}.weight is sharded already, prepare before fully_shard")


def _check_shared(model: nn.Module, chosen: Mapping[str, Any]) -> None:
    weights = {id(m.weight): name for name, m in chosen.items()}
    inside = {id(m) for m in chosen.values()}
    for name, module in model.named_modules():
        for of_it, p in module.named_parameters(recurse=False):
            if id(p) in weights and id(module) not in inside:
                raise ValueError(
                    f"quantisation of {weights[id(p)]!r}: its weight is also {name}.{of_it}, "
                    "which would not be quantised the same way. Choose both or neither"
                )


def _enable(module: Any, on: bool) -> None:
    for quantizer in (module.weight_fake_quantizer, getattr(module, "activation_fake_quantizer", None)):
        if quantizer is not None:
            quantizer.enabled = on


def _scale_dtype(bits: int) -> torch.dtype | None:
    # At 4 bits scales weigh: 16 bits in a group of 32 are an eighth of the codes. They are rounded here, in training, so
    # that the file need not round them. bfloat16 has float32's range: a group of zeros has the smallest scale, not 0.
    # At 8 bits 1 / s with 8 bits would move codes.
    return torch.bfloat16 if bits == 4 else None


def _of_weights(qat: Any, settings: Quantization) -> nn.Module:
    from torchao.quantization.granularity import PerAxis, PerGroup

    config = qat.IntxFakeQuantizeConfig(
        dtype=INTEGERS[settings.bits],
        granularity=PerAxis(0) if settings.group is None else PerGroup(settings.group),
        scale_precision=_scale_dtype(settings.bits),
    )
    return WeightQuantizer(settings.bits, settings.group, config)


def _of_activations(qat: Any) -> nn.Module:
    config = qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False, scale_precision=None)
    quantizer: nn.Module = qat.IntxFakeQuantizer(config)
    return quantizer


def _integers(module: Any) -> Tensor:
    from torchao.quantization import IntxUnpackedToInt8Tensor

    w, settings = module.weight, module.quantization
    codes = quantize(w, settings.bits, settings.group)
    weight: Tensor = IntxUnpackedToInt8Tensor(
        codes.values,
        codes.scale,
        torch.zeros_like(codes.scale, dtype=torch.int8),
        target_dtype=INTEGERS[settings.bits],
        block_size=(1, settings.group or w.shape[1]),
        dtype=w.dtype,
        # an embedding ignores it, a Linear that shares the embedding's weight does not
        activation_quantization="int8_asym_per_token" if settings.activations else None,
    )
    return weight


def _conv1d() -> list[type]:
    """Transformers' Conv1D, if any module can be one."""
    library = sys.modules.get("transformers.pytorch_utils")
    return [library.Conv1D] if library is not None else []


def _prepared_class(qat: Any, module: nn.Module) -> type:
    if is_conv1d(module):
        from commpress.model.quantized_conv1d import FakeQuantizedConv1D

        return FakeQuantizedConv1D
    found: type = qat.FakeQuantizedLinear if isinstance(module, nn.Linear) else qat.FakeQuantizedEmbedding
    return found


def _qat() -> Any:
    try:
        from torchao.quantization import qat
    except ImportError as error:
        raise ImportError("quantisation-aware training needs torchao: pip install 'commpress[model]'") from error
    return qat


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
