"""Recipes in the training program: the file, the teacher that it names, and the small model that it leaves."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

import commpress
from commpress.launch import checkpoint
from commpress.launch.model import GPT, Shape
from commpress.launch.parallel import Spread
from commpress.launch.ranks import together

if TYPE_CHECKING:
    from commpress.model import Recipe, Scheduler

SMALL = "model.safetensors"
"""What a recipe leaves in a run's folder: integers, and no pruned weights."""


def read(path: Path, steps: int) -> "Recipe":
    """The recipe of a run of so many steps. Raises ValueError that names the key, OSError if it cannot be read."""
    if importlib.util.find_spec("pydantic") is None or importlib.util.find_spec("torchao") is None:
        raise ValueError("found no pydantic or torchao, expected both; pip install 'commpress[model]'")
    from commpress.model import Recipe

    if path.exists() and not path.is_file():  # a device or pipe may have no end
        raise ValueError(f"{path}: expected a .toml or .yaml file, found none")
    try:
        recipe = Recipe.load(path)
    except ImportError as error:
        raise ValueError(f"{path}: {error}") from None
    recipe.require_within(steps)
    for key, spec in vars(recipe.traffic).items():
        if spec is not None:
            try:
                commpress.parse(spec)
            except ValueError as error:
                raise ValueError(f"{path}: traffic.{key}: {error}") from None
    if recipe.distil is not None and recipe.distil.teacher is None:
        raise ValueError(f"{path}: distil.teacher: missing, expected the folder of a run")
    return recipe


def teacher(recipe: "Recipe", context: int) -> GPT | None:
    """The model of the run that the recipe names. ValueError: there is none, it is damaged, or its context is shorter."""
    if recipe.distil is None:
        return None
    folder = Path(recipe.distil.teacher or "")
    if not checkpoint.exists(folder):
        raise ValueError(f"distil.teacher: no checkpoint in {folder}")
    state = checkpoint.load_shared(folder)
    shape = Shape(*(state["identity"][name] for name in ("layers", "width", "heads", "context")))
    if shape.context < context:
        raise ValueError(f"distil.teacher: {folder} has a context of {shape.context}, this run {context}")
    model = GPT(shape)
    model.load_state_dict(state["model"])
    return model


def store(
    file: Path, shape: Shape, trained: Spread, scheduler: "Scheduler", device: torch.device
) -> tuple[GPT, dict[str, Any]]:
    """Write the model as small as the recipe left it, and read it back: on the CPU, and what was written. Collective.

    Rank 0 does both, and sends the others what it has read: they may not see its file.
    """
    from commpress.model import prepare, quantization, stored

    model = GPT(shape)

    def write(state: dict[str, Any]) -> int:
        if dist.get_rank():
            return 0
        full = GPT(shape)
        prepare(full, scheduler.recipe)
        full.load_state_dict(state)
        if quantization.is_prepared(full):
            quantization.enable(full)
        stored.save(file, full, masks={name: mask.cpu() for name, mask in scheduler.masks.of.items()})
        model.load_state_dict(stored.load(file).state_dict())
        return file.stat().st_size

    with trained.alike():
        shared, _ = trained.state()
        size = torch.tensor(together(lambda: write(shared["model"]), device), dtype=torch.int64, device=device)
    dist.broadcast(size, 0)
    for p in model.parameters():
        values = p.detach().to(device)
        dist.broadcast(values, 0)
        p.data = values.cpu()
    dense = 4 * sum(p.numel() for p in model.parameters())
    return model, {
        "bytes": int(size),
        "times_smaller": dense / int(size),
        "sparsity": scheduler.masks.sparsity,
    }


def told(scheduler: "Scheduler") -> str:
    """A word on what the recipe does now."""
    pruned = scheduler.masks.sparsity
    shares = f", {pruned:.0%} pruned, {scheduler.reach.of_model:.0%} of the model" if pruned else ""
    return f" [{scheduler.phase}{shares}]"
