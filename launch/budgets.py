"""Budgets of `commpress train` and `commpress shrink`: the dense model that limits are held against, and how the file does."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from commpress.files import load_state, save_state, write_atomically
from commpress.launch.predictions import say
from commpress.launch.runtime import by_first_rank, together

if TYPE_CHECKING:
    from commpress.model import Recipe

DENSE = "dense.pt"
"""In the folder of a run: the model as it was when its budget began."""
CHOSEN, PAGE = "recipe.yaml", "judgement.html"
STRUCTURE = "structure.json"
"""What a budget removed of a model: the shares, what file and parameters were and became, and the sizes that are left."""


def begins_at(recipe: "Recipe") -> int | None:
    """The step whose model a recipe's budget is held against, and at which it may choose; None without one, or if it has."""
    its = recipe.budget
    return None if its is None or its.settled else its.start


def keep_dense(out: Path, model: nn.Module, device: torch.device) -> None:
    """Write the model as it is now beside the run, on rank 0: limits are held against it in the end. Collective."""
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}

    def keep() -> None:
        out.mkdir(parents=True, exist_ok=True)
        save_state(out / DENSE, {"model": state})

    together(keep if dist.get_rank() == 0 else lambda: None, device)


def dense(out: Path, model: nn.Module) -> nn.Module | None:
    """`model`, a fresh one, with the values that `keep_dense` wrote; None if nothing is there."""
    if not (out / DENSE).exists():
        return None
    found = load_state(out / DENSE)["model"]
    model.load_state_dict({name: found[name] for name in model.state_dict()})  # without what a recipe has prepared
    return model


def takes_structure(recipe: "Recipe | None") -> bool:
    """Whether a recipe's budget may remove structure."""
    return recipe is not None and recipe.budget is not None and recipe.budget.structure > 0


def narrowed(
    model: nn.Module,
    recipe: "Recipe",
    inputs: tuple[Tensor, ...],
    out: Path,
    device: torch.device,
    held_out: Sequence[tuple[tuple[Tensor, ...], Tensor]],
) -> "Recipe":
    """Remove of the model, in place, what its budget takes of structure; the recipe that says how much. Collective.

    Rank 0 measures and removes, with the loss on the first of the `held_out` batches if the model has learned something; the
    others follow with its sizes and values. It writes STRUCTURE into `out`. Raises TrainingError on all ranks for a limit
    that cannot be met.
    """
    from commpress.model import Recipe
    from commpress.model.narrowing import narrow
    from commpress.model.structured import Shapes, reshape

    def remove() -> dict[str, Any]:
        said, found = narrow(model, recipe, tuple(x.to(device) for x in inputs), held_out)
        if structure_of(out, said) is None or found.before is not None:
            record = json.dumps({"what": "structure", **asdict(found)}, indent=1) + "\n"
            out.mkdir(parents=True, exist_ok=True)
            write_atomically(out / STRUCTURE, lambda file: file.write(record.encode()))
        if found.before is not None:
            say(told(asdict(found)))
        return {"recipe": said.to_dict(), "shapes": asdict(found.shapes)}

    found = by_first_rank(remove, device)
    together(lambda: None if dist.get_rank() == 0 else reshape(model, Shapes(**found["shapes"])), device)
    if dist.get_world_size() > 1:
        for x in model.state_dict().values():
            if isinstance(x, Tensor):
                values = x.detach().contiguous()
                dist.broadcast(values, 0)
                x.copy_(values)
    said = Recipe.of(found["recipe"], recipe._source or "recipe")
    said._source = recipe._source
    return said


def structure_of(out: Path, recipe: "Recipe") -> dict[str, Any] | None:
    """Return the record of the removal that a recipe names; None if there was none, or STRUCTURE records another."""
    removed = None if recipe.budget is None else recipe.budget.removed
    if removed is None or not (out / STRUCTURE).exists():
        return None
    found: dict[str, Any] = json.loads((out / STRUCTURE).read_text())
    return found if found.get("removed") == removed else None


def reshape_as(out: Path, model: nn.Module, recipe: "Recipe") -> None:
    """Give a fresh model the sizes that STRUCTURE in a run's folder has. Raises ValueError if it is not there."""
    from commpress.model.structured import Shapes, reshape

    if recipe.budget is None or not recipe.budget.removed:
        return
    if (structure := structure_of(out, recipe)) is None:
        raise ValueError(f"{out}: expected {STRUCTURE} of the run, which has the sizes of its model, found none")
    reshape(model, Shapes(**structure["shapes"]))


def told(structure: dict[str, Any]) -> str:
    """A sentence on what was removed, with the figures before training."""
    from commpress.model.narrowing import described

    before, after = structure["before"], structure["after"]
    if structure["removed"] == 0:
        return "no structure removed: integers and zeros alone meet the budget's megabytes and milliseconds"
    if before is None:
        return f"{described(structure['removed'])} removed before training, as the recipe said"
    times = "" if before["ms"] is None else f", a call from {before['ms']:.3g} to {after['ms']:.3g} ms"
    losses = ""
    if after.get("loss") is not None:
        losses = f", the loss on the batches that were measured from {before['loss']:.4f} to {after['loss']:.4f}"
    sizes = (
        f"the file from {before['bytes'] / 1e6:.3f} MB dense to {after['bytes'] / 1e6:.3f} MB with integers and zeros"
    )
    return (
        f"{described(structure['removed'])} removed before training: from {before['parameters']:,} to "
        f"{after['parameters']:,} parameters, {sizes}{times}{losses}"
    )


def judged(
    dense: nn.Module,
    small: nn.Module,
    held_out: Sequence[tuple[tuple[Tensor, ...], Tensor]],
    recipe: "Recipe",
    out: Path,
    structure: dict[str, Any] | None = None,
) -> list[str]:
    """Judge the exported file of a budget, print and write what was found into `out`; the limits that it misses.

    `structure` is what was removed before training; the record has it without the sizes.
    """
    from commpress.launch import report
    from commpress.model import Judgement, judge
    from commpress.model.budget import runtime_of, shortfalls

    assert recipe.budget is not None
    judgement = judge(dense, small, held_out, runtimes=(runtime_of(recipe.budget),), folder=out)
    if structure is not None:
        removed = {key: structure[key] for key in ("removed", "before", "after")}
        sentences = [*judgement.sentences, told(structure)]
        judgement = Judgement({**judgement.record, "structure": removed, "sentences": sentences})
    judgement.write(out)
    report.write(out / PAGE, report.page([judgement.record]))
    chosen: dict[str, Any] = recipe.to_dict()
    write_atomically(out / CHOSEN, lambda file: file.write((json.dumps(chosen, indent=1) + "\n").encode()))
    for each in judgement.sentences:
        say(f"- {each}")
    say(f"files in {out / 'small'}; pictures, card and the recipe that was chosen in {out}")
    return shortfalls(recipe.budget, judgement.record)
