"""A trial: one choice and what became of it; and what a quality function gets of one while it computes."""

import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from commpress.model.search.objective import Weights
from commpress.model.search.spaces import Choice

LEAST_RIVALS = 4
"""Fewer trials to compare with prune none."""


class Pruned(Exception):  # noqa: N818  it says that a trial ends, not that something is wrong
    """Raised by `Trial.report` where a trial is given up; the search takes it, a quality function lets it through."""


@dataclass(frozen=True)
class Tried:
    """A trial that is over."""

    number: int
    choice: Choice
    state: Literal["done", "pruned", "failed"]
    """Judged to its end, given up early, or of a quality that is no finite number."""
    quality: float | None
    """f, of a trial that is done."""
    size: float
    """g."""
    curve: Mapping[int, float] = field(default_factory=dict)
    """The reported values of f, by step."""
    seconds: float = field(default=0.0, compare=False)
    """How long it took; the only thing that is not the same when it runs again."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**asdict(self), "curve": {str(step): value for step, value in self.curve.items()}}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "Tried":
        """Return what `to_dict` was called on."""
        return cls(**{**found, "curve": {int(step): value for step, value in found["curve"].items()}})


class Trial:
    """A trial under way: its number, its choice, its size, and a seed of its own for what is random in it."""

    def __init__(
        self, number: int, choice: Choice, size: float, seed: int, before: Sequence[Tried], weights: Weights | None
    ) -> None:
        self.number, self.choice, self.size, self.seed = number, choice, size, seed
        self.curve: dict[int, float] = {}
        self._before, self._weights = before, weights

    def report(self, step: int, quality: float) -> None:
        """Tell the quality so far. Raises Pruned where the trial is behind the median of earlier ones at this step.

        With weights h is compared, of all earlier trials that reported the step; without, f, of those that are no larger:
        what is small is not held against what is large. At least four must be there. Raises ValueError for a step that
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
            raise Pruned(f"trial {self.number}: {quality:g} at step {step}, behind the median of {len(rivals)} trials")

    def _compared(self, quality: float, size: float) -> float:
        return quality if self._weights is None else self._weights.of(quality, size)


def seed_of(*parts: object) -> int:
    """A seed from 0 to 2^32 - 1 that follows from these parts, the same everywhere."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")
