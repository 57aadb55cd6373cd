"""Strategies that propose choices: `random`, `tpe` (Bergstra et al., NeurIPS 2011) and `nsga2` (Deb et al., 2002), by Optuna.

Proposals come in rounds. A round's proposals are a function of seed, strategy and the trials of earlier rounds, so they are
the same on every rank and after every restart: each time Optuna's sampler starts again, with a separate seed for each trial,
and gets those trials. Within a round it knows the earlier proposals, not their results.
"""

import contextlib
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from commpress import extras
from commpress.model.search.objective import Weights
from commpress.model.search.spaces import Choice, Option, Space
from commpress.model.search.trial import Tried, seed_of

if TYPE_CHECKING:
    import optuna

STRATEGIES = ("random", "tpe", "nsga2")
DRAWS = 10_000
"""The number of draws of a new choice; if all were tried before, the space counts as exhausted."""


def propose(
    space: Space, strategy: str, seed: int, weights: Weights | None, before: Sequence[Tried], count: int, together: int
) -> list[Choice]:
    """Return the next `count` choices after whole rounds of `together` trials; fewer if the space is exhausted.

    No choice appears twice: an untried neighbour replaces a tried one. The first proposals
    do not depend on `count`. Raises ModuleNotFoundError without Optuna.
    """
    tried = {_key(each.choice) for each in before}
    found: list[Choice] = []
    with _quiet() as optuna:
        coded = _Coded(optuna, space)
        study = _study(optuna, coded, strategy, weights, before, together)
        for number in range(len(before), len(before) + count):
            study.sampler = _sampler(optuna, strategy, seed_of("sampler", seed, number), together)
            proposed = coded.choice(study.ask(coded.distributions).params)
            choice = _untried(space, proposed, tried, random.Random(f"neighbour {seed} {number}"))
            if choice is None:
                break
            tried.add(_key(choice))
            found.append(choice)
    return found


class _Coded:
    """Options coded for Optuna: by their places, and rising numbers in order, so that it can search near good ones."""

    def __init__(self, optuna: Any, space: Space) -> None:
        self._space = space
        of = optuna.distributions
        self.distributions = {
            name: of.IntDistribution(0, len(options) - 1)
            if _rising(options)
            else of.CategoricalDistribution(tuple(range(len(options))))
            for name, options in space.items()
        }

    def params(self, choice: Choice) -> dict[str, int]:
        """Return the places of a choice's options."""
        found = {}
        for name, options in self._space.items():
            keys = [(type(option), option) for option in options]
            found[name] = keys.index((type(choice[name]), choice[name]))
        return found

    def choice(self, params: dict[str, Any]) -> Choice:
        """Return the canonical choice."""
        return self._space.canonical({name: options[params[name]] for name, options in self._space.items()})


def _study(
    optuna: Any, coded: _Coded, strategy: str, weights: Weights | None, before: Sequence[Tried], together: int
) -> "optuna.Study":
    """Return a study in memory with the trials of earlier rounds. A trial without a quality counts as the worst."""
    study = optuna.create_study(directions=["maximize", "minimize"] if weights is None else ["maximize"])
    good = [tried.quality for tried in before if tried.quality is not None]
    worst = min(good, default=0.0)
    for tried in before:
        quality = worst if tried.quality is None else tried.quality
        values = [quality, tried.size] if weights is None else [weights.of(quality, tried.size)]
        generation = {_generation(optuna): tried.number // together} if strategy == "nsga2" else {}
        study.add_trial(
            optuna.trial.create_trial(
                params=coded.params(tried.choice),
                distributions=coded.distributions,
                values=values,
                system_attrs=generation,
            )
        )
    return study


def _sampler(optuna: Any, strategy: str, seed: int, together: int) -> Any:
    if strategy == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if strategy == "tpe":
        return optuna.samplers.TPESampler(seed=seed)
    return optuna.samplers.NSGAIISampler(seed=seed, population_size=together)


def _generation(optuna: Any) -> str:
    """The attribute in which NSGA-II finds a trial's generation: here a round."""
    return str(optuna.samplers.NSGAIISampler._get_generation_key())


def _untried(space: Space, choice: Choice, tried: set[tuple[Option, ...]], source: random.Random) -> Choice | None:
    """Return the choice, or the first new one on a walk that changes one option per step; None if there is none."""
    names = [name for name, options in space.items() if len(options) > 1]
    for _ in range(DRAWS):
        if _key(choice) not in tried:
            return choice
        if not names:
            return None
        name = source.choice(names)
        choice = space.canonical({**choice, name: source.choice(space[name])})
    return None


def _rising(options: Sequence[Option]) -> bool:
    numbers = [option for option in options if isinstance(option, int | float) and not isinstance(option, bool)]
    return len(numbers) == len(options) and all(a < b for a, b in itertools.pairwise(numbers))


def _key(choice: Choice) -> tuple[Any, ...]:
    return tuple((name, type(option), option) for name, option in choice.items())


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
    """Return Optuna, without its lines about every study. Raises ModuleNotFoundError that names the extra."""
    optuna = library()
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield optuna
    finally:
        optuna.logging.set_verbosity(level)


def library() -> Any:
    """Return Optuna. Raises ModuleNotFoundError that names the extra to install."""
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise extras.missing("commpress.model.search", error, "search") from error
    return optuna
