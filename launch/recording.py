"""The timeline of --timeline: the phases of some steps, written after them."""

import contextlib
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING

from commpress.launch.display import say
from commpress.launch.run_state import Run
from commpress.launch.runtime import together

if TYPE_CHECKING:
    from commpress.comm.timeline import Timeline

TIMELINE_AFTER = 5
"""Steps before recording starts: DDP lays out its buckets again, caches warm up."""


class Recording(contextlib.AbstractContextManager["Recording"]):
    """Records --timeline steps of a run, from TIMELINE_AFTER steps after its start, and none without that flag."""

    def __init__(self, run: Run) -> None:
        self.run, self.steps = run, run.settings.timeline
        self.first = run.done + TIMELINE_AFTER
        self.open = contextlib.ExitStack()
        self.timeline: Timeline | None = None

    def before_step(self) -> None:
        """Begin, if the next step is the first to record."""
        if self.steps and self.run.done == self.first:
            self.timeline = self.open.enter_context(self.run.strategy.session.timeline())

    def after_step(self, stopping: bool) -> None:
        """Write OUT/timeline.json, if that step was the last to record. Collective."""
        run = self.run
        if self.timeline is not None and (stopping or run.finished or run.done == self.first + self.steps):
            self.open.close()
            write = partial(self.timeline.write, run.out / "timeline.json")
            together(write if run.rank == 0 else lambda: None, run.device)
            self.timeline = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.open.close()
        if error is None and self.steps and self.run.done <= self.first:
            say(f"no timeline: it starts {TIMELINE_AFTER} steps after the start, and this run had no more than that")
