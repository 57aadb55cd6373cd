"""Structured removal: whole attention heads, hidden units and channels go, and the model is a smaller dense one after it.

Of each width n that `removal.py` finds in a model, round(amount * n) go, those whose weights matter least; the amount is one
for all widths, or each has its own. In a transformer the residual path stays, and heads and the units of the MLPs go.
Transformers' Conv1D (GPT-2) is a Linear transposed, and is one while the dependency graph is at work.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from commpress.model.heads import KNOWN, Heads
from commpress.model.layers import is_conv1d
from commpress.model.removal import Removal

__all__ = ["IMPORTANCE", "KNOWN", "Heads", "Shapes", "each_alone", "reshape", "shapes_of", "shrink"]

IMPORTANCE = ("magnitude", "taylor")
SIZES = ("in_features", "out_features", "in_channels", "out_channels", "groups", "num_features", "nx", "nf")
"""The attributes in which layers hold their sizes."""


@dataclass(frozen=True)
class Shapes:
    """The sizes of a model. `dataclasses.asdict` of it is JSON, `Shapes(**found)` takes that back."""

    tensors: dict[str, list[int]]
    """Shapes of everything in its state_dict."""
    sizes: dict[str, dict[str, int]]
    """Attributes that hold sizes, by module."""


def shrink(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any],
    amount: float | Mapping[str, float],
    *,
    importance: str = "magnitude",
    heads: Sequence[Heads] = KNOWN,
    keep: Sequence[str] = (),
) -> Shapes:
    """Remove the share `amount` of every width of a model, and at least one of each is left; return the new sizes.

    For shares by width give a mapping, {"blocks.*.up": 0.5, "blocks.0.attention.qkv": 0.25}: a width is called by the first
    layer whose outputs it is, the first name or glob that fits that decides, and others stay whole.
    `example_inputs` are those of one forward: a tensor, positional arguments, or named ones. `keep` are globs of modules of
    which nothing is removed, neither outputs nor inputs. Scores are of torch-pruning: "magnitude", the squares of all
    weights that go together, or "taylor", |gradient * weight|, for which a backward must have been. The same weights give
    the same result on all ranks.

    Parameters that change are new ones, without gradients: optimizer, masks and wrappers (DDP, `fully_shard`) come after.
    What the model computes is checked once: it must be what it computed with the removed inputs at 0. If it is not, as
    when attention is of a kind that `heads` does not describe, ValueError is raised and the model is as it was; so it is for
    an amount outside [0, 1), a name or glob that matches nothing, sharded parameters, or if nothing can be removed. ImportError
    without torch-pruning.
    """
    for name, share in amount.items() if isinstance(amount, Mapping) else [("", amount)]:
        if not 0 <= share < 1:
            raise ValueError(f"shrink: the amount{f' of {name!r}' if name else ''} must be in [0, 1), got {share}")
    if importance not in IMPORTANCE:
        raise ValueError(f"importance {importance!r}: expected one of {', '.join(IMPORTANCE)}")
    if any(isinstance(p, DTensor) for p in model.parameters()):
        raise ValueError("shrink: the parameters are sharded, call it before fully_shard")
    small = _copy(model).eval()
    transposed = _as_linear(small)
    with _follow():
        removal = Removal(small, example_inputs, importance, heads, keep)
        with torch.no_grad():
            removed = removal.choose(amount)
    if not removed and (any(amount.values()) if isinstance(amount, Mapping) else amount):
        raise ValueError(f"shrink({amount}): the model has no width of which as much can be removed")
    with torch.no_grad():
        expected = removal.outputs_without(removed)
        removal.remove(removed)
        try:
            computed = removal.outputs()
        except Exception as error:
            raise ValueError(f"shrink: without {removal.names(removed)} the model fails: {error}. {_HINT}") from error
    if difference := _difference(expected, computed):
        raise ValueError(f"shrink: without {removal.names(removed)} {difference}. {_HINT}")
    _as_conv1d(small, transposed)
    shapes = shapes_of(small, heads)
    reshape(model, shapes)
    model.load_state_dict(small.state_dict())
    return shapes


_HINT = "Describe the attention by heads=[Heads(...)], or leave modules alone by keep=[...]"


def each_alone(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any],
    shares: Sequence[float],
    measure: Callable[[nn.Module], float],
) -> dict[str, dict[float, tuple[float, int]]]:
    """Measure the model with a share of one width alone at 0, as if it were removed, and count the parameters of that.

    By width, as `shrink` calls it, and by share; a share too small for any head or channel of a width is not there. The
    model stays as it is, `measure` gets a copy in evaluation. Raises ValueError where `shrink` does.
    """
    small = _copy(model).eval()
    _as_linear(small)
    with _follow():
        removal = Removal(small, example_inputs, "magnitude", KNOWN, ())
    found: dict[str, dict[float, tuple[float, int]]] = {}
    with torch.no_grad():
        for share in shares:
            for width in removal.choose(share):
                with removal.zeroed(width):
                    found.setdefault(width.name, {})[share] = measure(small), removal.parameters(width)
    return found


@contextmanager
def _follow() -> Iterator[None]:
    """Say of an error inside that it is of the graph of the model."""
    try:
        with torch.enable_grad():
            yield
    except (ValueError, ImportError):
        raise
    except Exception as error:  # torch-pruning's, in the middle of a model that it does not understand
        raise ValueError(f"shrink: the model cannot be followed, {type(error).__name__}: {error}") from error


def shapes_of(model: nn.Module, heads: Sequence[Heads] = KNOWN) -> Shapes:
    """The sizes that a model has now. `heads` as for `shrink`."""
    attributes = {*SIZES, *(each.count for each in heads), *(each.width for each in heads if each.width)}
    sizes = {
        name: {key: value for key, value in vars(module).items() if key in attributes and type(value) is int}
        for name, module in model.named_modules()
    }
    return Shapes(
        {name: list(x.shape) for name, x in _tensors_of(model).items()}, {name: of for name, of in sizes.items() if of}
    )


def reshape(model: nn.Module, shapes: Shapes) -> None:
    """Give a model of the original sizes those of a smaller one, whose state_dict it then takes.

    Until then its tensors hold the first of their values; those whose shape changes are new parameters. Raises ValueError,
    with the name, for a tensor that the model does not have or that is not smaller; the model is then as it was.
    """
    tensors = _tensors_of(model)
    modules = dict(model.named_modules())
    if unknown := sorted({*(shapes.tensors.keys() ^ tensors.keys()), *(shapes.sizes.keys() - modules.keys())}):
        raise ValueError(f"reshape: the sizes are of another model, only one of the two has {unknown[0]!r}")
    for name, shape in shapes.tensors.items():
        now = tensors[name].shape
        if len(shape) != len(now) or any(new > old for new, old in zip(shape, now, strict=True)):
            raise ValueError(f"reshape: {name!r} has shape {tuple(now)}, it cannot become {tuple(shape)}")
    for name, shape in shapes.tensors.items():
        x = tensors[name]
        if list(x.shape) != shape:
            owner, _, leaf = name.rpartition(".")
            part = x.detach()[tuple(slice(n) for n in shape)].clone()
            kept = nn.Parameter(part, x.requires_grad) if isinstance(x, nn.Parameter) else part
            setattr(modules[owner], leaf, kept)
    for name, sizes in shapes.sizes.items():
        for key, value in sizes.items():
            setattr(modules[name], key, value)


def _copy(model: nn.Module) -> nn.Module:
    small = copy.deepcopy(model)
    for p, original in zip(small.parameters(), model.parameters(), strict=True):
        p.grad = original.grad
    return small


def _as_linear(model: nn.Module) -> dict[str, nn.Module]:
    """Put a Linear in the place of each Conv1D, with its values and gradients; return those that there were."""
    found: dict[str, nn.Module] = {name: module for name, module in model.named_modules() if name and is_conv1d(module)}
    for name, module in found.items():
        weight, bias = module.weight, module.bias
        assert isinstance(weight, nn.Parameter)
        assert isinstance(bias, nn.Parameter)
        inputs, outputs = weight.shape
        linear = nn.Linear(inputs, outputs, device=weight.device, dtype=weight.dtype).train(module.training)
        linear.weight = nn.Parameter(weight.detach().t().contiguous(), weight.requires_grad)
        linear.weight.grad = None if weight.grad is None else weight.grad.t().contiguous()
        linear.bias = bias
        model.set_submodule(name, linear)
    return found


def _as_conv1d(model: nn.Module, found: Mapping[str, nn.Module]) -> None:
    """Put back what `_as_linear` returned, with the values and sizes that the Linears have now."""
    for name, module in found.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        module.weight, module.bias = nn.Parameter(linear.weight.detach().t().contiguous()), linear.bias
        sizes = {"nf": linear.out_features, "nx": linear.in_features}
        for key, size in sizes.items():
            if key in vars(module):  # `nx` in newer versions only
                setattr(module, key, size)
        model.set_submodule(name, module)


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: x for name, x in model.state_dict(keep_vars=True).items() if isinstance(x, Tensor)}


def _difference(expected: Sequence[Tensor], computed: Sequence[Tensor]) -> str:
    """Return what is different, but for rounding."""
    for x, y in zip(expected, computed, strict=True):
        if x.shape != y.shape:
            return f"an output has shape {tuple(y.shape)}, it was {tuple(x.shape)}"
        if x.is_floating_point():
            largest, apart = float(x.abs().max()), float((x - y).abs().max())
            if not apart <= torch.finfo(x.dtype).eps ** 0.5 * largest:
                return f"the output is off by {apart:.1e} (its largest value is {largest:.1e})"
    return ""
