"""Which of several specs makes the shortest steps: tried in turns, decided by medians that all ranks know, looked at again.

    none  not counted | none | A B none | A B none | A B none | A ................ | A ................ ...
                             ^ ranked   ^ one is far          ^ chosen             ^ the ranks look: are the steps still
                                          behind: dropped                            as long as they were? Else from `none` on

Steps of a turn are timed from one to the next; the first of each turn is not counted. The ranks compare at the same steps, and
decide from what all of them have said, so all decide the same. No clock and no process group: who holds a search tells it how
long a step took, and what the ranks said.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

PLAIN = "none"
WARM_UP = 3
"""Steps that are not counted at first: DDP lays its buckets out anew after one, caches and connections are cold."""
FIRST_TURN = 3
TURN = 3
"""Steps of a turn, of which the first is not counted."""
ROUNDS = 3
MOST = 2
"""So many specs are tried against `none`."""
HOPELESS = 1.3
"""A spec whose predicted step is so many times as long as that of `none` is not tried."""
FAR_BEHIND = 1.25
"""After a round a spec that takes so many times as long as the best is tried no more."""
WORTH = 0.98
"""A spec is chosen only if its steps take less than this share of those of `none`."""
DRIFT = 1.2
"""Steps that have become so many times as long, or as short, are looked into."""
LOOK = 16
"""Fewest steps from one look to the next."""
SHARE = 0.01
"""Share of the time that looking may take."""
AGAIN = 3000
"""Fewest steps from one search to the next, if the steps do not drift."""

Said = Mapping[str, object]


@dataclass
class Trial:
    """One spec: the step that was predicted for it, and the median of those that it took, in seconds; None if there is none."""

    spec: str
    predicted: float | None = None
    measured: float | None = None


@dataclass
class Choice:
    """The outcome of a search: `spec` was chosen at the end of step `step`, among these."""

    spec: str
    step: int
    trials: list[Trial]

    def seconds(self, spec: str) -> float | None:
        """Return the measured step of a spec; None if it was not tried."""
        return next((trial.measured for trial in self.trials if trial.spec == spec), None)


@dataclass
class Search:
    """The specs that are tried beside `none`; `predict` ranks them, from what each rank said at the end of the plain steps.

    `predict` returns seconds a step by spec, that of `none` among them, the same on all ranks.
    """

    predict: Callable[[Sequence[Said], float], Mapping[str, float]]
    choices: list[Choice] = field(default_factory=list)
    """What was chosen, the last one last."""
    steps: int = 0
    """Steps that have ended."""

    def __post_init__(self) -> None:
        self._state = "warm up"
        self._steps_to_come = deque([(PLAIN, False)] * WARM_UP)
        self._tried: list[str] = [PLAIN]
        self._predicted: dict[str, float] = {}
        self._seconds: dict[str, list[float]] = {}
        self._round = 0
        self._patience = 1
        self._looks = 0
        self._next_search = 0

    @property
    def spec(self) -> str:
        """The spec of the step that goes on now, or begins next."""
        return self._steps_to_come[0][0]

    @property
    def state(self) -> str:
        """One of "warm up", "plain", "trying", "chosen"."""
        return self._state

    def note(self, seconds: float) -> bool:
        """Note that a step has taken so long; return whether the ranks must compare before the next one."""
        self.steps += 1
        spec, counts = self._steps_to_come.popleft()
        if counts:
            self._seconds.setdefault(spec, []).append(seconds)
        return not self._steps_to_come

    def medians(self) -> dict[str, float]:
        """Return what this rank has measured since the search began, or since the last look: seconds by spec."""
        return {spec: statistics.median(seconds) for spec, seconds in self._seconds.items()}

    def compare(self, everyone: Sequence[Said]) -> None:
        """Go on from what each rank said: its `medians`, and the seconds that a comparison took (`asked`)."""
        if self._state == "warm up":
            self._state = "plain"
            self._begin([(PLAIN, True)] * FIRST_TURN)
        elif self._state == "plain":
            self._rank(everyone)
        elif self._state == "trying":
            self._end_round(everyone)
        else:
            self._look(everyone)

    def _begin(self, steps: Sequence[tuple[str, bool]], keep: bool = False) -> None:
        self._steps_to_come = deque(steps)
        if not keep:
            self._seconds = {}

    def _rank(self, everyone: Sequence[Said]) -> None:
        plain = _agreed(everyone)[PLAIN]
        self._predicted = dict(self.predict(everyone, plain))
        others = [s for s in self._predicted if s != PLAIN and self._predicted[s] < HOPELESS * plain]
        self._tried = [*sorted(others, key=lambda s: self._predicted[s])[:MOST], PLAIN]
        self._round = 0
        if len(self._tried) == 1:
            self._choose(everyone)
            return
        self._state = "trying"
        self._next_round()

    def _next_round(self) -> None:
        turn = [False] + [True] * (TURN - 1)
        self._begin([(spec, counts) for spec in self._tried for counts in turn], keep=True)

    def _end_round(self, everyone: Sequence[Said]) -> None:
        found, self._round = _agreed(everyone), self._round + 1
        best = min(found[spec] for spec in self._tried)
        self._tried = [spec for spec in self._tried if found[spec] < FAR_BEHIND * best]
        if self._round == ROUNDS or len(self._tried) == 1:
            self._choose(everyone)
        else:
            self._next_round()

    def _choose(self, everyone: Sequence[Said]) -> None:
        found = _agreed(everyone)
        best = min(self._tried, key=lambda spec: found[spec])
        if best != PLAIN and found[best] >= WORTH * found[PLAIN]:
            best = PLAIN
        names = dict.fromkeys([PLAIN, *self._predicted])
        trials = [Trial(spec, self._predicted.get(spec), found.get(spec)) for spec in names]
        same = bool(self.choices) and self.choices[-1].spec == best
        self._patience = 2 * self._patience if same else 1
        self.choices.append(Choice(best, self.steps, trials))
        lost = sum(len(s) * max(0.0, found[spec] - found[best]) for spec, s in self._seconds.items())
        self._next_search = self.steps + max(AGAIN, math.ceil(lost / SHARE / found[best]))
        self._state, self._looks = "chosen", 0
        self._watch(everyone, found[best])

    def _watch(self, everyone: Sequence[Said], seconds: float) -> None:
        spec = self.choices[-1].spec
        asked = max(float(str(said.get("asked", 0.0))) for said in everyone)
        interval = max(LOOK, math.ceil(asked / SHARE / seconds))
        self._begin([(spec, False)] + [(spec, True)] * interval)

    def _look(self, everyone: Sequence[Said]) -> None:
        choice, self._looks = self.choices[-1], self._looks + 1
        now, then = _agreed(everyone)[choice.spec], choice.seconds(choice.spec)
        assert then is not None
        drifted = not then / DRIFT < now < then * DRIFT
        if (drifted and self._looks >= self._patience) or self.steps >= self._next_search:
            self._state = "plain"
            self._begin([(PLAIN, False)] + [(PLAIN, True)] * (TURN - 1))
        else:
            self._watch(everyone, now)


def _agreed(everyone: Sequence[Said]) -> dict[str, float]:
    """The mean of the ranks' medians, by spec: they wait for each other, so they have nearly the same."""
    medians = [said["medians"] for said in everyone]
    assert all(isinstance(of, Mapping) for of in medians)
    return {spec: statistics.fmean(of[spec] for of in medians) for spec in medians[0]}  # type: ignore[attr-defined, index]
