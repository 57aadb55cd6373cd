"""The search: rounds of trials, shared by all workers with the same folder, and their results.

    problem = Problem(space(model), quality, size)
    result = search(problem, strategy="tpe", trials=40, folder="runs/search")

Every worker (a rank of a torchrun job, or a job on another machine) computes the same proposals, claims a free one,
and waits for the end of a round. There is nothing to coordinate, and no worker leads.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from commpress.model.search.journal import Folder, Journal, Memory
from commpress.model.search.objective import Weights, front, spread
from commpress.model.search.spaces import Choice, Space
from commpress.model.search.strategies import STRATEGIES, propose
from commpress.model.search.trial import Pruned, Trial, Tried, seed_of

TOGETHER = 4
"""The default number of trials in a round."""
PATIENCE = 0.1
"""Seconds after which an idle worker looks again."""
VERSION = 1


class SearchError(ValueError):
    """A trial that ended with an error; the text has its number and choice."""


@dataclass(frozen=True)
class Problem:
    """A space and the functions that judge its choices. For one choice and seed they must give the same value each time, or a
    resumed search differs from an unbroken one."""

    space: Space
    quality: Callable[[Trial], float]
    """f of `trial.choice`; it may `trial.report` its progress."""
    size: Callable[[Choice], float]
    """g, before f is known: parameters, bytes, seconds."""
    prepare: Callable[[], None] | None = None
    """Called by all ranks together before the first trial, and again when a search is resumed: it may train a supernet."""
    final: Callable[[Trial], float] | None = None
    """f of a finalist that is trained on its own, if `quality` used shared weights."""
    name: str = ""
    """A folder holds trials of one name only. `commpress search` gives a problem without a name that of --space."""


@dataclass(frozen=True)
class Result:
    """The trials of a search, and its front or best choice."""

    trials: list[Tried]
    """Trials by number."""
    weights: Weights | None
    finals: dict[int, float]
    """Quality of the finalists that were trained on their own, by number."""

    @property
    def front(self) -> list[Tried]:
        """Return the trials of the Pareto front of quality and size, by rising size."""
        return front(self.trials)

    @property
    def best(self) -> Tried | None:
        """Return the trial with the largest h; without weights, with the largest quality. None if no trial was done."""
        weights = self.weights or Weights()
        done = [tried for tried in self.trials if tried.quality is not None]
        return max(done, key=lambda tried: (weights.of(tried.quality or 0.0, tried.size), -tried.number), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        best = self.best
        return {
            "weights": None if self.weights is None else asdict(self.weights),
            "front": [tried.number for tried in self.front],
            "best": None if best is None else best.number,
            "finals": {str(number): quality for number, quality in sorted(self.finals.items())},
            "rows": [tried.to_dict() for tried in self.trials],
        }


def search(
    problem: Problem,
    *,
    strategy: str = "random",
    trials: int = 20,
    seed: int = 0,
    weights: Weights | None = None,
    together: int = TOGETHER,
    finalists: int = 0,
    folder: str | Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Result:
    """Run trials until there are `trials`, with all other workers in `folder`; return the result of all.

    `strategy` searches for the largest h with `weights`, for the front without. `together` trials are proposed from the same
    results, as a round, or a generation of `nsga2`: that many may run at once. A folder with trials of the same search goes on
    with them. `problem.final` judges `finalists` of the front again (with weights: of the largest h). `progress` gets
    the number of finished trials.

    The trials are the same, by any number of workers and through any restart, if quality and size are functions of the choice
    and the seed. Raises SearchError if one of these fails, ValueError for wrong settings, or settings that differ from those
    of the folder.
    """
    _require(problem, strategy, trials, together, finalists)
    settings = _settings(problem, strategy, seed, weights, together)
    journal: Journal = Memory() if folder is None else Folder(Path(folder), problem.space, settings)
    worker = _Worker(problem, journal, strategy, trials, seed, weights, together, progress)
    worker.run()
    result = Result(worker.over(), weights, {})
    if finalists:
        worker.finish(chosen := _finalists(result, finalists))
        result.finals.update({n: f for n, f in journal.finals().items() if n in {tried.number for tried in chosen}})
    return result


@dataclass
class _Worker:
    """A worker of a search."""

    problem: Problem
    journal: Journal
    strategy: str
    trials: int
    seed: int
    weights: Weights | None
    together: int
    progress: Callable[[int], None] | None

    def run(self) -> None:
        """Run trials until all have ended. A round waits for the rounds before."""
        begin, proposals = -1, list[Choice]()
        while True:
            tried = self.journal.trials()
            self._tell(len(self.over()))
            over = next((n for n in range(self.trials) if n not in tried), self.trials)
            if over == self.trials:
                return
            if over - over % self.together != begin:
                begin = over - over % self.together
                count = min(self.together, self.trials - begin)
                before = [tried[n] for n in range(begin)]
                proposals = propose(
                    self.problem.space, self.strategy, self.seed, self.weights, before, count, self.together
                )
            waiting = [n for n in range(begin, begin + len(proposals)) if n not in tried]
            if not waiting:
                return  # all choices were tried
            done = [self._done(n, proposals[n - begin], before) for n in waiting]
            if not any(done):
                time.sleep(PATIENCE)

    def over(self) -> list[Tried]:
        """Return the trials of this search by number; the folder may have more from a longer one."""
        return [tried for number, tried in sorted(self.journal.trials().items()) if number < self.trials]

    def finish(self, chosen: list[Tried]) -> None:
        """Judge finalists, each trained on its own."""
        while waiting := [tried for tried in chosen if tried.number not in self.journal.finals()]:
            worked = False
            for tried in waiting:
                with self.journal.claim(f"final-{tried.number}") as mine:
                    if mine and tried.number not in self.journal.finals():
                        trial = self._trial(tried.number, tried.choice, tried.size, [])
                        assert self.problem.final is not None
                        self.journal.add_final(tried.number, self._called(trial, self.problem.final))
                        worked = True
            if not worked:
                time.sleep(PATIENCE)

    def _done(self, number: int, choice: Choice, before: list[Tried]) -> bool:
        """Run a trial, unless another worker has or is running it; return whether it ran here."""
        with self.journal.claim(f"trial-{number}") as mine:
            if not mine or number in self.journal.trials():
                return False
            self.journal.add(self._tried(number, choice, before))
            self._tell(len(self.over()))
            return True

    def _tried(self, number: int, choice: Choice, before: list[Tried]) -> Tried:
        began = time.perf_counter()
        size = self._guarded(number, choice, lambda: self.problem.size(dict(choice)))
        if not math.isfinite(size):
            raise SearchError(f"trial {number}, {choice}: its size is {size}, expected a finite number")
        trial = self._trial(number, choice, size, before)
        quality: float | None = None
        try:
            quality = self._called(trial, self.problem.quality)
            state = "done" if math.isfinite(quality) else "failed"
        except Pruned:
            state = "pruned"
        if state == "failed":
            quality = None
        seconds = time.perf_counter() - began
        return Tried(number, choice, state, quality, size, trial.curve, seconds)  # type: ignore[arg-type]

    def _trial(self, number: int, choice: Choice, size: float, before: list[Tried]) -> Trial:
        return Trial(number, dict(choice), size, seed_of("trial", self.seed, number), before, self.weights)

    def _called(self, trial: Trial, judge: Callable[[Trial], float]) -> float:
        torch.manual_seed(trial.seed)
        return self._guarded(trial.number, trial.choice, lambda: judge(trial))

    def _guarded(self, number: int, choice: Choice, action: Callable[[], float]) -> float:
        try:
            return float(action())
        except Pruned:
            raise
        except Exception as error:
            raise SearchError(f"trial {number}, {choice}: {type(error).__name__}: {error}") from error

    def _tell(self, over: int) -> None:
        if self.progress is not None:
            self.progress(over)


def _finalists(result: Result, count: int) -> list[Tried]:
    """Return the `count` trials of the front with the largest h; without weights, `count` spread along it."""
    if (weights := result.weights) is None:
        return spread(result.front, count)
    best = sorted(result.front, key=lambda tried: (-weights.of(tried.quality or 0.0, tried.size), tried.number))
    return best[:count]


def _settings(problem: Problem, strategy: str, seed: int, weights: Weights | None, together: int) -> dict[str, Any]:
    """Return the settings that all workers of a folder must share, as JSON values."""
    return {
        "version": VERSION,
        "problem": problem.name,
        "space": {name: list(options) for name, options in problem.space.items()},
        "conditions": {
            name: {other: list(of) for other, of in c.items()} for name, c in problem.space.conditions.items()
        },
        "strategy": strategy,
        "seed": seed,
        "weights": None if weights is None else asdict(weights),
        "together": together,
    }


def _require(problem: Problem, strategy: str, trials: int, together: int, finalists: int) -> None:
    if not isinstance(problem.space, Space):
        raise ValueError(
            f"the space of the problem is a {type(problem.space).__name__}, expected a commpress.model.search.Space"
        )
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r}: expected one of {', '.join(STRATEGIES)}")
    least_together = 2 if strategy == "nsga2" else 1  # a generation has two parents
    for name, value, least in (
        ("trials", trials, 1),
        ("together", together, least_together),
        ("finalists", finalists, 0),
    ):
        if value < least:
            raise ValueError(f"{name} {value}: expected a whole number of at least {least}")
    if finalists and problem.final is None:
        raise ValueError(f"finalists {finalists}: the problem has no `final` to judge them by, expected one")
