"""The aim of a search: the largest h = alpha f - beta g of quality f and size g, or the Pareto front of both."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar


class Judged(Protocol):
    """A candidate with a quality, which should be large, and a size, which should be small."""

    @property
    def quality(self) -> float | None:
        """The quality f; None if it was not measured."""

    @property
    def size(self) -> float:
        """The size g."""


T = TypeVar("T", bound=Judged)


@dataclass(frozen=True)
class Weights:
    """h = alpha f - beta g. Raises ValueError for a weight below 0 or not finite, or if both are 0."""

    alpha: float = 1.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        for name, weight in vars(self).items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"{name} {weight}: expected a finite number of at least 0")
        if not (self.alpha or self.beta):
            raise ValueError("alpha 0 and beta 0: expected one of them above 0; with both 0 all choices are equal")

    def of(self, quality: float, size: float) -> float:
        """Return h of a candidate with this quality f and size g."""
        return self.alpha * quality - self.beta * size


def front(found: Sequence[T]) -> list[T]:
    """Return the Pareto front of candidates, by rising size: no other candidate is better in quality or size and not worse in
    the other. Of equal candidates it has the first, and none without a quality."""
    best: list[T] = []
    for each in sorted((x for x in found if x.quality is not None), key=lambda x: (x.size, -_quality(x))):
        if not best or _quality(each) > _quality(best[-1]):
            best.append(each)
    return best


def spread(points: Sequence[T], count: int) -> list[T]:
    """Return at most `count` points of a front: both ends and some evenly between; a single one has the best quality."""
    if count >= len(points):
        return list(points)
    if count <= 1:
        return list(points[-1:]) * count
    return [points[round(i * (len(points) - 1) / (count - 1))] for i in range(count)]


def _quality(x: Judged) -> float:
    return -math.inf if x.quality is None else x.quality
