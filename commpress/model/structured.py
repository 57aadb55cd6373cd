"""Structured removal: whole attention heads, hidden units and channels go, and the model is a smaller dense one after it.

What hangs together is found by torch-pruning's dependency graph (Fang et al., arXiv:2301.12900): output i of one layer, its
place in a batch norm, input i of the next. Of each such width n, round(amount * n) go, those whose weights matter least.
A width stays that reaches the model's output, an embedding, a norm over features or a parameter outside of Linear,
convolution and batch norm: in a transformer that is the residual path, and heads and the units of the MLPs go. Grouped
convolutions, weights that two layers share and what rotary positions turn stay as well. Transformers' Conv1D (GPT-2) is a
Linear transposed, and is one while the graph is at work.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from commpress.model.layers import is_conv1d

IMPORTANCE = ("magnitude", "taylor")
SIZES = ("in_features", "out_features", "in_channels", "out_channels", "groups", "num_features", "nx", "nf")
"""The attributes in which layers hold their sizes."""


@dataclass(frozen=True)
class Heads:
    """An attention module that has these attributes: how many heads it has, and the Linear layers that they come from.

    One layer alone gives queries, keys and values one after another, [3 * heads * size of a head, inputs].
    """

    count: str
    layers: tuple[str, ...]
    width: str | None = None
    """The attribute that holds heads * size of a head, if there is one."""

    @property
    def parts(self) -> int:
        """How many times heads * size of a head are in a layer's outputs."""
        return 3 if len(self.layers) == 1 else 1


KNOWN = (
    Heads("heads", ("qkv",)),  # the training program's GPT
    Heads("num_attention_heads", ("query", "key", "value"), "all_head_size"),  # BERT and its kin in Transformers
    Heads("n_heads", ("q_lin", "k_lin", "v_lin")),  # DistilBERT
    Heads("num_heads", ("c_attn",), "split_size"),  # GPT-2
)


@dataclass(frozen=True)
class Shapes:
    """The sizes of a model. `dataclasses.asdict` of it is JSON, `Shapes(**found)` takes that back."""

    tensors: dict[str, list[int]]
    """Of everything in its state_dict."""
    sizes: dict[str, dict[str, int]]
    """By module, the attributes that hold sizes."""


def shrink(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any],
    amount: float,
    *,
    importance: str = "magnitude",
    heads: Sequence[Heads] = KNOWN,
    keep: Sequence[str] = (),
) -> Shapes:
    """Remove the share `amount` of every width of a model, and at least one of each is left; return the new sizes.

    `example_inputs` are those of one forward: a tensor, positional arguments, or named ones. `keep` are globs of modules of
    which nothing is removed, neither outputs nor inputs. Scores are of torch-pruning: "magnitude", the squares of all
    weights that go together, or "taylor", |gradient * weight|, for which a backward must have been. The same weights give
    the same result on all ranks.

    Parameters that change are new ones, without gradients: optimizer, masks and wrappers (DDP, `fully_shard`) come after.
    What the model computes is checked once: it must be what it computed with the removed inputs at 0. If it is not, as
    when attention is of a kind that `heads` does not describe, ValueError is raised and the model is as it was; so it is for
    an amount outside [0, 1), a glob that matches nothing, sharded parameters, or if nothing can be removed. ImportError
    without torch-pruning.
    """
    if not 0 <= amount < 1:
        raise ValueError(f"shrink: the amount must be in [0, 1), got {amount}")
    if importance not in IMPORTANCE:
        raise ValueError(f"importance {importance!r}: expected one of {', '.join(IMPORTANCE)}")
    if any(isinstance(p, DTensor) for p in model.parameters()):
        raise ValueError("shrink: the parameters are sharded, call it before fully_shard")
    small = _copy(model).eval()
    transposed = _as_linear(small)
    try:
        with torch.enable_grad():
            removal = _Removal(small, example_inputs, importance, heads, keep)
        with torch.no_grad():
            removed = removal.choose(amount)
    except (ValueError, ImportError):
        raise
    except Exception as error:  # torch-pruning's, in the middle of a model that it does not understand
        raise ValueError(f"shrink: the model cannot be followed, {type(error).__name__}: {error}") from error
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


@dataclass(frozen=True)
class _Width:
    """Outputs (or inputs) of a layer that go, and with them all that depends on them."""

    layer: nn.Module
    function: Any  # torch-pruning's, that removes them
    indices: list[int]
    attention: tuple[nn.Module, Heads, int] | None  # and how many of its heads go


class _Removal:
    """A model with the graph of what hangs together in it."""

    def __init__(
        self, model: nn.Module, inputs: Any, importance: str, heads: Sequence[Heads], keep: Sequence[str]
    ) -> None:
        try:
            import torch_pruning
        except ImportError as error:
            raise ImportError("shrink needs torch-pruning: pip install 'commpress[model]'") from error
        self._model, self._inputs = model, inputs
        self._names = {module: name for name, module in model.named_modules()}
        self._kept = _matching(keep, self._names) | set(_tied(model))
        self._attention = dict(_attention_layers(model, heads))
        for p in model.parameters():
            p.requires_grad_()  # the graph is traced by autograd
        self._graph = torch_pruning.DependencyGraph().build_dependency(
            model,
            inputs,
            output_transform=lambda output: list(_tensors_in(output)),
            verbose=False,
        )
        _map_splits(self._graph, torch_pruning.dependency.index_mapping._SplitIndexMapping)
        if importance == "taylor":
            for name, p in model.named_parameters():
                if p.grad is None and isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear | _ConvNd):
                    raise ValueError(f"importance 'taylor': {name!r} has no gradient, call backward first")
            self._importance: Any = torch_pruning.importance.TaylorImportance()
        else:
            self._importance = torch_pruning.importance.MagnitudeImportance()

    def choose(self, amount: float) -> list[_Width]:
        """Return what goes."""
        widths = [width for group in self._groups() if (width := self._part_of(group, amount))]
        if amount and not widths:
            raise ValueError(f"shrink({amount}): the model has no width of which as much can be removed")
        return widths

    def _groups(self) -> Iterator[Any]:
        """torch-pruning's groups, each from the first layer whose outputs are in it."""
        seen: set[nn.Module] = set()
        for layer in list(self._graph.module2node):
            if isinstance(layer, nn.Linear | _ConvNd) and layer not in seen:
                function = self._graph.get_pruner_of_module(layer).prune_out_channels
                if not self._winds(layer, function):
                    every = list(range(self._graph.get_out_channels(layer)))
                    group = self._graph.get_pruning_group(layer, function, every)
                    seen.update(dep.target.module for dep, _ in group if self._outputs(dep))
                    yield group

    def _winds(self, layer: nn.Module, function: Any) -> bool:
        """Whether slices of a width are put together again, as rotary positions do: a group would go round for ever."""
        reached: set[Any] = set()
        waiting = [(self._graph.module2node[layer], function)]
        while waiting:
            node, triggered = each = waiting.pop()
            if each not in reached:
                reached.add(each)
                waiting += [(dep.target, dep.handler) for dep in node.dependencies if dep.is_triggered_by(triggered)]
        return {"SLICE", "CONCAT"} <= {node.type.name for node, _ in reached}

    def _part_of(self, group: Any, amount: float) -> _Width | None:
        if self._stays(group):
            return None
        found = {
            self._attention[m] for dep, _ in group if (m := dep.target.module) in self._attention and self._outputs(dep)
        }
        if len(found) > 1:
            raise ValueError(f"shrink: {' and '.join(sorted(self._names[m] for m, _ in found))} share their heads")
        behind = min((item for item in group if self._takes(item.dep)), key=lambda item: len(item.idxs), default=None)
        if behind is not None and (found or len(behind.idxs) < len(group[0].idxs)):
            # queries, keys and values of one layer, or both halves of a gated one: behind it each unit is one index
            inputs = sorted(behind.idxs)
            if inputs == list(range(len(inputs))):
                group = self._graph.get_pruning_group(behind.dep.target.module, behind.dep.handler, inputs)
        layer, function = group[0].dep.target.module, group[0].dep.handler
        scores = self._importance(group)[: len(group[0].idxs)]  # behind a depthwise convolution it has a tail of zeros
        if not found:
            return _Width(layer, function, gone, None) if (gone := _least(scores, amount)) else None
        attention, how = found.pop()
        count = getattr(attention, how.count)
        heads = _least(scores.view(count, -1).mean(1), amount)
        size = len(scores) // count
        indices = [index for head in heads for index in range(head * size, (head + 1) * size)]
        return _Width(layer, function, indices, (attention, how, len(heads))) if heads else None

    def _stays(self, group: Any) -> bool:
        for dep, _ in group:
            module = dep.target.module
            if isinstance(module, nn.Parameter) or module in self._kept:
                return True
            if self._outputs(dep) and (not dep.target.outputs or dep.target.type.name == "OUTPUT"):
                return True
            if module in self._names:
                grouped = isinstance(module, _ConvNd) and module.groups not in (1, module.out_channels)
                if grouped or not isinstance(module, nn.Linear | _ConvNd | _BatchNorm):
                    return True
        return False

    def _outputs(self, dep: Any) -> bool:
        return bool(self._graph.is_out_channel_pruning_fn(dep.handler))

    def _takes(self, dep: Any) -> bool:
        """Whether it is the input of a layer, where a unit that goes can as well be 0."""
        layer = isinstance(dep.target.module, nn.Linear | _ConvNd)
        return layer and self._graph.is_in_channel_pruning_fn(dep.handler) and not self._outputs(dep)

    def outputs(self) -> list[Tensor]:
        """Return what the model computes of the example inputs."""
        if isinstance(self._inputs, Mapping):
            return list(_tensors_in(self._model(**self._inputs)))
        return list(
            _tensors_in(self._model(self._inputs) if isinstance(self._inputs, Tensor) else self._model(*self._inputs))
        )

    def outputs_without(self, widths: Sequence[_Width]) -> list[Tensor]:
        """Return what it computes when all that goes is 0 where the next layer takes it. It stays so."""
        for width in widths:
            for dep, indices in self._graph.get_pruning_group(width.layer, width.function, width.indices):
                if self._takes(dep):
                    weight = dep.target.module.weight
                    inputs = 0 if getattr(dep.target.module, "transposed", False) else 1
                    weight.index_fill_(inputs, torch.tensor(indices, dtype=torch.int64, device=weight.device), 0.0)
        return self.outputs()

    def remove(self, widths: Sequence[_Width]) -> None:
        """Let it go."""
        for width in widths:
            self._graph.get_pruning_group(width.layer, width.function, width.indices).prune()
            if width.attention is not None:
                module, how, gone = width.attention
                setattr(module, how.count, getattr(module, how.count) - gone)
                if how.width is not None:
                    setattr(module, how.width, getattr(module, how.layers[0]).out_features // how.parts)

    def names(self, widths: Sequence[_Width]) -> str:
        """The layers, for an error."""
        some = [f"{len(width.indices)} of {self._names[width.layer]!r}" for width in widths[:4]]
        return ", ".join(some) + (", ..." if len(widths) > 4 else "")


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
            if hasattr(module, key):
                setattr(module, key, size)
        model.set_submodule(name, module)


def _attention_layers(model: nn.Module, heads: Sequence[Heads]) -> Iterator[tuple[nn.Module, tuple[nn.Module, Heads]]]:
    """(layer, (attention module, how)) of each layer that heads come from."""
    for name, module in model.named_modules():
        for how in heads:
            layers = [getattr(module, layer, None) for layer in how.layers]
            count = getattr(module, how.count, None)
            if isinstance(count, int) and all(isinstance(layer, nn.Linear) for layer in layers):
                widths = {layer.out_features for layer in layers if isinstance(layer, nn.Linear)}
                parts = count * how.parts
                if len(widths) > 1 or min(widths) % parts:
                    raise ValueError(
                        f"shrink: {name!r} has {count} heads, and {', '.join(how.layers)} have {sorted(widths)} outputs: "
                        f"expected one multiple of {parts}"
                    )
                yield from ((layer, (module, how)) for layer in layers if layer is not None)


def _map_splits(graph: Any, mapping: Any) -> None:
    """Say which outputs go where that are split along the last of three dimensions, [batch, time, features].

    torch-pruning says so of the second dimension alone, and takes each part of GPT-2's queries, keys and values for all.
    """
    for node in list(graph.module2node.values()):
        shape = getattr(node.grad_fn, "_saved_self_sym_sizes", ())
        if node.type.name != "SPLIT" or node.module.offsets is None or len(shape) != 3:
            continue
        if node.grad_fn._saved_dim % 2**64 not in (2, 2**64 - 1):
            continue
        for i, part in enumerate(node.outputs):
            offset = node.module.offsets[i : i + 2]
            for end, other, reverse in ((node, part, False), (part, node, True)):
                for dep in end.dependencies:
                    if dep.target is other:
                        dep.index_mapping[0] = mapping(offset=offset, reverse=reverse)


def _matching(globs: Sequence[str], names: Mapping[nn.Module, str]) -> set[nn.Module]:
    """The modules that a glob matches, and all in them. Raises ValueError for one that matches none."""
    found: set[nn.Module] = set()
    for glob in globs:
        matched = [module for module, name in names.items() if fnmatchcase(name, glob)]
        if not matched:
            raise ValueError(
                f"keep {glob!r}: no module of that name, known: {', '.join(list(names.values())[1:9])}, ..."
            )
        found.update(inner for module in matched for inner in module.modules())
    return found


def _tied(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that share a parameter."""
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(p, []).append(module)
    for modules in owners.values():
        if len(modules) > 1:
            yield from modules


def _least(scores: Tensor, amount: float) -> list[int]:
    """The indices of the share that scores least, the first of equal ones; at least one is left."""
    k = min(round(amount * len(scores)), len(scores) - 1)
    return sorted(scores.argsort(stable=True)[:k].tolist())


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: x for name, x in model.state_dict(keep_vars=True).items() if isinstance(x, Tensor)}


def _tensors_in(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from (x for each in output.values() for x in _tensors_in(each))
    elif isinstance(output, list | tuple):
        yield from (x for each in output for x in _tensors_in(each))


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
