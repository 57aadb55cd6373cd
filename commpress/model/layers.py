"""Layers: which modules are linear maps, and which dimensions of their weights are outputs and inputs.

    nn.Linear            [outputs, inputs]
    Conv1D               [inputs, outputs]: that of Transformers' GPT-2 and its kin, a Linear transposed
    nn.Conv1d to 3d      [outputs, inputs / groups, kernel...]
    nn.ConvTranspose*    [inputs, outputs / groups, kernel...]

All others count as [outputs, ..., inputs]: nn.Bilinear, the gates of recurrent layers, the stacked projections of
nn.MultiheadAttention, embeddings.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

COMPILED = "_orig_mod."
"""The prefix that torch.compile puts into the names of a module's parameters."""


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is the Conv1D of Transformers, or a copy of it: by the name, and a weight [inputs, `nf`]."""
    w = getattr(module, "weight", None)
    named = any(kind.__name__.endswith("Conv1D") for kind in type(module).__mro__)
    return named and isinstance(w, Tensor) and w.dim() == 2 and w.shape[1] == getattr(module, "nf", None)


def is_linear(module: nn.Module) -> bool:
    """Whether it computes x W^T + b or x W + b: an `nn.Linear`, or the Conv1D of Transformers."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def input_dim(module: nn.Module) -> int:
    """The dimension of a weight along which inputs stand: 0 in Conv1D and transposed convolutions, 1 in other
    convolutions, else the last, as -1."""
    if is_conv1d(module) or isinstance(module, _ConvTransposeNd):
        return 0
    return 1 if isinstance(module, _ConvNd) else -1


@dataclass(frozen=True)
class Layout:
    """How the values of a weight stand."""

    inputs_first: bool = False
    groups: int = 1
    """Blocks of inputs, each with outputs of its own, of a transposed convolution."""
    kernel: bool = False
    """Whether dimensions of a kernel follow."""

    def turned(self, x: Tensor) -> Tensor:
        """Outputs in front: [outputs, inputs, kernel...], or [outputs, ..., inputs]. Turned twice it is as it was."""
        if not self.inputs_first:
            return x
        blocks: Tensor = x.unflatten(0, (self.groups, -1))
        return blocks.transpose(1, 2).flatten(0, 1)

    def inputs_last(self, x: Tensor) -> Tensor:
        """[outputs, kernel..., inputs]: what is next to each other belongs to one output, and one place of a kernel."""
        return self.turned(x).movedim(1, -1) if self.kernel else self.turned(x)

    def from_inputs_last(self, x: Tensor) -> Tensor:
        """Return what `inputs_last` made of `from_inputs_last(x)` is x."""
        return self.turned(x.movedim(-1, 1) if self.kernel else x)


PLAIN = Layout()


def layout_of(model: nn.Module, name: str) -> Layout:
    """How the parameter of this name stands. What a parametrization computes a weight from stands as the weight does."""
    owner, _, leaf = name.rpartition(".")
    if ".parametrizations." in f".{owner}":
        owner, _, leaf = f".{owner}".partition(".parametrizations.")
        owner = owner.removeprefix(".")
    module = module_of(model, owner)
    if not leaf.startswith("weight") or parameter_of(model, name).dim() < 2:
        return PLAIN
    if is_conv1d(module):
        return Layout(inputs_first=True)
    if isinstance(module, _ConvTransposeNd):
        return Layout(inputs_first=True, groups=module.groups, kernel=True)
    return Layout(kernel=isinstance(module, _ConvNd))


def inputs_last(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks or scores of parameters, by name, each as [outputs, ..., inputs]: what `pruning.require_n_of_m` looks at."""
    return {name: layout_of(model, name).inputs_last(x) for name, x in tensors.items()}


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """`dict(model.named_parameters())`, without what torch.compile puts into names."""
    return {plain(name): p for name, p in model.named_parameters()}


def plain(name: str) -> str:
    """A name without what torch.compile puts into it."""
    return name.replace(COMPILED, "")


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that `torch.compile` was given, if this is what it returned."""
    inner = getattr(model, COMPILED[:-1], None)
    return inner if isinstance(inner, nn.Module) else model


def module_of(model: nn.Module, name: str) -> nn.Module:
    """The module of a name in `model`, inside of what torch.compile made of it."""
    return uncompiled(model.get_submodule(name))


def parameter_of(model: nn.Module, name: str) -> Tensor:
    """The parameter of a name; behind a parametrization, too."""
    owner, _, leaf = name.rpartition(".")
    found = getattr(module_of(model, owner), leaf)
    assert isinstance(found, Tensor)
    return found


def never_called(model: nn.Module) -> set[str]:
    """Names of modules whose weights are used and whose forward is not: `out_proj` of each nn.MultiheadAttention."""
    return {
        plain(f"{name}.out_proj" if name else "out_proj")
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    }
