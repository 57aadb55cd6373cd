"""A comparison of two close specs by longer turns than those of a search. Both are nearly the best, so it costs little.

A ........ B ........ | B ........ A ........ | A ........ B ........ | over if all three had one winner, else two more
"""

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from commpress.comm.choice import Trial

CLOSE = 1.06
"""A spec meets the chosen one in a duel if its steps took less than this times the step time at which it would win."""
SOONEST, BOUTS = 3, 5
"""A duel ends after `SOONEST` bouts if all had the same winner, and after `BOUTS` in any case."""
HOPELESS = 1.25
"""A rival whose steps took this times as long in its first bout has lost: the prediction was wrong."""


@dataclass
class Duel:
    """`rival` wins a bout if its step takes less than `limit` times that of `chosen`."""

    chosen: str
    rival: str
    limit: float
    bouts: list[tuple[float, float]] = field(default_factory=list)
    """Seconds of a step of the chosen spec and of its rival, in each bout so far."""

    def turns(self) -> tuple[str, str]:
        """Return the order of the two specs in the next bout. It alternates, so that a drift favours neither."""
        return (self.chosen, self.rival) if len(self.bouts) % 2 == 0 else (self.rival, self.chosen)

    def count(self, seconds: Mapping[str, float]) -> bool:
        """Count a bout with these seconds a step, by spec. Returns whether the duel is over."""
        self.bouts.append((seconds[self.chosen], seconds[self.rival]))
        won, (mine, theirs) = self._won(), self.bouts[0]
        return len(won) == BOUTS or (len(won) >= SOONEST and len(set(won)) == 1) or theirs > HOPELESS * mine

    def winner(self) -> str:
        """Return the spec that has won more bouts."""
        won = self._won()
        return self.rival if 2 * sum(won) > len(won) else self.chosen

    def seconds(self) -> dict[str, float]:
        """Return the median seconds of a step over the bouts, by spec."""
        mine, theirs = (statistics.median(of) for of in zip(*self.bouts, strict=True))
        return {self.chosen: mine, self.rival: theirs}

    def _won(self) -> list[bool]:
        return [theirs < self.limit * mine for mine, theirs in self.bouts]


def rivals_of(
    winner: str, left: Iterable[str], trials: Iterable[Trial], codec: Callable[[str], str], worth: float
) -> list[str]:
    """Return whom the winner of a duel meets: the rivals that are left, without pieces of other codecs, and its own pieces.

    Its pieces must be untried, and predicted to take less than `worth` times the seconds of its whole buckets.
    """
    mine, predicted = codec(winner), {trial.spec: trial.predicted or 0.0 for trial in trials}
    kept = [spec for spec in left if codec(spec) in (spec, mine)]
    untried = [trial.spec for trial in trials if trial.measured is None and codec(trial.spec) == mine != trial.spec]
    ahead = [spec for spec in untried if spec not in kept and predicted[spec] < worth * predicted[mine]]
    return kept + ahead
