"""Layers cut to their first units: views of the weights while a supernet is trained, separate weights at the end.

    outputs of nn.Linear and nn.Conv*     weight[:k], bias[:k]
    inputs                                weight[:, :k]
    nn.BatchNorm*                         all of weight, bias, running_mean, running_var [:k]

The gradient of a view goes to the whole weight, 0 where it was cut. Running statistics are written through the view.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

Cut = Callable[[Tensor], Tensor]
"""A function from a tensor to its kept part, a view or not."""


def can_be_cut(module: nn.Module) -> bool:
    """Return whether it is a Linear or a convolution without groups that is not transposed."""
    if isinstance(module, _ConvNd):
        return module.groups == 1 and not isinstance(module, _ConvTransposeNd)
    return isinstance(module, nn.Linear)


def sizes(module: Any) -> tuple[int, int]:
    """Return the numbers of inputs and outputs of a layer that can be cut."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return module.in_channels, module.out_channels


def of_outputs(module: nn.Module, keep: Cut) -> dict[str, Cut]:
    """Return cuts by the names of tensors; `keep` takes [outputs, ...]."""
    names = ("weight", "bias", "running_mean", "running_var") if isinstance(module, _BatchNorm) else ("weight", "bias")
    return {name: keep for name in names if getattr(module, name, None) is not None}


def of_inputs(keep: Cut) -> dict[str, Cut]:
    """Return cuts by the names of tensors; `keep` takes [inputs, ...]."""
    return {"weight": lambda w: keep(w.transpose(0, 1)).transpose(0, 1)}


def first(k: int) -> Cut:
    """Return the cut that keeps the first k."""
    return lambda x: x[:k]


def call_cut(module: nn.Module, cuts: Mapping[str, Cut], *args: Any, **named: Any) -> Any:
    """Return the output of the module with its tensors cut; the module does not change."""
    tensors = {name: cut(_tensor(module, name)) for name, cut in cuts.items()}
    return functional_call(module, tensors, args, named)


@torch.no_grad()
def cut_(module: nn.Module, cuts: Mapping[str, Cut]) -> None:
    """Give the module the kept tensors, parameters as new parameters, and the sizes of its layers."""
    for name, cut in cuts.items():
        owner, _, leaf = name.rpartition(".")
        holder, old = module.get_submodule(owner), _tensor(module, name)
        left = cut(old.detach()).clone(memory_format=torch.contiguous_format)
        if isinstance(old, nn.Parameter):
            setattr(holder, leaf, nn.Parameter(left, requires_grad=old.requires_grad))
        else:
            setattr(holder, leaf, left)
        if leaf == "weight":
            _resize(holder, left)


def _resize(layer: nn.Module, w: Tensor) -> None:
    """Set the size attributes of a layer."""
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = w.shape
    elif isinstance(layer, _ConvNd):
        layer.out_channels, layer.in_channels = w.shape[:2]
    elif isinstance(layer, _BatchNorm):
        layer.num_features = len(w)


def _tensor(module: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    found = getattr(module.get_submodule(owner), leaf)
    assert isinstance(found, Tensor)
    return found
