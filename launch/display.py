"""Lines and the progress bar that rank 0 prints of a run."""

import contextlib
import math
import statistics
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from commpress.launch.recipes import SMALL
from commpress.launch.run_record import Traffic
from commpress.launch.settings import Settings, run_title
from commpress.launch.tasks import Task

if TYPE_CHECKING:
    from commpress.launch.run_state import Run

PLAIN_LINES = 20
"""The number of progress lines if the output is not a terminal."""


def say(line: str) -> None:
    """Print a line on rank 0."""
    if dist.get_rank() == 0:
        print(line, flush=True)


def say_what_begins(run: "Run") -> None:
    """Print a line about a run that is about to train."""
    say(
        f"{run.task.parameters / 1e6:.1f} M parameters, {run_title(run.settings)}, {dist.get_world_size()} ranks "
        f"({dist.get_backend()}, {run.device.type}, {torch.get_num_threads()} threads each), "
        f"{run.task.told()}" + (f"; going on at step {run.done}" if run.done else "")
    )
    if any(run.leaders):
        say(f"--out {run.out} is a folder of its own on each host: each keeps the files of its own ranks")


def say_what_became(run: "Run") -> None:
    """Print the result of a run, or how to go on with it."""
    settings, done = run.settings, run.done
    if not run.finished:
        more = " with --resume" + (" instead of --fork" if settings.fork is not None else "")
        more = "" if settings.recipe is not None or run.is_search else more
        say(f"stopped at step {done} of {settings.steps}; the same command{more} goes on from {run.out}")
        return
    say(str(run.strategy.session.report()).rstrip())
    say(
        f"validation loss {run.curve[-1]['validation_loss']:.4f} after {done} steps; record in {run.out / 'record.json'}"
    )
    if (small := run.small) is not None:
        say(
            f"{small['sparsity']:.0%} pruned, {small['bytes'] / 1e6:.2f} MB in {run.out / SMALL}, "
            f"{small['times_smaller']:.1f} times smaller than in float32; read back its validation loss is "
            f"{small['validation_loss']:.4f}"
        )


class Display:
    """Progress on rank 0: a bar in a terminal, else a line now and then. Other ranks show nothing.

    `sent` are the bytes that this rank has sent so far, in earlier starts of the run, too.
    """

    def __init__(self, settings: Settings, task: Task, bar: Progress | None, sent: int) -> None:
        self.settings, self.task_of_run, self.bar = settings, task, bar
        self.sent = sent
        self.validation = ""
        self.task = bar.add_task(run_title(settings), total=settings.steps, figures="") if bar else None

    def step(
        self,
        done: int,
        loss: float,
        validation_loss: float | None,
        durations: list[float],
        traffic: Traffic,
        phase: str = "",
    ) -> None:
        s = self.settings
        sent, self.sent = traffic.sent_bytes - self.sent, traffic.sent_bytes
        if validation_loss is not None:
            self.validation = f" val {validation_loss:.3f}"
        of = self.task_of_run
        speed = dist.get_world_size() * s.accumulate * of.amount / statistics.median(durations[-PLAIN_LINES:])
        figures = (
            f"loss {loss:.3f}{self.validation} {speed / 1e3:.1f}k {of.unit}/s"
            f" {sent / 1e6:.3f} MB/step {traffic.ratio:.1f}x less{phase}"
        )
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=done, figures=figures)
        elif done == s.steps or validation_loss is not None or done % math.ceil(s.steps / PLAIN_LINES) == 0:
            say(f"step {done}/{s.steps}  {figures}")


@contextlib.contextmanager
def display(settings: Settings, task: Task, sent: int) -> Iterator[Display]:
    """Return the display of training on this rank, which has sent so many bytes so far."""
    if dist.get_rank() == 0 and sys.stdout.isatty():
        columns = (
            BarColumn(bar_width=None),  # what is left of the terminal's width
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, expand=True) as bar:
            yield Display(settings, task, bar, sent)
    else:
        yield Display(settings, task, None, sent)
