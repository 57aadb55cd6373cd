"""[search] in a recipe: a search before the run, on the same ranks, with the same data and traffic.

    OUT/search/training/   a separate run: of the supernet along random paths, or of the dense model
    OUT/search/            the journal of the trials, and search.json, as those of `commpress search`

Both go on where they were interrupted. The ranks share the trials, which are judged with the weights of that training, and the
run begins with these weights and the best choice.
"""

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from commpress.files import write_atomically
from commpress.launch import checkpoint, run_folder
from commpress.launch.display import say
from commpress.launch.identity import RESUME_KEYS
from commpress.launch.run_state import Run
from commpress.launch.runtime import Stop, StopOfAll, TrainingError, together
from commpress.launch.settings import Settings
from commpress.launch.tasks import Own, Task

if TYPE_CHECKING:
    from commpress.model import Recipe
    from commpress.model.search import Compression, Problem, Result, Trial
    from commpress.model.search.spaces import Choice

FOLDER, TRAINING, BEGUN, RECORD = "search", "training", "begun.json", "search.json"


@dataclass(frozen=True)
class Found:
    """The result of a search: the task that the run trains, and its recipe."""

    task: Task
    recipe: "Recipe"
    choice: "Choice | None"
    """Options of the model's choices; None if the recipe has the result."""


class _Stopped(Exception):  # noqa: N818
    """The trials end here, for a rank was asked to stop."""


def require_space(recipe: "Recipe", task: Task) -> None:
    """Raise ValueError, with the key, if this model has nothing to search, or the search cannot run here."""
    if recipe.search is None:
        return
    from commpress.model.search.strategies import library

    library()
    if recipe.search.together < dist.get_world_size():
        raise ValueError(
            f"search.together: {recipe.search.together} keeps some of {dist.get_world_size()} ranks idle, expected as many"
        )
    try:
        _space(recipe, task.model())
    except ValueError as error:
        hint = (
            ""
            if isinstance(task, Own) or recipe.search.layers
            else "; expected search.layers, or a --model with choices"
        )
        raise ValueError(f"search: {error}{hint}") from None


def searched(
    settings: Settings,
    recipe: "Recipe",
    task: Task,
    device: torch.device,
    train: Callable[[Run], None],
    stop: Stop,
) -> Found | None:
    """Train, try, and return the best; None if the training was asked to stop. Collective. Raises TrainingError.

    `train` takes a run to its end, or until it is asked to stop. Trials raise TrainingError if they are asked to.
    """
    assert recipe.search is not None
    out = settings.folder / FOLDER
    if any(run_folder.leaders(out, device)):
        raise TrainingError(
            f"--out {settings.folder}: is not the same folder on all hosts, expected one that all share"
        )
    together(partial(_require_same, out, settings, recipe, task), device)
    begun = task
    if recipe.search.steps:
        state = _trained(settings, recipe, task, device, train)
        if state is None:
            return None
        begun = task.begun(state)
    model = begun.model().to(device)
    choice = _best(settings, recipe, begun, model, device, stop)
    if recipe.search.layers:
        return Found(begun, recipe.after_search(_compression(recipe).recipe(choice)), None)
    assert isinstance(begun, Own)
    return Found(begun.chosen(choice), recipe.after_search(), choice)


def _require_same(out: Path, settings: Settings, recipe: "Recipe", task: Task) -> None:
    """Raise ValueError if another search has begun in the folder."""
    from commpress.model.distillation import fingerprint

    mine = {
        "recipe": recipe.to_dict(),
        "text": list(task.fingerprint),
        "world_size": dist.get_world_size(),
        **{f"--{name.replace('_', '-')}": getattr(settings, name) for name in (*RESUME_KEYS, "eval_batches")},
    }
    assert recipe.search is not None
    if not recipe.search.steps:  # no training comes before the trials: these values are what they judge
        with torch.random.fork_rng(devices=[]):
            mine["model's first values"] = fingerprint(task.model())
    mine = json.loads(json.dumps(mine))
    path = out / BEGUN
    if path.exists():
        there = _read(path)
        for key, value in mine.items():
            if there.get(key) != value:
                raise ValueError(
                    f"--out {settings.folder}: the search there has {key} {there.get(key)}, this one {value}, by {path}: "
                    "expected the same, or another --out"
                )
    elif dist.get_rank() == 0:
        write_atomically(path, lambda file: file.write(f"{json.dumps(mine)}\n".encode()))


def _read(path: Path) -> dict[str, Any]:
    """Read the settings of a search that was begun. Raises ValueError that names the file, OSError if it cannot be read."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: damaged: {error}; expected what a search has written, or another --out") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: damaged: holds a {type(found).__name__}, expected an object, or another --out")
    return found


def _trained(
    settings: Settings, recipe: "Recipe", task: Task, device: torch.device, train: Callable[[Run], None]
) -> dict[str, Tensor] | None:
    """Return the values of the model after the search's training, on the CPU; None if it was asked to stop."""
    from commpress.model.first_rank import told_by_first_rank
    from commpress.model.search import Paths

    assert recipe.search is not None
    steps, out = recipe.search.steps, settings.folder / FOLDER / TRAINING
    goes_on = bool(told_by_first_rank(checkpoint.exists(out), None, device))
    changed: dict[str, Any] = {
        "out": out,
        "steps": steps,
        "recipe": None,
        "fork": None,
        "resume": goes_on,
        "timeline": 0,
    }
    changed |= {"warmup_steps": min(settings.warmup_steps, steps // 4), "optimizer_warmup": None}
    run = Run.begin(replace(settings, **changed), None, task, device)
    run.is_search = True
    if not recipe.search.layers:
        run.paths = Paths(run.model, settings.seed)
    if goes_on:
        run.restore()
    if not run.finished:
        say(
            f"search: {steps} steps of {'the dense model' if recipe.search.layers else 'all choices, along random paths'}"
        )
        train(run)
    if not run.finished:
        return None
    with run.strategy.synced():
        shared, _ = run.strategy.state()
        return {name: value.detach().cpu().clone() for name, value in shared["model"].items()}


def _best(
    settings: Settings, recipe: "Recipe", task: Task, model: nn.Module, device: torch.device, stop: Stop
) -> "Choice":
    """Return the choice of the best trial. All ranks share the trials, and get the same one."""
    from commpress.model.search import Weights, search

    its = recipe.search
    assert its is not None
    out, weights = settings.folder / FOLDER, Weights(1.0, its.beta)

    told, stop_of_all = 0, StopOfAll(stop, device)

    def go_on(over: int) -> None:
        nonlocal told
        if over > told:
            told = over
            say(f"search: trial {over}/{its.trials}")
        if stop_of_all.asked():
            raise _Stopped

    found: Result | None = None
    with contextlib.suppress(_Stopped):
        found = search(
            _problem(recipe, task, model, device),
            strategy=its.strategy,
            trials=its.trials,
            seed=settings.seed,
            weights=weights,
            together=its.together,
            folder=out,
            progress=go_on,
        )
    if stop_of_all.agreed(found is None) or found is None:
        raise TrainingError(f"stopped in the search, after {told} trials; run the same command again to go on")
    best = found.best
    if best is None:
        raise TrainingError("search: no trial has a finite loss")
    record = {"what": "search", "problem": str(settings.recipe), "strategy": its.strategy, "seed": settings.seed}
    text = json.dumps({**record, **found.to_dict()}, indent=1) + "\n"
    if dist.get_rank() == 0:
        write_atomically(out / RECORD, lambda file: file.write(text.encode()))
    say(
        f"search: {len(found.trials)} trials, the best has a loss of {-(best.quality or 0.0):.4f} at "
        f"{best.size:.3f} {'MB' if its.layers else 'M parameters'}: {best.choice}"
    )
    return best.choice


def _problem(recipe: "Recipe", task: Task, model: nn.Module, device: torch.device) -> "Problem":
    from commpress.model import quantization
    from commpress.model.search import Problem, fixed, parameters

    def of_architecture(trial: "Trial") -> float:
        return -_loss(fixed(model, trial.choice), task, device)

    def of_layers(trial: "Trial") -> float:
        made, _ = _compression(recipe).applied(model, trial.choice)
        if quantization.is_prepared(made):
            quantization.enable(made)
        return -_loss(made, task, device)

    space = _space(recipe, model)
    assert recipe.search is not None
    if recipe.search.layers:
        compression = _compression(recipe)
        return Problem(space, of_layers, lambda choice: compression.stored_bytes(model, choice) / 1e6, name="recipe")
    return Problem(space, of_architecture, lambda choice: parameters(fixed(model, choice)) / 1e6, name="recipe")


@torch.no_grad()
def _loss(model: nn.Module, task: Task, device: torch.device) -> float:
    """Return the mean loss over all held-out batches, on this rank only."""
    total, count = 0.0, 0
    model.eval()
    for (inputs, targets), rows in task.held_out(0, 1):
        output = model(*(x.to(device) for x in inputs))
        total, count = total + rows * float(task.loss(output, targets.to(device))), count + rows
    return total / count


def _space(recipe: "Recipe", model: nn.Module) -> Any:
    from commpress.model.search import space

    assert recipe.search is not None
    if not recipe.search.layers:
        return space(model)
    compression = _compression(recipe)
    compression.applied(model, {name: options[-1] for name, options in compression.space.items()})
    return compression.space


def _compression(recipe: "Recipe") -> "Compression":
    from commpress.model.search import Compression

    its = recipe.search
    assert its is not None
    when: Mapping[str, Any] = {"start": its.start, "end": its.last, "every": its.every}
    return Compression(its.layers, when, {"start": its.last})
