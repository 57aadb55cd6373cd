"""Budgets of `commpress train` and `commpress shrink`: the dense model that limits are held against, and how the file does."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from commpress.files import load_state, save_state, write_atomically
from commpress.launch.predictions import say
from commpress.launch.runtime import together

if TYPE_CHECKING:
    from commpress.model import Recipe

DENSE = "dense.pt"
"""In the folder of a run: the model as it was when its budget began."""
CHOSEN, PAGE = "recipe.yaml", "judgement.html"


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


def judged(
    dense: nn.Module,
    small: nn.Module,
    held_out: Sequence[tuple[tuple[Tensor, ...], Tensor]],
    recipe: "Recipe",
    out: Path,
) -> list[str]:
    """Judge the exported file of a budget, print and write what was found into `out`; the limits that it misses."""
    from commpress.launch import report
    from commpress.model import judge
    from commpress.model.budget import runtime_of, shortfalls

    assert recipe.budget is not None
    judgement = judge(dense, small, held_out, runtimes=(runtime_of(recipe.budget),), folder=out)
    judgement.write(out)
    report.write(out / PAGE, report.page([judgement.record]))
    chosen: dict[str, Any] = recipe.to_dict()
    write_atomically(out / CHOSEN, lambda file: file.write((json.dumps(chosen, indent=1) + "\n").encode()))
    for each in judgement.sentences:
        say(f"- {each}")
    say(f"files in {out / 'small'}; pictures, card and the recipe that was chosen in {out}")
    return shortfalls(recipe.budget, judgement.record)
