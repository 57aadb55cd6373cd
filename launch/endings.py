"""The end of a run with a recipe: its file is compared with [budget], [export] is written; ending.json says that both are done.

If a run was stopped in between, the next start does both again; a finished run repeats what it missed.
"""

import contextlib
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from commpress.files import write_atomically
from commpress.launch import budgets
from commpress.launch.exported import show_exported
from commpress.launch.predictions import say
from commpress.launch.runtime import TrainingError, by_first_rank, together

if TYPE_CHECKING:
    from commpress.launch.run_state import Run
    from commpress.model import Recipe

ENDING = "ending.json"


def of(folder: Path, done: int, device: torch.device) -> list[str] | None:
    """Return what the run in a folder missed when it finished at this step; None if it has no such end. Collective."""
    from commpress.model.first_rank import told_by_first_rank

    missed: list[str] | None = None
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((folder / ENDING).read_text())
        missed = found.get("missed") if isinstance(found, dict) and found.get("steps") == done else None
        if not isinstance(missed, list) or not all(isinstance(each, str) for each in missed):
            missed = None  # damaged: the end comes once more
    missed = told_by_first_rank(missed, None, device)
    return missed


def forget(folder: Path, device: torch.device) -> None:
    """Remove what says that a run's end is done, since it goes on. Collective."""
    together(lambda: (folder / ENDING).unlink(missing_ok=True) if dist.get_rank() == 0 else None, device)


def has_one(recipe: "Recipe") -> bool:
    """Return whether a recipe asks for something at the end."""
    return recipe.export is not None or recipe.budget is not None


def require_good(missed: list[str], folder: Path) -> None:
    """Raise TrainingError with what was missed."""
    if missed:
        raise TrainingError(f"{'; '.join(missed)}; the run itself has finished, in {folder}")


def write(run: "Run", full: nn.Module | None) -> None:
    """Judge and export the model, which rank 0 has whole. Collective. Raises TrainingError for what was missed.

    What may be better next time, a full disk or no memory, leaves no ending.json: the same command tries again.
    """
    assert run.scheduler is not None
    recipe = run.scheduler.recipe
    if has_one(recipe):
        require_good(by_first_rank(partial(_ended, run, recipe, full), run.device), run.out)


def _ended(run: "Run", recipe: "Recipe", full: nn.Module | None) -> list[str]:
    assert full is not None  # on rank 0
    missed = []
    held_out = [batch for batch, rows in run.task.held_out(0, 1) if rows]
    dense = None if recipe.budget is None else budgets.dense(run.out, run.task.dense())
    if dense is not None:
        structure = budgets.structure_of(run.out, recipe)
        short = budgets.judged(dense, full, held_out, recipe, run.out / "judged", structure)
        missed += [f"the budget is not met: {'; '.join(short)}"] if short else []
    elif recipe.budget is not None:  # as one that another run has settled
        say(
            f"[budget]: there is no {run.out / budgets.DENSE}, the dense model: its limits are not held against the file"
        )
    if recipe.export is not None:
        try:
            missed += _exported(recipe, full, run.task.example(), run.out)
        except (OSError, MemoryError) as error:
            return [*missed, f"export: {error}"]
    found: dict[str, Any] = {"what": "ending", "steps": run.done, "missed": missed}
    write_atomically(run.out / ENDING, lambda file: file.write((json.dumps(found, indent=1) + "\n").encode()))
    return missed


def _exported(recipe: "Recipe", full: nn.Module, example: tuple[torch.Tensor, ...], out: Path) -> list[str]:
    from commpress.model.export.by_recipe import export_by

    assert recipe.export is not None
    written, failed = export_by(recipe.export, full, out, example)
    show_exported(written)
    return [f"export: {'; '.join(failed)}"] if failed else []
