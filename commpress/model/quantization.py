"""Quantisation-aware training (Jacob et al., arXiv:1712.05877) of the weights of layers, on torchao's fake quantisers.

`quantized/` says which modules are taken, and how each computes. Forward computes with what the integers of `codes.py` stand
for, and backward goes straight through.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from commpress.model.codes import INTEGERS, Codes, fixed_point, quantize, scale_dtype
from commpress.model.distillation import PROJECTIONS
from commpress.model.held import whole
from commpress.model.layers import is_conv1d, never_called, plain
from commpress.model.quantized import (
    Decoder,
    Quantized,
    WeightQuantizer,
    class_of,
    kinds,
    rounds_inputs,
    row_shape,
    weights_of,
)
from commpress.model.quantized.converted import ConvertedWeight, converted_codes, integers
from commpress.model.ranges import InputQuantizer, StaticLinear, quantizer_of

__all__ = [
    "Codes",
    "Quantization",
    "WeightQuantizer",
    "codes_of",
    "computed_codes",
    "convert",
    "converted_codes",
    "enable",
    "fixed_point",
    "is_prepared",
    "load_state_dict",
    "prepare",
    "prepared",
    "quantize",
    "quantized_weights",
    "require_range",
    "state_dict",
    "switch",
]


Activations = Literal["dynamic", "static"]


@dataclass(frozen=True)
class Quantization:
    """How weights are quantised.

    Raises ValueError if bits are not 4 or 8, if a group has fewer than 2 weights, for other activations, or if there are no
    globs.
    """

    bits: int = 8
    group: int | None = None
    """How many neighbours in a row share a scale; None: the whole row, which is what makes up an output, or an embedding."""
    activations: Activations | None = None
    """Whether the input of a Linear or a convolution is int8 as well, asymmetric: "dynamic", with a scale and a zero point a
    token from its values (Linear only); "static", with one of each for all, which follow from the range that training learns
    (`ranges.py`). Of embeddings, attention and recurrent layers weights alone are rounded."""
    layers: tuple[str, ...] = ("*",)
    """Globs on the names of modules; `nn.Linear`, `nn.Embedding`, Transformers' Conv1D, `nn.Conv1d` to `nn.Conv3d`,
    `nn.MultiheadAttention`, `nn.RNN`, `nn.LSTM` and `nn.GRU` are meant, no subclass."""

    def __post_init__(self) -> None:
        if self.bits not in INTEGERS:
            raise ValueError(f"Quantization(bits={self.bits}): expected 4 or 8")
        if self.group is not None and self.group < 2:
            raise ValueError(f"Quantization(group={self.group}): expected at least 2 weights, or None for whole rows")
        if self.activations not in (None, *get_args(Activations)):
            raise ValueError(f"Quantization(activations={self.activations!r}): expected 'dynamic', 'static' or None")
        if not self.layers or isinstance(self.layers, str):
            raise ValueError(f"Quantization(layers={self.layers!r}): expected a tuple of globs, as in ('blocks.*',)")


def computed_codes(module: Any, name: str = "weight") -> Codes:
    """The codes that a prepared module computes with, of one of its whole weights. Collective if that is sharded.

    FSDP2's mixed precision rounds a weight before it is quantised; so does this, once the module has computed.
    """
    s: Quantization = module.quantization
    p = weights_of(module)[name]
    w = whole(p)
    if isinstance(p, DTensor):
        w = w.to(module.weight_fake_quantizer.dtype or w.dtype)
    if is_conv1d(module):
        return replace(quantize(w.t().contiguous(), s.bits, s.group), transposed=True)
    return replace(quantize(w.flatten(1), s.bits, s.group), row=row_shape(module))


def codes_of(module: Any, name: str = "weight") -> Codes | None:
    """The codes of a weight of a prepared or a converted module; None if it has none. Raises as `converted_codes`."""
    if isinstance(getattr(module, "quantization", None), Quantization):
        return computed_codes(module, name)
    codes = converted_codes(weights_of(module)[name])
    return codes and replace(codes, row=row_shape(module))


def quantized_weights(model: nn.Module) -> Iterator[tuple[str, Any, str, Tensor]]:
    """The name of a module that is prepared or converted, the module, and name and tensor of each weight that has codes."""
    inside = never_called(model)
    for name, module in model.named_modules():
        ours = isinstance(getattr(module, "quantization", None), Quantization) or isinstance(module, Quantized)
        torchaos = isinstance(getattr(module, "weight", None), ConvertedWeight) and plain(name) not in inside
        if ours or torchaos:
            yield from ((name, module, its, w) for its, w in weights_of(module).items())


def prepare(model: nn.Module, settings: Quantization) -> list[str]:
    """Give the chosen modules fake quantisers, switched off; return the modules' names.

    Modules and parameters stay the objects that they are, with names, hooks and gradients, and forward gives the same bits
    until `enable`. So it may come before DDP or `fully_shard` wrap the model, or in the middle of a run under DDP (give it
    what DDP wraps); after `fully_shard` it is too late. Modules that were prepared before keep their settings: a second
    call with other settings takes others. `nn.TransformerEncoderLayer` no longer takes its fused path of evaluation, which
    reads weights past their modules.

    Raises ValueError, with nothing changed, for a glob without a match; a group that does not divide a row; dtypes but
    float16, bfloat16 and float32; a convolution with `activations="dynamic"`; an embedding with `max_norm` or `sparse`; a
    weight that a module outside the choice shares.
    """
    chosen = _chosen(model, settings)
    for name, module in chosen.items():
        _check(name, module, settings)
    _check_shared(model, chosen)
    qat = _qat()
    for module in chosen.values():
        # what torchao's own swap gives, without a new module: that one would lose hooks, draw random numbers for weights
        # that nobody uses, and leave those behind who hold the old one
        module.__class__ = class_of(module, qat)
        module.weight_fake_quantizer = _of_weights(qat, settings)
        if rounds_inputs(module):
            module.activation_fake_quantizer = _of_activations(qat, settings, module.weight.device)
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
    """Return each module's settings, and whether its quantiser is on, by name. Scales are not saved: weights give them."""
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
    switch(model, {name: bool(saved["enabled"]) for name, saved in state.items()})


def switch(model: nn.Module, on: Mapping[str, bool]) -> None:
    """Switch fake quantisers on or off, by the names of their modules."""
    modules = dict(model.named_modules())
    for name, is_on in on.items():
        _enable(modules[name], is_on)


def convert(model: nn.Module) -> nn.Module:
    """Put integers in the place of the prepared weights, as torchao's `IntxUnpackedToInt8Tensor`; return the model.

    In place: the model trains no more, and what held the old parameters holds them still. For a copy, `copy.deepcopy`
    first. Outputs are bit for bit those of the model with fake quantisation on. Weights that were shared stay shared. A
    learned range of inputs stays as it is from here on. Convolutions, attention and recurrent layers hold their codes as
    [rows, width], and decode them in each forward.
    Raises ValueError if nothing is prepared, if weights are sharded, if a range is to be learned and nothing has been seen,
    or for a Conv1D: torchao has no kernel for it (its integers can be stored, and its float32 values loaded).
    """
    modules = {name: module for name, module, _ in prepared(model)}
    if not modules:
        raise ValueError("convert: the model has no fake quantisers, see prepare")
    for name, module in modules.items():
        if is_conv1d(module):
            raise ValueError(
                f"convert: {name!r} is a Conv1D, for which torchao has no kernel; store or export the model instead"
            )
        for its, w in weights_of(module).items():
            if isinstance(w, DTensor):
                raise ValueError(
                    f"convert: {name}.{its} is sharded. Load the full state dict into a model that is not, and that is prepared"
                )
        require_range(name, module)
    converted: dict[int, nn.Parameter] = {}
    kept = [(module, its, w) for module in modules.values() for its, w in weights_of(module).items()]  # ids stay theirs
    for module, _, w in kept:
        if id(w) not in converted:
            converted[id(w)] = nn.Parameter(integers(module, w), requires_grad=False)
    for module in modules.values():
        _unprepare(module)
    for module, its, w in kept:
        owner, _, leaf = its.rpartition(".")
        setattr(module.get_submodule(owner), leaf, converted[id(w)])
    return model


def require_range(name: str, module: nn.Module) -> None:
    """Raise ValueError, with the module's name, if its inputs are to be rounded by a range and none has been learned."""
    static = quantizer_of(module)
    try:
        _ = static and static.scale_and_zero()
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from None


def _chosen(model: nn.Module, settings: Quantization) -> dict[str, Any]:
    free = {name: m for name, m in model.named_modules() if name and type(m) in kinds()}
    free = {name: m for name, m in free.items() if not name.startswith(PROJECTIONS)}  # they leave before the model does
    for glob in settings.layers:
        if not any(fnmatchcase(name, glob) for name in free):
            known = ", ".join(free) or "none"
            raise ValueError(
                f"Quantization(layers={settings.layers}): {glob!r} matches no layer that can be quantised "
                f"and is not prepared yet. There are: {known}"
            )
    return {name: m for name, m in free.items() if any(fnmatchcase(name, glob) for glob in settings.layers)}


def _check(name: str, module: Any, settings: Quantization) -> None:
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
        raise ValueError(
            f"quantisation of {name!r}: an embedding with max_norm or sparse gradients cannot be quantised"
        )
    if row_shape(module) and settings.activations == "dynamic":
        raise ValueError(
            f"Quantization(activations='dynamic'): {name!r} is a {type(module).__name__}, whose inputs are not tokens; "
            "expected 'static' or None, or layers without it"
        )
    for its, w in weights_of(module).items():
        place = name if its == "weight" else f"{name}.{its}"
        width = w.shape[0] if is_conv1d(module) else math.prod(w.shape[1:])
        if width < 2 or width % (settings.group or width):
            raise ValueError(
                f"Quantization(group={settings.group}): {place!r} has rows of {width} weights, "
                + ("expected at least 2" if width < 2 else "which the group does not divide")
            )
        if w.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(f"quantisation of {place!r}: expected float16, bfloat16 or float32, got {_name(w.dtype)}")
        if isinstance(w, DTensor):
            raise ValueError(f"quantisation of {name!r}: {name}.{its} is sharded already, prepare before fully_shard")


def _check_shared(model: nn.Module, chosen: Mapping[str, Any]) -> None:
    weights = {id(w): name for name, m in chosen.items() for w in weights_of(m).values()}
    inside = {id(part) for m in chosen.values() for part in m.modules()}
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


def _of_weights(qat: Any, settings: Quantization) -> nn.Module:
    from torchao.quantization.granularity import PerAxis, PerGroup

    config = qat.IntxFakeQuantizeConfig(
        dtype=INTEGERS[settings.bits],
        granularity=PerAxis(0) if settings.group is None else PerGroup(settings.group),
        scale_precision=scale_dtype(settings.bits),
    )
    return WeightQuantizer(settings.bits, settings.group, config)


def _of_activations(qat: Any, settings: Quantization, device: torch.device) -> nn.Module | None:
    if settings.activations != "dynamic":
        return InputQuantizer(device) if settings.activations else None
    config = qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False, scale_precision=None)
    quantizer: nn.Module = qat.IntxFakeQuantizer(config)
    return quantizer


def _unprepare(module: Any) -> None:
    """Take the fake quantisers away; what rounds inputs by a range stays, and so does the range."""
    static = quantizer_of(module)
    if static is not None:
        static.frozen = static.enabled = True
    del module.quantization
    if isinstance(module, Quantized):
        module.weight_fake_quantizer = Decoder(row_shape(module))
        return
    module.__class__ = nn.Embedding if isinstance(module, nn.Embedding) else StaticLinear if static else nn.Linear
    del module.weight_fake_quantizer
    if not isinstance(module, nn.Embedding):
        del module.activation_fake_quantizer
    if static is not None:
        module.input_quantizer = static


def _qat() -> Any:
    try:
        from torchao.quantization import qat
    except ImportError as error:
        raise ImportError("quantisation-aware training needs torchao: pip install 'commpress[model]'") from error
    return qat


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
