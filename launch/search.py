"""Search an architecture or compression settings: trials, their table and front, and a folder to resume from.

    commpress search --space my_project.search:problem --strategy tpe --trials 40 --out runs/search
    torchrun --nproc-per-node 2 -m commpress.launch.search --space my_project.search:problem

The factory returns a `commpress.model.search.Problem`. Ranks share the trials, with other machines that run the same command
with the same --out. The same command again continues the search.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from commpress import extras
from commpress.files import write_atomically
from commpress.launch import run_folder, runtime
from commpress.launch.model_size import imported
from commpress.launch.predictions import require, say, show
from commpress.launch.records import SEARCHED, Record
from commpress.launch.run_record import default_threads
from commpress.launch.runtime import TrainingError, same_error_on_all_ranks, together
from commpress.notice import global_rank

try:
    from commpress.launch import command_line, report
    from commpress.launch.sections.searches import front_rows, sentence
except ModuleNotFoundError as error:
    raise extras.missing("commpress.launch.search", error, "launch") from None

if TYPE_CHECKING:
    from commpress.model.search import Problem, Weights

RECORD, PAGE = "search.json", "front.html"
PLAIN_LINES = 20
"""The number of progress lines if the output is not a terminal."""


@dataclass(frozen=True)
class Search:
    """Search an architecture or compression settings; ranks share the trials."""

    space: str = ""
    """The problem to search, module:factory; the factory returns a commpress.model.search.Problem. Required."""
    strategy: Literal["random", "tpe", "nsga2"] = "tpe"
    """The strategy that proposes choices."""
    trials: int = 20
    """Number of trials, those in --out included."""
    seed: int = 0
    """Seed of the proposals, and of what is random in a trial."""
    alpha: float = 1.0
    """Weight of quality in h = alpha f - beta g; used with --beta."""
    beta: float | None = None
    """Weight of size in h. None: search the front of both."""
    together: int = 4
    """Trials that are proposed from the same results and may run at once; the size of a generation of nsga2."""
    finalists: int = 0
    """Number of choices on the front that the problem's `final` trains on their own."""
    out: Path = Path("runs/search")
    """Folder for trials, search.json and front.html. Runs with the same folder share the search."""

    def run(self) -> None:
        """Search and print. Ends the program with code 1 and a sentence on all ranks if that fails, with 130 on Ctrl-C."""
        try:
            runtime.run_on_all_ranks(self.search)
        except KeyboardInterrupt:
            if global_rank() == 0:
                print(f"stopped; the same command goes on with the trials in {self.out}", file=sys.stderr)
            sys.exit(130)

    def search(self) -> None:
        """Search on all ranks, print on rank 0. Collective. Raises TrainingError on all ranks."""
        with runtime.process_group() as device, runtime.in_one_voice():
            together(self.require_sense, device)
            runtime.require_same_flags({key: value for key, value in vars(self).items() if key != "out"}, device)
            torch.set_num_threads(default_threads())
            problem = together(self.problem, device)
            if any(run_folder.leaders(self.out, device)):
                raise TrainingError(
                    f"--out {self.out}: is not the same folder on all hosts, expected one that all share"
                )
            if problem.prepare is not None:
                with same_error_on_all_ranks():
                    problem.prepare()
            record = self.tried(problem)
            together(partial(self.print, record) if dist.get_rank() == 0 else int, device)

    def require_sense(self) -> None:
        """Raise ValueError for flags that make no sense."""
        require(bool(self.space), "--space: expected module:factory, such as my_project.search:problem")
        least = {"trials": 1, "together": 2 if self.strategy == "nsga2" else 1, "finalists": 0}
        for name, number in least.items():
            value = getattr(self, name)
            require(value >= number, f"--{name} {value}: expected a whole number of at least {number}")
        ranks = dist.get_world_size()
        require(
            self.together >= ranks, f"--together {self.together}: keeps some of {ranks} ranks idle, expected {ranks}"
        )
        for name, weight in (("alpha", self.alpha), ("beta", self.beta)):
            good = weight is None or (math.isfinite(weight) and weight >= 0)
            require(good, f"--{name} {weight}: expected a finite number of at least 0")
        require(
            self.alpha > 0 or bool(self.beta), "--alpha 0: expected a --beta above 0 with it, or all choices are equal"
        )
        require(self.beta is not None or self.alpha == 1, f"--alpha {self.alpha:g}: has an effect only with --beta")
        run_folder.require_writable(self.out)

    def problem(self) -> "Problem":
        """Return the factory's problem, with a name. Raises ValueError that names the flag if it makes none."""
        from commpress.model.search import Problem
        from commpress.model.search.strategies import library

        library()
        factory = imported(self.space, "--space")
        try:
            found = factory()
        except (Exception, SystemExit) as error:
            raise ValueError(f"--space {self.space}: the call fails: {type(error).__name__}: {error}") from error
        if not isinstance(found, Problem):
            raise ValueError(
                f"--space {self.space}: returns a {type(found).__name__}, expected a commpress.model.search.Problem"
            )
        require(
            not self.finalists or found.final is not None, f"--finalists {self.finalists}: the Problem has no `final`"
        )
        return found if found.name else replace(found, name=self.space)

    def tried(self, problem: "Problem") -> Record:
        """Run the trials, with all others that share the folder, and return the record."""
        from commpress.model.search import search

        with shown(self.space, self.trials) as progress:
            found = search(
                problem,
                strategy=self.strategy,
                trials=self.trials,
                seed=self.seed,
                weights=self.weights(),
                together=self.together,
                finalists=self.finalists,
                folder=self.out,
                progress=progress,
            )
        return {
            "what": SEARCHED,
            "problem": self.space,
            "strategy": self.strategy,
            "seed": self.seed,
            **found.to_dict(),
        }

    def weights(self) -> "Weights | None":
        """Return the weights of h; None without --beta."""
        from commpress.model.search import Weights

        return None if self.beta is None else Weights(self.alpha, self.beta)

    def print(self, record: Record) -> None:
        """Print the result, and write search.json and front.html. Raises ValueError or OSError if that fails."""
        say(sentence(record))
        if len(record["rows"]) < self.trials:
            say("There is no choice that was not tried.")
        if not record["front"]:
            raise ValueError(f"--space {self.space}: no trial has a finite quality")
        head, *rows = front_rows(record)
        made = Table(*head, title="front", box=box.SIMPLE_HEAD)
        for row in rows:
            made.add_row(*row)
        show(made)
        text = json.dumps(_finite(record), indent=1, allow_nan=False) + "\n"
        write_atomically(self.out / RECORD, lambda file: file.write(text.encode()))
        report.write(self.out / PAGE, report.page([record]))
        say(f"record in {self.out / RECORD}, the front as a picture in {self.out / PAGE}")


@contextmanager
def shown(title: str, trials: int) -> Iterator[Callable[[int], None] | None]:
    """Show on rank 0 how many trials have ended: a bar in a terminal, else a line now and then."""
    if dist.get_rank() != 0:
        yield None
    elif sys.stdout.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn())
        with Progress(*columns, TimeRemainingColumn(compact=True), expand=True) as bar:
            task = bar.add_task(title, total=trials)
            yield lambda over: bar.update(task, completed=over)
    else:
        yield _Lines(trials)


class _Lines:
    """Progress as lines."""

    def __init__(self, trials: int) -> None:
        self._trials, self._every = trials, math.ceil(trials / PLAIN_LINES)
        self._said = 0

    def __call__(self, over: int) -> None:
        due = over == self._trials or over // self._every > self._said // self._every
        if over > self._said and due:
            print(f"trial {over}/{self._trials}", flush=True)
            self._said = over


def _finite(value: Any) -> Any:
    """Turn NaN and Inf, which JSON does not have, into text."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    command_line.read(Search, "python -m commpress.launch.search").run()
