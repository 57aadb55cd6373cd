"""Train a byte-level GPT on any number of ranks with compressed gradients. A program to read and to change.

    torchrun --nproc-per-node 2 -m commpress.launch.train --compress "topk(0.01)|int4"

Without torchrun it trains on one rank. On Ctrl-C or SIGTERM all ranks stop after the same step and write a checkpoint (and
torchrun itself, which passes the signal on, ends with its own traceback). `--resume` goes on from there; on CPU, with a
spec named, bit for bit like an unbroken run. An error on one rank (an unreadable file, a full disk) ends all
of them with one sentence that names rank and host.
"""

import contextlib
import math
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from commpress import extras
from commpress.launch import (
    budgets,
    data,
    endings,
    recipe_search,
    recipes,
    run_folder,
    runtime,
    scalars,
    strategies,
    tasks,
)
from commpress.launch.display import display, say, say_what_became, say_what_begins
from commpress.launch.evaluation import cross_entropy, validate
from commpress.launch.optimizers import learning_rate
from commpress.launch.recording import Recording
from commpress.launch.run_record import default_threads
from commpress.launch.run_state import Run
from commpress.launch.runtime import TrainingError, process_group, same_error_on_all_ranks, together
from commpress.launch.settings import Flags, Settings, check, require_alike
from commpress.launch.tasks import Own, Task

try:
    from commpress.launch import command_line
except ModuleNotFoundError as error:
    raise extras.missing("commpress.launch.train", error, "launch") from None

if TYPE_CHECKING:
    from commpress.model import Recipe

__all__ = ["Settings", "Train", "TrainingError", "check", "cross_entropy", "learning_rate", "train"]

CLIP_NORM = 1.0
CURVE_ROWS = 1000
"""The approximate number of rows of the loss curve, for any length of the run."""


def train(settings: Settings) -> bool:
    """Train, and write record.json and checkpoints into `settings.folder`. Returns False if it was asked to stop early.

    Collective: joins the ranks that torchrun started (or is a single one), unless a process group is already there.
    Raises TrainingError on all ranks; its sentence names the rank and its host if only one failed.
    """
    with process_group() as device, runtime.in_one_voice(), runtime.stop_signals() as stop:
        run = set_up(settings, device, stop)
        if run is None:
            return False
        if run.finished:
            go_over(run)
            return True
        say_what_begins(run)
        with contextlib.closing(run.board) if run.board else contextlib.nullcontext():
            loop(run, stop)
            finish(run)
        return run.finished


def set_up(settings: Settings, device: torch.device, stop: runtime.Stop) -> Run | None:
    """Check the settings, read the data, make the model on all ranks, and restore a checkpoint if asked for. Collective.

    With [search] that comes first; None if it was asked to stop.
    """
    settings = together(partial(recipes.with_specs, settings), device)
    require_alike(settings, device)  # before what the ranks do together by some flags alone
    settings = recipes.going_on(settings, device)
    recipe, task = together(partial(read_all, settings), device)
    torch.set_num_threads(settings.threads or default_threads())
    torch.manual_seed(settings.seed)
    with same_error_on_all_ranks():
        data.require_same_data(task.fingerprint, device)
        if settings.tensorboard:
            scalars.require(device)
    said, choice = None if recipe is None else recipe.to_dict(), None
    if before := recipes.chosen_before(settings, recipe, device):
        recipe, choice = before
        task = task.chosen(choice) if isinstance(task, Own) and choice is not None else task
    elif recipe is not None and recipe.search is not None:
        together(partial(recipe_search.require_space, recipe, task), device)
        together(
            partial(recipes.teacher, recipe, task, settings), device
        )  # what the run will miss is told before the search
        found = recipe_search.searched(settings, recipe, task, device, partial(part, stop=stop), stop)
        if found is None:
            return None
        task, recipe, choice = found.task, found.recipe, found.choice
        torch.manual_seed(settings.seed)
    if recipe is not None and isinstance(task, Own) and budgets.takes_structure(recipe):
        recipe, task = recipes.narrowed(recipe, task, settings, device)
        torch.manual_seed(settings.seed)
    run = Run.begin(settings, recipe, task, device, said, choice)
    if settings.resume or settings.fork is not None:
        run.restore()
    if settings.tensorboard and run.rank == 0 and not run.finished:
        run.board = scalars.Scalars(run.out / "tensorboard", run.done, sum(run.durations))
    return run


def read_all(settings: Settings) -> "tuple[Recipe | None, Task]":
    """Check the settings, and read the files that a rank needs before training. Raises ValueError or OSError."""
    check(settings)
    recipe = recipes.of_settings(settings)
    run_folder.require_usable(settings)
    return recipe, tasks.read(settings)


def part(run: Run, stop: runtime.Stop) -> None:
    """Train a run that is a part of another one. Collective."""
    say_what_begins(run)
    loop(run, stop)
    finish(run)


def go_over(run: Run) -> None:
    """Say that a run had finished before, or do the rest of its end. Collective. Raises TrainingError for what it missed."""
    over = f"{run.out} is already at step {run.done} of {run.settings.steps}"
    if run.scheduler is None or not endings.has_one(run.scheduler.recipe):
        say(f"{over}: nothing left to do")
    elif (missed := endings.of(run.out, run.done, run.device)) is None:
        say(f"{over}: what is left is its end")
        endings.write(run, recipes.whole(run.task, run.strategy, run.scheduler, run.device))
    else:
        say(f"{over}: nothing left to do")
        endings.require_good(missed, run.out)


def loop(run: Run, stop: runtime.Stop) -> None:
    """Train until all steps are done, or until a rank is asked to stop. Collective."""
    settings = run.settings
    endings.forget(run.out, run.device)
    if run.done == 0:
        run.add_to_curve(None, held_out(run))
    with display(settings, run.task, run.traffic.sent_bytes) as show, Recording(run) as recording:
        while not run.finished:
            recording.before_step()
            train_loss, stopping = step(run, stop)
            recording.after_step(stopping)
            due = run.finished or (settings.eval_every > 0 and run.done % settings.eval_every == 0)
            validation_loss = held_out(run) if due else None
            if due or run.done % math.ceil(settings.steps / CURVE_ROWS) == 0:
                run.add_to_curve(train_loss, validation_loss)
            phase = "" if run.scheduler is None else recipes.phase_label(run.scheduler)
            show.step(run.done, train_loss, validation_loss, run.durations, run.traffic, phase)
            if run.finished or stopping:
                return
            if due:
                run.write_record()
            if settings.checkpoint_every > 0 and run.done % settings.checkpoint_every == 0:
                run.save()


def step(run: Run, stop: runtime.Stop) -> tuple[float, bool]:
    """Take one optimizer step: the mean loss, and whether a rank was asked to stop. Collective."""
    started, settings, strategy, device = time.perf_counter(), run.settings, run.strategy, run.device
    for group in strategy.optimizer.param_groups:
        group["lr"] = learning_rate(run.done, settings)
    if run.paths is not None:
        run.paths.take(run.done)
    loss = torch.zeros((), dtype=torch.float32, device=device)
    for turn in range(settings.accumulate):
        inputs, targets = run.task.sample(run.own_windows)
        inputs = tuple(x.to(device) for x in inputs)
        # only the last one's backward synchronises the gradients
        with contextlib.nullcontext() if turn == settings.accumulate - 1 else strategy.accumulating():
            output = strategy.model(*inputs)
            task_loss = whole_loss = run.task.loss(output, targets.to(device))
            if run.scheduler is not None:
                whole_loss = run.scheduler.loss(task_loss, output, *inputs)
            if run.paths is not None:
                whole_loss = run.paths.loss(whole_loss)
            strategy.backward(whole_loss / settings.accumulate)
        loss += task_loss.detach() / settings.accumulate
    if not isinstance(strategy, strategies.Local):
        strategy.session.note_loss(loss)
    norm = strategy.clip(CLIP_NORM)
    # one small exchange a step: mean loss and norm, and whether any rank was asked to stop
    asked = torch.tensor(float(stop), dtype=torch.float64, device=device)
    world_size = dist.get_world_size()
    sums = torch.stack([loss.double() / world_size, norm.double() / world_size, asked])
    dist.all_reduce(sums)
    train_loss, norm_of_all, stopping = sums[0].item(), sums[1].item(), sums[2].item() > 0
    if not math.isfinite(train_loss) or not math.isfinite(norm_of_all):
        where = runtime.ranks_without(math.isfinite(loss.item()), device)
        raise TrainingError(
            f"step {run.done + 1}: the loss is {train_loss} and the gradient's norm {norm_of_all}"
            f"{f' (a loss that is not finite on {where})' if where else ''}, expected finite numbers; "
            f"--lr {settings.lr} is probably too high{runtime.or_too_coarse(strategy.session)}"
        )
    strategy.step()
    if run.scheduler is not None:
        if budgets.begins_at(run.scheduler.recipe) == run.done + 1:
            with strategy.synced():
                budgets.keep_dense(run.out, run.model, device)
        run.scheduler.step()
    run.done += 1
    if run.finished and isinstance(strategy, strategies.Local):
        strategy.outer.sync()
    run.durations.append(time.perf_counter() - started)
    return train_loss, stopping


def finish(run: Run) -> None:
    """Write the last files of the run, and print its result. Collective. Raises TrainingError for what its end missed."""
    full, scheduler = None, run.scheduler if run.finished else None
    if scheduler is not None:
        full = recipes.whole(run.task, run.strategy, scheduler, run.device)
        model, run.small = recipes.store(run.out / recipes.SMALL, full, run.task, scheduler, run.device)
        run.small["validation_loss"] = validate(model.to(run.device), run.task, run.device)
    run.write_record()
    run.save()
    say_what_became(run)
    try:
        if scheduler is not None:
            endings.write(run, full)
    finally:
        say(str(run.strategy.session.receipt()))


def held_out(run: Run) -> float:
    """Return the loss on held-out text. Collective."""
    with run.strategy.synced():
        return validate(run.model, run.task, run.device)


@dataclass(frozen=True)
class Train(Flags):
    """Train a byte-level GPT with compressed traffic, alone or under torchrun."""

    def run(self) -> None:
        """Train by the flags. Ends the program with code 1 and a sentence if that fails."""
        runtime.run_on_all_ranks(lambda: train(self.settings))


if __name__ == "__main__":
    command_line.read(Train, "python -m commpress.launch.train").run()
