"""When `auto` searches again: steps or exchanges have drifted, a spec that hurt may come back, or many steps have passed.

    drift     at once. If the search finds the codec in use, or one that the last searches have found, the next drift must wait,
              twice as long each time, until such searches take `SHARE` of the time. A search that finds a codec that is new
              among them ends the wait.
    others    at the step for which they are scheduled, but not before the last search has cost less than `SHARE` of the time
              since it began. They change no wait.

What a search has cost are its steps by other specs than the chosen one, a duel's and a setback's included, as far as they took
longer.
"""

import math
from collections import Counter, deque
from collections.abc import Iterable

from commpress.comm.choice import Choice

DRIFT = 1.2
"""The steps have drifted if they take this times as long as before, or the inverse."""
EXCHANGE_DRIFT, NOTICEABLE = 1.5, 0.05
"""The exchanges have drifted if they take the first of these times as long as before, or the inverse, and if that changes them
by the second, a share of a step. Beside a long backward a link may be ten times slower, and the step 1.2 times as long. What is
less than a share of 0.05 is noise, and little to gain."""
SHARE = 0.01
"""The share of the time that checks may take, and searches that find nothing new."""
AGAIN = 3000
"""The fewest steps from one search to the next, if nothing else calls for one."""
FIRST_WAIT, WAIT = 32, 256
"""Steps after a search that a drift began and that found nothing new, until a drift may begin another: the fewest, and the
most where searches cost nothing."""
REMEMBERED = 3
"""The number of searches, the last ones, among whose results a codec is not new. On a link that swings, two or three of them
take the lead in turns."""


class Again:
    """Decides when a search begins, by figures that are the same on all ranks."""

    def __init__(self) -> None:
        self.since = 0
        """The step before which the last search began."""
        self.ranked = 0
        """The step after which the last search ranked the specs that it might try."""
        self._steps: Counter[str] = Counter()
        """Steps since the last search began, by spec."""
        self._by_drift = False
        """Whether the last search began for a drift."""
        self._found: deque[str] = deque(maxlen=REMEMBERED)
        """What the last searches found; duels may have overruled them."""
        self._wait = 0
        self._drifts_from = 0
        """The step from which a drift begins a search."""
        self._last: Choice | None = None
        """The choice that was in use at the last check."""
        self._exchange: float | None = None
        """Seconds of a step's exchanges when that choice was made or, where they were not known then, at its first check."""

    def begin(self, step: int) -> None:
        """Note that a search begins after this step."""
        self.since, self.ranked = step, step
        self._steps.clear()

    def count(self, spec: str) -> None:
        """Count a step by this spec."""
        self._steps[spec] += 1

    def found(self, step: int, choice: Choice, before: str, exchange: float | None) -> None:
        """Note the result of a search at this step, `before` which another codec was in use, or the same; empty if none was. A
        step's exchanges took so many seconds."""
        self.compare_with(choice, exchange)
        new = choice.spec not in (before, *self._found)
        self._found.append(choice.spec)
        if new:
            self._wait, self._drifts_from = 0, 0
        elif self._by_drift:
            self._wait = min(max(FIRST_WAIT, 2 * self._wait), max(WAIT, self._paid(choice)))
            self._drifts_from = step + self._wait

    def compare_with(self, choice: Choice, exchange: float | None) -> None:
        """Compare the coming steps with this choice, whose exchanges take so many seconds a step; None if that is not known."""
        self._last, self._exchange = choice, exchange

    def is_due(
        self, step: int, choice: Choice, seconds: float, exchange: float | None, comes_back: Iterable[int]
    ) -> bool:
        """Return whether a search begins after this step.

        A step of the choice now takes so many seconds, and its exchanges so many, if that is known. Specs that hurt may be
        tried again after the steps of `comes_back`.
        """
        drifted = self._has_drifted(choice, seconds, exchange)
        ends = [self.since + AGAIN, *(one for one in comes_back if one > self.ranked)]
        scheduled = step >= max(min(ends), self.since + self._paid(choice))
        self._by_drift = drifted and not scheduled
        return scheduled or (drifted and step >= self._drifts_from)

    def _has_drifted(self, choice: Choice, seconds: float, exchange: float | None) -> bool:
        then = choice.seconds(choice.spec)
        assert then is not None
        if choice is not self._last or self._exchange is None:
            self.compare_with(choice, exchange)
        if not then / DRIFT < seconds < then * DRIFT:
            return True
        before = self._exchange
        if before is None or exchange is None:
            return False
        far = not before / EXCHANGE_DRIFT < exchange < before * EXCHANGE_DRIFT
        return far and abs(exchange - before) > NOTICEABLE * then

    def _paid(self, choice: Choice) -> int:
        """Return the steps of the choice of which the last search has cost `SHARE`."""
        took = {trial.spec: trial.measured or trial.predicted or 0.0 for trial in choice.trials}
        lost = sum(n * max(0.0, took.get(spec, 0.0) / took[choice.spec] - 1) for spec, n in self._steps.items())
        return math.ceil(lost / SHARE)
