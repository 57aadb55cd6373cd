"""When a parameter of 0/1 Adam syncs: every so many steps, ever more rarely, or as rarely as `auto` finds it worth."""

from collections.abc import Iterable
from dataclasses import dataclass

from commpress.comm.codecs import parse
from commpress.comm.optimizer_hooks import Candidate
from commpress.optim.settings import require_in_range

MANY = 1 << 20


@dataclass(frozen=True)
class Growing:
    """Syncs every `first` steps, and twice as rarely after each `steps` further ones, up to every `last`."""

    steps: int
    first: int = 1
    last: int = 16

    def __post_init__(self) -> None:
        require_in_range("Growing.steps", self.steps, 1)
        require_in_range("Growing.first", self.first, 1)
        require_in_range("Growing.last", self.last, self.first)

    def interval(self, step: int) -> int:
        """Steps between syncs, `step` steps after the warm-up."""
        return int(min(self.last, self.first << min(step // self.steps, 62)))


@dataclass(frozen=True)
class Sync:
    """A step's effect on a parameter's local steps: `keep` is 1 - lr wd, `weight` that of all since the last sync, and
    `share` this step's part of it."""

    keep: float
    weight: float
    share: float


def candidates(specs: Iterable[str], now: int, most: int) -> list[Candidate]:
    """Return `none` in every step, and `specs` every 1, 2, 4, ... steps below `now`, and every `most`; what sends more first.

    `most` stands for the interval that was asked for: as long as that grows, it is `now`.
    """
    intervals = [*(1 << power for power in range(now.bit_length()) if 1 << power < now), most]
    found = {Candidate("none"), *(Candidate(spec, every, min(every, now)) for spec in specs for every in intervals)}
    return sorted(found, key=lambda one: (-parse(one.spec).nbytes(MANY) / one.now, one.sync_every))
