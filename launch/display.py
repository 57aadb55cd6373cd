"""What rank 0 shows of a run while it trains."""

import contextlib
import math
import statistics
import sys
from collections.abc import Iterator

import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from commpress.launch.run_record import Traffic
from commpress.launch.settings import Settings, called

PLAIN_LINES = 20
"""Lines of progress in all where the output is not a terminal."""


def say(line: str) -> None:
    """Print a line on rank 0."""
    if dist.get_rank() == 0:
        print(line, flush=True)


class Display:
    """Progress on rank 0: a bar in a terminal, else a line now and then. Other ranks show nothing."""

    def __init__(self, settings: Settings, bar: Progress | None) -> None:
        self.settings, self.bar = settings, bar
        self.sent = 0
        self.validation = ""
        self.task = bar.add_task(called(settings), total=settings.steps, figures="") if bar else None

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
        speed = dist.get_world_size() * s.batch * s.accumulate * s.context / statistics.median(durations[-PLAIN_LINES:])
        figures = (
            f"loss {loss:.3f}{self.validation} {speed / 1e3:.1f}k tokens/s"
            f" {sent / 1e6:.3f} MB/step {traffic.ratio:.1f}x less{phase}"
        )
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=done, figures=figures)
        elif done == s.steps or validation_loss is not None or done % math.ceil(s.steps / PLAIN_LINES) == 0:
            say(f"step {done}/{s.steps}  {figures}")


@contextlib.contextmanager
def display(settings: Settings, done: int) -> Iterator[Display]:
    """How training is shown on this rank."""
    if dist.get_rank() == 0 and sys.stdout.isatty():
        columns = (
            BarColumn(bar_width=None),  # what is left of the terminal's width
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, expand=True) as bar:
            yield Display(settings, bar)
    else:
        yield Display(settings, None)
