"""A trial: one choice and its result; and the trial under way that a quality function gets."""

import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from commpress.model.search.objective import Weights
from commpress.model.search.spaces import Choice

LEAST_RIVALS = 4
"""The least number of trials to compare with before one is pruned."""


class Pruned(Exception):  # noqa: N818  it says that a trial ends, not that something is wrong
    """Raised by `Trial.report` to give a trial up; the search catches it, a quality function must not."""


@dataclass(frozen=True)
class Tried:
    """A finished trial."""

    number: int
    choice: Choice
    state: Literal["done", "pruned", "failed"]
    """Judged to its end, given up early, or without a finite quality."""
    quality: float | None
    """f of a finished trial."""
    size: float
    """g."""
    curve: Mapping[int, float] = field(default_factory=dict)
    """The reported values of f, by step."""
    seconds: float = field(default=0.0, compare=False)
    """Seconds; the only value that differs when the trial runs again."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**asdict(self), "curve": {str(step): value for step, value in self.curve.items()}}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "Tried":
        """Return the object that `to_dict` was called on."""
        return cls(**{**found, "curve": {int(step): value for step, value in found["curve"].items()}})


class Trial:
    """A trial under way: its number, its choice, its size, and its own seed."""

    def __init__(
        self, number: int, choice: Choice, size: float, seed: int, before: Sequence[Tried], weights: Weights | None
    ) -> None:
        self.number, self.choice, self.size, self.seed = number, choice, size, seed
        self.curve: dict[int, float] = {}
        self._before, self._weights = before, weights

    def report(self, step: int, quality: float) -> None:
        """Report the quality so far. Raises Pruned if the trial is below the median of earlier ones at this step.

        With weights it compares h with all earlier trials that reported the step; without, f with those that are no larger,
        so that a small choice is not compared with a large one. It needs at least four. Raises ValueError for a step that
        does not rise.
        """
        if self.curve and step <= max(self.curve):
            raise ValueError(f"report: step {step} after step {max(self.curve)}, expected rising steps")
        self.curve[step] = float(quality)
        rivals = [tried for tried in self._before if math.isfinite(tried.curve.get(step, math.nan))]
        if self._weights is None:
            rivals = [tried for tried in rivals if tried.size <= self.size]
        if len(rivals) < LEAST_RIVALS:
            return
        median = statistics.median(self._compared(tried.curve[step], tried.size) for tried in rivals)
        if not self._compared(quality, self.size) >= median:  # NaN is behind, too
            raise Pruned(f"trial {self.number}: {quality:g} at step {step}, below the median of {len(rivals)} trials")

    def _compared(self, quality: float, size: float) -> float:
        return quality if self._weights is None else self._weights.of(quality, size)


def seed_of(*parts: object) -> int:
    """Return a seed from 0 to 2^32 - 1 that depends only on these parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")
