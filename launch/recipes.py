"""Recipes in the training program: the file, the teacher that it names, and the small model that it leaves."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

import commpress
from commpress.comm.codecs import AUTO
from commpress.comm.plan import Plan
from commpress.comm.rules import is_open
from commpress.launch import checkpoint, patterns, strategies
from commpress.launch.exported import bytes_of, show_exported
from commpress.launch.model import GPT, Shape
from commpress.launch.runtime import TrainingError, same_error_on_all_ranks, together
from commpress.launch.settings import Settings, check
from commpress.launch.strategies import Strategy

if TYPE_CHECKING:
    from commpress.model import Recipe, Scheduler

SMALL = "model.safetensors"
"""The file that a recipe leaves in a run's folder: integers, and no pruned weights."""


def of_settings(settings: Settings) -> "Recipe | None":
    """Return the recipe of --recipe, None without one. Raises TrainingError if it cannot be followed in this run."""
    if settings.recipe is None:
        return None
    try:
        recipe = read(settings.recipe, settings.steps)
        if recipe.prune and settings.parallel == "deepspeed" and settings.zero_stage:
            raise ValueError(
                f"prune[0]: under ZeRO {settings.zero_stage} each rank steps a part of a parameter, and masks do not reach it; "
                "expected --zero-stage 0, or --parallel ddp or fsdp"
            )
        return recipe
    except OSError as error:
        raise TrainingError(f"cannot read --recipe {settings.recipe}: {error.strerror or error}") from None
    except ValueError as error:
        where = "" if str(settings.recipe) in str(error) else f" {settings.recipe}"
        raise TrainingError(f"--recipe{where}: {error}") from None


def with_specs(settings: Settings) -> Settings:
    """Return the settings with the specs that --compress and --parameters leave to the recipe, or to the defaults.

    Specs by patterns of names are read from their file. Raises TrainingError if that or the recipe cannot be read, if the
    recipe says another spec than a flag does, and for patterns that do not fit the model's parameters.
    """
    recipe, specs = of_settings(settings), dict[str, Any]()
    for name, key, usual in (
        ("compress", "spec", settings.spec),
        ("parameters", "parameters", settings.parameter_spec),
    ):
        given, wanted = getattr(settings, name), None if recipe is None else getattr(recipe.traffic, key)
        if given is not None and wanted is not None and given != wanted:
            raise TrainingError(f"--{name} {given}: the recipe has traffic.{key} {wanted!r}; leave one of them out")
        specs[name] = usual if wanted is None else wanted
    by_recipe = settings.compress is None and recipe is not None
    where = f"--recipe {settings.recipe}: traffic.spec" if by_recipe else f"--compress {settings.compress}"
    try:
        found = replace(settings, **{**specs, "compress": patterns.text_of(specs["compress"])})
        if (table := patterns.table_of(found.compress)) is not None:
            check(found)
            patterns.require_fit(table, found.shape)
    except OSError as error:
        raise TrainingError(f"cannot read {where}: {error.strerror or error}") from None
    except TrainingError:
        raise
    except ValueError as error:
        raise TrainingError(f"{where}: {error}") from None
    return found


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
        try:
            left_open = is_open(spec) or spec.endswith(patterns.ENDINGS) if key == "spec" and spec else spec == AUTO
            if spec is not None and not left_open:
                Plan.of_parameters(spec) if key == "parameters" else commpress.parse(spec)
        except ValueError as error:
            raise ValueError(f"{path}: traffic.{key}: {error}") from None
    if recipe.budget is not None and not recipe.budget.settled:
        raise ValueError(f"{path}: budget: is held against a dense model, which this run has not; see commpress shrink")
    if recipe.export is not None:
        from commpress.model.export import require

        try:
            require(recipe.export.formats)
        except ModuleNotFoundError as error:
            raise ValueError(f"{path}: export.formats: {error}") from None
    if recipe.distil is not None and recipe.distil.teacher is None:
        raise ValueError(f"{path}: distil.teacher: missing, expected the folder of a run")
    return recipe


def follow(
    recipe: "Recipe | None", model: GPT, settings: Settings, device: torch.device
) -> "tuple[Strategy, Scheduler | None]":
    """Spread the model over the ranks, and return with it what carries out the recipe. Collective."""
    if recipe is None:
        with same_error_on_all_ranks():
            return strategies.make(model, settings), None
    from commpress.model import Scheduler, prepare

    def get_ready() -> GPT | None:
        prepare(model, recipe)
        return teacher(recipe, settings.context)

    taught_by = together(get_ready, device)
    with same_error_on_all_ranks():
        strategy = strategies.make(model, settings)
        taught_by = None if taught_by is None else taught_by.to(device)
        return strategy, Scheduler(
            recipe,
            model,
            strategy.optimizer,
            session=strategy.session,
            teacher=taught_by,
            example_inputs=bytes_of(model),
        )


def model_of_run(folder: Path) -> GPT:
    """The model of a run's checkpoint, prepared as its recipe says.

    Raises ValueError if there is none, if it is damaged, or if its recipe is not over.
    """
    if not checkpoint.exists(folder):
        raise ValueError(f"{folder}: there is no checkpoint, expected the folder of a run of `commpress train`")
    state = checkpoint.load_shared(folder)
    identity = state["identity"]
    model = GPT(Shape(*(identity[name] for name in ("layers", "width", "heads", "context"))))
    if identity.get("recipe"):
        if state["step"] != identity["steps"]:
            raise ValueError(
                f"{folder}: is at step {state['step']} of {identity['steps']}, expected its recipe to be over"
            )
        from commpress.model import Recipe, prepare

        prepare(model, Recipe.of(identity["recipe"], str(folder)))
    model.load_state_dict(state["model"])
    return model


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


def whole(shape: Shape, strategy: Strategy, scheduler: "Scheduler", device: torch.device) -> GPT | None:
    """The model as the recipe left it, whole, on the CPU, its quantisers on: on rank 0, None on the others. Collective."""
    from commpress.model import prepare, quantization

    def load(state: dict[str, Any]) -> GPT | None:
        if dist.get_rank():
            return None
        full = GPT(shape)
        prepare(full, scheduler.recipe)
        full.load_state_dict(state)
        if quantization.is_prepared(full):
            quantization.enable(full)
        return full

    with strategy.synced():
        shared, _ = strategy.state()
        return together(lambda: load(shared["model"]), device)


def store(
    file: Path, full: GPT | None, shape: Shape, scheduler: "Scheduler", device: torch.device
) -> tuple[GPT, dict[str, Any]]:
    """Write the model as small as the recipe left it, and read it back: on the CPU, and what was written. Collective.

    Rank 0, which has the whole model, does both, and sends the others what it has read: they may not see its file.
    """
    from commpress.model import stored

    model = GPT(shape)

    def write() -> int:
        if full is None:
            return 0
        stored.save(file, full, masks={name: mask.cpu() for name, mask in scheduler.masks.of.items()})
        model.load_state_dict(stored.load(file).state_dict())
        return file.stat().st_size

    size = torch.tensor(together(write, device), dtype=torch.int64, device=device)
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


def exported(full: GPT | None, recipe: "Recipe", folder: Path, done: int, device: torch.device) -> list[str]:
    """Write what [export] names into the run's folder, on rank 0; what cannot be, a sentence each. Collective."""
    from commpress.model.export.by_recipe import export_by
    from commpress.model.first_rank import told_by_first_rank

    def write() -> list[str]:
        if full is None or recipe.export is None:
            return []
        written, failed = export_by(recipe.export, full, folder, bytes_of(full), done)
        show_exported(written)
        return failed

    found: list[str] = told_by_first_rank(together(write, device), None, device)
    return found


def is_exported(recipe: "Recipe", folder: Path, done: int) -> bool:
    """Whether what [export] names was written at this step."""
    from commpress.model.export.by_recipe import RECORD

    if recipe.export is None:
        return True
    try:
        found = json.loads((folder / recipe.export.folder / RECORD).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("steps") == done


def phase_label(scheduler: "Scheduler") -> str:
    """Return a word on what the recipe does now."""
    pruned = scheduler.masks.sparsity
    shares = f", {pruned:.0%} pruned, {scheduler.reach.of_model:.0%} of the model" if pruned else ""
    return f" [{scheduler.phase}{shares}]"
