"""Layers of integers: what a format is given of each module that is quantised, and the model with others in their places."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from commpress.model import quantization
from commpress.model.codes import Codes
from commpress.model.layers import is_conv1d
from commpress.model.quantized import Decoder, rounds_inputs
from commpress.model.ranges import InputQuantizer, quantizer_of, quantizers


@dataclass(frozen=True)
class Layer:
    """A module whose weights are quantised."""

    module: Any
    weights: dict[str, Codes]
    """By the weight's name in the module, with float32 scales; those of a shared weight are the same objects."""
    activations: quantization.Activations | None
    scale: float = 0.0
    """The scale of static inputs: x ~ scale (code - zero), codes of -128 to 127."""
    zero: int = 0

    @property
    def codes(self) -> Codes:
        """The codes of the only weight, of a Linear (or Conv1D, which is one), an Embedding or a convolution."""
        return self.weights["weight"]

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias of a Linear."""
        bias: nn.Parameter | None = self.module.bias
        return bias

    @property
    def embedding(self) -> bool:
        """Whether it is an Embedding."""
        return isinstance(self.module, nn.Embedding)

    @property
    def by_row(self) -> bool:
        """Whether a row of the only weight has one scale."""
        return self.codes.by_row


def require_exportable(model: nn.Module) -> None:
    """Raise ValueError for a model that no format takes: sharded, not on the CPU, in other dtypes than float32, or without a
    range that its training was to learn."""
    for name, x in model.state_dict(keep_vars=True).items():
        if not isinstance(x, Tensor) or isinstance(x, DTensor):
            raise ValueError(f"export: {name!r} is a {type(x).__name__}, expected whole tensors on this rank")
        if x.device.type != "cpu":
            raise ValueError(f"export: {name!r} is on {x.device}, expected a model on the CPU")
    for name, module in model.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        others = {x.dtype for x in own if x.is_floating_point()} - {torch.float32}
        if others and not isinstance(module, InputQuantizer):
            raise ValueError(f"export: {name!r} has {', '.join(map(str, others))}, expected float32")
        quantization.require_range(name, module)


def layers_of(model: nn.Module) -> dict[nn.Module, Layer]:
    """The quantised modules of a prepared or a converted model. Raises ValueError for weights that are not finite."""
    found: dict[nn.Module, Layer] = {}
    codes: dict[int, Codes] = {}
    for name, module, its, w in quantization.quantized_weights(model):
        if id(w) not in codes:
            of_it = quantization.codes_of(module, its)
            if of_it is None:
                continue
            if not bool(of_it.scale.isfinite().all()):
                raise ValueError(f"export: {name!r} has weights that are not finite")
            codes[id(w)] = replace(of_it, scale=of_it.scale.float())
        if module not in found:
            found[module] = _layer(module)
        found[module].weights[its] = codes[id(w)]
    return found


def _layer(module: Any) -> Layer:
    """A module without its weights."""
    settings: quantization.Quantization | None = getattr(module, "quantization", None)
    if (static := quantizer_of(module)) is not None:
        return Layer(module, {}, "static", *static.scale_and_zero())
    if not isinstance(module, nn.Linear) and not is_conv1d(module):
        return Layer(module, {}, None)
    if settings is not None:
        return Layer(module, {}, settings.activations)
    weight: Any = module.weight
    return Layer(module, {}, "dynamic" if weight.activation_quantization else None)


def decoded(layer: Layer, weights: Mapping[str, nn.Module], inputs: nn.Module | None) -> nn.Module:
    """A copy of a module of ours, in evaluation: its weights are what modules give that are called without arguments, by
    their names; `inputs` rounds what comes in."""
    made = _hollow(layer.module)
    for name in weights:
        owner, _, leaf = name.rpartition(".")
        if owner:
            made._modules[owner] = _hollow(made._modules[owner])
        made.get_submodule(owner)._parameters[leaf] = None
    given = nn.ModuleDict({name.replace(".", "_"): each for name, each in weights.items()})
    made.decoded, made.weight_fake_quantizer = given, Decoder(())
    made.computed = lambda name: given[name.replace(".", "_")]()
    if rounds_inputs(layer.module):
        made.activation_fake_quantizer = inputs
    module: nn.Module = made
    return module


def _hollow(module: Any) -> Any:
    """A copy that shares parameters and submodules, and can be given others."""
    made = copy.copy(module)
    made._parameters, made._modules = dict(module._parameters), dict(module._modules)
    return made


@contextlib.contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """The model in evaluation, its quantisers switched on and no gradients, until the block ends; then as it was."""
    training = {module: module.training for module in model.modules()}
    found: Any = [getattr(module, "weight_fake_quantizer", None) for module in model.modules()]
    switches = {each: each.enabled for each in (*found, *quantizers(model)) if each is not None}
    quantization.switch(model, dict.fromkeys(quantization.state_dict(model), True))
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was in training.items():
            module.training = was
        for switch, was in switches.items():
            switch.enabled = was


@contextlib.contextmanager
def replaced(model: nn.Module, make: Callable[[Layer], nn.Module]) -> Iterator[None]:
    """The model with what `make` gives in the place of each quantised module, until the block ends."""
    others = {module: make(layer).eval() for module, layer in layers_of(model).items()}
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None and child in others
    ]
    try:
        for parent, name, child in places:
            parent._modules[name] = others[child]
        yield
    finally:
        for parent, name, child in places:
            parent._modules[name] = child


def tensors_of(outputs: Any) -> list[Tensor]:
    """The tensors of what a model returns, in the order of torch's pytrees."""
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def batch_shapes(example_inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return `dynamic_shapes` that leave the first dimension free, of all inputs where it is that of the first tensor.

    Raises ValueError if there is no input, or only one row: tracing takes a size of 1 for one that never changes.
    """
    from torch.utils._pytree import tree_map

    tensors = tensors_of(example_inputs)
    if not tensors or not tensors[0].dim() or tensors[0].shape[0] < 2:
        got = tuple(tensors[0].shape) if tensors else "none"
        raise ValueError(
            f"example_inputs: expected tensors with 2 rows or more, so that the batch size stays free, got {got}"
        )
    rows, batch = tensors[0].shape[0], torch.export.Dim("batch")

    def shape(x: Any) -> Any:
        return {0: batch} if isinstance(x, Tensor) and x.dim() and x.shape[0] == rows else None

    return tuple(tree_map(shape, each) for each in example_inputs)
