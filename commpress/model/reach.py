"""The reach of a recipe, told before step 1: which parameters its entries prune, what is left out and why, what cannot be."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from commpress.model import layers
from commpress.model.distillation import PROJECTIONS
from commpress.model.recipe import Prune, Recipe, RecipeError, matching
from commpress.model.steps import LocalSteps, SendsMoves, SendsUpdates
from commpress.notice import warn

KEEP_ZEROS = ("_WeightNorm", "_SpectralNorm")
"""Parametrizations under which a 0 in the parameter is a 0 in the weight."""


@dataclass(frozen=True)
class Reach:
    """The share of a model that a recipe prunes."""

    pruned: float
    """The share of the chosen weights that is pruned and 0."""
    of_model: float
    """The share of all the model's parameters that is."""
    left_out: Mapping[str, str]
    """The matrices and kernels that no entry prunes, by name, and why."""

    def __str__(self) -> str:
        others = f"; left out: {listed(self.left_out)}" if self.left_out else ""
        return f"{self.pruned:.1%} of the chosen weights pruned, {self.of_model:.1%} of the model{others}"


def chosen(recipe: Recipe, model: nn.Module, optimizers: Sequence[Any]) -> list[list[str]]:
    """The names of the parameters that each entry prunes. Raises RecipeError, naming the key, for what cannot be."""
    parameters = layers.named_parameters(model)
    usual = linear_weights(model)
    found: list[list[str]] = []
    for index, entry in enumerate(recipe.prune):
        names = usual
        if entry.parameters:
            names = _matching(f"prune[{index}].parameters", entry.parameters, model)
        if not names:
            raise RecipeError(
                f"prune[{index}].parameters: the model has no Linear layers that are trained, expected globs of names, "
                f"known: {listed(parameters)}"
            )
        if entry.criterion == "wanda":
            names = _called(f"prune[{index}].criterion", names, model)
        for name in names:
            _require_fit(f"prune[{index}].parameters", name, parameters[name], model)
        for before in range(index):
            _require_order(recipe, before, index, found[before], names)
        _require_gradients(index, entry, optimizers)
        _require_possible(index, entry, names, model)
        found.append(names)
    return found


def left_out(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Parameters of two dimensions and more that are not among these names, and why they are not by default."""
    usual, reasons = set(linear_weights(model)), {}
    for name, p in layers.named_parameters(model).items():
        if p.dim() > 1 and name not in names and not name.startswith(PROJECTIONS):
            kind = type(layers.module_of(model, name.rpartition(".")[0])).__name__
            reason = "not chosen" if name in usual else f"of {kind}, name it in `parameters`"
            reasons[name] = reason if p.requires_grad else "frozen"
    return reasons


def linear_weights(model: nn.Module) -> list[str]:
    """The weights of all Linear and Conv1D layers that are trained, by the first of their names.

    Projections leave before the model does. A weight that an embedding shares is the embedding's.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    linear = {id(getattr(m, "weight", None)) for m in model.modules() if layers.is_linear(m)} - embeddings
    return [
        name
        for name, p in layers.named_parameters(model).items()
        if id(p) in linear and p.requires_grad and not name.startswith(PROJECTIONS)
    ]


def listed(names: Mapping[str, str] | Sequence[str] | Mapping[str, Any], most: int = 8) -> str:
    """Names for a sentence, with their reasons if they have any."""
    each = [
        f"{name} ({names[name]})" if isinstance(names, dict) and isinstance(names[name], str) else name
        for name in names
    ]
    return ", ".join(each[:most]) + (f" and {len(each) - most} others" if len(each) > most else "")


def _matching(key: str, patterns: Sequence[str], model: nn.Module) -> list[str]:
    """The parameters that a glob matches by any of their names, each by its first."""
    first = {id(p): name for name, p in layers.named_parameters(model).items()}
    every = {layers.plain(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    found = matching(key, patterns, list(every))
    return list(dict.fromkeys(first[id(every[name])] for name in found))


def _called(key: str, names: list[str], model: nn.Module) -> list[str]:
    """Without those whose inputs nobody sees, because their module is never called."""
    uncalled = layers.never_called(model)
    without = [name for name in names if name.rpartition(".")[0] in uncalled]
    left = [name for name in names if name not in without]
    if without and not left:
        raise RecipeError(
            f"{key}: wanda sees no input of {listed(without)}, nn.MultiheadAttention uses it without a call"
        )
    if without:
        warn(f"{key}: wanda leaves out {listed(without)}: nn.MultiheadAttention uses it without a call of its module")
    return left


def _require_fit(key: str, name: str, p: nn.Parameter, model: nn.Module) -> None:
    if not p.requires_grad:
        raise RecipeError(f"{key}: {name!r} is frozen, expected one that is trained")
    owner, behind, of = f".{name}".partition(".parametrizations.")
    if behind:
        weight = of.partition(".")[0]
        kinds = [type(each).__name__ for each in getattr(layers.module_of(model, owner[1:]).parametrizations, weight)]
        if other := [kind for kind in kinds if kind not in KEEP_ZEROS]:
            raise RecipeError(f"{key}: {name!r} has the parametrization {other[0]}, which may change its zeros")


def _require_order(recipe: Recipe, before: int, index: int, earlier_names: list[str], names: list[str]) -> None:
    earlier, entry = recipe.prune[before], recipe.prune[index]
    if not (shared := set(earlier_names) & set(names)):
        return
    if entry.last < earlier.start:
        raise RecipeError(
            f"prune[{index}].start: {entry.start}, before prune[{before}] of the same {min(shared)!r}, which starts at "
            f"{earlier.start}: write the entries in the order of their steps"
        )
    if entry.start <= earlier.last:
        raise RecipeError(
            f"prune[{index}].start: {entry.start}, while prune[{before}] prunes {min(shared)!r}, too, until {earlier.last}"
        )
    less = earlier.amount is not None and entry.amount is not None and entry.amount < earlier.amount
    if less and set(earlier_names) == set(names):
        raise RecipeError(
            f"prune[{index}].amount: {entry.amount}, less than the {earlier.amount} of the same weights that prune[{before}] "
            "has pruned by then: pruned weights stay pruned"
        )


def _require_gradients(index: int, entry: Prune, optimizers: Sequence[Any]) -> None:
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        if entry.how == "regrow" and isinstance(optimizer, SendsUpdates):
            raise RecipeError(f"prune[{index}].schedule: regrow needs mean gradients, {kind} has none")
        if entry.criterion in ("taylor", "movement") and isinstance(optimizer, LocalSteps):
            raise RecipeError(
                f"prune[{index}].criterion: {entry.criterion} needs gradients that all ranks share; under {kind} each has "
                "its own between syncs, expected magnitude or wanda"
            )
        if entry.criterion in ("taylor", "movement") and isinstance(optimizer, SendsMoves):
            raise RecipeError(
                f"prune[{index}].criterion: {entry.criterion} needs gradients, and {kind} gets the change of a momentum "
                "instead; expected magnitude or wanda"
            )


def _require_possible(index: int, entry: Prune, names: list[str], model: nn.Module) -> None:
    if entry.how == "regrow" and entry.start + entry.every >= entry.last:
        raise RecipeError(
            f"prune[{index}].every: {entry.every}, so no weight is exchanged from start {entry.start} to end {entry.last}, "
            f"expected less than {entry.last - entry.start}"
        )
    rows: list[tuple[int, int]] = []  # how many, and how long
    for name in names:
        layout = layers.layout_of(model, name)
        like = torch.empty(layers.parameter_of(model, name).shape, dtype=torch.bool, device="meta")
        last = layout.inputs_last(like).shape
        if entry.pattern is not None and (not last or last[-1] % entry.n_of_m[1]):
            n, m = entry.n_of_m
            raise RecipeError(
                f"prune[{index}].pattern: {n} of {m}: {name!r} must have a multiple of {m} inputs, it has "
                f"{last[-1] if last else 'none'}, its shape is {tuple(like.shape)}"
            )
        if entry.scope == "row" and like.dim() < 2:
            raise RecipeError(
                f"prune[{index}].scope: scope 'row': {name!r} has no rows, its shape is {tuple(like.shape)}"
            )
        rows.append((last[0] if last else 1, like.numel() // max(last[0] if last else 1, 1)))
    if entry.amount is not None:
        whole = {
            "row": [n for _, n in rows],
            "local": [r * n for r, n in rows],
            "global": [sum(r * n for r, n in rows)],
        }
        if not any(round(entry.amount * n) for n in whole[entry.scope]):
            raise RecipeError(
                f"prune[{index}].amount: {entry.amount} of {max(whole[entry.scope])} weights rounds to none, expected at "
                "least one"
            )
