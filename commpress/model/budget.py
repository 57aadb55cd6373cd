"""Budgets: amounts, bits and groups by layer, found in the run from what the exported file may take.

    1. each layer alone is pruned and rounded; how far the loss rises gives a path of choices (`sensitivity.py`)
    2. its first point at which the file fits is looked for: files are exported, and their calls timed
    3. of that point follow ordinary [[prune]] and [[quantize]] entries, which the scheduler carries out

Losses are means over the ranks' batches, by one all-reduce; the file is measured on the first rank, which tells the others. So
all choose the same.
"""

import copy
import glob
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from commpress.model import layers, quantization, ranges
from commpress.model.export import FORMATS, WITHOUT_PRUNED
from commpress.model.first_rank import done_by_first_rank
from commpress.model.judgement.forms import arrays_of, batches_of, side_of
from commpress.model.judgement.measuring import Process, in_turns
from commpress.model.judgement.quality import Loss
from commpress.model.judgement.runtimes import RUNTIMES
from commpress.model.quantization import Quantization
from commpress.model.recipe import Budget, Recipe
from commpress.model.sensitivity import Choice, Setting, Unit, Way, globs, greedy, pruned_mask, sensitivities, units_of

FEW = 4
"""Batches on which a rank measures the layers."""
MB = 1e6


class BudgetError(ValueError):
    """A budget that cannot be met; the text says which limit, and the closest that there is."""


@dataclass(frozen=True)
class Measured:
    """A file of some choice."""

    bytes: int
    ms: float | None


def settled(
    recipe: Recipe,
    model: nn.Module,
    held_out: Sequence[tuple[Any, Tensor]],
    loss: Loss | None = None,
    group: dist.ProcessGroup | None = None,
) -> Recipe:
    """Return the recipe with the entries that its budget comes to, for the model as it is now. Collective over `group`.

    `held_out` are this rank's batches (inputs, targets); the model stays as it is. Raises BudgetError for limits that no
    choice meets, ValueError for sharded parameters, a model that is prepared already or no batches.
    """
    budget = recipe.budget
    assert budget is not None
    batches = batches_of(held_out, "Scheduler(held_out)")
    if any(isinstance(p, DTensor) for p in model.parameters()):
        raise ValueError("budget: the parameters are sharded, expected a model that is whole on each rank")
    if quantization.is_prepared(model):
        raise ValueError("budget: the model is prepared for quantisation already, expected one that is not")
    units = units_of(model)
    dense, rises = sensitivities(model, units, any(way.prunes for way in ways(budget)), batches[:FEW], loss, group)
    files = _Files(model, units, budget, batches[0][0], group)
    told = ""
    for way in ways(budget):
        path = greedy(units, rises, way)
        if budget.max_mb is None and budget.max_ms is None:
            assert budget.max_loss is not None
            return _with_entries(recipe, units, _within(path, budget.max_loss * abs(dense)))
        chosen, told = _shortest(path, budget, files)
        if chosen is not None:
            return _with_entries(recipe, units, chosen)
    raise BudgetError(told)


def ways(budget: Budget) -> list[Way]:
    """Return the ways that a budget tries, in order: where time counts, integers that have kernels come first, then zeros."""
    prunes = budget.format in WITHOUT_PRUNED
    tried = [((8,), False), ((8,), prunes), ((8, 4), prunes)] if budget.max_ms is not None else [((8, 4), prunes)]
    return [Way(budget.format, zeros, bits) for bits, zeros in dict.fromkeys(tried)]


def missed(found: Measured, budget: Budget, known: Collection[Measured]) -> str:
    """A sentence on the limit that a file misses, with the closest of all that are known; empty for one that fits."""
    name = budget_file(budget)
    if budget.max_mb is not None and found.bytes > budget.max_mb * MB:
        near = min(each.bytes for each in known) / MB
        return f"budget.max_mb: {budget.max_mb:.4g} MB cannot be met, the closest of {name} is {near:.3f} MB"
    if budget.max_ms is not None and found.ms is not None and found.ms > budget.max_ms:
        shortest = min(each.ms for each in known if each.ms is not None)
        told = f"the closest of {name} in {runtime_of(budget)} is {shortest:.3g} ms"
        return f"budget.max_ms: {budget.max_ms:.4g} ms cannot be met, {told}"
    return ""


def shortfalls(budget: Budget, record: Mapping[str, Any]) -> list[str]:
    """The limits that a judgement's record of the exported file misses, a sentence each with the value."""
    runtime = runtime_of(budget)
    row = next(each for each in record["rows"] if each["runtime"] == runtime)
    speed = next(each for each in row["small"]["speeds"] if each["threads"] == 1)
    dense, small = row["quality"]["dense_loss"], row["quality"]["small_loss"]
    found = []
    if budget.max_mb is not None and row["small"]["bytes"] > budget.max_mb * MB:
        found.append(f"max_mb {budget.max_mb:g}: {row['small']['file']} has {row['small']['bytes'] / MB:.3f} MB")
    if budget.max_ms is not None and 1e3 * speed["median"] > budget.max_ms:
        found.append(
            f"max_ms {budget.max_ms:g}: a call takes {1e3 * speed['median']:.3g} ms in {runtime} on one thread"
        )
    rise = (small - dense) / abs(dense) if dense else 0.0
    if budget.max_loss is not None and rise > budget.max_loss:
        found.append(
            f"max_loss {budget.max_loss:.3g}: the loss of {row['small']['file']} is {small:.4f}, {rise:.2%} above the dense "
            f"model's {dense:.4f}"
        )
    return found


def runtime_of(budget: Budget) -> str:
    """The runtime in which the budget's file is measured."""
    return next(name for name, runtime in RUNTIMES.items() if runtime.format == budget.format)


class _Files:
    """Files of choices, measured on the first rank."""

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Unit],
        budget: Budget,
        inputs: tuple[Tensor, ...],
        group: dist.ProcessGroup | None,
    ) -> None:
        self._model, self._units, self._budget, self._inputs, self._group = model, units, budget, inputs, group
        self.known: dict[tuple[tuple[int, Setting], ...], Measured] = {}
        """What was measured so far."""

    def measured(self, choice: Choice) -> Measured:
        """Bytes, and milliseconds if the budget has some. Collective. Raises BudgetError on all ranks if it cannot be had."""
        key = tuple(sorted(choice.items(), key=lambda item: item[0]))
        if key not in self.known:

            def measure() -> dict[str, Any] | str:
                try:
                    return asdict(measured(self._model, self._units, choice, self._budget, self._inputs))
                except Exception as error:  # the others wait for this rank's word, whatever it met
                    return f"budget: {budget_file(self._budget)} cannot be measured: {error}"

            told = done_by_first_rank(measure, self._group, next(self._model.parameters()).device)
            if isinstance(told, str):
                raise BudgetError(told)
            self.known[key] = Measured(**told)
        return self.known[key]


def measured(
    model: nn.Module, units: Sequence[Unit], choice: Choice, budget: Budget, inputs: tuple[Tensor, ...]
) -> Measured:
    """Export a choice and measure the file, on this rank alone. Raises ValueError with the reason if that cannot be."""
    runtime, on_cpu = runtime_of(budget), tuple(x.cpu() for x in inputs)
    made = small(model, units, choice, budget, inputs).cpu()
    with tempfile.TemporaryDirectory(prefix="commpress-budget-") as folder:
        side = side_of("small", made, (runtime,), on_cpu, Path(folder) / "files", Path(folder) / "scratch")
        if runtime not in side.forms:
            raise ValueError(side.left_out[runtime])
        form = side.forms[runtime]
        if budget.max_ms is None:
            return Measured(form.bytes, None)
        with Process(form, arrays_of(on_cpu), 1) as process:
            return Measured(form.bytes, 1e3 * in_turns([process], 1)[0].median)


def small(
    model: nn.Module, units: Sequence[Unit], choice: Choice, budget: Budget, inputs: tuple[Tensor, ...]
) -> nn.Module:
    """A copy of the model with a choice carried out at once: pruned by magnitude, its ranges those of one batch."""
    made = copy.deepcopy(layers.uncompiled(model))
    parameters = layers.named_parameters(made)
    for i, setting in choice.items():
        if setting.amount:
            p = parameters[units[i].parameter]
            p.data.mul_(pruned_mask(p.detach(), setting.amount))
    for entry in _quantize_entries(units, choice, budget):
        quantization.prepare(
            made, Quantization(entry["bits"], entry.get("group"), entry.get("activations"), tuple(entry["layers"]))
        )
    if not quantization.is_prepared(made):
        return made.eval()
    quantization.enable(made)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):  # dropout of a copy draws nothing from the run
        made.train()(*inputs)
        for quantizer in ranges.quantizers(made):  # `learn` would ask the other ranks
            if quantizer.seen is not None:
                low, high = -quantizer.seen[0].double(), quantizer.seen[1].double()
                quantizer.range.copy_(torch.stack((low.clamp(max=0), high.clamp(min=0))))
    return made.eval()


def budget_file(budget: Budget) -> str:
    """The name of the file that is held against a budget."""
    name: str = FORMATS[budget.format].FILE
    return name


def _shortest(path: Sequence[tuple[Choice, float, float]], budget: Budget, files: _Files) -> tuple[Choice | None, str]:
    """The first choice of the path whose file fits, and else a sentence on the limit that the last one misses."""

    def missed_by(i: int) -> str:
        return missed(files.measured(path[i][0]), budget, files.known.values())

    most = (files.measured({}).bytes - budget.max_mb * MB) if budget.max_mb is not None else 0.0
    last = len(path) - 1
    first = next((i for i, (_, saved, _) in enumerate(path) if saved >= most), last)
    if not missed_by(first):
        return path[first][0], ""
    if told := missed_by(last):
        return None, told
    while last - first > 1:
        middle = (first + last) // 2
        first, last = (middle, last) if missed_by(middle) else (first, middle)
    return path[last][0], ""


def _within(path: Sequence[tuple[Choice, float, float]], rise: float) -> Choice:
    """The last choice of the path whose loss is expected to rise by no more."""
    return [choice for choice, _, so_far in path if so_far <= rise][-1]


def _with_entries(recipe: Recipe, units: Sequence[Unit], choice: Choice) -> Recipe:
    budget = recipe.budget
    assert budget is not None
    prunes: dict[float, list[str]] = {}
    for i, setting in sorted(choice.items()):
        if setting.amount:
            prunes.setdefault(setting.amount, []).append(glob.escape(units[i].parameter))
    when = {"start": budget.start, "end": budget.last, "every": budget.every}
    found = recipe.to_dict() | {
        "prune": [{**when, "amount": a, "scope": "local", "parameters": names} for a, names in prunes.items()],
        "quantize": _quantize_entries(units, choice, budget),
        "budget": budget.model_dump(mode="json", exclude_defaults=True) | {"settled": True},
    }
    return Recipe.of(found, "the recipe of a budget")


def _quantize_entries(units: Sequence[Unit], choice: Choice, budget: Budget) -> list[dict[str, Any]]:
    """A table for each kind of integers. Inputs are integers, too, where the format has kernels for them."""
    found: dict[tuple[int, int | None, str | None], list[str]] = {}
    for i, setting in sorted(choice.items()):
        if setting.bits:
            inputs = _inputs(units[i], setting.bits, budget.format)
            found.setdefault((setting.bits, setting.group, inputs), []).extend(units[i].modules)
    entries = []
    for (bits, group, inputs), names in found.items():
        more = {key: value for key, value in (("group", group), ("activations", inputs)) if value is not None}
        entries.append({"start": budget.last, "bits": bits, **more, "layers": list(globs(names))})
    return entries


def _inputs(unit: Unit, bits: int, format: str) -> str | None:
    """How inputs are rounded: by token for XNNPACK, which has no static matrices with float outputs, and no convolutions."""
    if format == "executorch":
        return "dynamic" if unit.prunable else None
    return "static" if bits == 8 and format != "safetensors" else None
