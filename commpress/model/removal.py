"""Removal of widths, with all that depends on them by torch-pruning's graph (Fang et al., arXiv:2301.12900).

Output i of one layer goes with its place in a batch norm and input i of the next. Grouped convolutions, weights that two layers
share and what rotary positions turn stay, and so does a width that reaches the model's output, an embedding, a norm over
features or a parameter outside of Linear, convolution and batch norm.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from commpress.model.heads import Heads, attention_layers


@dataclass(frozen=True)
class Width:
    """Outputs (or inputs) of a layer that go, and with them all that depends on them."""

    name: str
    """The first layer, in the model's order, whose outputs they are."""
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

    def choose(self, amount: float | Mapping[str, float]) -> list[Width]:
        """Return what goes, by one share of all widths or by shares of some; nothing where shares are too small."""
        names = list(self._widths)
        shares = _by_width(amount, names) if isinstance(amount, Mapping) else dict.fromkeys(names, amount)
        return [width for name, share in shares.items() if (width := self._part_of(name, share))]

    @cached_property
    def _widths(self) -> dict[str, Any]:
        """The groups of which something can go, by the names of their widths."""
        order = {module: i for i, module in enumerate(self._names)}
        found = {}
        for group in self._groups():
            if not self._stays(group):
                layers = [m for dep, _ in group if (m := dep.target.module) in order and self._outputs(dep)]
                first = min((m for m in layers if isinstance(m, nn.Linear | _ConvNd)), key=order.__getitem__)
                found[self._names[first]] = group
        return found

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

    def _part_of(self, name: str, amount: float) -> Width | None:
        group = self._widths[name]
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
            return Width(name, layer, function, gone, None) if (gone := _least(scores, amount)) else None
        attention, how = found.pop()
        count = getattr(attention, how.count)
        heads = _least(scores.view(count, -1).mean(1), amount)
        size = len(scores) // count
        indices = [index for head in heads for index in range(head * size, (head + 1) * size)]
        return Width(name, layer, function, indices, (attention, how, len(heads))) if heads else None

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
        for weight, inputs, indices in self._taken(widths):
            weight.index_fill_(inputs, indices, 0.0)
        return self.outputs()

    @contextmanager
    def zeroed(self, width: Width) -> Iterator[None]:
        """Set what goes of one width to 0 where the next layer takes it, and put it back."""
        taken = list(self._taken([width]))
        before = [weight.detach().clone() for weight, _, _ in taken]
        for weight, inputs, indices in taken:
            weight.index_fill_(inputs, indices, 0.0)
        try:
            yield
        finally:
            for (weight, _, _), kept in zip(taken, before, strict=True):
                weight.copy_(kept)

    def _taken(self, widths: Sequence[Width]) -> Iterator[tuple[Tensor, int, Tensor]]:
        """Weights that take what goes, the dimension of their inputs, and where there."""
        for width in widths:
            for dep, indices in self._graph.get_pruning_group(width.layer, width.function, width.indices):
                if self._takes(dep):
                    weight = dep.target.module.weight
                    inputs = 0 if getattr(dep.target.module, "transposed", False) else 1
                    yield weight, inputs, torch.tensor(indices, dtype=torch.int64, device=weight.device)

    def parameters(self, width: Width) -> int:
        """Return how many values go with a width, if nothing else does."""
        count = 0
        for dep, indices in self._graph.get_pruning_group(width.layer, width.function, width.indices):
            module = dep.target.module
            if module in self._names:
                outputs = self._outputs(dep)
                of = self._graph.get_out_channels if outputs else self._graph.get_in_channels
                moved = [p for p in module.parameters(recurse=False) if outputs or p.dim() > 1]
                count += sum(p.numel() * len(indices) // of(module) for p in moved)
        return count

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
        some = [f"{len(width.indices)} of {width.name!r}" for width in widths[:4]]
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


def _by_width(shares: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """The share of each width by its name, else by the first glob that fits it, 0 where none does.

    Raises ValueError for one that fits no width.
    """

    def fits(name: str, glob: str) -> bool:
        return name == glob or fnmatchcase(name, glob)

    for glob in shares:
        if not any(fits(name, glob) for name in names):
            known = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise ValueError(f"shrink: {glob!r} is no layer whose outputs can be removed, known: {known or 'none'}")
    by_glob = {name: [share for glob, share in shares.items() if fnmatchcase(name, glob)] for name in names}
    return {name: shares[name] if name in shares else (*by_glob[name], 0.0)[0] for name in names}


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
