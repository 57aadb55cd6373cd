"""The sync intervals of 0/1 Adam: a fixed number of steps, a growing one, or one that `auto` chooses."""

from collections.abc import Iterable
from dataclasses import dataclass

from commpress.comm.codecs import parse
from commpress.comm.optimizer_hooks import Candidate
from commpress.optim.settings import require_in_range

MANY = 1 << 20


@dataclass(frozen=True)
class Growing:
    """An interval of `first` steps that doubles after each further `steps` steps, up to `last`."""

    steps: int
    first: int = 1
    last: int = 16

    def __post_init__(self) -> None:
        require_in_range("Growing.steps", self.steps, 1)
        require_in_range("Growing.first", self.first, 1)
        require_in_range("Growing.last", self.last, self.first)

    def interval(self, step: int) -> int:
        """Return the number of steps between syncs, `step` steps after the warm-up."""
        return int(min(self.last, self.first << min(step // self.steps, 62)))


@dataclass(frozen=True)
class Sync:
    """The factors of one step of a parameter: `keep` is 1 - lr wd, `weight` the sum of the decayed learning rates since the
    last sync, and `share` this step's part of that sum."""

    keep: float
    weight: float
    share: float


def candidates(specs: Iterable[str], now: int, most: int) -> list[Candidate]:
    """Return the candidates of `auto`, those that send more first.

    These are `none` in every step, and each of `specs` every 1, 2, 4, ... steps below `now` and every `most` steps. `most` is
    the interval that the user asked for; while that interval grows, its present value is `now`.
    """
    intervals = [*(1 << power for power in range(now.bit_length()) if 1 << power < now), most]
    found = {Candidate("none"), *(Candidate(spec, every, min(every, now)) for spec in specs for every in intervals)}
    return sorted(found, key=lambda one: (-parse(one.spec).nbytes(MANY) / one.now, one.sync_every))
