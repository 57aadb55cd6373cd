"""Removal of widths, with all that depends on them by torch-pruning's graph (Fang et al., arXiv:2301.12900).

Output i of one layer goes with its place in a batch norm and input i of the next. Grouped convolutions, weights that two layers
share and what rotary positions turn stay, and so does a width that reaches the model's output, an embedding, a norm over
features or a parameter outside of Linear, convolution and batch norm.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from commpress.model.heads import Heads, attention_layers


@dataclass(frozen=True)
class Width:
    """Outputs (or inputs) of a layer that go, and with them all that depends on them."""

    layer: nn.Module
    function: Any  # torch-pruning's, that removes them
    indices: list[int]
    attention: tuple[nn.Module, Heads, int] | None  # and how many of its heads go


class Removal:
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
        self._attention = dict(attention_layers(model, heads))
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

    def choose(self, amount: float) -> list[Width]:
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

    def _part_of(self, group: Any, amount: float) -> Width | None:
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
            return Width(layer, function, gone, None) if (gone := _least(scores, amount)) else None
        attention, how = found.pop()
        count = getattr(attention, how.count)
        heads = _least(scores.view(count, -1).mean(1), amount)
        size = len(scores) // count
        indices = [index for head in heads for index in range(head * size, (head + 1) * size)]
        return Width(layer, function, indices, (attention, how, len(heads))) if heads else None

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

    def outputs_without(self, widths: Sequence[Width]) -> list[Tensor]:
        """Return what it computes when all that goes is 0 where the next layer takes it. It stays so."""
        for width in widths:
            for dep, indices in self._graph.get_pruning_group(width.layer, width.function, width.indices):
                if self._takes(dep):
                    weight = dep.target.module.weight
                    inputs = 0 if getattr(dep.target.module, "transposed", False) else 1
                    weight.index_fill_(inputs, torch.tensor(indices, dtype=torch.int64, device=weight.device), 0.0)
        return self.outputs()

    def remove(self, widths: Sequence[Width]) -> None:
        """Let it go."""
        for width in widths:
            self._graph.get_pruning_group(width.layer, width.function, width.indices).prune()
            if width.attention is not None:
                module, how, gone = width.attention
                setattr(module, how.count, getattr(module, how.count) - gone)
                if how.width is not None:
                    setattr(module, how.width, getattr(module, how.layers[0]).out_features // how.parts)

    def names(self, widths: Sequence[Width]) -> str:
        """The layers, for an error."""
        some = [f"{len(width.indices)} of {self._names[width.layer]!r}" for width in widths[:4]]
        return ", ".join(some) + (", ..." if len(widths) > 4 else "")


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


def _tensors_in(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from (x for each in output.values() for x in _tensors_in(each))
    elif isinstance(output, list | tuple):
        yield from (x for each in output for x in _tensors_in(each))
