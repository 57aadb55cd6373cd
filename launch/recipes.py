"""Recipes in the training program: the file, its teacher, and the small model that it makes."""

import importlib.util
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

import commpress
from commpress.comm.codecs import AUTO
from commpress.comm.plan import Plan
from commpress.comm.rules import is_open
from commpress.launch import budgets, checkpoint, patterns, run_folder, strategies, tasks
from commpress.launch.model import GPT, Shape
from commpress.launch.model_size import called
from commpress.launch.runtime import TrainingError, same_error_on_all_ranks, together
from commpress.launch.settings import Settings, check
from commpress.launch.strategies import Strategy
from commpress.launch.tasks import Task

if TYPE_CHECKING:
    from commpress.model import Recipe, Scheduler
    from commpress.model.search.spaces import Choice

SMALL = "model.safetensors"
"""The stored model in a run's folder: integers, and no pruned weights."""


def of_settings(settings: Settings) -> "Recipe | None":
    """Return the recipe of --recipe; None without one. Raises TrainingError if this run cannot follow it."""
    if settings.recipe is None:
        return None
    try:
        return read(settings.recipe, settings)
    except OSError as error:
        raise TrainingError(f"cannot read --recipe {settings.recipe}: {error.strerror or error}") from None
    except ValueError as error:
        where = "" if str(settings.recipe) in str(error) else f" {settings.recipe}"
        raise TrainingError(f"--recipe{where}: {error}") from None


def with_specs(settings: Settings) -> Settings:
    """Return the settings with specs: from the flags, else from the recipe, else the defaults.

    Specs by patterns of names are read from their file. Raises TrainingError if a file cannot be read, if the
    recipe and a flag have different specs, and for patterns that do not fit the model's parameters.
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
        if (table := patterns.table_of(found.compress)) is not None and found.model is None:
            check(found)
            patterns.require_fit(table, found.shape)
    except OSError as error:
        raise TrainingError(f"cannot read {where}: {error.strerror or error}") from None
    except TrainingError:
        raise
    except ValueError as error:
        raise TrainingError(f"{where}: {error}") from None
    return found


def going_on(settings: Settings, device: torch.device) -> Settings:
    """Return the settings; with a recipe and a checkpoint in --out, as with --resume. Collective."""
    if settings.recipe is None or settings.resume:
        return settings
    from commpress.model.first_rank import told_by_first_rank

    there = together(partial(run_folder.holds_checkpoint, settings.folder, "--out"), device)
    return replace(settings, resume=True, fork=None) if told_by_first_rank(there, None, device) else settings


def chosen_before(
    settings: Settings, recipe: "Recipe | None", device: torch.device
) -> "tuple[Recipe, Choice | None] | None":
    """Return the recipe of the run that this one continues, after search and budget, and the choice in its model.

    None if it continues none, or that run has no recipe. Collective. Raises TrainingError for a fork of a run whose budget has
    chosen, or that is after the step at which this one's begins.
    """
    source = settings.folder if settings.resume else settings.fork
    if source is None or recipe is None:
        return None
    state = run_folder.load_shared(source, device)
    if settings.fork is not None and (begins := budgets.begins_at(recipe)) is not None and begins <= state["step"]:
        raise TrainingError(
            f"--fork {source}: it is at step {state['step']}, expected a budget.start above that, got {begins}"
        )
    if (chosen := state.get("chosen")) is None:
        return None
    from commpress.model import Recipe

    saved = Recipe.of(chosen["recipe"], str(source))
    if settings.fork is None:
        saved._source = recipe._source
        return saved, chosen["choice"]
    if saved.budget is not None and saved.budget.settled:
        raise TrainingError(
            f"--fork {source}: its [budget] has already chosen, expected a run at a step before {saved.budget.start}"
        )
    return recipe, chosen["choice"]


def read(path: Path, settings: Settings) -> "Recipe":
    """Return the recipe of a run. Raises ValueError that names the key, OSError if it cannot be read."""
    if importlib.util.find_spec("pydantic") is None or importlib.util.find_spec("torchao") is None:
        raise ValueError("found no pydantic or torchao, expected both; pip install 'commpress[model]'")
    from commpress.model import Recipe

    if path.exists() and not path.is_file():  # a device or pipe may have no end
        raise ValueError(f"{path}: expected a .toml or .yaml file, found none")
    try:
        recipe = Recipe.load(path)
    except ImportError as error:
        raise ValueError(f"{path}: {error}") from None
    recipe.require_within(settings.steps)
    for key, spec in vars(recipe.traffic).items():
        try:
            left_open = is_open(spec) or spec.endswith(patterns.ENDINGS) if key == "spec" and spec else spec == AUTO
            if spec is not None and not left_open:
                Plan.of_parameters(spec) if key == "parameters" else commpress.parse(spec)
        except ValueError as error:
            raise ValueError(f"{path}: traffic.{key}: {error}") from None
    if budgets.takes_structure(recipe):
        require_removable(recipe, path, settings)
    if (begins := budgets.begins_at(recipe)) is not None:
        if settings.parallel != "ddp":
            raise ValueError(f"{path}: budget: expected --parallel ddp, where each rank has the whole model")
        if begins == 0 and settings.model is None and recipe.search is None:
            raise ValueError(
                f"{path}: budget.start: 0, before any training, expected a later step: limits are compared with the model of "
                "that step"
            )
    if recipe.search is not None and (settings.parallel != "ddp" or settings.fork is not None):
        got = f"--fork {settings.fork}" if settings.fork is not None else f"--parallel {settings.parallel}"
        raise ValueError(f"{path}: search: expected --parallel ddp and a run from its beginning, got {got}")
    if recipe.export is not None:
        from commpress.model.export import require

        try:
            require(recipe.export.formats)
        except ModuleNotFoundError as error:
            raise ValueError(f"{path}: export.formats: {error}") from None
    if recipe.distil is not None and recipe.distil.teacher is None and (settings.model is None or recipe.search):
        raise ValueError(f"{path}: distil.teacher: missing, expected the folder of a run")
    return recipe


def require_removable(recipe: "Recipe", path: Path, settings: Settings) -> None:
    """Raise ValueError where a budget's structure cannot be removed, which is before the run and of a model of one's own."""
    assert recipe.budget is not None
    if settings.model is None or recipe.search is not None:
        got = "a [search]" if recipe.search is not None else "the built-in GPT"
        raise ValueError(
            f"{path}: budget.structure: expected --model, and no [search], whose widths it finds, got {got}"
        )
    if recipe.budget.start:
        raise ValueError(
            f"{path}: budget.start: structure is removed before the run, expected 0, got {recipe.budget.start}"
        )
    if settings.parallel != "ddp":
        raise ValueError(f"{path}: budget.structure: expected --parallel ddp, got {settings.parallel}")


def narrowed(recipe: "Recipe", task: tasks.Own, settings: Settings, device: torch.device) -> "tuple[Recipe, tasks.Own]":
    """Remove what the budget takes of structure, or took before; the recipe that says so, and the task. Collective."""
    model = together(lambda: task.model().to(device), device)
    held_out = [batch for batch, rows in task.held_out(0, 1) if rows]
    recipe = budgets.narrowed(model, recipe, task.example(), settings.folder, device, held_out)
    return recipe, task.narrowed(model.cpu())


def follow(
    recipe: "Recipe | None", model: nn.Module, task: Task, settings: Settings, device: torch.device
) -> "tuple[Strategy, Scheduler | None]":
    """Spread the model over the ranks, and return it with the recipe's scheduler. Collective."""
    if recipe is None:
        with same_error_on_all_ranks():
            return strategies.make(model, settings), None
    from commpress.model import Scheduler, prepare

    rank, world_size = dist.get_rank(), dist.get_world_size()
    own = list(task.held_out(rank, world_size)) if recipe.chooses else []

    def get_ready() -> nn.Module | None:
        if recipe.chooses and not any(rows for _, rows in own):
            raise ValueError(
                f"budget: {world_size} ranks measure layers, each on its own held-out batches; this rank has none"
            )
        prepare(model, recipe)
        return teacher(recipe, task, settings)

    taught_by = together(get_ready, device)
    restoring = settings.resume or settings.fork is not None
    if budgets.begins_at(recipe) == 0 and not restoring:
        whole = task.dense().to(device) if budgets.takes_structure(recipe) else model
        budgets.keep_dense(settings.folder, whole, device)
    with same_error_on_all_ranks():
        strategy = strategies.make(model, settings)
        taught_by = None if taught_by is None else taught_by.to(device)
        return strategy, Scheduler(
            recipe,
            model,
            strategy.optimizer,
            session=strategy.session,
            teacher=taught_by,
            restoring=restoring,
            held_out=[batch for batch, rows in own if rows],
            example_inputs=task.example(),
        )


def model_of_run(folder: Path, factory: str | None) -> nn.Module:
    """Return the model of a run's checkpoint, prepared as its recipe says.

    A factory that the run names is called only if it is `factory`, the caller's --model: a file alone runs no code. Raises
    ValueError if it is another, if there is no checkpoint, if it is damaged, or if its recipe has not finished.
    """
    if not checkpoint.exists(folder):
        raise ValueError(f"{folder}: there is no checkpoint, expected the folder of a run of `commpress train`")
    state = checkpoint.load_shared(folder)
    identity, chosen = state["identity"], state.get("chosen") or {}
    tasks.require_named(folder, "model", identity.get("model"), factory, "--model")
    model = _fresh(identity, factory, chosen.get("choice"))
    if identity.get("recipe"):
        if state["step"] != identity["steps"]:
            raise ValueError(
                f"{folder}: is at step {state['step']} of {identity['steps']}, expected a run whose recipe has finished"
            )
        from commpress.model import Recipe, prepare

        recipe = Recipe.of(chosen.get("recipe", identity["recipe"]), str(folder))
        budgets.reshape_as(folder, model, recipe)
        prepare(model, recipe)
    model.load_state_dict(state["model"])
    return model


def _fresh(identity: dict[str, Any], factory: str | None, choice: "dict[str, Any] | None") -> nn.Module:
    if factory is None:
        return GPT(Shape(*(identity[name] for name in ("layers", "width", "heads", "context"))))
    model = tasks.module_of(factory)
    if choice is None:
        return model
    from commpress.model.search import fixed

    return fixed(model, choice)


def teacher(recipe: "Recipe", task: Task, settings: Settings) -> nn.Module | None:
    """Return the model that the recipe distils from: a run's, or for your own model the one that a factory makes.

    Raises ValueError if there is none, it is damaged, its context is shorter, or its factory is not that of this run.
    """
    if recipe.distil is None:
        return None
    name = recipe.distil.teacher
    if name is None:
        return task.dense()
    if settings.model is not None and ":" in name:
        made = called(name, "distil.teacher")
        if not isinstance(made, nn.Module):
            raise ValueError(f"distil.teacher: {name} returns a {type(made).__name__}, expected a torch.nn.Module")
        return made
    folder = Path(name)
    if not checkpoint.exists(folder):
        raise ValueError(f"distil.teacher: no checkpoint in {folder}")
    state = checkpoint.load_shared(folder)
    if settings.model is not None:
        if (factory := state["identity"].get("model")) not in (None, settings.model):
            raise ValueError(
                f"distil.teacher: the model of the run in {folder} is made by {factory}, a function whose code would run; "
                f"expected a run of --model {settings.model}, or module:factory"
            )
        return model_of_run(folder, factory)
    shape = Shape(*(state["identity"][name] for name in ("layers", "width", "heads", "context")))
    if shape.context < settings.context:
        raise ValueError(f"distil.teacher: {folder} has a context of {shape.context}, this run {settings.context}")
    model = GPT(shape)
    model.load_state_dict(state["model"])
    return model


def whole(task: Task, strategy: Strategy, scheduler: "Scheduler", device: torch.device) -> nn.Module | None:
    """Return the whole model after the recipe, on the CPU, its quantisers on: on rank 0; None on the others. Collective."""
    from commpress.model import prepare, quantization

    def load(state: dict[str, Any]) -> nn.Module | None:
        if dist.get_rank():
            return None
        full = task.model()
        prepare(full, scheduler.recipe)
        full.load_state_dict(state)
        if quantization.is_prepared(full):
            quantization.enable(full)
        return full

    with strategy.synced():
        shared, _ = strategy.state()
        return together(lambda: load(shared["model"]), device)


def store(
    file: Path, full: nn.Module | None, task: Task, scheduler: "Scheduler", device: torch.device
) -> tuple[nn.Module, dict[str, Any]]:
    """Write the small model and read it back; return it, on the CPU, and the file. Collective.

    Rank 0, which has the whole model, does both, and sends the others the result: they may not see its file.
    """
    from commpress.model import stored

    model = task.model()

    def write() -> int:
        if full is None:
            return 0
        stored.save(file, full, masks={name: mask.cpu() for name, mask in scheduler.masks.of.items()})
        model.load_state_dict(stored.load(file).state_dict())
        return file.stat().st_size

    size = torch.tensor(together(write, device), dtype=torch.int64, device=device)
    dist.broadcast(size, 0)
    for p in (*model.parameters(), *model.buffers()):
        values = p.detach().to(device)
        dist.broadcast(values, 0)
        p.data = values.cpu()
    dense = 4 * sum(p.numel() for p in model.parameters())
    return model, {
        "bytes": int(size),
        "times_smaller": dense / int(size),
        "sparsity": scheduler.masks.sparsity,
    }


def phase_label(scheduler: "Scheduler") -> str:
    """Return a word for the recipe's present phase."""
    pruned = scheduler.masks.sparsity
    shares = f", {pruned:.0%} pruned, {scheduler.reach.of_model:.0%} of the model" if pruned else ""
    return f" [{scheduler.phase}{shares}]"
