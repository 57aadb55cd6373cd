"""Structure by a budget: what must go of a model's widths for its megabytes and milliseconds to be met, and no more.

    1. each width alone is narrowed by eighths, up to the most that [budget] allows: how far the loss rises gives a path of
       shares by width, the least loss for each parameter first. A model that has learned nothing loses one share of each
    2. the first point at which the file fits is found by bisection: the model is narrowed (`structured.py`), exported, dense
       and with the fewest bytes that a budget may choose (`sensitivity.smallest`), and the file is measured in its runtime

What is left is an ordinary dense model, which is wrapped and trained under the rest of the budget.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from commpress.model import layers, structured
from commpress.model.budget import BudgetError, Measured, budget_file, measured, missed, ways
from commpress.model.judgement.forms import Batch, batches_of
from commpress.model.judgement.quality import Loss
from commpress.model.recipe import Budget, Recipe
from commpress.model.sensitivity import Choice, loss_of, smallest, units_of
from commpress.model.structured import Shapes

Shares = float | dict[str, float]
"""One share of all widths, or shares by width as `structured.shrink` takes them."""
EIGHTHS = 8
MARGIN = 0.95
"""The part of `max_ms` in which a share must stay where a larger one fits: the same calls are timed again in the run."""
MOST_BATCHES = 16
"""Batches on which the loss is measured at most, for each width and share."""
LEARNED = 0.1
"""By how much, as a share of its loss, a model does worse on targets of other rows if it has learned something."""


@dataclass(frozen=True)
class Size:
    """A model and its exported file."""

    parameters: int
    bytes: int
    ms: float | None
    """Of a call, where the budget has a limit of time."""
    loss: float | None = None
    """On the batches, where some were given, in float32 and without training."""


@dataclass(frozen=True)
class Narrowed:
    """The structure that was removed from a model."""

    removed: Shares
    """Shares by width, or one of each width; 0 if the budget can be met without."""
    shapes: Shapes
    """The sizes that are left, for `structured.reshape` of a fresh model."""
    before: Size | None
    """The dense model; None where the recipe said already how much goes."""
    after: Size | None
    """The narrowed one, with the integers and zeros by which its file fits."""


def narrow(
    model: nn.Module,
    recipe: Recipe,
    inputs: tuple[Tensor, ...],
    batches: Sequence[tuple[Any, Tensor]] | None = None,
    loss: Loss | None = None,
) -> tuple[Recipe, Narrowed]:
    """Remove of the model, in place, as little structure as the recipe's budget needs; the recipe that says so, and how much.

    Call it on one rank, before the model is prepared and wrapped, and reshape the others' by `Narrowed.shapes`. `inputs` are
    those of one forward; calls are timed with them. With `batches` (inputs, targets), of which 16 are used at most, the loss
    says what goes of which width, if that is better than one share of each; `loss` takes outputs and targets if it is not the
    usual one. Without, or if the loss is hardly higher with targets of other rows, the model has learned nothing yet, and all
    widths lose one share. A recipe that says
    how much goes, as that of a checkpoint does, is followed without measuring. Raises BudgetError, the model as it was, for
    a limit that the most structure does not meet; ValueError for a budget without `structure`, and where
    `structured.shrink` raises.
    """
    its = recipe.budget
    if its is None or not its.structure:
        raise ValueError("narrow: expected a recipe whose [budget] has structure, the most that may be removed")
    before = after = None
    removed: Shares | None = its.removed
    model = layers.uncompiled(model)
    known = [] if batches is None or removed is not None else _some(batches)
    dense = _loss(model, known, loss) if known else None
    if removed is None:
        removed, before, after = _least(model, its, inputs, known, loss, dense)
        before = replace(before, loss=dense)
    if removed:
        structured.shrink(model, inputs, removed)
    if after is not None and known:
        after = replace(after, loss=_loss(model, known, loss))
    said = recipe.model_copy(update={"budget": its.model_copy(update={"removed": removed})})
    return said, Narrowed(removed, structured.shapes_of(model), before, after)


def described(removed: Shares) -> str:
    """Return shares of widths in words, as in "0.25 of 'up', 0.5 of 'down'"."""
    if not isinstance(removed, dict):
        return f"{removed:.3g} of each width"
    some = ", ".join(f"{share:.3g} of {name!r}" for name, share in list(removed.items())[:8])
    return some + (f" and of {len(removed) - 8} more widths" if len(removed) > 8 else "")


def _least(
    model: nn.Module,
    budget: Budget,
    inputs: tuple[Tensor, ...],
    batches: Sequence[Batch],
    loss: Loss | None,
    dense: float | None,
) -> tuple[Shares, Size, Size]:
    """Return the least that must go for a file to fit, the dense file, and that one. `dense` is the loss of the whole model."""
    files, told = _tried(model, budget, inputs)
    before = _size(model, files[0])
    if not told:
        return 0.0, before, _size(model, files[-1])
    try:
        narrowed = _without(model, inputs, budget.structure)
    except (ValueError, ImportError) as error:
        raise BudgetError(f"{told}; budget.structure: nothing can be removed: {error}") from error
    files, told = _tried(narrowed, budget, inputs)
    if told:
        raise BudgetError(f"{told}, with {budget.structure:.3g} of each width removed")
    most = budget.structure, _size(narrowed, files[-1])
    eighths = [
        *(i / EIGHTHS for i in range(1, EIGHTHS) if i / EIGHTHS < budget.structure),
        budget.structure,
    ]
    least, after = _first_that_fits(model, budget, inputs, eighths, most)
    if dense is not None and _has_learned(model, batches, loss, dense):
        path = _path(model, inputs, eighths, batches, loss, dense)
        by_width, its = _first_that_fits(model, budget, inputs, path, (path[-1], most[1]))
        one_share, other = (loss_of(_without(model, inputs, x), batches, loss) for x in (least, by_width))
        if other < one_share:
            least, after = by_width, its
    return least, before, after


def _first_that_fits(
    model: nn.Module, budget: Budget, inputs: tuple[Tensor, ...], points: Sequence[Shares], last: tuple[Shares, Size]
) -> tuple[Shares, Size]:
    """The first point, from little to much, at which a file fits, by bisection. The `last` one fits, and is known."""
    least, after = last
    careful = budget
    if budget.max_ms is not None:
        careful = budget.model_copy(update={"max_ms": MARGIN * budget.max_ms})
    low, high = -1, len(points) - 1
    while high - low > 1:
        middle = (low + high) // 2
        try:
            narrowed = _without(model, inputs, points[middle])
        except ValueError:  # too small a share for any width: a larger one was removed
            low = middle
            continue
        files, told = _tried(narrowed, careful, inputs)
        if told:
            low = middle
        else:
            high, least, after = middle, points[middle], _size(narrowed, files[-1])
    return least, after


def _path(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    shares: Sequence[float],
    batches: Sequence[Batch],
    loss: Loss | None,
    dense: float,
) -> list[dict[str, float]]:
    """Shares by width, from little to the most of all, by one more share of one width at each step.

    It is of the width that has, up to one of its shares, the least rise of the loss for each parameter saved, of equal ones
    that which saves more; a loss that falls counts as one that stays. Losses and parameters of several widths are taken for
    the sums of each alone.
    """
    alone = structured.each_alone(model, inputs, shares, lambda narrowed: loss_of(narrowed, batches, loss))
    path: list[dict[str, float]] = []
    now: dict[str, float] = {}
    while True:
        moves = []
        for name, found in alone.items():
            loss_now, saved_now = found.get(now.get(name, 0.0), (dense, 0))
            larger = {share: each for share, each in found.items() if each[1] > saved_now}
            for then, saved in larger.values():
                more = saved - saved_now
                moves.append((max(0.0, then - loss_now) / more, -more, name, min(larger)))
        if not moves:
            return path
        *_, name, share = min(moves)
        now = {**now, name: share}
        path.append(now)


def _has_learned(model: nn.Module, batches: Sequence[Batch], loss: Loss | None, dense: float) -> bool:
    """Whether the loss is higher with targets of other rows. If all targets are equal, that is not known, and True."""
    source = torch.Generator().manual_seed(0)
    targets = known = [y.cpu() for _, y in batches]
    if len({y.shape[1:] for y in known}) == 1:  # rows of all batches, which may be one each
        every = torch.cat(known)
        targets = list(every[_shuffled(len(every), source)].split([len(y) for y in known]))
    else:  # texts of several lengths, say: their tokens in another order
        targets = [y.flatten()[_shuffled(y.numel(), source)].view_as(y) for y in known]
    if all(map(torch.equal, targets, known)):
        return True
    others = [(inputs, y) for (inputs, _), y in zip(batches, targets, strict=True)]
    return _loss(model, others, loss) > dense + LEARNED * abs(dense)


def _shuffled(n: int, source: torch.Generator) -> Tensor:
    return torch.randperm(n, generator=source, dtype=torch.int64, device="cpu")


def _some(batches: Sequence[tuple[Any, Tensor]]) -> list[Batch]:
    """Up to 16 batches from all over the set, which may be sorted."""
    return batches_of(batches[:: -(-len(batches) // MOST_BATCHES) or 1], "narrow(batches)")


def _loss(model: nn.Module, batches: Sequence[Batch], loss: Loss | None) -> float:
    return loss_of(copy.deepcopy(model), batches, loss)


def _without(model: nn.Module, inputs: tuple[Tensor, ...], share: Shares) -> nn.Module:
    narrowed = copy.deepcopy(model)
    structured.shrink(narrowed, inputs, share)
    return narrowed


def _tried(model: nn.Module, budget: Budget, inputs: tuple[Tensor, ...]) -> tuple[Sequence[Measured], str]:
    """The files of the dense model and of its smallest forms, until one fits; and what the last one misses."""
    units = units_of(model)
    choices: list[Choice] = [{}, *(smallest(units, way) for way in ways(budget))]
    files: list[Measured] = []
    told = ""
    for choice in choices:
        try:
            files.append(measured(model, units, choice, budget, inputs))
        except Exception as error:  # an exporter's or a runtime's, of any kind
            raise BudgetError(f"budget: {budget_file(budget)} cannot be measured: {error}") from error
        if not (told := missed(files[-1], budget, files)):
            break
    return files, told


def _size(model: nn.Module, file: Measured) -> Size:
    return Size(sum(p.numel() for p in model.parameters()), file.bytes, file.ms)
