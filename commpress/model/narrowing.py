"""Structure by a budget: the least share of each width that must go for its megabytes and milliseconds to be met.

Shares are eighths up to the most that [budget] allows, found by bisection. At each the model is narrowed (`structured.py`) and
exported, dense and with the fewest bytes that a budget may choose (`sensitivity.smallest`), and the file is measured in its
runtime. What is left is an ordinary dense model, which is wrapped and trained under the rest of the budget.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from commpress.model import layers, structured
from commpress.model.budget import BudgetError, Measured, budget_file, measured, missed, ways
from commpress.model.recipe import Budget, Recipe
from commpress.model.sensitivity import Choice, smallest, units_of
from commpress.model.structured import Shapes

EIGHTHS = 8
MARGIN = 0.95
"""The part of `max_ms` in which a share must stay where a larger one fits: the same calls are timed again in the run."""


@dataclass(frozen=True)
class Size:
    """A model and its exported file."""

    parameters: int
    bytes: int
    ms: float | None
    """Of a call, where the budget has a limit of time."""


@dataclass(frozen=True)
class Narrowed:
    """The structure that was removed from a model."""

    removed: float
    """The share of each width; 0 if the budget can be met without."""
    shapes: Shapes
    """The sizes that are left, for `structured.reshape` of a fresh model."""
    before: Size | None
    """The dense model; None where the recipe said already how much goes."""
    after: Size | None
    """The narrowed one, with the integers and zeros by which its file fits."""


def narrow(model: nn.Module, recipe: Recipe, inputs: tuple[Tensor, ...]) -> tuple[Recipe, Narrowed]:
    """Remove of the model, in place, as little structure as the recipe's budget needs; the recipe that says so, and how much.

    Call it on one rank, before the model is prepared and wrapped, and reshape the others' by `Narrowed.shapes`. `inputs` are
    those of one forward; calls are timed with them. A recipe that says how much goes, as that of a checkpoint does, is
    followed without measuring. Raises BudgetError, the model as it was, for a limit that the most structure does not meet;
    ValueError for a budget without `structure`, and where `structured.shrink` raises.
    """
    its = recipe.budget
    if its is None or not its.structure:
        raise ValueError("narrow: expected a recipe whose [budget] has structure, the most that may be removed")
    before = after = None
    removed = its.removed
    if removed is None:
        removed, before, after = _least(model, its, inputs)
    if removed:
        structured.shrink(model, inputs, removed)
    said = recipe.model_copy(update={"budget": its.model_copy(update={"removed": removed})})
    return said, Narrowed(removed, structured.shapes_of(model), before, after)


def _least(model: nn.Module, budget: Budget, inputs: tuple[Tensor, ...]) -> tuple[float, Size, Size]:
    """The least share with which a file fits; the dense file, and that one."""
    files, told = _tried(model, budget, inputs)
    before = _size(model, files[0])
    if not told:
        return 0.0, before, _size(model, files[-1])
    shares = [*(i / EIGHTHS for i in range(1, EIGHTHS) if i / EIGHTHS < budget.structure), budget.structure]
    try:
        narrowed = _without(model, inputs, budget.structure)
    except (ValueError, ImportError) as error:
        raise BudgetError(f"{told}; budget.structure: nothing can be removed: {error}") from error
    files, told = _tried(narrowed, budget, inputs)
    if told:
        raise BudgetError(f"{told}, with {budget.structure:.3g} of each width removed")
    least, after = budget.structure, _size(narrowed, files[-1])
    careful = budget
    if budget.max_ms is not None:
        careful = budget.model_copy(update={"max_ms": MARGIN * budget.max_ms})
    low, high = -1, len(shares) - 1
    while high - low > 1:
        middle = (low + high) // 2
        try:
            narrowed = _without(model, inputs, shares[middle])
        except ValueError:  # too small a share for any width: a larger one was removed
            low = middle
            continue
        files, told = _tried(narrowed, careful, inputs)
        if told:
            low = middle
        else:
            high, least, after = middle, shares[middle], _size(narrowed, files[-1])
    return least, before, after


def _without(model: nn.Module, inputs: tuple[Tensor, ...], share: float) -> nn.Module:
    narrowed = copy.deepcopy(layers.uncompiled(model))
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
